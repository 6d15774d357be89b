//! What people see of the kernel half: the last look at it, and what was made good since the agent began.
//! Written by `reconcile`, read by `app`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

use crate::datapath::{Datapath, DatapathError, Drift, Found, Mode};
use kube2ram_service::telemetry::chain;

/// Shared by whoever looks and whoever tells.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<Mutex<Look>>);

/// The kernel half as it was found last.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// When; `None` before the first time.
    pub at: Option<Instant>,
    /// Which cgroup the sockets of pods belong to.
    pub mode: Option<Mode>,
    /// The programs that belong in force, and where.
    pub programs: Vec<(&'static str, PathBuf)>,
    /// What is amiss and could not be made good, as text; bounded.
    pub failures: Vec<String>,
    /// How often something was made good, by kind.
    pub repairs: BTreeMap<Drift, u64>,
    /// The last time: what kind, of what, and when.
    pub last_repair: Option<(Drift, &'static str, Instant)>,
}

/// One reason is usually everybody's.
const MAX_FAILURES: usize = 8;

impl State {
    /// The last look.
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

    /// Notes that the kernel does not answer; until the next look.
    pub(super) fn late(&self, failure: String) {
        self.look().failures.insert(0, failure);
    }

    fn look(&self) -> MutexGuard<'_, Look> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
