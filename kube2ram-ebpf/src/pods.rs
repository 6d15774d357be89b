//! Whether a task is a pod's, and which cgroup stands for that pod; told by the ids of the task's ancestors. Called by `connect`, `task` and `wire`.
//!
//! By id on every level rather than at a level that user space tells: in a nested node, paths do not begin at the kernel's root.

use kube2ram_common::abi::{Config, MAX_CGROUP_LEVEL};

use crate::context::{Packet, current_ancestor_cgroup};

/// Not a closure, which LLVM would make a function of its own.
macro_rules! of_task {
    ($level:literal) => {
        current_ancestor_cgroup($level)
    };
}

/// Returns what `$found` makes of the level of the pods' cgroup. Not a loop: 5.10 without CAP_PERFMON also follows what a processor may guess, and
/// no guess ever ends one.
macro_rules! search {
    ($config:ident, $ancestor:ident, $found:ident, $none:expr, $($level:literal)+) => {
        const LEVELS: &[i32] = &[$($level),+];
        const _: () = assert!(LEVELS[LEVELS.len() - 1] == MAX_CGROUP_LEVEL);
        $(
            let cgroup = $ancestor!($level);
            if cgroup == $config.pods_cgroup {
                return $found($level);
            }
            if cgroup == 0 {
                return $none;
            }
        )+
        return $none
    };
}

/// Tells whether the calling task is below the pods' cgroup.
#[inline(always)]
pub(crate) fn is_pods_task(config: &Config) -> bool {
    #[inline(always)]
    const fn yes(_: i32) -> bool {
        true
    }
    search!(config, of_task, yes, false, 1 2 3 4 5 6 7 8 9 10);
}

/// Whether the socket that sends a packet is of a cgroup below the pods'. A socket that is only half of one
/// (TIME_WAIT) has no cgroup.
#[inline(always)]
pub(crate) fn is_pods_packet(packet: &Packet, config: &Config) -> bool {
    #[inline(always)]
    const fn yes(_: i32) -> bool {
        true
    }
    macro_rules! of_packet {
        ($level:literal) => {
            packet.ancestor_cgroup($level)
        };
    }
    search!(config, of_packet, yes, false, 1 2 3 4 5 6 7 8 9 10);
}

/// The cgroup whose share a connection of the calling task counts against: the pod's, which lies below the pods' cgroup, or below that of its quality of service.
#[inline(always)]
pub(crate) fn accountable_cgroup(config: &Config) -> u64 {
    let level = level_of_pods(config);
    if level == 0 {
        return 0;
    }
    let cgroup = current_ancestor_cgroup(level + 1);
    let [first, second] = config.qos_cgroups;
    // No task has the cgroup 0, which stands for none.
    if cgroup != 0 && (cgroup == first || cgroup == second) {
        current_ancestor_cgroup(level + 2)
    } else {
        cgroup
    }
}

/// At which level below the root the calling task's ancestor is the pods' cgroup; 0 if it is none of them.
#[inline(always)]
fn level_of_pods(config: &Config) -> i32 {
    #[inline(always)]
    const fn itself(level: i32) -> i32 {
        level
    }
    search!(config, of_task, itself, 0, 1 2 3 4 5 6 7 8 9 10);
}
