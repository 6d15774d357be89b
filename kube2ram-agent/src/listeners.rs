//! Listeners of the agent inside pods' network namespaces, so that nothing between pod and host (policies, SNAT, routes) can come between a pod and the
//! agent. Owns their life: opened when a pod's sandbox appears, closed with it. Depends on `datapath` and `identity`; called by `app`.
//!
//! A pod without one is served by the host's listener: until its own is open, where that fails, and when it has the host's namespace, whatever others
//! its processes make. A listener of its own would give a hostNetwork pod nothing, because nothing stands between it and the host's.

mod devices;
mod links;
mod metrics;
mod names;
mod netns;
mod pods;
mod processes;
mod routed;
mod succession;

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kube2ram_common::abi::MAX_TARGETS;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use self::{devices::Seen, names::Names, pods::PodCgroups, processes::Found};
pub(crate) use self::{
    links::{Links, WayOut},
    netns::Netns,
};
pub use self::{
    metrics::Metrics,
    netns::NetnsId,
    succession::{HandOver, PodListener},
};
use crate::{
    clock::since_boot,
    closing::Closing,
    datapath::{AcceptedOrigins, DatapathError, ListenerId, Origins, Targets},
    identity::{self, CgroupId, Watch, WatchId},
    telemetry::chain,
};

/// Starts to serve one listener, until it is told to end, and returns at once. Called within the runtime.
pub type Serve = Box<dyn Fn(Arc<TcpListener>, Arc<dyn Origins>, Closing) + Send>;

/// The listeners in pods.
pub struct PodListeners {
    cgroups: PodCgroups,
    targets: Targets,
    origins: AcceptedOrigins,
    serve: Serve,
    metrics: Metrics,
    names: Names,
    pods: HashMap<CgroupId, Pod>,
    /// Those of a former agent whose pods were not looked at yet.
    inherited: HashMap<CgroupId, Open>,
    /// What was said once and need not be again.
    said: HashSet<&'static str>,
}

/// A pod whose cgroup is there.
#[derive(Debug)]
struct Pod {
    cgroup: PathBuf,
    population: Option<WatchId>,
    /// How often it was examined since its last event, and when it will be again.
    examined: u32,
    again_at: Option<Instant>,
    open: Option<Open>,
    complained: bool,
    /// Its network devices, once they are set up.
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Open {
    id: ListenerId,
    addr: SocketAddrV4,
    netns: NetnsId,
    listener: Arc<TcpListener>,
    closing: Closing,
}

/// Why a pod has no listener of its own.
#[derive(Debug, thiserror::Error)]
enum ListenError {
    /// The listener could not be opened.
    #[error("cannot listen on {0} in the pod")]
    Listen(Ipv4Addr, #[source] io::Error),
    /// The kernel half could not be told.
    #[error("cannot redirect the pod")]
    Redirect(#[source] DatapathError),
}

/// How often everything is looked at, whether something happened or not.
const RECONCILE_EVERY: Duration = Duration::from_secs(30);
/// A first process is in the pod's cgroup a few milliseconds before it is in the pod's namespace, and no event tells of that: after an event, a pod is
/// looked at again after this, twice this and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The last of these pauses is 2.6 s; after that, only the next event or the next full pass helps.
const PAUSES: u32 = 10;
/// The map's room but for the host's listener.
const MAX_PODS: usize = MAX_TARGETS - 1;

impl PodListeners {
    /// Prepares for the pods below `pods_cgroup`.
    pub fn new(
        cgroup_root: &Path,
        pods_cgroup: &Path,
        targets: Targets,
        origins: AcceptedOrigins,
        metrics: Metrics,
        serve: Serve,
    ) -> Self {
        let names = Names::starting_at(u64::try_from(since_boot().as_nanos()).unwrap_or(u64::MAX / 2));
        let (cgroups, pods, said) =
            (PodCgroups::new(cgroup_root, pods_cgroup), HashMap::new(), HashSet::new());
        let inherited = HashMap::new();
        Self { cgroups, targets, origins, serve, metrics, names, pods, inherited, said }
    }

    /// Opens and closes listeners until they are to be closed, all of them, or handed over. What the kernel half knows of them stays: where
    /// nobody took them over, pods are then refused.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the listeners that are open to whoever serves them.
    pub async fn run(mut self, closing: Closing, mut heirs: mpsc::Receiver<HandOver>) {
        let shutdown = closing.draining().clone();
        let host = match NetnsId::own() {
            Ok(host) => host,
            Err(error) => {
                warn!(%error, "cannot tell the host's network namespace; no pod gets a listener of its own");
                if let Some(Some(heir)) = shutdown.run_until_cancelled(heirs.recv()).await {
                    // Whoever asked may have given up.
                    drop(heir.send(self.handed_over()));
                }
                return shutdown.cancelled().await;
            }
        };
        let mut watch = match Watch::start() {
            Ok(watch) => Some(watch),
            Err(error) => {
                self.metrics.failed("watch");
                warn!(%error, "cannot watch cgroups; new pods get their listener late");
                None
            }
        };
        let (mut events, mut full_at) = (Vec::new(), Instant::now());
        while !shutdown.is_cancelled() {
            let fired: HashSet<_> = events.drain(..).collect();
            let watching = watch.as_ref().map(Watch::handle);
            let closing = closing.clone();
            let is_full = full_at <= Instant::now() || fired.contains(&WatchId::OVERFLOW);
            let pass = spawn_blocking(move || {
                if let Err(error) = self.pass(host, watching.as_ref(), &fired, is_full, &closing) {
                    self.metrics.failed("survey");
                    self.warn_once("cannot list pods' cgroups", Some(&error));
                }
                self
            });
            // It panicked, which ends this part, or the runtime ends.
            let Ok(passed) = pass.await else { return };
            self = passed;
            if is_full {
                full_at = Instant::now() + RECONCILE_EVERY;
            }
            let next_at = self.pods.values().filter_map(|pod| pod.again_at).fold(full_at, Instant::min);
            let happens = async {
                match &mut watch {
                    Some(watch) => watch.next(&mut events).await,
                    None => std::future::pending().await,
                }
            };
            let is_watching = tokio::select! {
                () = shutdown.cancelled() => return,
                Some(heir) = heirs.recv() => {
                    // Nobody to hear it: then nobody has taken anything over, and all ends with the shutdown.
                    drop(heir.send(self.handed_over()));
                    drop(self); // whoever still serves has the listeners, and a pod that is gone needs its namespace back
                    return shutdown.cancelled().await;
                }
                is_watching = happens => is_watching,
                () = sleep_until(next_at) => true,
            };
            if !is_watching {
                self.metrics.failed("watch");
                watch = None;
            }
        }
    }

    /// One look at the pods' cgroups: closes what is gone, and examines what is new, due or `fired`.
    fn pass(
        &mut self,
        host: NetnsId,
        watch: Option<&identity::Handle>,
        fired: &HashSet<WatchId>,
        is_full: bool,
        closing: &Closing,
    ) -> io::Result<()> {
        let unwatched = Cell::new(None);
        let listed = self.cgroups.list(|directory| {
            if let Some(Err(error)) = watch.map(|watch| watch.children(directory)) {
                unwatched.set(Some(error));
            }
        })?;
        let living: HashSet<_> = listed.iter().map(|(id, _)| *id).collect();
        self.forget_others(&living, watch);
        self.close_inherited_of_others(&living);
        for (id, cgroup) in listed {
            if self.pods.contains_key(&id) {
                continue;
            }
            if self.pods.len() == MAX_PODS {
                self.metrics.failed("redirect");
                self.warn_once("more pods than fit; the host's listener serves the rest", None);
                break;
            }
            // Before its processes are looked for, so that none is missed.
            let population = watch.map(|watch| watch.population(&cgroup)).transpose();
            let population = population.unwrap_or_else(|error| {
                unwatched.set(Some(error));
                None
            });
            let again_at = Some(Instant::now());
            let open = self.inherited.remove(&id);
            let pod = Pod { cgroup, population, examined: 0, again_at, open, complained: false, seen: None };
            self.pods.insert(id, pod);
        }
        if let Some(error) = unwatched.take().filter(|error| error.kind() != io::ErrorKind::NotFound) {
            self.metrics.failed("watch");
            self.warn_once("cannot watch cgroups; new pods get their listener late", Some(&error));
        }

        let now = Instant::now();
        let mut due = Vec::new();
        for (id, pod) in &mut self.pods {
            // A pod whose listener cannot be opened costs everybody's time, so it does not decide when.
            let has_fired = !pod.complained && pod.population.is_some_and(|watched| fired.contains(&watched));
            if has_fired {
                pod.examined = 0;
            }
            if has_fired || is_full || pod.again_at.is_some_and(|at| at <= now) {
                due.push(*id);
            }
        }
        for id in due {
            self.examine(id, host, closing);
        }
        if is_full {
            self.look_for_devices(host);
        }
        self.metrics.open.set(self.pods.values().filter(|pod| pod.open.is_some()).count() as i64);
        Ok(())
    }

    /// Forgets pods that are gone.
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

    /// Sends a pod to the host's listener, then closes its own; in this order, so that nobody is sent to one that is closed. Whether there is none now.
    fn close(&mut self, id: CgroupId) -> bool {
        let Some(pod) = self.pods.get_mut(&id) else { return true };
        let Some(open) = pod.open.take() else { return true };
        if let Err(error) = self.targets.remove(id) {
            pod.open = Some(open); // to be tried again
            self.metrics.failed("close");
            warn!(cgroup.id = %id, error = chain(&error), "cannot forget a pod's listener");
            return false;
        }
        open.closing.close();
        debug!(cgroup.id = %id, addr = %open.addr, "listener in a pod closed");
        true
    }

    /// Gives a pod the listener that it can have now, and notes when to look again.
    fn examine(&mut self, id: CgroupId, host: NetnsId, closing: &Closing) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.again_at = None;
        let found = match processes::of_pod(&pod.cgroup, host) {
            Ok(found) => found,
            Err(error) => {
                self.metrics.failed("find");
                return self.warn_once("cannot look at a pod's processes", Some(&error));
            }
        };
        match found {
            Found::Denied => {
                self.metrics.failed("find");
                let what = "pods' processes may not be looked at: add SYS_PTRACE to the container's securityContext.capabilities; the host's \
                            listener serves all pods";
                return self.warn_once(what, None);
            }
            Found::Hidden => {
                self.metrics.failed("find");
                let what =
                    "pods' processes are hidden: set hostPID: true; the host's listener serves all pods";
                return self.warn_once(what, None);
            }
            // The listener would keep the namespace alive, for whose end the network plugin may wait.
            Found::Nobody => {
                self.close(id);
                return;
            }
            Found::Own(netns) if pod.open.as_ref().is_none_or(|open| open.netns != netns.id) => {
                self.open_or_close(id, &netns, closing);
            }
            Found::Hosts => self.leave_to_host(id),
            Found::Monitors | Found::Own(_) => {}
        }
        // A first process moves on: from the host's namespace to its own, or from an old sandbox's to a new one's.
        if let Some(pod) = self.pods.get_mut(&id).filter(|pod| pod.examined < PAUSES) {
            pod.again_at = Some(Instant::now() + FIRST_PAUSE * 2_u32.pow(pod.examined));
            pod.examined += 1;
        }
    }

    /// A pod in the host's namespace has no way to a listener elsewhere, be it one that a former agent opened.
    fn leave_to_host(&mut self, id: CgroupId) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.seen = None;
        if pod.open.is_some()
            && self.close(id)
            && let Some(pod) = self.pods.get_mut(&id)
        {
            pod.examined = 0; // its first process may be a new one, which has yet to be moved
        }
    }

    /// Where it cannot be opened, the pod's listener in an earlier namespace is of no use either.
    fn open_or_close(&mut self, id: CgroupId, netns: &Netns, closing: &Closing) {
        let outcome = self.open(id, netns, closing);
        if let Err(error) = &outcome {
            self.close(id);
            self.metrics.failed(error.step());
        }
        let Some(pod) = self.pods.get_mut(&id) else { return };
        let has_complained = std::mem::replace(&mut pod.complained, outcome.is_err());
        if let Err(error) = outcome
            && !has_complained
        {
            warn!(cgroup.id = %id, error = chain(&error), "the host's listener serves a pod");
        }
    }

    /// Opens a listener in a namespace and redirects the pod to it; then closes the one that the pod had in an earlier namespace.
    fn open(&mut self, id: CgroupId, netns: &Netns, closing: &Closing) -> Result<(), ListenError> {
        let opens = || self.pods.values().filter_map(|pod| pod.open.as_ref()).chain(self.inherited.values());
        let (listener_id, addr) = self.names.next(|addr| opens().any(|open| *open.addr.ip() == addr));
        let listen_error = |source| ListenError::Listen(addr, source);
        let (listener, bound) = netns::listen_in(netns, addr).map_err(listen_error)?;
        let listener = TcpListener::from_std(listener).map_err(listen_error)?;
        self.targets.insert(id, listener_id, bound).map_err(ListenError::Redirect)?;

        let listener = Arc::new(listener);
        let open = Open { id: listener_id, addr: bound, netns: netns.id, listener, closing: closing.child() };
        self.serve(id, &open);
        debug!(cgroup.id = %id, addr = %bound, "listener in a pod open");
        let former = self.pods.get_mut(&id).and_then(|pod| pod.open.replace(open));
        if let Some(former) = former {
            former.closing.close();
        }
        Ok(())
    }

    fn serve(&self, pod: CgroupId, open: &Open) {
        let origins = Arc::new(self.origins.of_pod(pod, open.id));
        (self.serve)(Arc::clone(&open.listener), origins, open.closing.clone());
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
            Self::Listen(..) => "listen",
            Self::Redirect(_) => "redirect",
        }
    }
}
