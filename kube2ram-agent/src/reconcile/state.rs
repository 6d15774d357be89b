//! The state of the eBPF programs for status: the last check, and the repairs since the agent started.
//! Written by `reconcile`, read by `app`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

use crate::datapath::{Datapath, DatapathError, Drift, Found, Mode};
use kube2ram_service::telemetry::chain;

/// Shared by the writer and the readers.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<Mutex<Look>>);

/// The eBPF programs at the last check.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// When; `None` before the first time.
    pub at: Option<Instant>,
    /// Which cgroup the sockets of pods belong to.
    pub mode: Option<Mode>,
    /// The expected programs, and their cgroups.
    pub programs: Vec<(&'static str, PathBuf)>,
    /// Differences that could not be repaired, as text; bounded.
    pub failures: Vec<String>,
    /// Number of repairs, by kind.
    pub repairs: BTreeMap<Drift, u64>,
    /// The last time: what kind, of what, and when.
    pub last_repair: Option<(Drift, &'static str, Instant)>,
}

/// All failures usually have the same reason.
const MAX_FAILURES: usize = 8;

impl State {
    /// The last check.
    pub fn read(&self) -> Look {
        self.look().clone()
    }

    pub(super) fn write(&self, datapath: &Datapath, found: &Found) {
        let now = Instant::now();
        let mut look = self.look();
        look.at = Some(now);
        // They change together, and next to never.
        if look.mode != Some(datapath.mode()) {
            look.mode = Some(datapath.mode());
            look.programs = datapath.programs().map(|(name, cgroup)| (name, cgroup.to_owned())).collect();
        }
        look.failures.clear();
        let failures = found.failed.iter().take(MAX_FAILURES).map(|error: &DatapathError| chain(error));
        look.failures.extend(failures);
        for (drift, of) in found.repaired.iter().zip(&found.of) {
            *look.repairs.entry(*drift).or_default() += 1;
            look.last_repair = Some((*drift, of, now));
        }
    }

    /// Records that the kernel does not answer; until the next check.
    pub(super) fn late(&self, failure: String) {
        self.look().failures.insert(0, failure);
    }

    fn look(&self) -> MutexGuard<'_, Look> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
