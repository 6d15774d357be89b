//! What `kube2ram store` shows: the three maps of the predecessors' `/debug/store`, and what is known beyond
//! them. No secrets are among it, but external ids and policies of pods are: it is for root. Called by
//! `app::operator`.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Value, json};

use crate::{
    args::Config,
    kubernetes::{Cluster, PodView},
    status::SCHEMA,
};

/// What is known now.
pub(super) fn store_of(config: &Config, cluster: &Cluster) -> Value {
    let mut pods = cluster.pod_views();
    pods.sort_by(|a, b| (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name)));
    let namespaces = cluster.allow_lists();
    let namespaces = namespaces.iter().map(|(name, list)| (&**name, list.as_deref()));
    store(&pods, namespaces, &config.annotation_keys.role, cluster.is_synced())
}

/// `rolesByIP`, `namespaceByIP` and `rolesByNamespace` are the predecessors'. An address that several pods
/// have, such as the node's, is left out there, as it was by them; here no pod is known by its address.
fn store<'n>(
    pods: &[PodView],
    namespaces: impl Iterator<Item = (&'n str, Option<&'n str>)>,
    key: &str,
    is_synced: bool,
) -> Value {
    let role = |view: &PodView| view.pod.annotations.get(key).map_or_else(String::new, ToString::to_string);
    let mut by_ip: BTreeMap<IpAddr, Vec<&PodView>> = BTreeMap::new();
    for view in pods {
        if let Some(ip) = view.ip {
            by_ip.entry(ip).or_default().push(view);
        }
    }
    let alone: BTreeMap<String, &PodView> = by_ip
        .into_iter()
        .filter_map(|(ip, pods)| match pods[..] {
            [pod] => Some((ip.to_string(), pod)),
            _ => None,
        })
        .collect();
    let roles_by_ip: BTreeMap<_, _> = alone.iter().map(|(ip, view)| (ip, role(view))).collect();
    let namespace_by_ip: BTreeMap<_, _> = alone.iter().map(|(ip, view)| (ip, &view.pod.namespace)).collect();
    let roles_by_namespace: BTreeMap<_, _> =
        namespaces.map(|(name, list)| (name, list.map(patterns))).collect();
    let all: Vec<_> = pods.iter().map(shown).collect();
    json!({
        "schema": SCHEMA,
        "rolesByIP": roles_by_ip,
        "namespaceByIP": namespace_by_ip,
        "rolesByNamespace": roles_by_namespace,
        "synced": is_synced,
        "pods": all,
    })
}

/// A malformed list allows nothing, and so has no patterns.
fn patterns(list: &str) -> Vec<String> {
    serde_json::from_str::<Option<Vec<String>>>(list).ok().flatten().unwrap_or_default()
}

fn shown(view: &PodView) -> Value {
    let pod = &view.pod;
    json!({
        "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.as_str(), "serviceAccount": pod.service_account,
        "hostNetwork": pod.host_network, "ip": view.ip, "annotations": pod.annotations,
        "serviceAccountAnnotations": pod.account_annotations.as_deref(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{identity::PodUid, kubernetes::Presence, pod::Pod};

    fn view(name: &str, ip: Option<[u8; 4]>, role: Option<&str>) -> PodView {
        let pod = Pod {
            uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").unwrap(),
            namespace: "shop".into(),
            name: name.into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "default".into(),
            host_network: false,
            annotations: role.map(|role| ("role".into(), role.into())).into_iter().collect(),
        };
        PodView {
            pod: Arc::new(pod),
            config_hash: None,
            ip: ip.map(IpAddr::from),
            is_running: true,
            presence: Presence::Known,
        }
    }

    #[test]
    fn has_the_predecessors_shape_and_leaves_out_addresses_of_several_pods() {
        let node = Some([10, 0, 0, 1]);
        let pods = [
            view("a", Some([10, 1, 0, 1]), Some("reader")),
            view("b", Some([10, 1, 0, 2]), None),
            view("c", node, Some("x")),
            view("d", node, Some("y")),
            view("e", None, Some("z")),
        ];
        let namespaces =
            [("shop", Some(r#"["a*", "b"]"#)), ("none", None), ("null", Some("null")), ("broken", Some("["))];

        let store = store(&pods, namespaces.into_iter(), "role", true);

        assert_eq!(store["rolesByIP"], json!({"10.1.0.1": "reader", "10.1.0.2": ""}));
        assert_eq!(store["namespaceByIP"], json!({"10.1.0.1": "shop", "10.1.0.2": "shop"}));
        let lists = json!({"shop": ["a*", "b"], "none": null, "null": [], "broken": []});
        assert_eq!(store["rolesByNamespace"], lists);
        assert_eq!(store["pods"].as_array().map(Vec::len), Some(5));
        assert_eq!(store["pods"][0]["annotations"], json!({"role": "reader"}));
        assert_eq!(store["pods"][0]["serviceAccountAnnotations"], json!(null));
    }
}
