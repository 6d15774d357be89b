//! Opens the pinned maps, and pins them again if their pins are missing. The typed views of what a map holds
//! are below: `configuration`, `targets`, `sockets`, `counters`. Called by `attach`, `repair` and `upkeep`.

mod configuration;
mod targets;
mod sockets;
mod counters;

use std::os::fd::OwnedFd;

use aya::maps::{Map, MapData, MapError};
use kube2ram_common::names::map;

use super::{
    DatapathError, io_error,
    pins::{Pins, ensure_pinned},
    sys::{object_id, open_pinned},
};

pub(super) use self::configuration::Configuration;
#[cfg(test)]
pub(crate) use self::counters::NoOutcomes;
pub use self::{
    counters::Counters,
    sockets::{AcceptedOrigins, NetnsCookies, PassMark},
    targets::{PodTarget, Targets},
};

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
