//! Counts and reports pods whose packets bypass the node's network stack, and so the netfilter rules. Called
//! by `listeners`, of which it is a part; depends on `links` and `processes`.

use std::{collections::BTreeSet, io, time::Duration};

use tokio::time::Instant;
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
    /// Until they are set up.
    retry: Option<Retry>,
}

/// When a namespace without devices is asked again: in the next full pass at first, later after as long as it
/// has had none, up to some ten minutes. Some pods never have any.
#[derive(Debug)]
struct Retry {
    first_at: Instant,
    again_at: Instant,
}

impl Retry {
    fn after(earlier: Option<&Self>, now: Instant) -> Self {
        let first_at = earlier.map_or(now, |earlier| earlier.first_at);
        Self { first_at, again_at: now + (now - first_at).clamp(FIRST_RETRY, LAST_RETRY) }
    }
}

impl Seen {
    fn nothing(netns: NetnsId, earlier: Option<&Self>, now: Instant) -> Self {
        let earlier = earlier.filter(|seen| seen.netns == netns).and_then(|seen| seen.retry.as_ref());
        let retry = Some(Retry::after(earlier, now));
        Self { netns, devices: BTreeSet::new(), peers: BTreeSet::new(), retry }
    }
}

/// How many ends of pairs are followed of one pod: the plugin makes one or two, the pod could make thousands.
const MAX_PEERS: usize = 8;
/// How long a pass may go on asking: a namespace takes 0.1 ms, but the kernel's lock for devices is the
/// network plugin's, too. The next pass has the rest.
const ASK_FOR: Duration = Duration::from_millis(100);
/// Shorter than the time between two full passes.
const FIRST_RETRY: Duration = Duration::from_secs(25);
const LAST_RETRY: Duration = Duration::from_mins(10);

impl PodListeners {
    /// Lists the devices of pods that are set up and not listed yet, and updates metrics and log. Nothing
    /// else depends on the result.
    pub(super) fn look_for_devices(&mut self, host: NetnsId) {
        let until = Instant::now() + ASK_FOR;
        for (id, pod) in &mut self.pods {
            let now = Instant::now();
            if pod.has_known_devices(now) || until <= now {
                continue;
            }
            let Ok(Found::Own(netns, _)) = processes::of_pod(&pod.cgroup.path, host) else { continue };
            match links_in(&netns) {
                Ok(links) if links.are_set_up() => {
                    let (devices, peers) = (links.devices(), links.peers().take(MAX_PEERS).collect());
                    pod.seen = Some(Seen { netns: netns.id, devices, peers, retry: None });
                }
                Ok(_) => pod.seen = Some(Seen::nothing(netns.id, pod.seen.as_ref(), now)),
                Err(error) => {
                    pod.seen = Some(Seen::nothing(netns.id, pod.seen.as_ref(), now));
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
    /// Or has none yet, and was asked a short time ago.
    pub(super) fn has_known_devices(&self, now: Instant) -> bool {
        let is_elsewhere = |seen: &Seen| self.open.as_ref().is_some_and(|open| open.netns != seen.netns);
        let is_due = |seen: &Seen| seen.retry.as_ref().is_some_and(|retry| retry.again_at <= now);
        self.seen.as_ref().is_some_and(|seen| !is_elsewhere(seen) && !is_due(seen))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_stays_without_devices_is_asked_less_and_less_often() {
        let start = Instant::now();
        let mut pauses = Vec::new();
        let (mut now, mut retry) = (start, None);
        for _ in 0..5 {
            let next = Retry::after(retry.as_ref(), now);
            pauses.push((next.again_at - now).as_secs());
            (now, retry) = (next.again_at, Some(next));
        }

        assert_eq!(pauses, [25, 25, 50, 100, 200]);
    }
}
