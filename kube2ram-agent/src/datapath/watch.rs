//! What the kernel half needs from time to time: entries that died of age are removed, and on kernels on which sockets can fall to the root cgroup, that
//! is looked for. Called by `attach`; runs as long as the agent does.

use std::time::Duration;

use aya::maps::HashMap;
use kube2ram_common::{
    abi::{ConnectRecord, HANDSHAKE_MAX_AGE_NS, Handshake},
    names::map,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::sleep;
use tracing::{error, warn};

use super::{DatapathError, Mode, Settings, load, maps::open, pins::Pins, probe::sees_pods};
use crate::telemetry::chain;

/// How long pods may be refused, when somebody begins to use cgroup v1 `net_cls` or `net_prio`, before they are redirected at the root.
const INTERVAL: Duration = Duration::from_secs(30);

/// The first kernel on which sockets stay with their cgroup (kernel commit 8520e224f547).
const SOCKETS_STAY: (u32, u32) = (5, 15);

/// Whether sockets can fall to the root cgroup on this kernel; unless its vendor has back-ported the change, which the probe tells.
pub(super) fn sockets_may_fall() -> bool {
    load::kernel_version() < SOCKETS_STAY
}

/// Looks again and again, for ever.
///
/// # Cancel safety
/// Safe between two looks; a look does not wait.
pub(super) async fn run(pins: Pins, settings: Settings, mut mode: Mode) {
    loop {
        sleep(INTERVAL).await;
        if let Err(error) = remove_the_old(&pins) {
            warn!(error = chain(&error), "cannot remove handshakes that were never completed");
        }
        if mode == Mode::Pods && sockets_may_fall() {
            match follow(&pins, &settings) {
                Ok(found) => mode = found,
                Err(error) => {
                    error!(error = chain(&error), "cannot tell whether the programs see the pods' sockets");
                }
            }
        }
    }
}

fn follow(pins: &Pins, settings: &Settings) -> Result<Mode, DatapathError> {
    if sees_pods(settings)? {
        return Ok(Mode::Pods);
    }
    // The pinned maps are the same, so this is the same kernel half.
    fall_back(&mut load::load(pins, false)?, pins, settings)?;
    Ok(Mode::Root)
}

/// Redirects at the root, and makes sure that pods are seen there.
///
/// # Errors
/// [`DatapathError::Blind`] when they are not; what is in force stays.
pub(super) fn fall_back(ebpf: &mut aya::Ebpf, pins: &Pins, settings: &Settings) -> Result<(), DatapathError> {
    warn!(
        "sockets of pods belong to the root cgroup (cgroup v1 net_cls or net_prio is in use on a kernel below 5.15): redirecting there; raw sockets \
         of hostNetwork pods get through until the node boots with cgroup_no_v1=net_cls,net_prio"
    );
    Mode::Root.put_in_force(ebpf, pins, settings)?;
    if sees_pods(settings)? { Ok(()) } else { Err(DatapathError::Blind) }
}

/// An entry stays behind when another program takes our notice of the close away. It is never handed over, but it takes room.
fn remove_the_old(pins: &Pins) -> Result<(), DatapathError> {
    let now = clock_gettime(ClockId::Monotonic);
    let now_ns = u64::try_from(Duration::try_from(now).unwrap_or_default().as_nanos()).unwrap_or_default();
    let is_old = |since_ns: u64| now_ns.saturating_sub(since_ns) > HANDSHAKE_MAX_AGE_NS;
    let mut handshakes: HashMap<_, Handshake, ConnectRecord> = open(pins, map::HANDSHAKES)?;
    let old: Vec<_> =
        handshakes.iter().flatten().filter(|(_, record)| is_old(record.connected_at_ns)).collect();
    for (key, _) in old {
        // Completed meanwhile, or taken by another socket of the same 4-tuple, which is then not vouched for.
        let _gone_already = handshakes.remove(&key);
    }
    let mut shares: HashMap<_, u64, u64> = open(pins, map::SHARES)?;
    let old: Vec<_> = shares.iter().flatten().filter(|(_, taken_at_ns)| is_old(*taken_at_ns)).collect();
    for (key, _) in old {
        let _gone_already = shares.remove(&key);
    }
    Ok(())
}
