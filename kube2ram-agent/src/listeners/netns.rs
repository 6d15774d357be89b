//! Network namespaces: how they are told apart, and how to listen inside of one. Blocks; depends on nothing of ours.
//! Called by `listeners` and `processes`.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, accept, bind, connect, getsockname, listen, socket_with,
        sockopt,
    },
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use serde::{Deserialize, Serialize};

/// Device and inode of a namespace. Not reused while anything holds the namespace, and a listening socket does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetnsId(u64, u64);

impl NetnsId {
    /// The agent's own, which is the host's: its pod has `hostNetwork`.
    ///
    /// # Errors
    /// procfs's.
    pub fn own() -> io::Result<Self> {
        Self::of(fs::metadata("/proc/self/ns/net"))
    }

    fn of(metadata: io::Result<fs::Metadata>) -> io::Result<Self> {
        metadata.map(|metadata| Self(metadata.dev(), metadata.ino()))
    }
}

/// A namespace that is held open.
#[derive(Debug)]
pub(crate) struct Netns {
    file: File,
    pub(crate) id: NetnsId,
}

impl Netns {
    /// Does something inside. setns(2) changes the calling thread, so it is called on a thread that ends with it: there is no way back that could fail.
    pub(crate) fn within<T: Send>(&self, task: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                task()
            })?;
            inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }

    /// For the kernel, which takes a namespace as a descriptor.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Holds the one that a file leads to: a process's, or one that has a name, as iproute2 gives them.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::PermissionDenied`] where the process may not be looked at.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { id: NetnsId::of(file.metadata())?, file })
    }
}

/// Listens on `addr` in a namespace, on a port of the kernel's choice: a fixed one would take that port from the pod, because whoever binds the
/// wildcard address needs it on every address. The ephemeral ports are what no program counts on.
pub(super) fn listen_in(netns: &Netns, addr: Ipv4Addr) -> io::Result<(TcpListener, SocketAddrV4)> {
    netns.within(|| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        // What a former agent's connections left on the same address must not stand in the way.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(addr, 0))?;
        listen(&socket, BACKLOG)?;
        let bound = SocketAddrV4::try_from(getsockname(&socket)?)?;
        probe(bound)?;
        // The probe's end, so that nobody has to serve it.
        accept(&socket).map(drop)?;
        Ok((TcpListener::from(socket), bound))
    })
}

/// Dials a listener from within its namespace: where the loopback device is down or filtered, a pod is not to be sent to it.
fn probe(addr: SocketAddrV4) -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PROBE_TIMEOUT))?;
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?; // leaves no TIME_WAIT behind
    match connect(&socket, &addr) {
        Err(Errno::INPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
        connected => Ok(connected?),
    }
}

/// The loopback device takes microseconds, and all other pods wait for one whose device drops packets.
const PROBE_TIMEOUT: Duration = Duration::from_millis(20);
/// As tokio's own listeners.
const BACKLOG: i32 = 1024;
