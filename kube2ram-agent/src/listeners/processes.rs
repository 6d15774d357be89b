//! The processes of a pod, and the pod's network namespace according to them. Blocks; depends on `netns`.
//! Called by `listeners`.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use rustix::io::Errno;

use super::netns::{Netns, NetnsId};
use crate::identity::child_cgroups;

/// A process, by its number in the host's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pid(u32);

impl Pid {
    /// Whether it is in that namespace. If it was a pod's oldest process there, it still is: later ones are
    /// younger, and one that has its number now, in the same namespace, proves as much.
    pub(super) fn is_in(self, netns: NetnsId) -> bool {
        NetnsId::at(Path::new(&format!("/proc/{}/ns/net", self.0))).is_ok_and(|here| here == netns)
    }
}

/// The network namespace of a pod, by its processes.
#[derive(Debug)]
pub(super) enum Found {
    /// The agent may not read its processes: it lacks CAP_SYS_PTRACE, or a security module denies it.
    Denied,
    /// Its processes cannot be seen: the agent's pid namespace is not the host's.
    Hidden,
    /// The host's namespace: a hostNetwork pod, or a pod whose runtime has not moved its first process yet.
    Hosts,
    /// It has no process but the runtime's: its containers are about to start, or have ended.
    Monitors,
    /// It has no process.
    Nobody,
    /// Its own, and the process that shows it.
    Own(Netns, Pid),
}

/// The namespace of the pod's oldest process: the pause process's, or the first container's where there is
/// none. The pod's sockets are created there, whatever namespaces its other processes create or enter,
/// because those processes are younger: everything that runs in a container starts after the container's
/// first process, which ends last. CRI-O's monitors are older, but belong to the host; they do not count.
///
/// A process that enters another namespace decides only if no older process is left. The target applies only
/// to that pod's cgroup, and only the connect hook leads to the listener: other processes in that namespace
/// cannot reach it.
///
/// # Errors
/// When descriptors or memory run out: then nothing is known.
pub(super) fn of_pod(cgroup: &Path, host: NetnsId) -> io::Result<Found> {
    of_pod_in(Path::new("/proc"), cgroup, host)
}

/// A container's cgroup is the pod's child; crun puts its processes one further down, systemd in a container
/// another one or two.
const MAX_DEPTH: usize = 4;
/// How many cgroups of a pod are searched: containers may make more. Nearest first.
const MAX_CGROUPS: usize = 128;
/// How much of a `cgroup.procs` is read. The kernel lists a cgroup's first processes first.
const MAX_PROCS_BYTES: u64 = 4096;
/// The name of the cgroups of CRI-O's monitors (conmon, conmon-rs), children of the pod's cgroup next to its
/// containers (cri-o/internal/config/cgmgr). Their mount namespace does not identify them: CRI-O may have its
/// own, and a privileged pod may enter the host's.
const MONITORS: &str = "crio-conmon-";
/// `starttime` in proc_pid_stat(5), counted from behind the command's closing parenthesis, which ends the
/// second field.
const START_TIME: usize = 22 - 3;

fn of_pod_in(procfs: &Path, cgroup: &Path, host: NetnsId) -> io::Result<Found> {
    let mut search = Search { procfs, host, found: Found::Nobody, oldest: u64::MAX };
    let mut cgroups = VecDeque::from([(cgroup.to_owned(), 0)]);
    let mut left = MAX_CGROUPS;
    while let Some((cgroup, depth)) = cgroups.pop_front() {
        let pids = pids(&cgroup)?;
        if depth == 1 && is_of_monitors(&cgroup) {
            search.pass_over(&pids);
            continue;
        }
        for pid in pids {
            search.look_at(pid, &cgroup)?;
        }
        if depth < MAX_DEPTH {
            let before = cgroups.len();
            cgroups.extend(child_cgroups(&cgroup).take(left).map(|child| (child, depth + 1)));
            left -= cgroups.len() - before;
        }
    }
    Ok(search.found)
}

/// What is found so far.
struct Search<'a> {
    procfs: &'a Path,
    host: NetnsId,
    found: Found,
    /// When the oldest process started; the greatest number before any process was read.
    oldest: u64,
}

impl Search<'_> {
    fn look_at(&mut self, pid: u32, cgroup: &Path) -> io::Result<()> {
        if pid == 0 {
            self.cannot_look(Found::Hidden);
            return Ok(());
        }
        let Some(looked) = self.look(&self.procfs.join(pid.to_string())).transpose() else { return Ok(()) };
        // Listed again: then the number was not another process's meanwhile, nor is it one that has just
        // ended, which the kernel denies, too.
        if !pids(cgroup)?.contains(&pid) {
            return Ok(());
        }
        match looked {
            Ok((started, netns)) => {
                let is_hosts = netns.id == self.host;
                // Start times are in hundredths of a second. Of two processes with the same time, the one in
                // the host's namespace counts: the host listener serves both.
                if started < self.oldest || is_hosts {
                    self.found = if is_hosts { Found::Hosts } else { Found::Own(netns, Pid(pid)) };
                }
                self.oldest = started;
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self.cannot_look(Found::Denied),
            Err(error) if is_one_of(&error, &[Errno::NOENT, Errno::SRCH]) => {} // it is about to go
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Start and namespace of a process, if none before is older.
    fn look(&self, process: &Path) -> io::Result<Option<(u64, Netns)>> {
        let stat = fs::read(process.join("stat"))?;
        let started = start_time(&stat).filter(|started| *started <= self.oldest);
        started.map(|started| Ok((started, Netns::open(&process.join("ns/net"))?))).transpose()
    }

    /// A process that can be read decides.
    fn cannot_look(&mut self, why: Found) {
        if self.oldest == u64::MAX {
            self.found = why;
        }
    }

    fn pass_over(&mut self, monitors: &[u32]) {
        if !monitors.is_empty() && matches!(self.found, Found::Nobody) {
            self.found = Found::Monitors;
        }
    }
}

fn is_of_monitors(cgroup: &Path) -> bool {
    cgroup.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(MONITORS.as_bytes()))
}

/// The processes in a cgroup: none when it was removed, or is a threaded cgroup.
fn pids(cgroup: &Path) -> io::Result<Vec<u32>> {
    let mut text = String::new();
    let read = File::open(cgroup.join("cgroup.procs"))
        .and_then(|file| file.take(MAX_PROCS_BYTES).read_to_string(&mut text));
    if let Err(error) = read {
        let is_empty = is_one_of(&error, &[Errno::NOENT, Errno::NODEV, Errno::OPNOTSUPP]);
        return if is_empty { Ok(Vec::new()) } else { Err(error) };
    }
    // The last line may be cut.
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    Ok(text[..whole].lines().filter_map(|line| line.parse().ok()).collect())
}

/// When a process started, in ticks since boot.
fn start_time(stat: &[u8]) -> Option<u64> {
    let command_end = stat.iter().rposition(|byte| *byte == b')')?;
    std::str::from_utf8(&stat[command_end + 1..]).ok()?.split_ascii_whitespace().nth(START_TIME)?.parse().ok()
}

fn is_one_of(error: &io::Error, errnos: &[Errno]) -> bool {
    errnos.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests;
