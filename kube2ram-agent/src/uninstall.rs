//! `kube2ram uninstall`: takes everything out of force on this node. Depends on `datapath` and `guard`; called by `main`.

use std::{fmt, path::Path};

use crate::{
    boot_guard,
    datapath::{self, DatapathError, Removed},
    guard::{self, GuardError},
};

/// What was removed.
#[derive(Debug)]
pub struct Report {
    kernel_half: Removed,
    forward_guard: bool,
    /// Which is a file of the host, to be removed by itself.
    boot_guard_installed: bool,
}

/// Why something may be left. Running it again goes on where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// The kernel half.
    #[error("cannot remove the kernel half")]
    Datapath(#[source] DatapathError),
    /// The netfilter rule.
    #[error("cannot remove the forward guard")]
    Guard(#[source] GuardError),
}

/// Removes programs, maps and the netfilter rule, whatever is there. The order keeps pods away from the metadata server until the last
/// steps, so that a crash in between leaves a node that fails closed.
///
/// # Errors
/// [`UninstallError`]; when an agent runs on the pins, nothing was removed.
pub fn uninstall(bpf_dir: &Path) -> Result<Report, UninstallError> {
    let kernel_half = datapath::remove(bpf_dir).map_err(UninstallError::Datapath)?;
    let forward_guard = guard::remove().map_err(UninstallError::Guard)?;
    Ok(Report { kernel_half, forward_guard, boot_guard_installed: boot_guard::is_installed() })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel_half: Removed { links, maps }, forward_guard, boot_guard_installed } = *self;
        if (links, maps, forward_guard) == (0, 0, false) {
            f.write_str("nothing of kube2ram was in force on this node")?;
        } else {
            let guard = if forward_guard { "removed" } else { "not there" };
            write!(
                f,
                "detached {links} programs, removed {maps} maps; forward guard: {guard}; pods of this node now reach the node's role"
            )?;
        }
        if boot_guard_installed {
            f.write_str("; the boot guard is still installed, and from the next boot on no pod reaches anything: kube2ram boot-guard remove")?;
        }
        Ok(())
    }
}
