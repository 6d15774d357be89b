//! cgroup v2 as a kubelet uses it: both naming schemes, and removal with everything inside.
//! Touches only directories that it is given. Called by `node` and its record.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::standin::hex_sha256;

/// Who names the cgroups: the kubelet's `cgroupDriver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// `kubepods/burstable/pod<uid>/<container id>`.
    #[default]
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/cri-containerd-<container
    /// id>.scope`.
    Systemd,
}

/// A pod's quality of service class, which is a level of the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Qos {
    /// No requests or limits.
    BestEffort,
    /// Some.
    #[default]
    Burstable,
    /// Limits for everything: directly below kubepods.
    Guaranteed,
}

impl CgroupDriver {
    pub(super) fn kubepods(self) -> &'static str {
        match self {
            Self::Cgroupfs => "kubepods",
            Self::Systemd => "kubepods.slice",
        }
    }

    /// A pod's directory, below kubepods.
    pub(super) fn pod(self, qos: Qos, uid: &str) -> PathBuf {
        let class = match qos {
            Qos::BestEffort => "besteffort",
            Qos::Burstable => "burstable",
            Qos::Guaranteed => "",
        };
        match (self, class) {
            (Self::Cgroupfs, class) => Path::new(class).join(format!("pod{uid}")),
            (Self::Systemd, "") => PathBuf::from(format!("kubepods-pod{}.slice", uid.replace('-', "_"))),
            (Self::Systemd, class) => Path::new(&format!("kubepods-{class}.slice"))
                .join(format!("kubepods-{class}-pod{}.slice", uid.replace('-', "_"))),
        }
    }

    /// A container's directory, below its pod's. Its id has 64 hexadecimal digits, as every runtime's.
    pub(super) fn container(self, pod_uid: &str, name: &str) -> String {
        let id = hex_sha256(format!("{pod_uid}/{name}").as_bytes());
        match self {
            Self::Cgroupfs => id,
            Self::Systemd => format!("cri-containerd-{id}.scope"),
        }
    }
}

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` next to v1.
pub(super) fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let cgroup2 = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|mount| mount.get(2) == Some(&"cgroup2"));
    cgroup2.and_then(|mount| mount.get(1).map(PathBuf::from)).context("cgroup v2 is not mounted")
}

/// How long killed processes may take to leave.
const REMOVE_DEADLINE: Duration = Duration::from_secs(60);

/// Kills every process in a cgroup and below, and removes the directories.
pub(super) fn remove(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + REMOVE_DEADLINE;
    loop {
        kill(directory)?;
        match remove_tree(directory) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("cannot remove {}", directory.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn kill(directory: &Path) -> Result<()> {
    for child in children(directory)? {
        kill(&child)?;
    }
    let Ok(processes) = fs::read_to_string(directory.join("cgroup.procs")) else { return Ok(()) };
    for pid in processes.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }

    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in children(directory)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => Ok(entries?
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_pods_as_each_driver_does() {
        let uid = "0b8c2a5e-1f6d-4f0e-9d1c-3a1d5f1f0001";
        let pod = |driver: CgroupDriver, qos| driver.pod(qos, uid).display().to_string();

        assert_eq!(pod(CgroupDriver::Cgroupfs, Qos::Burstable), format!("burstable/pod{uid}"));
        assert_eq!(pod(CgroupDriver::Cgroupfs, Qos::Guaranteed), format!("pod{uid}"));
        assert_eq!(
            pod(CgroupDriver::Systemd, Qos::BestEffort),
            "kubepods-besteffort.slice/kubepods-besteffort-pod0b8c2a5e_1f6d_4f0e_9d1c_3a1d5f1f0001.slice"
        );
        assert_eq!(
            pod(CgroupDriver::Systemd, Qos::Guaranteed),
            "kubepods-pod0b8c2a5e_1f6d_4f0e_9d1c_3a1d5f1f0001.slice"
        );
    }
}
