//! Tests whether the programs see the sockets of pods: a child below the pods' cgroup connects to an address
//! that they refuse. No packet is sent either way. Called by `attach` and `upkeep`.

use std::{fs, io, net::SocketAddrV4, os::fd::AsFd as _, path::PathBuf, time::Duration};

use kube2ram_common::connection::PROBE_ADDR;

use super::{
    DatapathError, Settings,
    child::{Attempt, connect_in_child},
    io_error,
};
use crate::identity::{CgroupId, cgroup_id};

/// Any port will do.
const PROBE: SocketAddrV4 = SocketAddrV4::new(PROBE_ADDR, 9);

/// Returns whether a socket made by a task of the pods' is seen by the programs that redirect.
///
/// # Errors
/// [`DatapathError::Io`] when it cannot be determined.
pub(super) fn sees_pods(settings: &Settings) -> Result<bool, DatapathError> {
    // The agent's own cgroup is as good as any pod's, if it lies there.
    if settings.own_cgroup.starts_with(&settings.pods_cgroup) {
        return answer(connect_in_child(None, PROBE, Attempt::Datagram), settings);
    }
    let cgroup = ProbeCgroup::make(settings.pods_cgroup.join("kube2ram-probe"))?;
    let path = cgroup.0.join("cgroup.procs");
    let procs = fs::OpenOptions::new().write(true).open(&path).map_err(io_error("open", &path))?;
    answer(connect_in_child(Some(procs.as_fd()), PROBE, Attempt::Datagram), settings)
}

/// Connects to an address and closes again, in a child below the pods' cgroup. `before` is called with the
/// child's cgroup, whose name is no pod's and which no pod can enter. Blocks until the child has ended, but
/// no longer than `patience`, which counts whole seconds.
///
/// # Errors
/// [`DatapathError::Io`]: connect(2)'s error, or why there was no child.
pub fn dial_as_pod(
    settings: &Settings,
    to: SocketAddrV4,
    patience: Duration,
    before: impl FnOnce(CgroupId),
) -> Result<(), DatapathError> {
    let cgroup = ProbeCgroup::make(settings.pods_cgroup.join("kube2ram-dial"))?;
    before(cgroup_id(&cgroup.0).map_err(io_error("examine", &cgroup.0))?);
    let path = cgroup.0.join("cgroup.procs");
    let procs = fs::OpenOptions::new().write(true).open(&path).map_err(io_error("open", &path))?;
    let connected = connect_in_child(Some(procs.as_fd()), to, Attempt::Stream(patience));
    connected.and_then(|connected| connected).map_err(io_error("connect from", &cgroup.0))
}

fn answer(outcome: io::Result<io::Result<()>>, settings: &Settings) -> Result<bool, DatapathError> {
    let connected = outcome.map_err(io_error("probe from below", &settings.pods_cgroup))?;
    Ok(connected.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied))
}

/// A cgroup for the child, which no pod's name is like; removed at the end.
struct ProbeCgroup(PathBuf);

impl ProbeCgroup {
    fn make(path: PathBuf) -> Result<Self, DatapathError> {
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(io_error("create", &path)(error))
            }
            _ => Ok(Self(path)),
        }
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::debug!(%error, cgroup = %self.0.display(), "cannot remove the probe's cgroup"); // and is used again
        }
    }
}
