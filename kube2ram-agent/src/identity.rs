//! Cgroup id → pod UID. Owns the cgroup2 mount and the names that kubelet and container runtimes give to cgroups.
//! Depends on nothing of ours; called by `server` once per connection.

use std::fmt;

/// A cgroup2 id: the 64-bit file handle of its directory. Never reused on a 64-bit kernel while it is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId(pub u64);

impl fmt::Display for CgroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a pod's cgroup is named after, in lower case: the pod's UID with dashes (`8-4-4-4-12` hex digits), or for a static pod
/// the 32 hex digits of its `kubernetes.io/config.hash`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Box<str>);

/// Why a connection's cgroup is not known to be a pod's.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The cgroup lies outside of every pod.
    #[error("cgroup {path} belongs to no pod")]
    NoPod {
        /// Its path below the cgroup2 mount.
        path: std::path::PathBuf,
    },
    /// The cgroup is gone (or never was): its id no longer opens.
    #[error("cgroup {0} is gone")]
    Gone(CgroupId),
    /// The kernel refused to open the cgroup by its id.
    #[error("cannot open cgroup {id}")]
    Open {
        /// The id.
        id: CgroupId,
        /// What open_by_handle_at(2) or readlink(2) said.
        #[source]
        source: std::io::Error,
    },
}

/// Tells which pod a cgroup belongs to.
pub trait CgroupPods: Send + Sync + 'static {
    /// The pod to which `cgroup` belongs, through the outermost pod segment of its path.
    ///
    /// # Errors
    /// Every error must end in a denial.
    fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError>;
}
