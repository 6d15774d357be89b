//! Typed views of the pinned maps. Called by `attach`; the views are handed to `server`, `cloud` and `admin`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, SkStorage};
use kube2ram_common::{
    abi::{CONFIG_KEEPS_OPEN, Config, ConnectRecord, Counter, DEFAULT_TARGET, FLAG_AMBIGUOUS, Target},
    connection::{addr_be, addr6_be, port_be},
    names::map,
};

use super::{
    AgentAddr, DatapathError, Former, HOST_LISTENER, ListenerId, Origin, OriginError, Origins, PassGrant,
    Settings, io_error,
    pins::{Pins, ensure_pinned},
    sys::{object_id, open_pinned},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::identity::{CgroupId, cgroup_id};

/// Opens by pin, which checks sizes against the kernel's map (`Ebpf::take_map` checks against our own object only).
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

    /// Pins it again if its pin is gone or another map's, and tells whether something was done.
    pub(super) fn repair(&self, pins: &Pins) -> Result<bool, DatapathError> {
        let is_ours = |pinned: &OwnedFd| object_id(pinned).map(|id| id == self.id);
        ensure_pinned(&self.map, &pins.map(self.name), is_ours)
    }
}

/// The configuration that today's cgroups and these settings ask for.
fn wanted_config(settings: &Settings) -> Result<Config, DatapathError> {
    let Settings { metadata, agent: AgentAddr(agent), pods_cgroup, .. } = settings;
    Ok(Config {
        pods_cgroup: cgroup_id(pods_cgroup).map_err(io_error("examine", pods_cgroup))?.0,
        metadata_addr6_be: metadata.v6.map_or([0; 4], addr6_be),
        metadata_addr_be: addr_be(*metadata.v4.ip()),
        agent_addr_be: addr_be(*agent.ip()),
        metadata_port_be: port_be(metadata.v4.port()),
        agent_port_be: port_be(agent.port()),
        flags: if settings.keeps_open { CONFIG_KEEPS_OPEN } else { 0 },
    })
}

/// What the kernel half must know of the node and the cloud.
pub(super) struct Configuration(Array<MapData, Config>);

impl Configuration {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::CONFIG).map(Self)
    }

    /// Writes it unless it is there, and tells whether something was done.
    pub(super) fn ensure(&mut self, settings: &Settings) -> Result<bool, DatapathError> {
        let failed = |what| move |source| DatapathError::Map { what, name: map::CONFIG, source };
        let wanted = wanted_config(settings)?;
        if self.0.get(&0, 0).map_err(failed("read"))? == wanted {
            return Ok(false);
        }
        self.0.set(0, wanted, 0).map_err(failed("write"))?;
        Ok(true)
    }
}

/// Where pods are redirected to, by the pod's cgroup. Remembers what it wrote, so that it can be written again.
#[derive(Clone, Debug)]
pub struct Targets(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    map: HashMap<MapData, u64, Target>,
    /// As many as the map has room for.
    wanted: BTreeMap<u64, Target>,
}

impl Targets {
    /// Opens the map. Where a former agent is gone, nobody listens any more, and all pods are sent to the host's listener.
    pub(super) fn open(pins: &Pins, host: AgentAddr, former: Former) -> Result<Self, DatapathError> {
        let mut written = Written { map: open(pins, map::TARGETS)?, wanted: BTreeMap::new() };
        if former == Former::HandsOver {
            written.adopt()?;
        }
        written.set(DEFAULT_TARGET, target(HOST_LISTENER, host.0))?;
        written.repair()?;
        Ok(Self(Arc::new(Mutex::new(written))))
    }

    /// Sends a pod's connections to a listener of its own, which must be listening.
    ///
    /// # Errors
    /// When the map is full, or the kernel refuses; what held for the pod before still does.
    pub fn insert(
        &self,
        pod: CgroupId,
        listener: ListenerId,
        addr: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        self.written().set(pod.0, target(listener, addr))
    }

    /// Sends the connections of pods without a listener of their own to the host's, at this address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn set_host(&self, host: AgentAddr) -> Result<(), DatapathError> {
        self.written().set(DEFAULT_TARGET, target(HOST_LISTENER, host.0))
    }

    /// Sends a pod's connections to the host's listener again. Call it before the pod's own is closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, pod: CgroupId) -> Result<(), DatapathError> {
        self.written().remove(pod.0)
    }

    /// Where a pod's connections go; `None` for the host's listener.
    pub fn of_pod(&self, pod: CgroupId) -> Option<SocketAddrV4> {
        let target = *self.written().wanted.get(&pod.0)?;
        Some(SocketAddrV4::new(target.addr_be.to_ne_bytes().into(), u16::from_be(target.port_be)))
    }

    /// Compares the map with what was written, and makes it so: tells how many entries were missing, altered or somebody else's.
    pub(super) fn repair(&self) -> Result<usize, DatapathError> {
        self.written().repair()
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn target(listener: ListenerId, addr: SocketAddrV4) -> Target {
    Target { listener: listener.0, addr_be: addr_be(*addr.ip()), port_be: port_be(addr.port()), reserved: 0 }
}

impl Written {
    /// Takes what another agent wrote for its own.
    fn adopt(&mut self) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { what: "read", name: map::TARGETS, source };
        self.wanted = self.map.iter().collect::<Result<_, _>>().map_err(failed)?;
        Ok(())
    }

    fn set(&mut self, cgroup: u64, target: Target) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { what: "write", name: map::TARGETS, source };
        self.map.insert(cgroup, target, 0).map_err(failed)?;
        self.wanted.insert(cgroup, target);
        Ok(())
    }

    fn remove(&mut self, cgroup: u64) -> Result<(), DatapathError> {
        match self.map.remove(&cgroup) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
            Ok(()) => {}
            Err(source) => {
                return Err(DatapathError::Map { what: "remove from", name: map::TARGETS, source });
            }
        }
        self.wanted.remove(&cgroup);
        Ok(())
    }

    fn repair(&mut self) -> Result<usize, DatapathError> {
        let failed = |source| DatapathError::Map { what: "read", name: map::TARGETS, source };
        let found = self.map.keys().collect::<Result<BTreeSet<_>, _>>().map_err(failed)?;
        let mut repaired = 0;
        // First, because they take the room of those that are missing.
        for cgroup in found.iter().filter(|cgroup| !self.wanted.contains_key(cgroup)) {
            let failed = |source| DatapathError::Map { what: "remove from", name: map::TARGETS, source };
            self.map.remove(cgroup).map_err(failed)?;
            repaired += 1;
        }
        for (cgroup, target) in &self.wanted {
            if found.contains(cgroup) && self.map.get(cgroup, 0).map_err(failed)? == *target {
                continue;
            }
            let failed = |source| DatapathError::Map { what: "write", name: map::TARGETS, source };
            self.map.insert(*cgroup, *target, 0).map_err(failed)?;
            repaired += 1;
        }
        Ok(repaired)
    }
}

/// Reads the records that the kernel half leaves with the sockets of one listener.
#[derive(Clone, Debug)]
pub struct AcceptedOrigins {
    records: Arc<SkStorage<MapData, ConnectRecord>>,
    listener: ListenerId,
    /// The key of the listener's target.
    target_cgroup: u64,
}

impl AcceptedOrigins {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let records = Arc::new(open(pins, map::ACCEPTED)?);
        Ok(Self { records, listener: HOST_LISTENER, target_cgroup: DEFAULT_TARGET })
    }

    /// Reads those of a pod's own listener instead.
    #[must_use]
    pub fn of_pod(&self, pod: CgroupId, listener: ListenerId) -> Self {
        Self { records: Arc::clone(&self.records), listener, target_cgroup: pod.0 }
    }
}

impl Origins for AcceptedOrigins {
    fn origin_of(&self, socket: BorrowedFd<'_>) -> Result<Origin, OriginError> {
        let record = self.records.get(&socket.as_raw_fd(), 0).map_err(|error| match error {
            MapError::KeyNotFound => OriginError::Unvouched,
            error => OriginError::Read(io::Error::other(error)),
        })?;
        if record.flags & FLAG_AMBIGUOUS != 0 || record.cgroup == 0 {
            return Err(OriginError::Ambiguous);
        }
        // Two independent facts: which listener, and under which pod's cgroup the caller's was found.
        if record.listener != self.listener.0 || record.target_cgroup != self.target_cgroup {
            return Err(OriginError::Misdirected);
        }
        Ok(Origin { cgroup: CgroupId(record.cgroup), tgid: record.tgid })
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

/// The kernel half's counters.
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
    let help = "What the kernel half did, by outcome.";
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
