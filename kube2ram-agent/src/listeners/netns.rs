//! Network namespaces: how they are identified, and how to listen inside of one. Blocks; depends on
//! `datapath` for a pass and on `server::listener` for its buffers. Called by `listeners` and `processes`.
//! The only module that uses socket2.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
    time::Duration,
};

use kube2ram_common::abi::LISTENER_PORTS;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use kube2ram_cloud::upstream::PassGrant;
use kube2ram_service::listener::bound_buffers;

/// Device and inode of a namespace. Not reused while anything holds the namespace, and a listening socket
/// does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId(u64, u64);

impl NetnsId {
    /// The agent's own, which is the host's: its pod has `hostNetwork`.
    ///
    /// # Errors
    /// procfs's.
    pub fn own() -> io::Result<Self> {
        Self::of(fs::metadata("/proc/self/ns/net"))
    }

    /// The one that a file leads to, which is not held.
    ///
    /// # Errors
    /// As [`Netns::open`].
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        Self::of(fs::metadata(path))
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
    /// Runs a closure in the namespace. setns(2) changes the calling thread, so the closure runs on a thread
    /// that ends afterwards: the thread never has to return to its first namespace, which could fail.
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
    /// The kernel's; [`io::ErrorKind::PermissionDenied`] if the agent may not read the process.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { id: NetnsId::of(file.metadata())?, file })
    }
}

/// What listens in a namespace, at the loopback device.
#[derive(Debug)]
pub(super) struct Opened {
    /// The port of all.
    pub(super) port: u16,
    /// At 127.0.0.1.
    pub(super) v4: TcpListener,
    /// At `::1`, where the namespace has that.
    pub(super) v6: Option<TcpListener>,
    /// A socket that was made inside, to ask with.
    pub(super) inside: UdpSocket,
}

/// Listens in a namespace at the first port that is free: an application, or an agent that is about to end,
/// may have one of them.
///
/// At 127.0.0.1, because service meshes leave that address alone, and no other of 127.0.0.0/8.
pub(super) fn listen_in(netns: &Netns, pass: &dyn PassGrant) -> io::Result<Opened> {
    netns.within(|| {
        let (first, last) = LISTENER_PORTS;
        let mut taken = io::ErrorKind::AddrInUse.into();
        for port in first..=last {
            match listen_at((Ipv4Addr::LOCALHOST, port).into(), pass) {
                Ok(v4) => {
                    // If `::1` is not available, IPv6 sockets are redirected to the IPv4 listener.
                    let v6 = listen_at((Ipv6Addr::LOCALHOST, port).into(), pass).ok();
                    let inside = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                    return Ok(Opened { port, v4: v4.into(), v6: v6.map(TcpListener::from), inside });
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken = error,
                Err(error) => return Err(error),
            }
        }
        Err(taken)
    })
}

fn listen_at(addr: SocketAddr, pass: &dyn PassGrant) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    // Connections of an earlier agent in TIME_WAIT on the same address must not prevent the bind.
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        // The kernel accepts no packet for ::1 from another device (ipv6_rcv), and answers to a client that
        // has bound another address leave by that address's device.
        socket.set_only_v6(true)?;
    } else {
        // With route_localnet, which the pod can set, other hosts reach 127.0.0.1 through another device.
        socket.bind_device(Some(LOOPBACK))?;
    }
    bound_buffers(&socket)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    probe(addr, pass)?;
    // Accepts the probe's connection, so that no server has to. Rules in the pod may have redirected it
    // elsewhere.
    socket.set_read_timeout(Some(PROBE_TIMEOUT))?;
    socket.accept()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Dials a listener from within its namespace: if the loopback device is down or filtered, no pod may be
/// redirected to the listener. The socket has a pass, because the connect hook denies direct connections to
/// in-pod listeners.
fn probe(addr: SocketAddr, pass: &dyn PassGrant) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    pass.grant(socket.as_fd())?;
    socket.set_linger(Some(Duration::ZERO))?; // leaves no TIME_WAIT behind
    socket.connect_timeout(&addr.into(), PROBE_TIMEOUT)
}

/// The kernel's name for it in every namespace.
const LOOPBACK: &[u8] = b"lo";
/// The loopback device takes microseconds, and all other pods wait for one whose device drops packets.
const PROBE_TIMEOUT: Duration = Duration::from_millis(20);
/// As tokio's own listeners.
const BACKLOG: i32 = 1024;
