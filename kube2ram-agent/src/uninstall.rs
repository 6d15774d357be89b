//! `kube2ram uninstall`: removes all programs, maps and rules from this node. Depends on `datapath`, `guard`
//! and the files that agents leave in the state directory; called by `main`.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use crate::{
    boot_guard, control,
    datapath::{self, DatapathError, Removed},
    guard::{self, GuardError},
    handover, probe,
    server::token::Tokens,
    snapshot,
    wire_guard::{self, WireGuardError},
};
use kube2ram_service::state_dir::{StateDir, StateDirError};

/// What was removed.
#[derive(Debug)]
pub struct Report {
    ebpf_programs: Removed,
    forward_guard: bool,
    /// Which is a file of the host, to be removed by itself.
    boot_guard_installed: bool,
}

/// Why something may be left. Another run continues where this one stopped.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// An agent runs, possibly a standby agent, which would attach everything again.
    #[error("an agent runs on this node (it uses {}): delete the DaemonSet first", .0.display())]
    AgentRuns(PathBuf),
    /// The eBPF programs.
    #[error("cannot remove the eBPF programs")]
    Datapath(#[source] DatapathError),
    /// The netfilter rule.
    #[error("cannot remove the netfilter rules")]
    Guard(#[source] GuardError),
    /// What agents left in the state directory.
    #[error("cannot empty {}", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Filters on network devices.
    #[error("cannot remove the wire guard")]
    WireGuard(#[source] WireGuardError),
    /// The state directory.
    #[error("cannot use the state directory")]
    StateDir(#[source] StateDirError),
}

/// Removes programs, maps and the netfilter rule, whatever is there. The order keeps pods away from the
/// metadata server until the last steps, so that a crash in between leaves a node that fails closed.
///
/// # Errors
/// [`UninstallError`]; when an agent runs, nothing was removed.
pub fn uninstall(bpf_dir: &Path, state_dir: &Path) -> Result<Report, UninstallError> {
    let state_error = |source| UninstallError::State { path: state_dir.to_owned(), source };
    let state = state_dir.exists().then(|| StateDir::open(state_dir)).transpose();
    let state = state.map_err(UninstallError::StateDir)?;
    // Held until the end: no agent starts meanwhile.
    state.as_ref().map_or(Ok(()), StateDir::claim).map_err(|error| match error {
        StateDirError::InUse(path) => UninstallError::AgentRuns(path),
        error => UninstallError::StateDir(error),
    })?;
    let mut ebpf_programs = datapath::remove(bpf_dir).map_err(UninstallError::Datapath)?;
    ebpf_programs.links += wire_guard::remove_filters().map_err(UninstallError::WireGuard)?;
    let forward_guard = guard::remove().map_err(UninstallError::Guard)?;
    if let Some(state) = &state {
        empty(state).map_err(state_error)?;
    }
    Ok(Report { ebpf_programs, forward_guard, boot_guard_installed: boot_guard::is_installed() })
}

/// Removes what is known to be an agent's, and the directory unless there is more in it, or something is
/// mounted there.
fn empty(state: &StateDir) -> io::Result<()> {
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let sockets = [handover::SOCKET, control::SOCKET, control::DRAFT].map(str::to_owned);
    let files = [Tokens::KEY_FILE, snapshot::FILE_NAME, snapshot::DRAFT_NAME].map(str::to_owned);
    let names = fs::read_dir(state.path())?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let probes = names.filter(|name| name.starts_with(probe::SHARED_PREFIX));
    for name in probes.chain(sockets).chain(files) {
        match fs::remove_file(state.path().join(name)) {
            Err(error) if !missing(&error) => return Err(error),
            _ => {}
        }
    }
    match fs::remove_dir(state.path()) {
        Err(error) if may_stay(&error) => Ok(()),
        outcome => outcome,
    }
}

/// Whether the error means that the directory may stay: it is a volume's mount point (or on a read-only root
/// file system, whichever the kernel reports first), or not empty.
fn may_stay(error: &io::Error) -> bool {
    use io::ErrorKind::{DirectoryNotEmpty, ReadOnlyFilesystem, ResourceBusy};
    matches!(error.kind(), DirectoryNotEmpty | ReadOnlyFilesystem | ResourceBusy)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ebpf_programs: Removed { links, maps }, forward_guard, boot_guard_installed } = *self;
        if (links, maps, forward_guard) == (0, 0, false) {
            f.write_str("nothing of kube2ram was active on this node")?;
        } else {
            let guard = if forward_guard { "removed" } else { "not there" };
            write!(
                f,
                "detached {links} programs, removed {maps} maps; netfilter rules: {guard}; pods of this node now reach the node's role"
            )?;
        }
        if boot_guard_installed {
            f.write_str("; the boot guard is still installed, and from the next boot on no pod reaches anything: kube2ram boot-guard remove")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn an_empty_directory_may_stay_where_it_is_a_mount_point() {
        let stays = |error: Errno| may_stay(&error.into());

        // A volume's, and the same below `readOnlyRootFilesystem`.
        assert!(stays(Errno::BUSY) && stays(Errno::ROFS) && stays(Errno::NOTEMPTY));
        assert!(!stays(Errno::ACCESS) && !stays(Errno::IO) && !stays(Errno::NOENT));
    }
}
