//! How the agent's configuration and its view of the cluster meet. Called by `app`.

use std::sync::Arc;

use super::node::Node;
use crate::{
    args::{ApiServer, Config},
    identity::live_pods,
    kubernetes::{ClientConfig, ClusterConfig},
    policy::check_allow_list,
};

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
    let format = config.namespace_restrictions;
    let (cgroup_root, pods) = (node.settings.cgroup_root.clone(), node.settings.pods_cgroups());
    ClusterConfig {
        node: config.node.as_str().into(),
        pod_annotations: config.annotation_keys.all().map(Into::into).into(),
        allow_list_annotation: config.namespace_key.clone(),
        // Without restrictions nobody reads the lists.
        check_allow_list: Arc::new(move |text| {
            format.map_or(Ok(()), |format| check_allow_list(text, format))
        }),
        live_pods: Arc::new(move || live_pods(&cgroup_root, &pods)),
    }
}
