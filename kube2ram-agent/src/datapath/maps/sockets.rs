//! What the kernel stores with single sockets: the record of an accepted connection, the cookie of a network
//! namespace, and the pass. `server` reads the records, `listeners` the cookies; `kube2ram-cloud` gets the
//! pass for its own sockets as a `PassGrant`.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{MapData, MapError, MapInfo, SkStorage};
use kube2ram_cloud::upstream::PassGrant;
use kube2ram_common::{abi::ConnectRecord, connection::PROBE_ADDR, names::map};

use super::open;
use crate::{
    datapath::{DatapathError, Origin, OriginError, Origins, pins::Pins, sys},
    identity::CgroupId,
};

/// Reads the records that the eBPF programs store with the sockets that the host listener accepts.
#[derive(Clone, Debug)]
pub struct AcceptedOrigins(Arc<SkStorage<MapData, ConnectRecord>>);

impl AcceptedOrigins {
    pub(in crate::datapath) fn open(pins: &Pins) -> Result<Self, DatapathError> {
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
    pub(in crate::datapath) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::NETNS).map(|cookies| Self(Mutex::new(cookies)))
    }

    /// The cookie of the namespace in which a socket was created. From Linux 5.14 on the kernel provides it.
    /// Before, the connect hook does; it runs for the agent's sockets if the agent's cgroup is below the
    /// pods'.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if neither provides it.
    pub fn of(&self, socket: &UdpSocket) -> io::Result<u64> {
        match sys::netns_cookie(socket) {
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
    pub(in crate::datapath) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let map_id = id_of_pinned(pins)?;
        Ok(Self { marks: Mutex::new(open(pins, map::PASS)?), map_id })
    }

    pub(in crate::datapath) fn is_of(&self, pins: &Pins) -> Result<bool, DatapathError> {
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
