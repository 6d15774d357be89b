//! Cgroup path → pod UID, by the names that the kubelet's cgroup drivers give. Pure: no I/O, no logs.
//! Depends on nothing of ours but [`PodUid`]; called by `identity::cgroup`.

use std::path::{Component, Path};

use super::PodUid;

/// The pod to which the cgroup `path` belongs, both it and `pods` (the kubelet's pods cgroup) being relative
/// to the same root.
///
/// Only the one or two segments directly below `pods` are read. A container may make cgroups below its own
/// and name them like another pod's, but it cannot make one up here: the outermost pod segment is the
/// kubelet's.
///
/// Names: the kubelet's `cgroup_manager_linux.go` (`ToCgroupfs`, `ToSystemd`) and systemd.slice(5).
pub fn pod_of_path(path: &Path, pods: &Path) -> Option<PodUid> {
    let driver = Driver::of(pods)?;
    let mut segments = path.strip_prefix(pods).ok()?.components().map(|segment| match segment {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let first = segments.next()??;
    if let Some(uid) = driver.pod(first, None) {
        return Some(uid);
    }
    let qos = QOS_CLASSES.into_iter().find(|qos| driver.is_qos(first, qos))?;
    driver.pod(segments.next()??, Some(qos))
}

/// Whether a child of the pods' cgroup, by the names of both, holds the pods of one quality of service.
pub(super) fn is_qos_cgroup(name: &str, pods: &Path) -> bool {
    Driver::of(pods).is_some_and(|driver| QOS_CLASSES.into_iter().any(|qos| driver.is_qos(name, qos)))
}

/// Guaranteed pods have no cgroup of their class in between.
pub(super) const QOS_CLASSES: [&str; 2] = ["besteffort", "burstable"];

/// How the kubelet spells a chain of cgroups.
enum Driver<'a> {
    /// `kubepods/burstable/pod<uid>`.
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice`: each slice repeats its
    /// parent's name.
    Systemd {
        /// The pods slice without its suffix: `kubepods`, or `kubelet-kubepods` below a `--cgroup-root`.
        stem: &'a str,
    },
}

impl<'a> Driver<'a> {
    fn of(pods: &'a Path) -> Option<Self> {
        let name = pods.file_name()?.to_str()?;
        Some(match name.strip_suffix(".slice") {
            Some(stem) => Self::Systemd { stem },
            None => Self::Cgroupfs,
        })
    }

    fn is_qos(&self, segment: &str, qos: &str) -> bool {
        match self {
            Self::Cgroupfs => segment == qos,
            Self::Systemd { stem } => slice_below(segment, stem) == Some(qos),
        }
    }

    fn pod(&self, segment: &str, qos: Option<&str>) -> Option<PodUid> {
        let name = match (self, qos) {
            (Self::Cgroupfs, _) => segment,
            (Self::Systemd { stem }, None) => slice_below(segment, stem)?,
            (Self::Systemd { stem }, Some(qos)) => {
                slice_below(segment, stem)?.strip_prefix(qos)?.strip_prefix('-')?
            }
        };
        PodUid::parse(name.strip_prefix("pod")?)
    }
}

/// `kubepods-burstable.slice` below `kubepods` → `burstable`.
fn slice_below<'a>(segment: &'a str, stem: &str) -> Option<&'a str> {
    segment.strip_suffix(".slice")?.strip_prefix(stem)?.strip_prefix('-')
}

#[cfg(test)]
mod tests;
