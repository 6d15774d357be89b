//! How the agent's configuration and its view of the cluster meet. Called by `app`.

use std::sync::Arc;

use super::node::Node;
use crate::{
    args::{ApiServer, Config, CredentialsFrom, TokenRequestsAs},
    identity::live_pods,
    kubernetes::{AllowLists, ClusterConfig, ServiceAccountConfig, TokenRequester},
    policy::check_allow_list,
};
use kube2ram_service::kubernetes::ClientConfig;

pub(super) fn client_config(config: &Config) -> ClientConfig {
    match &config.api_server {
        ApiServer::InCluster => ClientConfig::InCluster,
        ApiServer::Kubeconfig(path) => ClientConfig::Kubeconfig(path.clone()),
        ApiServer::Url { url, token, insecure } => {
            ClientConfig::Server { url: url.to_string(), token: token.clone(), insecure: *insecure }
        }
    }
}

pub(super) fn cluster_config(config: &Config, node: &Node) -> ClusterConfig {
    let arn_style = config.cloud.dialect().arns;
    let allow_lists = config.namespace_restrictions.map(|format| AllowLists {
        annotation: config.namespace_key.clone(),
        role_annotation: config.annotation_keys.role.clone(),
        check: Arc::new(move |text| check_allow_list(text, format, arn_style)),
    });
    let service_accounts = config.annotation_keys.account_bounded().map(|keys| ServiceAccountConfig {
        annotations: keys.map(|(key, bytes)| (key.into(), bytes)).into(),
        tokens: match (config.credentials_from, config.token_requests_as) {
            (CredentialsFrom::Node, _) => None,
            (CredentialsFrom::ServiceAccount, TokenRequestsAs::Agent) => Some(TokenRequester::Agent),
            (CredentialsFrom::ServiceAccount, TokenRequestsAs::Node) => Some(TokenRequester::Node),
        },
    });
    let (cgroup_root, pods) = (node.settings.cgroup_root.clone(), node.settings.pods_cgroups());
    ClusterConfig {
        node: config.node.as_str().into(),
        pod_annotations: config.annotation_keys.bounded().map(|(key, bytes)| (key.into(), bytes)).into(),
        allow_lists,
        service_accounts,
        live_pods: Arc::new(move || live_pods(&cgroup_root, &pods)),
        lookup: config.cloud.dialect().patience.lookup,
    }
}
