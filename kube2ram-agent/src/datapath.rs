//! The user-space side of the eBPF programs: loads, pins and attaches them, and reads the records of
//! connections. The only module that uses aya. Called by `app` (attach) and `server` (origin of an accepted
//! connection).

mod attach;
mod attachment;
mod boot;
mod child;
mod fill_levels;
mod links;
mod load;
mod log;
mod maps;
mod other_installation;
mod pins;
mod attachment_points;
mod probe;
mod remove;
mod repair;
mod sys;
mod tcx;
mod trees;
mod upkeep;
mod wire;

use std::{
    io,
    net::SocketAddrV4,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

#[cfg(test)]
pub(crate) use self::fill_levels::NoEntries;
#[cfg(test)]
pub(crate) use self::maps::NoOutcomes;
pub(crate) use self::tcx::has_ingress_programs;
pub use self::{
    attach::{Datapath, Outgoing, Settings},
    attachment::{Attachment, attachments, connect_programs},
    attachment_points::Mode,
    boot::{BootGuard, BootOutcome, BootSettings, apply_boot_guard, boot_guard},
    fill_levels::{FillLevel, FillLevels},
    load::kernel_version,
    maps::{AcceptedOrigins, Counters, NetnsCookies, PassMark, PodTarget, Targets},
    other_installation::{OtherInstallation, other_installation},
    pins::{Lock, check_bpffs},
    probe::dial_as_pod,
    remove::{Removed, remove},
    repair::{Drift, Found},
    wire::{Covering, LinkHeader, Wire, WireDevice, WireHook, uncover},
};
use crate::identity::{CgroupId, PodUid};
use kube2ram_common::abi::ABI_VERSION;

/// The log target of the eBPF programs' verdicts.
pub const VERDICTS: &str = "kube2ram::kernel";

/// Who is behind one accepted connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod: the listener is in that pod's network namespace, on the loopback device.
    Pod(PodUid),
    /// The task that called connect(2), as the eBPF programs recorded it. It may be in a nested cgroup of a
    /// container.
    Task(CgroupId),
}

/// Why a connection has no origin.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// Two sockets claimed one 4-tuple, or the record was lost: the connection has no usable record.
    #[error("ambiguous connection")]
    Ambiguous,
    /// Reading the socket's storage failed.
    #[error("cannot read the origin of a connection")]
    Read(#[source] io::Error),
    /// No connect hook has recorded the connection: it was not redirected but dialled directly.
    #[error("no connect hook has recorded this connection")]
    Unvouched,
}

/// Returns the origin of an accepted connection. The only interface between the kernel's records and the
/// server.
pub trait Origins: Send + Sync + 'static {
    /// Reads the origin of an accepted socket.
    ///
    /// # Errors
    /// [`OriginError::Unvouched`] when the kernel did not mark it; any error must end in a denial.
    fn origin_of(&self, socket: BorrowedFd<'_>) -> Result<Origin, OriginError>;
}

/// The origins of an in-pod listener. The connect hook redirects only that pod to it, and nothing else can
/// reach it: every connection is the pod's.
#[derive(Debug)]
pub struct PodOrigin(pub PodUid);

impl Origins for PodOrigin {
    fn origin_of(&self, _: BorrowedFd<'_>) -> Result<Origin, OriginError> {
        Ok(Origin::Pod(self.0.clone()))
    }
}

/// Why the eBPF programs are not attached. Every message names a remedy, if there is one.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// A program could not be attached.
    #[error("cannot attach {program} to {}", cgroup.display())]
    Attach {
        /// Its name.
        program: &'static str,
        /// Where to.
        cgroup: PathBuf,
        /// aya's or the kernel's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The programs do not see what pods do, at the pods' cgroup nor at the root.
    #[error(
        "the programs do not see the sockets of pods: check --pods-cgroup; below Linux 5.15 boot with cgroup_no_v1=net_cls,net_prio"
    )]
    Blind,
    /// The pin directory is not on a bpf file system.
    #[error("{} is on no bpf file system: mount one there (mount -t bpf bpf /sys/fs/bpf), or set --bpf-dir", .0.display())]
    BpfFs(PathBuf),
    /// The lock that was handed over is another directory's.
    #[error("the running agent does not use {}: give both the same --bpf-dir", .0.display())]
    ForeignLock(PathBuf),
    /// A pinned map differs from what this agent would create, although its directory has this agent's
    /// layout.
    #[error("pinned map {} does not fit this agent; remove it when no other agent runs", .0.display())]
    ForeignMap(PathBuf),
    /// A file or directory operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel is older than 5.10.
    #[error("Linux {0} is too old: use 5.10 or newer")]
    Kernel(String),
    /// The kernel refused the object, or a program of it.
    #[error("cannot load {what} into the kernel")]
    Load {
        /// The object or program.
        what: String,
        /// aya's error; holds the verifier's log.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another agent holds the pins.
    #[error("another agent uses {}", .0.display())]
    Locked(PathBuf),
    /// A map operation failed.
    #[error("cannot {what} map {name}")]
    Map {
        /// What was tried.
        what: &'static str,
        /// The map.
        name: &'static str,
        /// aya's error.
        #[source]
        source: aya::maps::MapError,
    },
    /// A network device has no program of the wire guard, or has it behind another one.
    #[error("cannot attach a program to egress of network device {index}")]
    Wire {
        /// Its index.
        index: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// This binary was built without the eBPF programs.
    #[error("this binary was built without the eBPF programs: build it with `cargo xtask build`")]
    NoObject,
}

/// Builds a `map_err` for a file operation.
fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DatapathError {
    move |source| DatapathError::Io { what, path: path.to_owned(), source }
}

/// The map layout of a set of pins. Sets of different layouts are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout(pub u32);

impl Layout {
    /// The one of this build.
    pub const OURS: Self = Self(ABI_VERSION);
}

/// The address of the agent's listener on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentAddr(pub SocketAddrV4);
