//! The network namespaces of pods' processes. Reads the pods' cgroup and procfs; called by `wire_guard`.
//!
//! The namespaces of all processes are searched, not only of each pod's first: a network card that a pod has
//! moved does not change the pod's identity, but it changes where packets leave.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
        socket_with, sockopt::set_socket_recv_buffer_size,
    },
};

use crate::{
    identity::child_cgroups,
    listeners::{Netns, NetnsId},
};

/// Reports when devices of its namespace change: the one in which it was created. It keeps the namespace
/// alive.
#[derive(Debug)]
pub(super) struct DeviceChanges(OwnedFd);

impl DeviceChanges {
    /// From now on.
    ///
    /// # Errors
    /// Netlink's.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        // One notice will do; a pod decides how many there are.
        set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
        bind(&socket, &SocketAddrNetlink::new(0, RTMGRP_LINK))?;
        Ok(Self(socket))
    }

    /// Whether it is among those of [`Notified::now`].
    pub(super) fn is_among(&self, notified: &HashSet<u64>) -> bool {
        notified.contains(&self.number())
    }

    /// Another one may have the same number once this one is closed.
    fn number(&self) -> u64 {
        self.0.as_raw_fd().unsigned_abs().into()
    }

    /// Whether something has changed since the last call, or may have.
    pub(super) fn have_happened(&self) -> bool {
        let mut have_happened = false;
        for _ in 0..NOTICES_MAX {
            match recv(&self.0, &mut [0; 1][..], RecvFlags::TRUNC) {
                Err(Errno::AGAIN) => return have_happened,
                // Notices were dropped, among others.
                Ok(_) | Err(_) => have_happened = true,
            }
        }
        true
    }
}

/// Many of these, of which it tells at once which have notices.
#[derive(Debug)]
pub(super) struct Notified(OwnedFd);

impl Notified {
    /// Of none yet.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Includes one, until it is dropped.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn add(&self, changes: &DeviceChanges) -> io::Result<()> {
        Ok(epoll::add(&self.0, &changes.0, EventData::new_u64(changes.number()), EventFlags::IN)?)
    }

    /// Those that may have notices, until these are read.
    pub(super) fn now(&self) -> HashSet<u64> {
        let mut events = Vec::with_capacity(NOTIFIED_MAX);
        // After an error, the next call reports the same.
        let _is_complete = epoll::wait(&self.0, spare_capacity(&mut events), Some(&Timespec::default()));
        events.into_iter().map(|event| event.data.u64()).collect()
    }
}

/// More are reported by the next call.
const NOTIFIED_MAX: usize = 1024;
/// include/uapi/linux/rtnetlink.h.
const RTMGRP_LINK: u32 = 1;
const RECEIVE_BUFFER: usize = 4096;
/// More are read at the next call.
const NOTICES_MAX: usize = 16;

/// The namespaces of the processes below `cgroup`, without the `host`'s, each by the directory of a process
/// in it.
///
/// # Errors
/// When the cgroup cannot be read, or descriptors run out. A process that has ended, or that may not be read,
/// is skipped; so are more namespaces than a node can have.
pub(super) fn of_pods(cgroup: &Path, host: NetnsId) -> io::Result<HashMap<NetnsId, PathBuf>> {
    let mut found = HashMap::new();
    let mut cgroups = VecDeque::from([cgroup.to_owned()]);
    for _ in 0..MAX_CGROUPS {
        let Some(cgroup) = cgroups.pop_front() else { break };
        for process in processes(&cgroup)? {
            match NetnsId::at(&process.join(NETNS)) {
                Ok(netns) if netns != host => {
                    found.entry(netns).or_insert(process);
                }
                Err(error) if is_exhausted(&error) => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
        cgroups.extend(child_cgroups(&cgroup));
    }
    Ok(found)
}

/// The namespace of a process, by its directory in procfs.
///
/// # Errors
/// When the process has ended, or may not be read.
pub(super) fn of_process(process: &Path) -> io::Result<Netns> {
    Netns::open(&process.join(NETNS))
}

/// Whether a process is in that namespace; also if that is unknown.
pub(super) fn is_in(process: &Path, netns: NetnsId) -> bool {
    match NetnsId::at(&process.join(NETNS)) {
        Ok(here) => here == netns,
        Err(error) => is_exhausted(&error),
    }
}

/// In the directory of a process.
const NETNS: &str = "ns/net";

/// The namespaces of all processes, without the `host`'s.
///
/// # Errors
/// When procfs cannot be read, or descriptors run out.
pub(super) fn of_all(host: NetnsId) -> io::Result<HashMap<NetnsId, Netns>> {
    let mut found = HashMap::new();
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        match of_process(&process.path()) {
            Ok(netns) if netns.id != host => {
                found.entry(netns.id).or_insert(netns);
            }
            Err(error) if is_exhausted(&error) => return Err(error),
            // Not a process, or it has ended.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(found)
}

/// Pods and containers, and what these make; nearest first.
const MAX_CGROUPS: usize = 16_384;
/// How much of a `cgroup.procs` is read: some 16 processes, of which a container's first is the first.
const MAX_PROCS_BYTES: u64 = 128;

/// The first processes of a cgroup, as directories of procfs: none when it was removed, or is a threaded
/// cgroup.
fn processes(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut text = String::new();
    let read = File::open(cgroup.join("cgroup.procs"))
        .and_then(|file| file.take(MAX_PROCS_BYTES).read_to_string(&mut text));
    match read {
        Err(error) if is_exhausted(&error) => return Err(error),
        Err(_) => return Ok(Vec::new()),
        Ok(_) => {}
    }
    // The last line may be cut.
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    Ok(text[..whole].lines().map(|pid| Path::new("/proc").join(pid)).collect())
}

/// Whether descriptors or memory have run out, which is unrelated to the process.
pub(super) fn is_exhausted(error: &io::Error) -> bool {
    [Some(libc::EMFILE), Some(libc::ENFILE), Some(libc::ENOMEM)].contains(&error.raw_os_error())
}
