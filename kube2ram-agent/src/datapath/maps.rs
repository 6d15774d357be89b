//! Typed views of the pinned maps. Called by `attach`; the views are handed to `server`, `cloud` and `admin`.

use std::{
    fmt, io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, SkStorage};
use kube2ram_common::{
    abi::{Config, ConnectRecord, Counter, DEFAULT_TARGET, FLAG_AMBIGUOUS, Target},
    connection::{addr_be, port_be},
    names::map,
};

use super::{
    AgentAddr, DatapathError, Former, HOST_LISTENER, ListenerId, MetadataAddr, Origin, OriginError, Origins,
    PassGrant, Settings, io_error, pins::Pins,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::identity::{CgroupId, cgroup_id};

/// Opens by pin, which checks sizes against the kernel's map (`Ebpf::take_map` checks against our own object only).
fn open<T>(pins: &Pins, name: &'static str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let opened = MapData::from_pin(pins.map(name)).and_then(Map::from_map_data).and_then(T::try_from);
    opened.map_err(|source| DatapathError::Map { what: "open", name, source })
}

/// Writes what the kernel half must know; done before anything is attached.
pub(super) fn configure(pins: &Pins, settings: &Settings, former: Former) -> Result<(), DatapathError> {
    let failed = |name| move |source| DatapathError::Map { what: "write", name, source };
    let Settings { metadata: MetadataAddr(metadata), agent: AgentAddr(agent), pods_cgroup, .. } = settings;
    let config = Config {
        pods_cgroup: cgroup_id(pods_cgroup).map_err(io_error("examine", pods_cgroup))?.0,
        metadata_addr_be: addr_be(*metadata.ip()),
        agent_addr_be: addr_be(*agent.ip()),
        metadata_port_be: port_be(metadata.port()),
        agent_port_be: port_be(agent.port()),
        reserved: 0,
    };
    open::<Array<_, Config>>(pins, map::CONFIG)?.set(0, config, 0).map_err(failed(map::CONFIG))?;
    let mut targets = Targets::open(pins)?;
    targets.set(DEFAULT_TARGET, HOST_LISTENER, *agent)?;
    match former {
        Former::Gone => targets.forget_pods(),
        Former::HandsOver => Ok(()),
    }
}

/// Where pods are redirected to, by the pod's cgroup.
#[derive(Debug)]
pub struct Targets(HashMap<MapData, u64, Target>);

impl Targets {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::TARGETS).map(Self)
    }

    /// Sends a pod's connections to a listener of its own, which must be listening.
    ///
    /// # Errors
    /// When the map is full, or the kernel refuses; what held for the pod before still does.
    pub fn insert(
        &mut self,
        pod: CgroupId,
        listener: ListenerId,
        addr: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        self.set(pod.0, listener, addr)
    }

    /// Sends a pod's connections to the host's listener again. Call it before the pod's own is closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, pod: CgroupId) -> Result<(), DatapathError> {
        match self.0.remove(&pod.0) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(()) => Ok(()),
            Err(source) => Err(DatapathError::Map { what: "remove from", name: map::TARGETS, source }),
        }
    }

    fn set(&mut self, cgroup: u64, listener: ListenerId, addr: SocketAddrV4) -> Result<(), DatapathError> {
        let target = Target {
            listener: listener.0,
            addr_be: addr_be(*addr.ip()),
            port_be: port_be(addr.port()),
            reserved: 0,
        };
        let failed = |source| DatapathError::Map { what: "write", name: map::TARGETS, source };
        self.0.insert(cgroup, target, 0).map_err(failed)
    }

    /// Removes what a former agent left: nobody listens there any more.
    fn forget_pods(&mut self) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { what: "read", name: map::TARGETS, source };
        let cgroups = self.0.keys().collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let mut pods = cgroups.into_iter().filter(|cgroup| *cgroup != DEFAULT_TARGET);
        pods.try_for_each(|pod| self.remove(CgroupId(pod)))
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
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "What the kernel half did, by outcome";
        let mut family = encoder.encode_descriptor("kernel_outcomes", help, None, MetricType::Counter)?;
        for (label, value) in self.read() {
            ConstCounter::new(value).encode(family.encode_family(&[("outcome", label)])?)?;
        }
        Ok(())
    }
}
