//! How full the maps of the host listener are. Made by `attach`; `app` registers it, and each scrape of the
//! metrics reads it.

use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use kube2ram_common::{
    abi::{ConnectRecord, Handshake, MAX_HANDSHAKES, MAX_LEASES},
    names::map,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, gauge::ConstGauge},
};

use super::{
    DatapathError, io_error,
    pins::Pins,
    sys::{count_entries, open_pinned},
};

/// The maps in which connections to the host listener have entries.
#[derive(Debug)]
pub struct FillLevels {
    maps: Vec<(Kind, OwnedFd)>,
    /// What was read last, and when.
    last: Mutex<Option<(Instant, Vec<FillLevel>)>>,
}

/// How full one map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillLevel {
    /// The value of its metrics label.
    pub map: &'static str,
    /// How many entries it has.
    pub entries: usize,
    /// How many it may have.
    pub capacity: usize,
}

/// One of the maps.
#[derive(Clone, Copy, Debug)]
struct Kind {
    map: &'static str,
    name: &'static str,
    key_bytes: usize,
    value_bytes: usize,
    capacity: usize,
}

const KINDS: [Kind; 3] = [
    Kind {
        map: "clients",
        name: map::CLIENTS,
        key_bytes: size_of::<u64>(),
        value_bytes: size_of::<ConnectRecord>(),
        capacity: MAX_HANDSHAKES,
    },
    Kind {
        map: "handshakes",
        name: map::HANDSHAKES,
        key_bytes: size_of::<Handshake>(),
        value_bytes: size_of::<ConnectRecord>(),
        capacity: MAX_HANDSHAKES,
    },
    Kind {
        map: "shares",
        name: map::SHARES,
        key_bytes: size_of::<u64>(),
        value_bytes: size_of::<u64>(),
        capacity: MAX_LEASES,
    },
];

const READ_EVERY: Duration = Duration::from_secs(1);

impl FillLevels {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |kind: Kind| {
            let path = pins.map(kind.name);
            Ok((kind, open_pinned(&path).map_err(io_error("open", &path))?))
        };
        let maps = KINDS.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { maps, last: Mutex::default() })
    }

    /// Counts the entries: some 0.2 ms for each empty map, and 15 ms for a full one. What cannot be read is
    /// left out.
    pub fn read(&self) -> impl Iterator<Item = FillLevel> {
        self.maps.iter().filter_map(|(kind, map)| {
            let entries = count_entries(map, kind.key_bytes, kind.value_bytes).ok()?;
            Some(FillLevel { map: kind.map, entries, capacity: kind.capacity })
        })
    }

    /// The same once a second at most: any process of the node may ask for metrics, as often as it likes.
    fn read_seldom(&self) -> Vec<FillLevel> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, levels)) = last.as_ref().filter(|(read_at, _)| read_at.elapsed() < READ_EVERY) {
            return levels.clone();
        }
        let levels: Vec<_> = self.read().collect();
        *last = Some((Instant::now(), levels.clone()));
        levels
    }
}

impl Collector for FillLevels {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode(&self.read_seldom(), encoder)
    }
}

fn encode(levels: &[FillLevel], mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let help = "Entries in the kernel's maps of connections to the host listener, by map (clients: from connect(2) until the agent accepts; handshakes: from the SYN on; shares: leases of the pods' shares).";
    let name = "host_listener_map_entries";
    let mut entries = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for level in levels {
        ConstGauge::new(level.entries).encode(entries.encode_family(&[("map", level.map)])?)?;
    }
    let help = "The largest number of entries of these maps, by map (clients, handshakes, shares).";
    let name = "host_listener_map_capacity";
    let mut capacities = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for level in levels {
        ConstGauge::new(level.capacity).encode(capacities.encode_family(&[("map", level.map)])?)?;
    }
    Ok(())
}

/// As [`FillLevels`] of empty maps, without a kernel.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct NoEntries;

#[cfg(test)]
impl Collector for NoEntries {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let level = |kind: Kind| FillLevel { map: kind.map, entries: 0, capacity: kind.capacity };
        encode(&KINDS.map(level), encoder)
    }
}
