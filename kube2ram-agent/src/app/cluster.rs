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
    let (cgroup_root, pods) = (node.settings.cgroup_root.clone(), node.settings.pods_cgroups());
    ClusterConfig {
        node: config.node.as_str().into(),
        pod_annotations: config.annotation_keys.bounded().map(|(key, bytes)| (key.into(), bytes)).into(),
        allow_lists,
        service_accounts: service_accounts(config),
        live_pods: Arc::new(move || live_pods(&cgroup_root, &pods)),
        lookup: config.cloud.dialect().patience.lookup,
    }
}

/// What counts of ServiceAccounts; `None` where nothing does.
fn service_accounts(config: &Config) -> Option<ServiceAccountConfig> {
    let annotations = config.annotation_keys.account_bounded()?;
    Some(ServiceAccountConfig {
        annotations: annotations.map(|(key, bytes)| (key.into(), bytes)).into(),
        tokens: match (config.credentials_from, config.token_requests_as) {
            (CredentialsFrom::Node, _) => None,
            (CredentialsFrom::ServiceAccount, TokenRequestsAs::Agent) => Some(TokenRequester::Agent),
            (CredentialsFrom::ServiceAccount, TokenRequestsAs::Node) => Some(TokenRequester::Node),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;

    fn of(flags: &[&str]) -> Option<ServiceAccountConfig> {
        let args = ["kube2ram", "--node=n", "--cloud=aws"].iter().chain(flags).map(Into::into);
        match Command::from_args(args, &|_| None).unwrap() {
            Command::Agent(config) => service_accounts(&config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn service_accounts_are_read_and_their_tokens_asked_for_as_the_flags_say() {
        let by_account = "--credentials-from=service-account";

        assert!(of(&[]).is_none());
        let read = of(&["--service-account-roles"]).unwrap();
        assert!(read.tokens.is_none(), "reading is no reason to ask for tokens");
        let keys: Vec<_> = read.annotations.iter().map(|(key, _)| &**key).collect();
        assert_eq!(keys[..2], ["iam.amazonaws.com/role", "eks.amazonaws.com/role-arn"]);
        assert!(matches!(of(&[by_account]).unwrap().tokens, Some(TokenRequester::Node)));
        let as_agent = of(&[by_account, "--token-requests-as=agent"]).unwrap();
        assert!(matches!(as_agent.tokens, Some(TokenRequester::Agent)));
        assert!(of(&["--token-requests-as=agent"]).is_none());
    }
}
