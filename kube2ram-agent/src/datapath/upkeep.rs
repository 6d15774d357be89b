//! Periodic maintenance of the eBPF programs: removes expired entries. On kernels on which sockets can fall
//! to the root cgroup, it also tests for that. Called by `reconcile`.

use std::time::Duration;

use aya::{Pod, maps::HashMap};
use kube2ram_common::{
    abi::{ConnectRecord, HANDSHAKE_MAX_AGE_NS, Handshake, is_over},
    names::map,
};
use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

use super::{Datapath, DatapathError, Mode, load, maps::open, pins::Pins, probe::sees_pods};
use kube2ram_service::telemetry::chain;

/// The first kernel on which sockets stay with their cgroup (kernel commit 8520e224f547).
const SOCKETS_STAY: (u32, u32) = (5, 15);

/// Whether sockets can fall to the root cgroup on this kernel. If its vendor has back-ported the change, the
/// probe finds out.
pub(super) fn sockets_may_fall() -> bool {
    load::kernel_version() < SOCKETS_STAY
}

impl Datapath {
    /// Does what is due from time to time, some 30 s. A few system calls, and two more for each handshake
    /// that was never completed.
    ///
    /// # Errors
    /// When the programs do not see the sockets of pods, or this cannot be determined; to be tried again.
    pub fn upkeep(&mut self) -> Result<(), DatapathError> {
        if let Err(error) = remove_the_old(&self.pins) {
            warn!(error = chain(&error), "cannot remove handshakes that were never completed");
        }
        if !sockets_may_fall() || sees_pods(&self.settings)? {
            return Ok(());
        }
        match self.mode {
            Mode::Pods => self.fall_back(),
            Mode::Root => Err(DatapathError::Blind),
        }
    }
}

/// A record stays behind when its connect(2) came to nothing before a packet was sent, or when another
/// program takes our notice of the close away. It is never handed over, but it takes room.
fn remove_the_old(pins: &Pins) -> Result<(), DatapathError> {
    let until_ns = |record: &ConnectRecord| record.connected_at_ns + HANDSHAKE_MAX_AGE_NS;
    remove_over::<u64, ConnectRecord>(pins, map::CLIENTS, until_ns)?;
    remove_over::<Handshake, ConnectRecord>(pins, map::HANDSHAKES, until_ns)?;
    remove_over::<u64, u64>(pins, map::SHARES, |until_ns| *until_ns)
}

fn remove_over<K: Pod, V: Pod>(
    pins: &Pins,
    name: &'static str,
    until_ns: impl Fn(&V) -> u64,
) -> Result<(), DatapathError> {
    let now = clock_gettime(ClockId::Monotonic);
    let now_ns = u64::try_from(Duration::try_from(now).unwrap_or_default().as_nanos()).unwrap_or_default();
    let mut entries: HashMap<_, K, V> = open(pins, name)?;
    let old: Vec<_> =
        entries.iter().flatten().filter(|(_, value)| is_over(now_ns, until_ns(value))).collect();
    for (key, _) in old {
        // Already removed, or reused by another socket meanwhile, which then has no record.
        let _gone_already = entries.remove(&key);
    }
    Ok(())
}
