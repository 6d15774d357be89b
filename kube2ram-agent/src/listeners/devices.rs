//! Counts and reports pods whose packets bypass the node's network stack, and so the netfilter rules. Called
//! by `listeners`, of which it is a part; depends on `links` and `processes`.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    NetnsId, Pod, PodListeners,
    netns::Netns,
    processes::{self, Found},
};
use crate::devices::{Device, Links, programmed};

/// What a pod's namespace has.
#[derive(Debug)]
pub(super) struct Seen {
    netns: NetnsId,
    devices: BTreeSet<Device>,
    /// The node's ends of its pairs, to which programs may come later.
    peers: BTreeSet<u32>,
}

/// How many ends of pairs are followed of one pod: the plugin makes one or two, the pod could make thousands.
const MAX_PEERS: usize = 8;
/// How long a pass may go on asking: a namespace takes 0.1 ms, but the kernel's lock for devices is the
/// network plugin's, too. The next pass has the rest.
const ASK_FOR: Duration = Duration::from_millis(100);

impl PodListeners {
    /// Lists the devices of pods that are set up and not listed yet, and updates metrics and log. Nothing
    /// else depends on the result.
    pub(super) fn look_for_devices(&mut self, host: NetnsId) {
        let until = Instant::now() + ASK_FOR;
        for (id, pod) in &mut self.pods {
            if pod.has_known_devices() || until <= Instant::now() {
                continue;
            }
            let Ok(Found::Own(netns)) = processes::of_pod(&pod.cgroup.path, host) else { continue };
            match links_in(&netns) {
                Ok(links) if links.are_set_up() => {
                    let (devices, peers) = (links.devices(), links.peers().take(MAX_PEERS).collect());
                    pod.seen = Some(Seen { netns: netns.id, devices, peers });
                }
                Ok(_) => pod.seen = None,
                Err(error) => {
                    self.metrics.failed("links");
                    debug!(cgroup.id = %id, %error, "cannot list a pod's network devices");
                }
            }
        }
        let peers = self.pods.values().filter_map(|pod| pod.seen.as_ref()).flat_map(|seen| &seen.peers);
        let programmed = programmed(&peers.copied().collect()).unwrap_or_else(|error| {
            self.metrics.failed("links");
            debug!(%error, "cannot list the programs of the node's devices");
            BTreeSet::new()
        });
        for device in Device::ALL {
            let pods = self.pods.values().filter(|pod| pod.has(device, &programmed)).count();
            self.metrics.beside_host(device, pods);
            if pods != 0 && self.said.insert(device.label()) {
                warn!(
                    device = device.label(),
                    "pods' packets do not pass the node's network stack, or (ebpf) may not: netfilter does not see what packet sockets and tunnels send from \
                     there, and only the wire guard (--wire-guard) keeps it from the metadata server"
                );
            }
        }
    }
}

impl Pod {
    fn has_known_devices(&self) -> bool {
        let is_elsewhere = |seen: &Seen| self.open.as_ref().is_some_and(|open| open.netns != seen.netns);
        self.seen.as_ref().is_some_and(|seen| !is_elsewhere(seen))
    }

    fn has(&self, device: Device, programmed: &BTreeSet<u32>) -> bool {
        self.seen.as_ref().is_some_and(|seen| {
            let is_routed = device == Device::Ebpf && !seen.peers.is_disjoint(programmed);
            is_routed || seen.devices.contains(&device)
        })
    }
}

fn links_in(netns: &Netns) -> io::Result<Links> {
    netns.within(Links::of_this_thread)
}
