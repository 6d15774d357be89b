//! In-pod listeners: listeners of the agent inside pods' network namespaces. A namespace belongs to one pod,
//! so every client of its listener is that pod, and network policies, SNAT and routes between pod and host
//! have no effect. A listener is opened when a pod's sandbox appears, and closed with it. Depends on
//! `datapath` and `identity`; called by `app`.
//!
//! The host listener serves a pod without an in-pod listener: until it is open, if it cannot be opened, if
//! the pod is in the host's namespace, and if two pods have the same namespace.

mod cut;
mod devices;
mod examine;
mod metrics;
mod netns;
mod pods;
mod processes;
mod schedule;

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kube2ram_common::abi::MAX_TARGETS;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use tracing::warn;

pub(crate) use self::netns::Netns;
pub use self::{
    cut::{Ended, end_cut_connections},
    metrics::Metrics,
    netns::NetnsId,
};
use self::{
    devices::Seen,
    pods::{PodCgroup, PodCgroups},
    processes::Pid,
    schedule::Schedule,
};
use crate::{
    datapath::{NetnsCookies, Origins, Targets},
    identity::{self, CgroupId, Watch, WatchId},
};
use kube2ram_cloud::upstream::PassGrant;
use kube2ram_service::drain::Drain;

/// Starts to serve one listener and returns at once. Serving ends with the drain or on an error; the last
/// argument must be dropped then. Called within the runtime.
pub type Serve = Box<dyn Fn(Arc<TcpListener>, Arc<dyn Origins>, Drain, Ending) + Send>;

/// Asks for an end of all changes. From the answer on none is opened or closed any more, and nothing is
/// written: another agent does. Those that are open go on.
pub type Release = oneshot::Sender<()>;

/// What opening a listener in a pod takes.
pub struct Kernel {
    /// Identifies network namespaces.
    pub cookies: NetnsCookies,
    /// For trying what was opened.
    pub pass: Arc<dyn PassGrant>,
    /// Sends pods there.
    pub targets: Targets,
}

/// The listeners in pods.
pub struct PodListeners {
    cgroups: PodCgroups,
    kernel: Kernel,
    serve: Serve,
    metrics: Metrics,
    pods: HashMap<CgroupId, Pod>,
    full_passes: u32,
    /// A listener ended although the agent did not close it.
    ended: Arc<Notify>,
    /// Whether a cgroup could not be watched.
    is_blind: bool,
    /// Warnings that are logged only once.
    said: HashSet<&'static str>,
}

/// A pod whose cgroup exists.
#[derive(Debug)]
struct Pod {
    cgroup: PodCgroup,
    population: Option<WatchId>,
    schedule: Schedule,
    /// Its network namespace, if that is, or seems to be, its own.
    netns: Option<NetnsId>,
    /// The process that showed it, if the last examination found it so.
    first: Option<Pid>,
    open: Option<Open>,
    complained: bool,
    /// Its network devices, once they were asked for.
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Open {
    port: u16,
    netns: NetnsId,
    drain: Drain,
    has_ended: Arc<AtomicBool>,
}

/// Tells of the end of a listener when it is dropped.
#[derive(Debug)]
pub struct Ending {
    has_ended: Arc<AtomicBool>,
    notify: Arc<Notify>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::Release);
        self.notify.notify_one();
    }
}

const POLLING: &str = "cannot watch cgroups, so they are looked at every second: raise fs.inotify.max_user_instances and max_user_watches on the node";
/// How often pods' cgroups are listed while inotify does not work.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// The time between two full passes, with or without events.
const RECONCILE_EVERY: Duration = Duration::from_secs(30);
/// In each tenth of them, the processes of all pods are searched. Otherwise those of pods whose first process
/// is where it was are not: an older one can be there only if a process of the host has moved it.
const THOROUGH: u32 = 10;

impl Pod {
    /// Whether the first process is still in the namespace of the listener, and that is the pod's alone.
    fn is_as_before(&self) -> bool {
        let is_in = |(open, first): (&Open, Pid)| first.is_in(open.netns);
        !self.complained && self.open.as_ref().zip(self.first).is_some_and(is_in)
    }
}

impl PodListeners {
    /// Prepares for the pods below each of `pods_cgroups`, the first of which must exist.
    pub fn new(
        cgroup_root: &Path,
        pods_cgroups: Vec<PathBuf>,
        kernel: Kernel,
        metrics: Metrics,
        serve: Serve,
    ) -> Self {
        let (cgroups, pods, said) =
            (PodCgroups::new(cgroup_root, pods_cgroups), HashMap::new(), HashSet::new());
        let ended = Arc::default();
        Self { cgroups, kernel, serve, metrics, pods, full_passes: 0, ended, is_blind: false, said }
    }

    /// Opens and closes listeners until the drain, or until another agent takes over. Notifies `opened` when
    /// all existing pods have been examined. The targets stay in the map: if no other agent takes over, pods
    /// are then refused.
    ///
    /// # Cancel safety
    /// Dropping the future leaves open listeners to the tasks that serve them.
    pub async fn run(
        mut self,
        drain: Drain,
        mut releases: mpsc::Receiver<Release>,
        opened: oneshot::Sender<()>,
    ) {
        let shutdown = drain.draining().clone();
        let mut opened = Some(opened);
        let tell = |asked: oneshot::Sender<()>| {
            let _has_given_up = asked.send(());
        };
        let host = match NetnsId::own() {
            Ok(host) => host,
            Err(error) => {
                warn!(%error, "cannot identify the host's network namespace; no pod gets an in-pod listener");
                opened.take().into_iter().for_each(tell);
                if let Some(Some(release)) = shutdown.run_until_cancelled(releases.recv()).await {
                    tell(release);
                }
                return shutdown.cancelled().await;
            }
        };
        let mut watch = None;
        let (mut events, mut full_at) = (Vec::new(), Instant::now());
        while !shutdown.is_cancelled() {
            let fired: HashSet<_> = events.drain(..).collect();
            let watching = watch.as_ref().map(Watch::handle);
            let drain = drain.clone();
            let is_full = full_at <= Instant::now() || fired.contains(&WatchId::OVERFLOW);
            if is_full && watch.is_none() {
                watch = self.start_watch();
            }
            let pass = spawn_blocking(move || {
                if let Err(error) = self.pass(host, watching.as_ref(), &fired, is_full, &drain) {
                    self.metrics.failed("survey");
                    self.warn_once("cannot list pods' cgroups", Some(&error));
                }
                self
            });
            // It panicked, which ends this part, or the runtime ends.
            let Ok(passed) = pass.await else { return };
            self = passed;
            let is_polling = self.is_blind || watch.is_none();
            self.metrics.polling.set(is_polling.into());
            if is_full {
                full_at = Instant::now() + RECONCILE_EVERY;
                opened.take().into_iter().for_each(tell);
            }
            let next_at =
                self.pods.values().filter_map(|pod| pod.schedule.next_at()).fold(full_at, Instant::min);
            let next_at = if is_polling { next_at.min(Instant::now() + POLL_EVERY) } else { next_at };
            let happens = async {
                match &mut watch {
                    Some(watch) => watch.next(&mut events).await,
                    None => std::future::pending().await,
                }
            };
            let is_watching = tokio::select! {
                () = shutdown.cancelled() => return,
                Some(release) = releases.recv() => {
                    tell(release);
                    return shutdown.cancelled().await;
                }
                is_watching = happens => is_watching,
                () = self.ended.notified() => true,
                () = sleep_until(next_at) => true,
            };
            if !is_watching {
                self.metrics.failed("watch");
                watch = None;
            }
        }
    }

    /// `None` when inotify's instances or watches are used up: then cgroups are polled, and this is tried
    /// again.
    fn start_watch(&mut self) -> Option<Watch> {
        Watch::start()
            .inspect_err(|error| {
                self.metrics.failed("watch");
                self.warn_once(POLLING, Some(error));
            })
            .ok()
    }

    /// One pass over the pods' cgroups: closes the listeners of removed pods, and examines pods that are new,
    /// due or `fired`.
    fn pass(
        &mut self,
        host: NetnsId,
        watch: Option<&identity::Handle>,
        fired: &HashSet<WatchId>,
        is_full: bool,
        drain: &Drain,
    ) -> io::Result<()> {
        let unwatched = Cell::new(None);
        let listed = self.cgroups.list(|directory| {
            if let Some(Err(error)) = watch.map(|watch| watch.children(directory)) {
                unwatched.set(Some(error));
            }
        })?;
        let living: HashSet<_> = listed.iter().map(|cgroup| cgroup.id).collect();
        self.forget_others(&living, watch);
        for cgroup in listed {
            if let Some(pod) = self.pods.get_mut(&cgroup.id) {
                if pod.population.is_none()
                    && let Some(watch) = watch
                {
                    match watch.population(&cgroup.path) {
                        Ok(watched) => pod.population = Some(watched),
                        Err(error) => unwatched.set(Some(error)),
                    }
                }
                continue;
            }
            if self.pods.len() == MAX_TARGETS {
                self.metrics.failed("redirect");
                self.warn_once(
                    "more pods than the target map holds; the host listener serves the others",
                    None,
                );
                break;
            }
            // The watch is set before the processes are read, so that none is missed.
            let population = watch.map(|watch| watch.population(&cgroup.path)).transpose();
            let population = population.unwrap_or_else(|error| {
                unwatched.set(Some(error));
                None
            });
            let id = cgroup.id;
            let pod = Pod {
                cgroup,
                population,
                schedule: Schedule::new(),
                netns: None,
                first: None,
                open: None,
                complained: false,
                seen: None,
            };
            self.pods.insert(id, pod);
        }
        let unwatched = unwatched.take().filter(|error| error.kind() != io::ErrorKind::NotFound);
        self.is_blind = unwatched.is_some();
        if let Some(error) = unwatched {
            self.metrics.failed("watch");
            self.warn_once(POLLING, Some(&error));
        }

        self.close_ended();
        let now = Instant::now();
        let mut due = Vec::new();
        let is_thorough = is_full && self.full_passes.is_multiple_of(THOROUGH);
        self.full_passes = self.full_passes.wrapping_add(is_full.into());
        for (id, pod) in &mut self.pods {
            // A pod whose listener cannot be opened must not delay the other pods, so it is retried only in
            // full passes.
            let has_fired = !pod.complained && pod.population.is_some_and(|watched| fired.contains(&watched));
            if has_fired {
                pod.schedule.restart();
            }
            let is_due = has_fired || is_thorough || pod.schedule.next_at().is_some_and(|at| at <= now);
            let is_polled = pod.population.is_none() && !pod.complained;
            if is_due || ((is_full || is_polled) && !pod.is_as_before()) {
                due.push(*id);
            }
        }
        for id in due {
            self.examine(id, host, drain);
        }
        if is_full {
            self.look_for_devices(host);
        }
        self.metrics.open.set(self.pods.values().filter(|pod| pod.open.is_some()).count() as i64);
        Ok(())
    }

    /// Forgets removed pods.
    fn forget_others(&mut self, living: &HashSet<CgroupId>, watch: Option<&identity::Handle>) {
        let gone: Vec<_> = self.pods.keys().filter(|id| !living.contains(id)).copied().collect();
        for id in gone {
            if self.close(id)
                && let Some(pod) = self.pods.remove(&id)
                && let (Some(watch), Some(population)) = (watch, pod.population)
            {
                watch.end(population);
            }
        }
    }

    /// Listeners that ended by themselves: a process in the pod destroyed the socket. Until the listener is
    /// opened again, the host listener serves the pod.
    fn close_ended(&mut self) {
        let has_ended = |open: &Open| open.has_ended.load(Ordering::Acquire);
        let ended = self.pods.iter().filter(|(_, pod)| pod.open.as_ref().is_some_and(has_ended));
        let ended: Vec<_> = ended.map(|(id, _)| *id).collect();
        for id in ended {
            self.metrics.failed("ended");
            if self.close(id)
                && let Some(pod) = self.pods.get_mut(&id)
                && pod.schedule.reopen()
            {
                warn!(pod.uid = %pod.cgroup.uid, "a process in a pod destroyed the in-pod listener; the agent opens it again each time");
            }
        }
    }

    fn warn_once(&mut self, what: &'static str, error: Option<&io::Error>) {
        if self.said.insert(what) {
            warn!(error = error.map(tracing::field::display), "{what}");
        }
    }
}
