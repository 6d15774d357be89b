//! Whether the machine's host name is its node's name, as far as the API server can tell an agent that may
//! list pods only. Depends on `kubernetes` and the node's addresses; called by `service`.

use std::time::Duration;

use tokio::time::timeout;

use super::node::is_of_this_node;
use crate::kubernetes::{Cluster, PodView, Resource};

/// How long the kubelet may take to report the address of a pod that has just started, the agent's own among
/// them.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a pod that the API server has on the node of that name shares this machine's network: the agent's
/// own does. Waits for the first list, however long the API server is away. That list may be a little old,
/// and have pods of a former machine of that name.
///
/// # Cancel safety
/// Dropping the future loses nothing.
pub(super) async fn is_confirmed(cluster: &Cluster) -> bool {
    cluster.listed(Resource::Pods).await;
    // Before the first look, so that no change is lost between the two.
    let mut changed = cluster.changes();
    let decided = async {
        loop {
            if is_of_this_machine(&cluster.pod_views()) {
                return true;
            }
            if changed.changed().await.is_err() {
                return false;
            }
        }
    };
    timeout(PATIENCE, decided).await.unwrap_or(false)
}

fn is_of_this_machine(pods: &[PodView]) -> bool {
    pods.iter().any(|view| view.pod.host_network && view.ip.is_some_and(is_of_this_node))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

    use super::*;
    use crate::{identity::PodUid, kubernetes::Presence, pod::Pod};

    fn view(host_network: bool, ip: Option<&str>) -> PodView {
        let pod = Pod {
            uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").unwrap(),
            namespace: "kube-system".into(),
            name: "kube2iam".into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "kube2iam".into(),
            host_network,
            annotations: BTreeMap::new(),
        };
        let ip = ip.map(|ip| ip.parse::<IpAddr>().unwrap());
        let presence = Presence::Known;
        PodView { pod: Arc::new(pod), config_hash: None, ip, is_running: true, presence }
    }

    #[test]
    fn a_pod_on_the_hosts_network_with_an_address_of_this_machine_confirms_the_name() {
        // A loopback address stands for any of this machine; the other one is of no machine.
        let (here, elsewhere) = (Some("127.0.0.1"), Some("192.0.2.1"));
        for (pods, is_confirmed) in [
            (vec![], false),
            (vec![view(true, here)], true),
            (vec![view(true, elsewhere)], false),
            (vec![view(true, None)], false),
            (vec![view(true, elsewhere), view(true, here)], true),
            (vec![view(true, None), view(true, here)], true),
            (vec![view(false, here)], false),
            (vec![view(false, None)], false),
        ] {
            let shown: Vec<_> = pods.iter().map(|view| (view.pod.host_network, view.ip)).collect();

            assert_eq!(is_of_this_machine(&pods), is_confirmed, "{shown:?}");
        }
    }
}
