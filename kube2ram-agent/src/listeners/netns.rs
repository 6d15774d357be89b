//! Network namespaces: which one a pod has, told by its processes, and how to listen inside of it. Blocks; depends on nothing of ours.
//! Called by `listeners`.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
pub(super) struct Netns {
    file: File,
    pub(super) id: NetnsId,
}

impl Netns {
    /// Does something inside. setns(2) changes the calling thread, so it is called on a thread that ends with it: there is no way back that could fail.
    pub(super) fn within<T: Send>(&self, task: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                task()
            })?;
            inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }

    /// One that has a name, as iproute2 gives them.
    #[cfg(test)]
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { id: NetnsId::of(file.metadata())?, file })
    }
}

/// What a pod's processes tell.
#[derive(Debug)]
pub(super) enum Found {
    /// Its processes may not be looked at: the agent lacks CAP_SYS_PTRACE, or a security module objects.
    Denied,
    /// Its processes cannot be seen: the agent's pid namespace is not the host's.
    Hidden,
    /// All are in the host's namespace: a hostNetwork pod, or one whose runtime has yet to move its first process.
    Hosts,
    /// It has no process.
    Nobody,
    /// Its own.
    Own(Netns),
}

/// The namespace of the oldest process outside of the host's namespace: the pause process, where there is one. (CRI-O keeps its monitors, which are
/// older and the host's, in the pod's cgroup.) A process that moved itself elsewhere can be it only where nothing older is left, and harms its own pod
/// alone, because the target holds for that pod's cgroup.
///
/// # Errors
/// When descriptors or memory run out: then nothing is known.
pub(super) fn of_pod(cgroup: &Path, host: NetnsId) -> io::Result<Found> {
    let (mut found, mut oldest) = (Found::Nobody, u64::MAX);
    let mut cgroups = VecDeque::from([(cgroup.to_owned(), 0)]);
    let mut left = MAX_CGROUPS;
    while let Some((cgroup, depth)) = cgroups.pop_front() {
        for pid in pids(&cgroup)? {
            if pid == 0 {
                if oldest == u64::MAX {
                    found = Found::Hidden;
                }
                continue;
            }
            let path = format!("/proc/{pid}/ns/net");
            let id = match NetnsId::of(fs::metadata(&path)) {
                Ok(id) => id,
                Err(error) => {
                    if error.kind() == io::ErrorKind::PermissionDenied && oldest == u64::MAX {
                        found = Found::Denied;
                    }
                    continue;
                }
            };
            if id == host {
                if matches!(found, Found::Nobody) {
                    found = Found::Hosts;
                }
                continue;
            }
            let Some(started) = started(pid).filter(|started| *started < oldest) else { continue };
            // Opened first, looked for again after: then the number was not another process's meanwhile.
            if let Ok(file) = File::open(&path)
                && let Ok(id) = NetnsId::of(file.metadata())
                && id != host
                && pids(&cgroup)?.contains(&pid)
            {
                (found, oldest) = (Found::Own(Netns { file, id }), started);
            }
        }
        if depth < MAX_DEPTH
            && let Ok(entries) = fs::read_dir(&cgroup)
        {
            let children = entries.filter_map(Result::ok).filter(is_directory).take(left);
            let before = cgroups.len();
            cgroups.extend(children.map(|entry| (entry.path(), depth + 1)));
            left -= cgroups.len() - before;
        }
    }
    Ok(found)
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
/// A container's cgroup is the pod's child; crun puts its processes one further down, systemd in a container another one or two.
const MAX_DEPTH: usize = 4;
/// How many cgroups of a pod are searched: containers may make more. Nearest first.
const MAX_CGROUPS: usize = 128;
/// How much of a `cgroup.procs` is read. The kernel lists a cgroup's first processes first.
const MAX_PROCS_BYTES: u64 = 4096;
/// `starttime` in proc_pid_stat(5), counted from behind the command's closing parenthesis, which ends the second field.
const START_TIME: usize = 22 - 3;

/// The processes in a cgroup: none when it is gone, or of the kind that holds only threads.
fn pids(cgroup: &Path) -> io::Result<Vec<u32>> {
    let mut text = String::new();
    let read = File::open(cgroup.join("cgroup.procs"))
        .and_then(|file| file.take(MAX_PROCS_BYTES).read_to_string(&mut text));
    if let Err(error) = read {
        let is_empty = [Errno::NOENT, Errno::NODEV, Errno::OPNOTSUPP]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
        return if is_empty { Ok(Vec::new()) } else { Err(error) };
    }
    // The last line may be cut.
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    Ok(text[..whole].lines().filter_map(|line| line.parse().ok()).collect())
}

/// When a process started, in ticks since boot.
fn started(pid: u32) -> Option<u64> {
    start_time(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

fn start_time(stat: &[u8]) -> Option<u64> {
    let command_end = stat.iter().rposition(|byte| *byte == b')')?;
    std::str::from_utf8(&stat[command_end + 1..]).ok()?.split_ascii_whitespace().nth(START_TIME)?.parse().ok()
}

fn is_directory(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_start_time_behind_any_command() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";

        for command in ["(sleep)", "(a b) S 9)", "(\u{fffd})", "()"] {
            assert_eq!(start_time(format!("12 {command} {rest}").as_bytes()), Some(777), "{command}");
        }
        for cut in ["", "12 (sleep", "12 (sleep) S 1 2"] {
            assert_eq!(start_time(cut.as_bytes()), None, "{cut}");
        }
    }

    #[test]
    fn a_process_knows_when_it_started() {
        let now = started(std::process::id()).unwrap();

        assert!(started(1).unwrap() <= now);
    }
}
