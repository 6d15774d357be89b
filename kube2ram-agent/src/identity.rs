//! Cgroup id → pod UID. Owns the cgroup2 mount and the names that kubelet and container runtimes give to
//! cgroups. Depends on nothing of ours; called by `server` once per connection, and by `app` to find the
//! mount.

mod cgroup;
mod cgroup_path;
mod live;
mod mount;
mod watch;

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

pub use self::{
    cgroup::{CgroupTree, cgroup_id, qos_cgroups},
    cgroup_path::pod_of_path,
    live::{live_pods, pod_cgroups},
    mount::{MountError, find_cgroup_root, find_pods_cgroup, is_populated, other_pods_cgroups, own_cgroup},
};
pub(crate) use self::{
    live::child_cgroups,
    watch::{Handle, Watch, WatchId},
};

/// A cgroup2 id: the 64-bit file handle of its directory. Never reused on a 64-bit kernel while it is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CgroupId(pub u64);

impl fmt::Display for CgroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a pod's cgroup is named after, in lower case: the pod's UID with dashes (`8-4-4-4-12` hex digits), or
/// for a static pod the 32 hex digits of its `kubernetes.io/config.hash`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Box<str>")]
pub struct PodUid(Arc<str>);

impl PodUid {
    /// Parses a UID as the API server, a kubelet or a cgroup name writes it: case and `_` for `-` (systemd
    /// reserves the dash) do not matter, anything else does.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.replace('_', "-").to_ascii_lowercase();
        let dashes_or_none = text.len() == uuid::fmt::Hyphenated::LENGTH || text.len() == CONFIG_HASH_LEN;
        // `Uuid` takes more forms (braces, `urn:`), none of them of these two lengths.
        (dashes_or_none && Uuid::from_str(&text).is_ok()).then(|| Self(text.into()))
    }

    /// The UID in lower case, with dashes unless it is a config hash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is a static pod's config hash, which the API server knows only through the mirror pod.
    pub fn is_config_hash(&self) -> bool {
        self.0.len() == CONFIG_HASH_LEN
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<Box<str>> for PodUid {
    type Error = &'static str;

    fn try_from(text: Box<str>) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("not a pod's UID")
    }
}

impl Serialize for PodUid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// An MD5 in hex: the kubelet's `applyDefaults` for pods that come from files or URLs.
const CONFIG_HASH_LEN: usize = 32;

/// Why a connection's cgroup is not known to be a pod's.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The cgroup lies outside of every pod.
    #[error("cgroup {path} belongs to no pod")]
    NoPod {
        /// Its path below the cgroup2 mount.
        path: std::path::PathBuf,
    },
    /// The cgroup was removed (or never existed): its id cannot be opened.
    #[error("cgroup {0} no longer exists")]
    Gone(CgroupId),
    /// The kernel refused to open the cgroup by its id.
    #[error("cannot open cgroup {id}")]
    Open {
        /// The id.
        id: CgroupId,
        /// The error of open_by_handle_at(2) or readlink(2).
        #[source]
        source: std::io::Error,
    },
}

/// Returns which pod a cgroup belongs to.
pub trait CgroupPods: Send + Sync + 'static {
    /// The pod to which `cgroup` belongs, through the outermost pod segment of its path.
    ///
    /// # Errors
    /// Every error must end in a denial.
    fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError>;
}
