//! The network namespaces of pods: which there are, when each is queried, and the check of one. Depends on
//! `namespaces`, `numbers`, `datapath` and `devices`. Called by `wire_guard`, of which it is a part.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    LOOK_EVERY, Look, WireGuardError,
    namespaces::{self, DeviceChanges, Notified},
    numbers,
};
use crate::{
    datapath::{Wire, WireDevice},
    devices::Links,
    listeners::{Netns, NetnsId},
    netlink::uninterrupted,
};
use kube2ram_service::clock::jitter;

/// The network namespaces of the pods below one cgroup.
#[derive(Debug)]
pub(super) struct Pods {
    cgroup: PathBuf,
    known: HashMap<NetnsId, Pod>,
    /// `None` when there is no descriptor for it.
    notified: Option<Notified>,
    searched_at: Instant,
    search_at: Instant,
    search_until: Instant,
}

/// A network namespace of pods. Nothing here keeps it alive for longer than until the next search: the
/// network plugin may wait for its end.
#[derive(Debug)]
struct Pod {
    /// One that is in it, as a directory of procfs.
    process: PathBuf,
    devices: BTreeSet<WireDevice>,
    /// The other ends of its pairs, by their index in their own namespace, usually the node's.
    peers: BTreeSet<u32>,
    /// Once it was asked.
    changes: Option<DeviceChanges>,
    ask_at: Instant,
}

/// How often namespaces of pods are searched without events. A search finds missed namespaces, and releases
/// those without a process.
const SEARCH_EVERY: Duration = Duration::from_secs(30);
/// A device that has left a namespace is searched for, but not more often: a pod can have notices sent as
/// often as it likes.
const SEARCH_PAUSE: Duration = Duration::from_secs(2);
/// How often, at least, a namespace without events and without a covered device is queried. A change by which
/// one of its devices leads out is notified at once: by the namespace itself, or by the node's namespace when
/// the other end of a pair leaves it. Each query takes a thread.
const ASK_AGAIN: Duration = Duration::from_mins(5);
/// A device is moved into a pod's namespace before the pod's first process is there.
const SEARCH_AFTER_CHANGE: Duration = Duration::from_secs(10);
/// How many ends of pairs are remembered of one pod: the plugin makes one or two, the pod could make
/// thousands.
const MAX_PEERS: usize = 64;

impl Pods {
    /// Nothing is searched before the first [`Self::look`].
    pub(super) fn new(cgroup: &Path) -> Self {
        let now = Instant::now();
        let (cgroup, known, notified) = (cgroup.to_owned(), HashMap::new(), Notified::new().ok());
        Self { cgroup, known, notified, searched_at: now, search_at: now, search_until: now }
    }

    /// How many of their devices have the program.
    pub(super) fn devices(&self) -> usize {
        self.known.values().map(|pod| pod.devices.len()).sum()
    }

    /// The node's devices have changed, and have these indices now: one may have moved into a pod.
    pub(super) fn follow_node(&mut self, links: &[u32]) {
        let now = Instant::now();
        self.search_until = now + SEARCH_AFTER_CHANGE;
        let here: BTreeSet<_> = links.iter().copied().collect();
        for pod in self.known.values_mut().filter(|pod| !pod.peers.is_subset(&here)) {
            pod.ask_at = now;
        }
    }

    /// Searches for namespaces, and looks at the devices of those that are due.
    pub(super) fn look(&mut self, wire: &mut Wire, host: &Netns, look: &mut Look) {
        let now = Instant::now();
        let notified = self.notified.as_ref().map(Notified::now).unwrap_or_default();
        for pod in self.known.values_mut() {
            let Some(changes) = &pod.changes else {
                pod.ask_at = now;
                continue;
            };
            if changes.is_among(&notified) && changes.have_happened() {
                pod.ask_at = now;
                // A device that has left may be in another pod's now.
                self.search_at = self.search_at.min(self.searched_at + SEARCH_PAUSE);
            }
        }
        // A namespace that is known only by its process must be found again when the process has ended. The
        // others can wait until they are queried, or for the next search.
        let before = self.known.len();
        self.known.retain(|id, pod| pod.ask_at > now || pod.is_in(*id));
        if now >= self.search_at || now < self.search_until || self.known.len() < before {
            (self.searched_at, self.search_at) = (now, now + SEARCH_EVERY);
            match namespaces::of_pods(&self.cgroup, host.id) {
                Ok(mut found) => {
                    // By the process that was found, or by one beyond those that a search reads.
                    self.known.retain(|id, pod| match found.remove(id) {
                        Some(process) => {
                            pod.process = process;
                            true
                        }
                        None => pod.is_in(*id),
                    });
                    self.known.extend(found.into_iter().map(|(id, process)| (id, Pod::new(process, now))));
                }
                Err(error) => {
                    // Before the first search it is not known whether all devices are covered.
                    self.search_at = now;
                    look.failures.push(WireGuardError::Namespaces(error));
                }
            }
        }
        for (id, pod) in self.known.iter_mut().filter(|(_, pod)| pod.ask_at <= now) {
            let failures = look.failures.len();
            let has_looked = pod.look(*id, wire, host, self.notified.as_ref(), look);
            let is_calm = has_looked && pod.devices.is_empty() && look.failures.len() == failures;
            // Not all at the same moment.
            let again_in = if is_calm { ASK_AGAIN.mul_f64(0.5 + 0.5 * jitter()) } else { LOOK_EVERY };
            pod.ask_at = now + again_in;
        }
    }
}

impl Pod {
    fn new(process: PathBuf, now: Instant) -> Self {
        let (devices, peers) = (BTreeSet::new(), BTreeSet::new());
        Self { process, devices, peers, changes: None, ask_at: now }
    }

    /// Whether its process is still there, and in that namespace; also if that is unknown.
    fn is_in(&self, id: NetnsId) -> bool {
        namespaces::is_in(&self.process, id)
    }

    /// Whether it was checked: its process may have ended, or entered another namespace.
    fn look(
        &mut self,
        id: NetnsId,
        wire: &mut Wire,
        host: &Netns,
        notified: Option<&Notified>,
        look: &mut Look,
    ) -> bool {
        const OWNER: &str = "a pod";
        let Self { process, devices, peers, changes, .. } = self;
        let looked = namespaces::of_process(process).and_then(|netns| {
            if netns.id != id {
                return Err(io::ErrorKind::NotFound.into());
            }
            netns.within(|| {
                if changes.is_none() {
                    let made = DeviceChanges::of_this_thread()?;
                    // Otherwise the namespace is asked at each look. The node's number of watches is limited,
                    // and pods have some.
                    *changes = notified.is_some_and(|all| all.add(&made).is_ok()).then_some(made);
                }
                let links = uninterrupted(Links::of_this_thread)?;
                let node = numbers::number_of(host.as_fd())?;
                *peers = links.peers_in(node).take(MAX_PEERS).collect();
                let way = links.way_out_of_pod(node);
                Ok(look.cover(wire, &way, devices, OWNER))
            })
        });
        match looked {
            Ok(covered) => {
                *devices = covered;
                return true;
            }
            // The process has ended: the next check follows soon.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => look.failures.push(WireGuardError::List { owner: OWNER, source }),
        }
        false
    }
}
