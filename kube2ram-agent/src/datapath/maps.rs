//! Typed views of the pinned maps. Called by `attach`; the views are handed to `server`, `cloud` and `admin`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, SkStorage},
};
use kube2ram_common::{
    abi::{CONFIG_KEEPS_OPEN, Config, ConnectRecord, Counter, TARGET_HAS_IPV6, Target},
    connection::{PROBE_ADDR, addr_be, addr6_be, port_be},
    names::map,
};

use super::{
    AgentAddr, DatapathError, Origin, OriginError, Origins, Outgoing, Settings, io_error,
    pins::{Pins, ensure_pinned},
    sys::{object_id, open_pinned},
};
use kube2ram_cloud::upstream::PassGrant;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::identity::{CgroupId, cgroup_id, qos_cgroups};

/// Opens by pin, which checks sizes against the kernel's map (`Ebpf::take_map` checks against our own object
/// only).
pub(super) fn open<T>(pins: &Pins, name: &'static str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let opened = MapData::from_pin(pins.map(name)).and_then(Map::from_map_data).and_then(T::try_from);
    opened.map_err(|source| DatapathError::Map { what: "open", name, source })
}

/// A map that is pinned. Open, so that it can be pinned again.
#[derive(Debug)]
pub(super) struct PinnedMap {
    name: &'static str,
    map: OwnedFd,
    id: u32,
}

impl PinnedMap {
    /// Opens all of them.
    pub(super) fn open_all(pins: &Pins) -> Result<Vec<Self>, DatapathError> {
        let open = |name| {
            let path = pins.map(name);
            let map = open_pinned(&path).map_err(io_error("open", &path))?;
            let id = object_id(&map).map_err(io_error("examine", &path))?;
            Ok(Self { name, map, id })
        };
        map::ALL.into_iter().map(open).collect()
    }

    /// Its name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Pins the map again if its pin is missing or another map's, and returns whether it did so.
    pub(super) fn repair(&self, pins: &Pins) -> Result<bool, DatapathError> {
        let is_ours = |pinned: &OwnedFd| object_id(pinned).map(|id| id == self.id);
        ensure_pinned(&self.map, &pins.map(self.name), is_ours)
    }
}

/// The configuration that today's cgroups and these settings ask for.
fn wanted_config(settings: &Settings, agent_netns: u64) -> Result<Config, DatapathError> {
    let Settings { metadata, agent: AgentAddr(agent), pods_cgroup, .. } = settings;
    let examine_error = || io_error("examine", pods_cgroup);
    Ok(Config {
        pods_cgroup: cgroup_id(pods_cgroup).map_err(examine_error())?.0,
        agent_netns,
        qos_cgroups: qos_cgroups(pods_cgroup).map_err(examine_error())?.map(|id| id.map_or(0, |id| id.0)),
        metadata_addr6_be: metadata.v6.map_or([0; 4], addr6_be),
        metadata_addr_be: addr_be(*metadata.v4.ip()),
        agent_addr_be: addr_be(*agent.ip()),
        metadata_port_be: port_be(metadata.v4.port()),
        agent_port_be: port_be(agent.port()),
        flags: if settings.keeps_open { CONFIG_KEEPS_OPEN } else { 0 },
    })
}

/// The configuration of the eBPF programs: node and cloud.
pub(super) struct Configuration {
    map: Array<MapData, Config>,
    agent_netns: u64,
}

impl Configuration {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self { map: open(pins, map::CONFIG)?, agent_netns: 0 })
    }

    /// Identifies the agent's network namespace, if it is not known yet. Below Linux 5.14 the programs
    /// provide its cookie: those of a previous agent, or this agent's after they are attached.
    pub(super) fn learn_agent_netns(&mut self, pins: &Pins) {
        if self.agent_netns != 0 {
            return;
        }
        let ask = || {
            NetnsCookies::open(pins)
                .map_err(io::Error::other)?
                .of(&UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?)
        };
        match ask() {
            Ok(cookie) => self.agent_netns = cookie,
            // Then a connection of the host's own can be taken for a pod's that has forged the host's
            // address.
            Err(error) => tracing::debug!(%error, "cannot identify the agent's own network namespace"),
        }
    }

    /// Writes the configuration unless the map already has it, and returns whether it did so.
    pub(super) fn ensure(&mut self, settings: &Settings) -> Result<bool, DatapathError> {
        let failed = |what| move |source| DatapathError::Map { what, name: map::CONFIG, source };
        let wanted = wanted_config(settings, self.agent_netns)?;
        if self.map.get(&0, 0).map_err(failed("read"))? == wanted {
            return Ok(false);
        }
        self.map.set(0, wanted, 0).map_err(failed("write"))?;
        Ok(true)
    }
}

/// The agent's listener in a pod's network namespace, at 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodTarget {
    /// The cookie of the namespace.
    pub netns: u64,
    /// The TCP port.
    pub port: u16,
    /// Whether it is at `::1` as well.
    pub has_ipv6: bool,
}

/// Pods with an in-pod listener, by the pod's cgroup. Remembers what it wrote, so that it can be written
/// again.
#[derive(Clone, Debug)]
pub struct Targets(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    map: HashMap<MapData, u64, Target>,
    /// Follows from it: which pod's a namespace is.
    namespaces: HashMap<MapData, u64, u64>,
    /// As many as the map has room for.
    wanted: BTreeMap<u64, Target>,
    /// The entries that a previous agent wrote.
    adopted: BTreeSet<u64>,
}

impl Targets {
    /// Opens the map. If the previous agent has ended, its listeners are closed, and all pods are redirected
    /// to the host listener.
    pub(super) fn open(pins: &Pins, outgoing: Outgoing) -> Result<Self, DatapathError> {
        let (map, namespaces) = (open(pins, map::TARGETS)?, open(pins, map::NAMESPACES)?);
        let mut written = Written { map, namespaces, wanted: BTreeMap::new(), adopted: BTreeSet::new() };
        if outgoing == Outgoing::HandsOver {
            written.adopt()?;
        }
        written.repair()?;
        Ok(Self(Arc::new(Mutex::new(written))))
    }

    /// Redirects a pod's connections to its in-pod listener, which must be listening.
    ///
    /// # Errors
    /// When the map is full, or the kernel refuses; what held for the pod before still does.
    pub fn insert(&self, pod: CgroupId, target: PodTarget) -> Result<(), DatapathError> {
        self.written().set(pod.0, target.into())
    }

    /// Redirects a pod's connections to the host listener again. Call it before the in-pod listener is
    /// closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, pod: CgroupId) -> Result<(), DatapathError> {
        self.written().remove(pod.0)
    }

    /// Redirects pods to the host listener if their target is still the outgoing agent's in-pod listener:
    /// those listeners are about to be closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget_adopted(&self) -> Result<(), DatapathError> {
        let mut written = self.written();
        let adopted = std::mem::take(&mut written.adopted);
        adopted.into_iter().try_for_each(|pod| written.remove(pod))
    }

    /// The target of a pod's in-pod listener, if it has one.
    pub fn of_pod(&self, pod: CgroupId) -> Option<PodTarget> {
        self.written().wanted.get(&pod.0).copied().map(PodTarget::from)
    }

    /// Compares the map with what was written, repairs it, and returns how many entries were missing, altered
    /// or foreign.
    pub(super) fn repair(&self) -> Result<usize, DatapathError> {
        self.written().repair()
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<PodTarget> for Target {
    fn from(target: PodTarget) -> Self {
        let flags = if target.has_ipv6 { TARGET_HAS_IPV6 } else { 0 };
        Self { netns: target.netns, port_be: port_be(target.port), flags, reserved: 0 }
    }
}

impl From<Target> for PodTarget {
    fn from(target: Target) -> Self {
        let has_ipv6 = target.flags & TARGET_HAS_IPV6 != 0;
        Self { netns: target.netns, port: u16::from_be(target.port_be), has_ipv6 }
    }
}

impl Written {
    /// Takes what another agent wrote for its own.
    fn adopt(&mut self) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { what: "read", name: map::TARGETS, source };
        self.wanted = self.map.iter().collect::<Result<_, _>>().map_err(failed)?;
        self.adopted = self.wanted.keys().copied().collect();
        Ok(())
    }

    fn set(&mut self, cgroup: u64, target: Target) -> Result<(), DatapathError> {
        // No other process may dial the listener before the pod is redirected to it.
        self.namespaces.insert(target.netns, cgroup, 0).map_err(failed("write", map::NAMESPACES))?;
        self.map.insert(cgroup, target, 0).map_err(failed("write", map::TARGETS))?;
        self.adopted.remove(&cgroup);
        let former = self.wanted.insert(cgroup, target);
        match former.filter(|former| former.netns != target.netns) {
            Some(former) => remove(&mut self.namespaces, former.netns, map::NAMESPACES),
            None => Ok(()),
        }
    }

    fn remove(&mut self, cgroup: u64) -> Result<(), DatapathError> {
        remove(&mut self.map, cgroup, map::TARGETS)?;
        match self.wanted.remove(&cgroup) {
            Some(former) => remove(&mut self.namespaces, former.netns, map::NAMESPACES),
            None => Ok(()),
        }
    }

    fn repair(&mut self) -> Result<usize, DatapathError> {
        let namespaces = self.wanted.iter().map(|(cgroup, target)| (target.netns, *cgroup)).collect();
        Ok(repair(&mut self.namespaces, &namespaces, map::NAMESPACES)?
            + repair(&mut self.map, &self.wanted, map::TARGETS)?)
    }
}

fn failed(what: &'static str, name: &'static str) -> impl Fn(MapError) -> DatapathError {
    move |source| DatapathError::Map { what, name, source }
}

fn remove<V: Pod>(
    map: &mut HashMap<MapData, u64, V>,
    key: u64,
    name: &'static str,
) -> Result<(), DatapathError> {
    match map.remove(&key) {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("remove from", name)),
    }
}

/// Repairs a map, and returns how many entries differed.
fn repair<V: Pod + PartialEq>(
    map: &mut HashMap<MapData, u64, V>,
    wanted: &BTreeMap<u64, V>,
    name: &'static str,
) -> Result<usize, DatapathError> {
    let found = map.keys().collect::<Result<BTreeSet<_>, _>>().map_err(failed("read", name))?;
    let mut repaired = 0;
    // These come first, because they take the room of missing entries.
    for key in found.iter().filter(|key| !wanted.contains_key(key)) {
        remove(map, *key, name)?;
        repaired += 1;
    }
    for (key, value) in wanted {
        if found.contains(key) && map.get(key, 0).map_err(failed("read", name))? == *value {
            continue;
        }
        map.insert(key, value, 0).map_err(failed("write", name))?;
        repaired += 1;
    }
    Ok(repaired)
}

/// Reads the records that the eBPF programs store with the sockets that the host listener accepts.
#[derive(Clone, Debug)]
pub struct AcceptedOrigins(Arc<SkStorage<MapData, ConnectRecord>>);

impl AcceptedOrigins {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::ACCEPTED).map(|records| Self(Arc::new(records)))
    }
}

impl Origins for AcceptedOrigins {
    fn origin_of(&self, socket: BorrowedFd<'_>) -> Result<Origin, OriginError> {
        let record = self.0.get(&socket.as_raw_fd(), 0).map_err(|error| match error {
            MapError::KeyNotFound => OriginError::Unvouched,
            error => OriginError::Read(io::Error::other(error)),
        })?;
        if record.ambiguous != 0 || record.established != 1 || record.cgroup == 0 {
            return Err(OriginError::Ambiguous);
        }
        Ok(Origin::Task(CgroupId(record.cgroup)))
    }
}

/// The cookies of network namespaces.
#[derive(Debug)]
pub struct NetnsCookies(Mutex<SkStorage<MapData, u64>>);

impl NetnsCookies {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::NETNS).map(|cookies| Self(Mutex::new(cookies)))
    }

    /// The cookie of the namespace in which a socket was created. From Linux 5.14 on the kernel provides it.
    /// Before, the connect hook does; it runs for the agent's sockets if the agent's cgroup is below the
    /// pods'.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if neither provides it.
    pub fn of(&self, socket: &UdpSocket) -> io::Result<u64> {
        match super::sys::netns_cookie(socket) {
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => self.by_hook(socket),
            told => told,
        }
    }

    fn by_hook(&self, socket: &UdpSocket) -> io::Result<u64> {
        let mut cookies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = socket.as_raw_fd();
        cookies.insert(&key, 0, 0).map_err(io::Error::other)?;
        // Any port will do: the hook refuses.
        let _refused = socket.connect((PROBE_ADDR, 9));
        match cookies.get(&key, 0).map_err(io::Error::other)? {
            0 => Err(io::ErrorKind::Unsupported.into()),
            cookie => Ok(cookie),
        }
    }
}

/// Grants the pass through the pinned map, which only root can open.
#[derive(Debug)]
pub struct PassMark {
    marks: Mutex<SkStorage<MapData, u32>>,
    map_id: u32,
}

impl PassMark {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let map_id = id_of_pinned(pins)?;
        Ok(Self { marks: Mutex::new(open(pins, map::PASS)?), map_id })
    }

    pub(super) fn is_of(&self, pins: &Pins) -> Result<bool, DatapathError> {
        Ok(id_of_pinned(pins)? == self.map_id)
    }
}

fn id_of_pinned(pins: &Pins) -> Result<u32, DatapathError> {
    let failed = |source| DatapathError::Map { what: "examine", name: map::PASS, source };
    MapInfo::from_pin(pins.map(map::PASS)).map(|info| info.id()).map_err(failed)
}

impl PassGrant for PassMark {
    fn grant(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.insert(&socket.as_raw_fd(), 1, 0).map_err(io::Error::other)
    }
}

/// The counters of the eBPF programs.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::COUNTERS).map(Self)
    }

    /// Label and value of each, summed over the CPUs; what cannot be read is left out.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Counter::ALL.iter().filter_map(|(counter, label)| {
            let values = self.0.get(&(*counter as u32), 0).ok()?;
            Some((*label, values.iter().sum()))
        })
    }
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.read()).finish()
    }
}

impl Collector for Counters {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_outcomes(self.read(), encoder)
    }
}

fn encode_outcomes(
    outcomes: impl Iterator<Item = (&'static str, u64)>,
    mut encoder: DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let help = "Decisions of the eBPF programs, by outcome.";
    let mut family = encoder.encode_descriptor("kernel_outcomes", help, None, MetricType::Counter)?;
    for (label, value) in outcomes {
        ConstCounter::new(value).encode(family.encode_family(&[("outcome", label)])?)?;
    }
    Ok(())
}

/// As [`Counters`] before anything happened, without a kernel.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct NoOutcomes;

#[cfg(test)]
impl Collector for NoOutcomes {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_outcomes(Counter::ALL.iter().map(|(_, label)| (*label, 0)), encoder)
    }
}
