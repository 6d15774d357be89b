//! Keeps the eBPF programs in the expected state while the agent runs. Depends on `datapath`; called by
//! `app`.
//!
//! Changes that inotify reports are repaired at once: a pods' cgroup that is created again, a pin that is
//! removed. All others are found by periodic checks.

mod state;

use std::{future::pending, sync::Arc, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use self::state::{Look, State};
use crate::{
    datapath::{AgentAddr, Datapath, DatapathError, Drift, Found},
    identity::{self, Watch, WatchId},
    kubernetes::{About, Notice, Notices},
};
use kube2ram_service::{
    admin::{Pending, Readiness},
    telemetry::chain,
};

/// How long a change without an event may last, such as a link that is detached by force.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The target map takes two system calls per pod, and a wrong entry gives no pod more than its own role.
const LOOK_AT_TARGETS_EVERY: Duration = Duration::from_secs(10);
/// How long pods may be refused, after a process begins to use cgroup v1 `net_cls` or `net_prio`, before they
/// are redirected at the root.
const UPKEEP_EVERY: Duration = Duration::from_secs(30);
/// The shortest time between two repairs, if another process keeps changing the programs.
const PAUSE: Duration = Duration::from_millis(10);
/// A check takes milliseconds. It waits for `cgroup_mutex`, and for a child that joins a cgroup, which a busy
/// node may delay.
const LATE: Duration = Duration::from_secs(5);
/// The condition of readiness.
const CONDITION: &str = "the eBPF programs";
/// The condition of readiness while a check does not end.
const LATE_CONDITION: &str = "the kernel's answer on the programs";

/// What the reconciler counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    active: Gauge,
    repairs: Family<[(&'static str, &'static str); 1], Counter>,
    failures: Counter,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let help = "Whether all eBPF programs and maps are in the expected state";
        registry.register("datapath_in_force", help, metrics.active.clone());
        registry.register(
            "datapath_repairs",
            "Repaired differences from the expected state, by kind (cgroup, config, detached, link_pin, map_pin, program, targets)",
            metrics.repairs.clone(),
        );
        let help = "Checks of the eBPF programs that found something which could not be repaired";
        registry.register("datapath_repair_failures", help, metrics.failures.clone());
        for drift in Drift::ALL {
            drop(metrics.repairs.get_or_create(&[("kind", drift.label())]));
        }
        metrics
    }
}

/// Checks the eBPF programs, and repairs them. Owns them, and with them the lock on the pins. Dropping it
/// changes nothing.
pub struct Reconciler {
    datapath: Datapath,
    /// Where the host listener is.
    agent: watch::Receiver<AgentAddr>,
    metrics: Metrics,
    notices: Arc<dyn Notices>,
    readiness: Readiness,
    state: State,
    /// While something could not be repaired.
    pending: Option<Pending>,
}

impl Reconciler {
    /// Takes attached programs.
    pub fn new(
        datapath: Datapath,
        agent: watch::Receiver<AgentAddr>,
        metrics: Metrics,
        notices: Arc<dyn Notices>,
        readiness: Readiness,
    ) -> Self {
        metrics.active.set(1);
        let state = State::default();
        state.write(&datapath, &Found::default());
        Self { datapath, agent, metrics, notices, readiness, state, pending: None }
    }

    /// The state that `app` reads.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Looks and repairs until `stop`. What cannot be repaired makes the agent unready and is tried again;
    /// only when another agent has taken the pins over, which is what a restart finds out, it returns
    /// earlier.
    ///
    /// Looks run on threads that may block: their system calls wait for locks of the kernel.
    ///
    /// # Cancel safety
    /// None: a check that has begun continues. After `stop` this returns once nothing is written any longer.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut watch = Watch::start()
            .inspect_err(|error| warn!(%error, "cannot watch cgroups and pins; repairs take a second"))
            .ok();
        let mut targets_at = Instant::now() + LOOK_AT_TARGETS_EVERY;
        let mut upkeep_at = Instant::now() + UPKEEP_EVERY;
        let mut events = Vec::new();
        while !stop.is_cancelled() {
            let now = Instant::now();
            let due = Due { targets: targets_at <= now, upkeep: upkeep_at <= now };
            if due.targets {
                targets_at = now + LOOK_AT_TARGETS_EVERY;
                // inotify's instances may have been used up for a while.
                watch = watch.or_else(|| Watch::start().ok());
            }
            let (readiness, state) = (self.readiness.clone(), self.state.clone());
            let handle = watch.as_ref().map(Watch::handle);
            let looking = spawn_blocking(move || {
                let looked = self.look(due, handle.as_ref());
                (self, looked)
            });
            // It panicked, which ends this part, or the runtime ends.
            let Some((this, looked)) = in_time(looking, &readiness, &state).await else { return };
            self = this;
            // Otherwise it is due again at the next check: until then the agent is not ready.
            if due.upkeep && looked.upkeep_done {
                upkeep_at = Instant::now() + UPKEEP_EVERY;
            }
            let found = looked.found;
            self.tell(&found);
            if let Some(DatapathError::Locked(_)) = found.failed.first() {
                return;
            }
            sleep(PAUSE).await;
            tokio::select! {
                is_watching = happens(watch.as_mut(), &mut events) => if !is_watching { watch = None },
                // Never an error: the sender is dropped only when everything ends.
                Ok(()) = self.agent.changed() => {}
                () = stop.cancelled() => {}
                () = sleep(LOOK_EVERY) => {}
            }
            events.clear();
        }
    }

    /// Blocks.
    fn look(&mut self, due: Due, watch: Option<&identity::Handle>) -> Looked {
        // Before looking, so that nothing is missed.
        self.watch(watch);
        let agent = *self.agent.borrow_and_update();
        let moved = self.datapath.move_agent(agent);
        let mut found = self.datapath.repair(due.targets);
        found.failed.extend(moved.err());
        let mut upkeep_done = due.upkeep;
        if due.upkeep
            && let Err(error) = self.datapath.upkeep()
        {
            upkeep_done = false;
            found.failed.push(error);
        }
        Looked { found, upkeep_done }
    }

    fn watch(&self, watch: Option<&identity::Handle>) {
        let Some(watch) = watch else { return };
        for directory in self.datapath.directories() {
            // If the directory does not exist, the following check creates it, or reports it.
            if let Err(error) = watch.children(&directory) {
                debug!(directory = %directory.display(), %error, "cannot watch");
            }
        }
    }

    /// Counts and logs, once for each failure that is new.
    fn tell(&mut self, found: &Found) {
        self.state.write(&self.datapath, found);
        for drift in &found.repaired {
            self.metrics.repairs.get_or_create(&[("kind", drift.label())]).inc();
            let kind = drift.label();
            let message = format!(
                "another process changed kube2ram's programs, maps or links in the kernel ({kind}), and the agent repaired them; find the process that has the right to do so (bpf(2), {})",
                "the bpf file system, the pods' cgroup"
            );
            self.notices.warn(Notice { about: About::Node, reason: "DatapathRepaired", message });
        }
        self.metrics.active.set(found.failed.is_empty().into());
        match (found.failed.first(), &self.pending) {
            (Some(first), pending) => {
                self.metrics.failures.inc();
                if pending.is_none() {
                    let failures = found.failed.len();
                    error!(error = chain(first), failures, "the eBPF programs are not in the expected state");
                    let message = format!(
                        "the agent cannot repair kube2ram's programs, maps or links in the kernel: {first}"
                    );
                    self.notices.warn(Notice { about: About::Node, reason: "DatapathBroken", message });
                    self.pending = Some(self.readiness.wait_for(CONDITION));
                }
            }
            (None, Some(_)) => {
                info!("the eBPF programs are in the expected state again");
                self.pending.take().into_iter().for_each(Pending::ready);
            }
            (None, None) => {}
        }
    }
}

/// The parts of a check besides the comparison.
#[derive(Clone, Copy, Debug)]
struct Due {
    targets: bool,
    upkeep: bool,
}

struct Looked {
    found: Found,
    upkeep_done: bool,
}

/// Waits for a check, and makes the agent unready while it takes too long; `None` when it panicked.
async fn in_time<T>(mut looking: JoinHandle<T>, readiness: &Readiness, state: &State) -> Option<T> {
    if let Ok(looked) = timeout(LATE, &mut looking).await {
        return looked.ok();
    }
    let pending = readiness.wait_for(LATE_CONDITION);
    let late = format!("a check of the programs has not ended after {} s", LATE.as_secs());
    error!("{late}: check whether the node hangs; the agent waits, and repairs nothing until then");
    state.late(late);
    let looked = looking.await.ok();
    info!("the check of the programs has ended");
    pending.ready();
    looked
}

/// Waits for events; `false` when none will come any more.
async fn happens(watch: Option<&mut Watch>, events: &mut Vec<WatchId>) -> bool {
    match watch {
        Some(watch) => watch.next(events).await,
        None => pending().await,
    }
}
