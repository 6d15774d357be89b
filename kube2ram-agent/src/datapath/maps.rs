//! Typed views of the pinned maps. Called by `attach`; the views are handed to `server`, `cloud` and `admin`.

use std::{
    fmt, io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SkStorage};
use kube2ram_common::{
    abi::{Config, ConnectRecord, Counter, DEFAULT_TARGET, FLAG_AMBIGUOUS, Target},
    connection::{addr_be, port_be},
    names::map,
};

use super::{
    AgentAddr, DatapathError, HOST_LISTENER, MetadataAddr, Origin, OriginError, Origins, PassGrant, Settings,
    io_error, pins::Pins,
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
pub(super) fn configure(pins: &Pins, settings: &Settings) -> Result<(), DatapathError> {
    let failed = |name| move |source| DatapathError::Map { what: "write", name, source };
    let Settings { metadata: MetadataAddr(metadata), agent: AgentAddr(agent), pods_cgroup, .. } = settings;
    let config = Config {
        pods_cgroup: cgroup_id(pods_cgroup).map_err(io_error("examine", pods_cgroup))?.0,
        metadata_addr_be: addr_be(*metadata.ip()),
        metadata_port_be: port_be(metadata.port()),
        reserved: 0,
    };
    open::<Array<_, Config>>(pins, map::CONFIG)?.set(0, config, 0).map_err(failed(map::CONFIG))?;
    let target = Target {
        listener: HOST_LISTENER,
        addr_be: addr_be(*agent.ip()),
        port_be: port_be(agent.port()),
        reserved: 0,
    };
    open::<HashMap<_, u64, Target>>(pins, map::TARGETS)?
        .insert(DEFAULT_TARGET, target, 0)
        .map_err(failed(map::TARGETS))
}

/// Reads the records that the kernel half leaves with the sockets of one listener.
#[derive(Debug)]
pub struct AcceptedOrigins {
    records: SkStorage<MapData, ConnectRecord>,
    listener: u64,
}

impl AcceptedOrigins {
    pub(super) fn open(pins: &Pins, listener: u64) -> Result<Self, DatapathError> {
        Ok(Self { records: open(pins, map::ACCEPTED)?, listener })
    }
}

impl Origins for AcceptedOrigins {
    fn origin_of(&self, socket: BorrowedFd<'_>) -> Result<Origin, OriginError> {
        let record = self.records.get(&socket.as_raw_fd(), 0).map_err(|error| match error {
            MapError::KeyNotFound => OriginError::Unvouched,
            error => OriginError::Read(io::Error::other(error)),
        })?;
        if record.flags & FLAG_AMBIGUOUS != 0 || record.listener != self.listener || record.cgroup == 0 {
            return Err(OriginError::Ambiguous);
        }
        Ok(Origin { cgroup: CgroupId(record.cgroup), tgid: record.tgid })
    }
}

/// Grants the pass through the pinned map, which only root can open.
#[derive(Debug)]
pub struct PassMark(std::sync::Mutex<SkStorage<MapData, u32>>);

impl PassMark {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self(std::sync::Mutex::new(open(pins, map::PASS)?)))
    }
}

impl PassGrant for PassMark {
    fn grant(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut marks = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
