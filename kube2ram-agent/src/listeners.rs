//! In-pod listeners: listeners of the agent inside pods' network namespaces. A namespace belongs to one pod,
//! so every client of its listener is that pod, and network policies, SNAT and routes between pod and host
//! have no effect. A listener is opened when a pod's sandbox appears, and closed with it. Depends on
//! `datapath` and `identity`; called by `app`.
//!
//! The host listener serves a pod without an in-pod listener: until it is open, if it cannot be opened, if
//! the pod is in the host's namespace, and if two pods have the same namespace.

mod cut;
mod devices;
mod metrics;
mod netns;
mod pods;
mod processes;

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
use tracing::{debug, warn};

pub(crate) use self::netns::Netns;
pub use self::{
    cut::{Ended, end_cut_connections},
    metrics::Metrics,
    netns::NetnsId,
};
use self::{
    devices::Seen,
    netns::Opened,
    pods::{PodCgroup, PodCgroups},
    processes::Found,
};
use crate::{
    datapath::{DatapathError, NetnsCookies, Origins, PodOrigin, PodTarget, Targets},
    identity::{self, CgroupId, Watch, WatchId},
};
use kube2ram_cloud::upstream::PassGrant;
use kube2ram_service::{drain::Drain, telemetry::chain};

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
    /// How often it was examined since its last event, and when it will be again.
    examined: u32,
    again_at: Option<Instant>,
    /// Its network namespace, if that is, or seems to be, its own.
    netns: Option<NetnsId>,
    open: Option<Open>,
    /// How often a process in the pod destroyed it.
    ended: u32,
    complained: bool,
    /// Its network devices, once they are set up.
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

/// Why a pod has no in-pod listener.
#[derive(Debug, thiserror::Error)]
enum ListenError {
    /// The listener could not be opened.
    #[error("cannot listen in the pod")]
    Listen(#[source] io::Error),
    /// The target map could not be written.
    #[error("cannot redirect the pod")]
    Redirect(#[source] DatapathError),
}

const POLLING: &str = "cannot watch cgroups, so they are looked at every second: raise fs.inotify.max_user_instances and max_user_watches on the node";
/// How often pods' cgroups are listed while inotify does not work.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// The time between two full passes, with or without events.
const RECONCILE_EVERY: Duration = Duration::from_secs(30);
/// A pod's first process is in the pod's cgroup some milliseconds before it is in the pod's namespace, and
/// there is no event for that. After an event a pod is therefore examined again after this time, twice this
/// time, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The last of these pauses is 2.6 s; after that, only the next event or the next full pass helps.
const PAUSES: u32 = 10;
/// A pod that ends its listener, as it can with NET_ADMIN, has it back this much later; twice that the second
/// time, and so on up to 8 s.
const REOPEN_AFTER: Duration = Duration::from_millis(500);
const MAX_REOPEN_DOUBLINGS: u32 = 4;

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
        Self { cgroups, kernel, serve, metrics, pods, ended: Arc::default(), is_blind: false, said }
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
            let next_at = self.pods.values().filter_map(|pod| pod.again_at).fold(full_at, Instant::min);
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
                if pod.population.is_none() {
                    pod.population = watch.and_then(|watch| watch.population(&cgroup.path).ok());
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
            let (id, again_at) = (cgroup.id, Some(Instant::now()));
            let pod = Pod {
                cgroup,
                population,
                examined: 0,
                again_at,
                netns: None,
                open: None,
                ended: 0,
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
        for (id, pod) in &mut self.pods {
            // A pod whose listener cannot be opened must not delay the other pods, so it is retried only in
            // full passes.
            let has_fired = !pod.complained && pod.population.is_some_and(|watched| fired.contains(&watched));
            if has_fired {
                pod.examined = 0;
            }
            let is_polled = pod.population.is_none() && pod.open.is_none() && !pod.complained;
            if has_fired || is_polled || is_full || pod.again_at.is_some_and(|at| at <= now) {
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
            {
                if pod.ended == 0 {
                    warn!(pod.uid = %pod.cgroup.uid, "a process in a pod destroyed the in-pod listener; the agent opens it again each time");
                }
                pod.again_at =
                    Some(Instant::now() + REOPEN_AFTER * 2_u32.pow(pod.ended.min(MAX_REOPEN_DOUBLINGS)));
                (pod.examined, pod.ended) = (0, pod.ended + 1);
            }
        }
    }

    /// Redirects a pod to the host listener, then closes its in-pod listener. In this order no connection is
    /// redirected to a closed listener. Returns whether the pod has no listener now.
    fn close(&mut self, id: CgroupId) -> bool {
        let Some(pod) = self.pods.get_mut(&id) else { return true };
        let Some(open) = pod.open.take() else { return true };
        if let Err(error) = self.kernel.targets.remove(id) {
            pod.open = Some(open); // to be tried again
            self.metrics.failed("close");
            warn!(cgroup.id = %id, error = chain(&error), "cannot remove an in-pod listener from the target map");
            return false;
        }
        open.drain.close();
        debug!(cgroup.id = %id, port = open.port, "in-pod listener closed");
        true
    }

    /// Opens or closes the in-pod listener as its namespace requires, and schedules the next examination.
    fn examine(&mut self, id: CgroupId, host: NetnsId, drain: &Drain) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.again_at = None;
        let found = match processes::of_pod(&pod.cgroup.path, host) {
            Ok(found) => found,
            Err(error) => {
                self.metrics.failed("find");
                return self.warn_once("cannot read a pod's processes", Some(&error));
            }
        };
        match found {
            Found::Denied => {
                self.metrics.failed("find");
                let what = "pods' processes may not be looked at: add SYS_PTRACE to the container's securityContext.capabilities; the host \
                            listener serves all pods";
                return self.warn_once(what, None);
            }
            Found::Hidden => {
                self.metrics.failed("find");
                let what = "pods' processes are hidden: set hostPID: true; the host listener serves all pods";
                return self.warn_once(what, None);
            }
            // The listener would keep the namespace alive, and the network plugin may wait for the
            // namespace's end.
            Found::Nobody => {
                pod.netns = None;
                self.close(id);
                return;
            }
            Found::Own(netns) => {
                pod.netns = Some(netns.id);
                let is_open_there = pod.open.as_ref().is_some_and(|open| open.netns == netns.id);
                if !self.is_contested(id, netns.id) && !is_open_there {
                    self.open_or_close(id, &netns, drain);
                }
            }
            Found::Hosts => self.leave_to_host(id),
            // Its namespace is about to go, or has yet to come.
            Found::Monitors => pod.netns = pod.netns.filter(|_| pod.open.is_some()),
        }
        // A first process moves on: from the host's namespace to its own, or from an old sandbox's to a new
        // one's.
        if let Some(pod) = self.pods.get_mut(&id).filter(|pod| pod.examined < PAUSES) {
            pod.again_at = Some(Instant::now() + FIRST_PAUSE * 2_u32.pow(pod.examined));
            pod.examined += 1;
        }
    }

    /// Whether another pod has the same namespace. Then the two cannot be distinguished there, and neither
    /// has a listener: a process that was moved must not give one pod the other's role. The next look at
    /// either pod finds out when this has ended.
    fn is_contested(&mut self, id: CgroupId, netns: NetnsId) -> bool {
        let claimed = self.pods.iter().filter(|(_, pod)| pod.netns == Some(netns)).map(|(id, _)| *id);
        let claimed: Vec<_> = claimed.collect();
        if claimed.iter().all(|other| *other == id) {
            return false;
        }
        self.metrics.failed("contested");
        for pod in claimed {
            self.close(pod);
            if let Some(pod) = self.pods.get_mut(&pod).filter(|pod| !pod.complained) {
                pod.complained = true;
                warn!(pod.uid = %pod.cgroup.uid, "another pod's process is in this pod's network namespace; the host listener serves both pods");
            }
        }
        true
    }

    /// A pod in the host's namespace cannot reach a listener in another namespace, including one of an
    /// earlier agent.
    fn leave_to_host(&mut self, id: CgroupId) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        (pod.seen, pod.netns) = (None, None);
        if pod.open.is_some()
            && self.close(id)
            && let Some(pod) = self.pods.get_mut(&id)
        {
            pod.examined = 0; // its first process may be a new one, which has yet to be moved
        }
    }

    /// If it cannot be opened, the in-pod listener of the pod's earlier namespace is useless, too.
    fn open_or_close(&mut self, id: CgroupId, netns: &Netns, drain: &Drain) {
        let outcome = self.open(id, netns, drain);
        if let Err(error) = &outcome {
            self.close(id);
            self.metrics.failed(error.step());
            if matches!(error, ListenError::Listen(error) if error.kind() == io::ErrorKind::PermissionDenied)
            {
                let what = "listeners in pods are not permitted: add NET_BIND_SERVICE to the container's securityContext.capabilities; the host \
                            listener serves all pods";
                self.warn_once(what, None);
            }
        }
        let Some(pod) = self.pods.get_mut(&id) else { return };
        let has_complained = std::mem::replace(&mut pod.complained, outcome.is_err());
        if let Err(error) = outcome
            && !has_complained
        {
            warn!(cgroup.id = %id, error = chain(&error), "the host listener serves a pod");
        }
    }

    /// Opens a listener in a namespace and redirects the pod to it; then closes the one that the pod had in
    /// an earlier namespace.
    fn open(&mut self, id: CgroupId, netns: &Netns, drain: &Drain) -> Result<(), ListenError> {
        let Some(pod) = self.pods.get_mut(&id) else { return Ok(()) };
        let Opened { port, v4, v6, inside } =
            netns::listen_in(netns, &*self.kernel.pass).map_err(ListenError::Listen)?;
        let cookie = self.kernel.cookies.of(&inside).map_err(ListenError::Listen)?;
        let listeners = [Some(v4), v6].into_iter().flatten().map(TcpListener::from_std);
        let listeners = listeners.collect::<io::Result<Vec<_>>>().map_err(ListenError::Listen)?;
        let target = PodTarget { netns: cookie, port, has_ipv6: listeners.len() == 2 };
        self.kernel.targets.insert(id, target).map_err(ListenError::Redirect)?;

        let open =
            Open { port, netns: netns.id, drain: drain.child(), has_ended: Arc::new(AtomicBool::new(false)) };
        for listener in listeners {
            let ending = Ending { has_ended: Arc::clone(&open.has_ended), notify: Arc::clone(&self.ended) };
            let origin = Arc::new(PodOrigin(pod.cgroup.uid.clone()));
            (self.serve)(Arc::new(listener), origin, open.drain.clone(), ending);
        }
        debug!(cgroup.id = %id, port, "in-pod listener open");
        if let Some(former) = pod.open.replace(open) {
            former.drain.close();
        }
        Ok(())
    }

    fn warn_once(&mut self, what: &'static str, error: Option<&io::Error>) {
        if self.said.insert(what) {
            warn!(error = error.map(tracing::field::display), "{what}");
        }
    }
}

impl ListenError {
    /// The metrics label.
    fn step(&self) -> &'static str {
        match self {
            Self::Listen(_) => "listen",
            Self::Redirect(_) => "redirect",
        }
    }
}
