//! `kube2ram boot-guard`: a systemd unit on the host that denies containers the metadata server from boot on,
//! before the kubelet starts, until an agent takes over. Depends on `datapath`, `guard` and `identity`;
//! called by `main`, `preflight` and `uninstall`.

mod binary;
mod host_root;
mod unit;

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

pub use self::host_root::HostRootError;
use self::{binary::is_static, host_root::HostRoot};
use crate::{
    datapath::{BootOutcome, BootSettings, DatapathError, apply_boot_guard},
    guard::{self, GuardError},
    identity::{MountError, find_cgroup_root},
    wire_guard::{self, WireGuardError},
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_service::telemetry::chain;

/// The binary, below the host's root.
const BINARY: (&str, &str) = ("opt/kube2ram/bin", "kube2ram");
/// The unit.
const UNIT: (&str, &str) = ("etc/systemd/system", "kube2ram-boot-guard.service");
/// What `systemctl enable` would make: where, for what is in its `[Install]` section.
const WANTED_BY: &str = "etc/systemd/system/multi-user.target.wants";
const REQUIRED_BY: &str = "etc/systemd/system/kubelet.service.requires";
/// The file in which an installation leaves its failure to the agent; empty when there was none.
const REPORT: &str = "boot-guard";
const MAX_REPORT_BYTES: u64 = 4096;
/// Each of them shows that the host has systemd, also if it does not run (in an image that is being built).
const SYSTEMD: [&str; 2] = ["usr/lib/systemd", "lib/systemd"];

/// What the guard does at boot; also the flags with which the unit calls [`apply`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The bpffs directory of the agent's pins.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount; found by looking when `None`.
    pub cgroup_root: Option<PathBuf>,
    /// Whether the netfilter rule becomes active as well.
    pub forward_guard: bool,
    /// The host's own cgroups, relative to the root.
    pub host_cgroups: Vec<PathBuf>,
    /// What is denied.
    pub metadata: MetadataAddr,
}

/// How the guard is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// What it does at boot.
    pub guard: Guard,
    /// The host's file system, as it is mounted here.
    pub host_root: PathBuf,
    /// The directory of the agent's pod in which a failure is reported, if one must not end the pod's start.
    pub report_to: Option<PathBuf>,
    /// Whether the kubelet does not start without the guard.
    pub required_by_kubelet: bool,
}

/// Why the boot guard is not installed, removed or active.
#[derive(Debug, thiserror::Error)]
pub enum BootGuardError {
    /// The cgroups are not where they should be.
    #[error("cannot find the cgroups")]
    Cgroups(#[source] MountError),
    /// The programs are not attached.
    #[error("cannot activate the boot guard's programs")]
    Datapath(#[source] DatapathError),
    /// The network devices are not known.
    #[error("cannot find the devices by which packets leave this node")]
    WireGuard(#[source] WireGuardError),
    /// This binary needs libraries, which the host may not have.
    #[error(
        "this binary is not static and would not run on the host: use the one of the image, or build it with `cargo xtask build --release`"
    )]
    Dynamic,
    /// The programs are attached, but the netfilter rules are not active.
    #[error("cannot activate the netfilter rules; --forward-guard=off runs without them")]
    ForwardGuard(#[source] GuardError),
    /// A file of the host could not be read or written.
    #[error("cannot change the host's files")]
    HostRoot(#[source] HostRootError),
    /// The host has no systemd.
    #[error("{} has no systemd, the only init system that install supports: let the node's init run `kube2ram boot-guard apply`, with these flags, before the kubelet", .0.display())]
    NoSystemd(PathBuf),
    /// The running binary could not be read.
    #[error("cannot read this binary")]
    OwnBinary(#[source] io::Error),
}

/// What [`install`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// All is as it should be.
    Done {
        /// Whether it was not before.
        changed: bool,
    },
    /// Nothing, or not all. The agent reports it.
    Failed(String),
}

/// What [`remove`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    files: usize,
}

/// What [`apply`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied(BootOutcome);

/// Puts this very binary and the unit on the host, for the next boot. What is there as it should be is not
/// written again.
///
/// # Errors
/// [`BootGuardError`], unless the installation names a directory for the report. Each file is complete or
/// missing, and another run continues.
pub fn install(installation: &Installation) -> Result<Installed, BootGuardError> {
    let binary = fs::read("/proc/self/exe").map_err(BootGuardError::OwnBinary);
    let installed = binary.and_then(|binary| install_binary(&binary, installation));
    match &installation.report_to {
        Some(directory) => Ok(report(installed, directory)),
        None => installed,
    }
}

/// Leaves the outcome to the agent.
fn report(installed: Result<Installed, BootGuardError>, directory: &Path) -> Installed {
    let failure = installed.as_ref().err().map(|error| chain(error));
    if let Err(error) = fs::write(directory.join(REPORT), failure.as_deref().unwrap_or_default()) {
        // There is no log yet, and the pod's status shows the last line.
        return Installed::Failed(match failure {
            Some(failure) => {
                format!("{failure}; cannot report it to the agent in {}: {error}", directory.display())
            }
            None => format!("it is installed, but the agent cannot know: {}: {error}", directory.display()),
        });
    }
    installed.unwrap_or_else(|_| Installed::Failed(failure.unwrap_or_default()))
}

/// Why the boot guard could not be installed when this pod started, if an installation was tried then.
pub fn installation_failure(pod_dir: &Path) -> Option<String> {
    let file = fs::File::open(pod_dir.join(REPORT)).ok()?;
    let mut failure = String::new();
    io::Read::take(file, MAX_REPORT_BYTES).read_to_string(&mut failure).ok()?;
    (!failure.is_empty()).then_some(failure)
}

fn install_binary(binary: &[u8], installation: &Installation) -> Result<Installed, BootGuardError> {
    let Installation { guard, host_root, report_to: _, required_by_kubelet } = installation;
    if !is_static(binary) {
        return Err(BootGuardError::Dynamic);
    }
    let root = HostRoot::open(host_root).map_err(BootGuardError::HostRoot)?;
    let unit = unit::text(guard, *required_by_kubelet);
    let write = || {
        if !SYSTEMD.iter().any(|directory| root.exists(directory)) {
            return Ok(None);
        }
        let mut changed = root.write(BINARY, binary, 0o755)?;
        changed |= root.write(UNIT, unit.as_bytes(), 0o644)?;
        // Last: only what is whole is ever started.
        changed |= root.link((WANTED_BY, UNIT.1), &unit_from_beside())?;
        if *required_by_kubelet {
            changed |= root.link((REQUIRED_BY, UNIT.1), &unit_from_beside())?;
        } else {
            changed |= root.remove((REQUIRED_BY, UNIT.1))?;
        }
        Ok(Some(Installed::Done { changed }))
    };
    let installed = write().map_err(BootGuardError::HostRoot)?;
    installed.ok_or_else(|| BootGuardError::NoSystemd(host_root.clone()))
}

/// Removes what [`install`] put on the host. Attached programs stay attached until an agent takes over, or
/// until `kube2ram uninstall`.
///
/// # Errors
/// [`BootGuardError::HostRoot`]; another run continues.
pub fn remove(host_root: &Path) -> Result<Removed, BootGuardError> {
    let root = HostRoot::open(host_root).map_err(BootGuardError::HostRoot)?;
    let remove = || {
        let mut files = 0;
        // What starts it first.
        for file in [(REQUIRED_BY, UNIT.1), (WANTED_BY, UNIT.1), UNIT, BINARY] {
            files += usize::from(root.remove(file)?);
        }
        for directory in [REQUIRED_BY, "opt/kube2ram/bin", "opt/kube2ram"] {
            root.remove_empty(directory)?;
        }
        Ok(Removed { files })
    };
    remove().map_err(BootGuardError::HostRoot)
}

/// Whether the unit is on this machine. In a container this is unrelated to the host.
pub fn is_installed() -> bool {
    Path::new("/").join(UNIT.0).join(UNIT.1).exists()
}

/// Activates the guard now, unless an agent's programs are attached already.
///
/// # Errors
/// [`BootGuardError`]. After [`BootGuardError::ForwardGuard`] all but packets that the node would forward are
/// denied.
pub fn apply(guard: &Guard) -> Result<Applied, BootGuardError> {
    let cgroup_root = find_cgroup_root(guard.cgroup_root.as_deref()).map_err(BootGuardError::Cgroups)?;
    let settings = BootSettings {
        bpf_dir: guard.bpf_dir.clone(),
        cgroup_root,
        host_cgroups: guard.host_cgroups.clone(),
        metadata: guard.metadata,
        wire: wire_guard::devices_of_node(guard.metadata).map_err(BootGuardError::WireGuard)?,
    };
    let outcome = apply_boot_guard(&settings).map_err(BootGuardError::Datapath)?;
    if guard.forward_guard && matches!(outcome, BootOutcome::Active { .. }) {
        guard::install(guard.metadata).map_err(BootGuardError::ForwardGuard)?;
    }
    Ok(Applied(outcome))
}

/// The unit's path from a `.wants` directory.
fn unit_from_beside() -> String {
    format!("../{}", UNIT.1)
}

impl fmt::Display for Installed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = match self {
            Self::Done { changed: true } => "installed",
            Self::Done { changed: false } => "is installed already",
            Self::Failed(why) => {
                return write!(
                    f,
                    "the boot guard could not be installed: {why}. The agent starts all the same; from the next boot on, pods that start before it reach the node's role"
                );
            }
        };
        write!(
            f,
            "boot guard {done}: /{}/{}, /{}/{}, enabled; active from the next boot on (systemctl daemon-reload makes it known to this one)",
            BINARY.0, BINARY.1, UNIT.0, UNIT.1
        )
    }
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.files {
            0 => f.write_str("no boot guard was installed"),
            _ => f.write_str(
                "boot guard removed; from the next boot on, pods that start before the agent reach the node's role (kube2ram uninstall also detaches the programs that are active now)",
            ),
        }
    }
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            BootOutcome::AgentActive => f.write_str("an agent's programs are active; nothing to guard"),
            BootOutcome::Active { missing } if missing.is_empty() => f.write_str("boot guard active"),
            BootOutcome::Active { missing } => {
                write!(
                    f,
                    "boot guard active; these cgroups do not exist yet, so their tasks are denied as well: {missing:?}"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests;
