//! The wire guard: keeps a tc program on each device by which packets leave the node. It covers packets that
//! pass no cgroup hook and no netfilter rule: those of packet sockets of pods in the node's network
//! namespace, of pods with their own network card or on ipvlan, and of pods whose packets a program of the
//! network plugin redirects. Depends on `datapath`, on `listeners` for devices and namespaces, and on
//! `netlink`. Called by `app` and `uninstall`.

mod first;
mod namespaces;
mod node;
mod numbers;
mod pods;
mod remove;
mod repairs;
mod state;

use std::{collections::BTreeSet, io, path::Path, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    task::block_in_place,
    time::{Instant, sleep},
};
use tracing::{debug, error, info, warn};

pub use self::{
    first::cover_once,
    remove::remove_filters,
    state::{Standing, State},
};
use self::{node::NodeDevices, pods::Pods, repairs::Repairs};
use crate::{
    datapath::{Covering, DatapathError, Wire, WireDevice},
    devices::WayOut,
    listeners::Netns,
    netlink::uninterrupted,
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_service::{
    admin::{Pending, Readiness},
    telemetry::chain,
};

/// Why devices could not be listed, or have no program.
#[derive(Debug, thiserror::Error)]
pub enum WireGuardError {
    /// The program could not be attached, or removed.
    #[error("cannot attach the wire guard to the network devices of {owner}")]
    Cover {
        /// Whose.
        owner: &'static str,
        /// The datapath's.
        #[source]
        source: Box<DatapathError>,
    },
    /// The kernel did not list the devices.
    #[error("cannot list the network devices of {owner}")]
    List {
        /// Whose.
        owner: &'static str,
        /// Netlink's.
        #[source]
        source: io::Error,
    },
    /// The network namespaces of pods could not be found.
    #[error("cannot find the network namespaces of pods")]
    Namespaces(#[source] io::Error),
    /// A filter could not be removed.
    #[error("cannot remove the program from network device {0}")]
    Uncover(u32, #[source] io::Error),
    /// A device whose link header the programs cannot read.
    #[error(
        "network device {0} has a link header that the wire guard cannot read: packet sockets pass there"
    )]
    UnknownHeader(u32),
}

/// How long a device may be there without the program.
pub const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The guard of one node. Dropping it leaves the programs attached.
#[derive(Debug)]
pub struct WireGuard {
    wire: Wire,
    metadata: MetadataAddr,
    host: Netns,
    metrics: Metrics,
    state: State,
    /// With `--wire-guard=on`: pending while a device is without the program.
    readiness: Option<(Readiness, Option<Pending>)>,
    node: NodeDevices,
    /// Of these, the ones that had the program at the last check.
    node_devices: BTreeSet<WireDevice>,
    pods: Pods,
    /// Devices that were logged as covered, or failures, are logged once.
    said: Option<String>,
    repairs: Repairs,
}

/// The wire guard's metrics.
#[derive(Debug, Default)]
pub struct Metrics {
    active: Gauge,
    devices: Family<[(&'static str, &'static str); 1], Gauge>,
    repairs: Counter,
}

const NODE: [(&str, &str); 1] = [("of", "node")];
const PODS: [(&str, &str); 1] = [("of", "pods")];

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let help = "Whether the wire guard's program is the first one on each network device that leads out of the node";
        registry.register("wire_guard_in_force", help, metrics.active.clone());
        let help = "Network devices with the wire guard's program, by owner (node, pods)";
        registry.register("wire_guard_devices", help, metrics.devices.clone());
        let help = "How often the wire guard's program was missing from a device, or behind another one, and was attached again";
        registry.register("wire_guard_repairs", help, metrics.repairs.clone());
        for of in [NODE, PODS] {
            drop(metrics.devices.get_or_create(&of));
        }
        metrics
    }
}

impl WireGuard {
    /// Creates a guard that has checked nothing yet. With `readiness`, the agent is not ready while a device
    /// is without the program.
    ///
    /// # Errors
    /// When the node's network namespace cannot be opened.
    pub fn new(
        wire: Wire,
        metadata: MetadataAddr,
        pods_cgroup: &Path,
        readiness: Option<Readiness>,
        registry: &mut Registry,
    ) -> io::Result<Self> {
        Ok(Self {
            wire,
            metadata,
            host: Netns::open(Path::new("/proc/self/ns/net"))?,
            metrics: Metrics::new(registry),
            state: State::default(),
            readiness: readiness.map(|readiness| (readiness, None)),
            node: NodeDevices::new(),
            node_devices: BTreeSet::new(),
            pods: Pods::new(pods_cgroup),
            said: None,
            repairs: Repairs::default(),
        })
    }

    /// The state that `app` reads.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Looks at all devices from time to time, for ever.
    ///
    /// # Cancel safety
    /// Safe: a check does not await, and its changes are complete when it ends.
    pub async fn run(mut self) {
        loop {
            sleep(LOOK_EVERY).await;
            // The check runs here and not on another thread: when this task is stopped, nothing may write any
            // longer.
            block_in_place(|| self.look());
        }
    }

    /// Attaches the program to devices without it, and returns whether all have it. A failure is logged and
    /// not returned: the cgroup hooks protect without the guard. Blocks for some system calls per device, and
    /// a thread for each namespace that is queried.
    pub fn look(&mut self) -> bool {
        let mut look = Look::default();
        match self.wire.repair_links() {
            Ok(repaired) => look.repairs += repaired,
            Err(error) => {
                look.failures.push(WireGuardError::Cover { owner: "the node", source: error.into() })
            }
        }
        self.look_at_node(&mut look);
        self.pods.look(&mut self.wire, &self.host, &mut look);
        self.tell(&look)
    }

    fn look_at_node(&mut self, look: &mut Look) {
        const OWNER: &str = "the node";
        let refreshed = self.node.refresh(self.metadata);
        let known = std::mem::take(&mut self.node_devices);
        self.node_devices = look.cover(&mut self.wire, self.node.way_out(), &known, OWNER);
        // One may have moved into a pod.
        if known != self.node_devices || matches!(refreshed, Ok(true)) {
            self.pods.follow_node(self.node.links());
        }
        if let Err(source) = refreshed {
            look.failures.push(WireGuardError::List { owner: OWNER, source });
        }
    }

    fn tell(&mut self, look: &Look) -> bool {
        let is_active = look.failures.is_empty();
        let (node, pods) = (self.node_devices.len(), self.pods.devices());
        self.metrics.active.set(is_active.into());
        self.metrics.devices.get_or_create(&NODE).set(node as i64);
        self.metrics.devices.get_or_create(&PODS).set(pods as i64);
        self.metrics.repairs.inc_by(look.repairs as u64);
        if let Some(repairs) = self.repairs.add(look.repairs, Instant::now()) {
            warn!(
                repairs,
                "the wire guard's program was removed from devices or moved; attached it again (logged once a minute, with the number since)"
            );
        }
        let failure = look.failures.first().map(|error| chain(error));
        self.state.update(|standing| {
            standing.is_active = Some(is_active);
            standing.node_devices = node;
            standing.pod_devices = pods;
            standing.repairs += look.repairs as u64;
            standing.failure.clone_from(&failure);
        });
        if let Some((readiness, pending)) = &mut self.readiness {
            match (is_active, pending.take()) {
                (true, Some(waiting)) => waiting.ready(),
                (true, None) => {}
                (false, waiting) => *pending = waiting.or_else(|| Some(readiness.wait_for(CONDITION))),
            }
        }
        if failure != self.said {
            match &failure {
                Some(error) => error!(
                    error,
                    failures = look.failures.len(),
                    "the wire guard is not active on every device: packet sockets of pods may reach the metadata server"
                ),
                None => info!("the wire guard is active on every device"),
            }
            self.said = failure;
        }
        is_active
    }
}

/// The devices of the calling thread's namespace by which packets leave the node.
///
/// # Errors
/// [`WireGuardError::List`].
pub fn devices_of_node(metadata: MetadataAddr) -> Result<Vec<WireDevice>, WireGuardError> {
    let listed = uninterrupted(|| node::way_out_of_node(metadata));
    let way = listed.map_err(|source| WireGuardError::List { owner: "the node", source })?;
    Ok(way.devices)
}

/// The condition of readiness.
const CONDITION: &str = "the wire guard on every network device";

/// The result of one check of all devices.
#[derive(Debug, Default)]
struct Look {
    failures: Vec<WireGuardError>,
    repairs: usize,
}

impl Look {
    /// Attaches the program to devices of the calling thread's namespace, and returns those that have it.
    /// `known` had the program before.
    fn cover(
        &mut self,
        wire: &mut Wire,
        way: &WayOut,
        known: &BTreeSet<WireDevice>,
        owner: &'static str,
    ) -> BTreeSet<WireDevice> {
        self.failures.extend(way.unknown.iter().map(|index| WireGuardError::UnknownHeader(*index)));
        let mut covered = BTreeSet::new();
        for device in &way.devices {
            match wire.cover(*device) {
                Ok(Covering::Gone) => continue,
                Ok(Covering::Unchanged) => {}
                Ok(Covering::Moved) if !known.contains(device) => {} // an earlier agent's
                Ok(Covering::Attached | Covering::Moved) if known.contains(device) => self.repairs += 1,
                Ok(covering @ (Covering::Attached | Covering::Moved)) => {
                    info!(
                        device = device.index,
                        of = owner,
                        ?covering,
                        "the wire guard is active on a device"
                    );
                }
                Err(error) => {
                    debug!(
                        device = device.index,
                        error = chain(&error),
                        "cannot attach the wire guard to a device"
                    );
                    self.failures.push(WireGuardError::Cover { owner, source: error.into() });
                    continue;
                }
            }
            covered.insert(*device);
        }
        covered
    }
}
