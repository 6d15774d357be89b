//! Whether a task is a pod's, and which cgroup stands for that pod; told by the ids of the task's ancestors. Called by `connect` and `task`.

use kube2ram_common::abi::{Config, MAX_CGROUP_LEVEL};

use crate::context::current_ancestor_cgroup;

/// The level of the pods' cgroup, if the calling task is below it. By id on every level rather than at a level that user space tells: in a nested
/// node, paths do not begin at the kernel's root.
#[inline(always)]
pub(crate) fn level_of_pods(config: &Config) -> Option<i32> {
    let mut level = 1;
    while level <= MAX_CGROUP_LEVEL {
        let cgroup = current_ancestor_cgroup(level);
        if cgroup == config.pods_cgroup {
            return Some(level);
        }
        if cgroup == 0 {
            break;
        }
        level += 1;
    }
    None
}

/// The cgroup whose share a connection of the calling task counts against: two levels below that of the pods. This is the pod or, without a level for
/// its quality of service, one of its containers; a container makes cgroups only further below.
#[inline(always)]
pub(crate) fn accountable_cgroup(config: &Config) -> u64 {
    let Some(level) = level_of_pods(config) else { return 0 };
    let cgroup = current_ancestor_cgroup(level + 2);
    if cgroup != 0 {
        return cgroup;
    }
    current_ancestor_cgroup(level + 1)
}
