//! How the agent's configuration and its view of the cluster meet. Called by `app`.

use std::sync::Arc;

use super::node::Node;
use crate::{
    args::{ApiServer, Config},
    identity::live_pods,
    kubernetes::{ClientConfig, Cluster, ClusterConfig},
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
    let (cgroup_root, pods_cgroup) = (node.settings.cgroup_root.clone(), node.settings.pods_cgroup.clone());
    ClusterConfig {
        node: config.node.as_str().into(),
        pod_annotations: config.annotation_keys.all().map(Into::into).into(),
        allow_list_annotation: config.namespace_key.clone(),
        // Without restrictions nobody reads the lists.
        check_allow_list: Arc::new(move |text| {
            format.map_or(Ok(()), |format| check_allow_list(text, format))
        }),
        live_pods: Arc::new(move || live_pods(&cgroup_root, &pods_cgroup)),
    }
}

/// What `/debug/store` shows: who is known, and by which annotations. No secrets are among them.
pub(super) fn debug_store(cluster: &Arc<Cluster>) -> Box<dyn Fn() -> serde_json::Value + Send + Sync> {
    let cluster = Arc::clone(cluster);
    Box::new(move || {
        let mut pods = cluster.pods();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let pods: Vec<_> = pods
            .iter()
            .map(|pod| {
                serde_json::json!({
                    "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.as_str(), "serviceAccount": pod.service_account,
                    "hostNetwork": pod.host_network, "annotations": pod.annotations,
                })
            })
            .collect();
        serde_json::json!({ "synced": cluster.is_synced(), "pods": pods })
    })
}
