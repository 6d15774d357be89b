//! Whether a task is a pod's, and which cgroup stands for that pod, by the ids of the task's ancestor
//! cgroups. Called by `connect`, `task` and `wire`.
//!
//! Ids are compared on every level, not on a level that user space passes in: in a nested node, paths do not
//! begin at the kernel's root.

use kube2ram_common::abi::{Config, MAX_CGROUP_LEVEL};

use crate::context::{Packet, current_ancestor_cgroup};

/// A macro and not a closure, because LLVM would turn a closure into a separate function.
macro_rules! of_task {
    ($level:literal) => {
        current_ancestor_cgroup($level)
    };
}

/// Returns the result of `$found` for the level of the pods' cgroup. The levels are unrolled instead of a
/// loop: without CAP_PERFMON, the verifier of Linux 5.10 also explores speculative paths, and a loop never
/// ends on them.
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

/// Returns whether the calling task is below the pods' cgroup.
#[inline(always)]
pub(crate) fn is_pods_task(config: &Config) -> bool {
    #[inline(always)]
    const fn yes(_: i32) -> bool {
        true
    }
    search!(config, of_task, yes, false, 1 2 3 4 5 6 7 8 9 10);
}

/// Whether the socket that sends a packet belongs to a cgroup below the pods' cgroup. A TIME_WAIT socket has
/// no cgroup.
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

/// The cgroup whose share a connection of the calling task counts against: the pod's cgroup. It lies below
/// the pods' cgroup, or below the cgroup of its quality of service.
#[inline(always)]
pub(crate) fn accountable_cgroup(config: &Config) -> u64 {
    let level = level_of_pods(config);
    if level == 0 {
        return 0;
    }
    let cgroup = current_ancestor_cgroup(level + 1);
    let [first, second] = config.qos_cgroups;
    // The id 0 stands for no cgroup.
    if cgroup != 0 && (cgroup == first || cgroup == second) {
        current_ancestor_cgroup(level + 2)
    } else {
        cgroup
    }
}

/// The level below the root at which the calling task's ancestor cgroup is the pods' cgroup; 0 if none is.
#[inline(always)]
fn level_of_pods(config: &Config) -> i32 {
    #[inline(always)]
    const fn itself(level: i32) -> i32 {
        level
    }
    search!(config, of_task, itself, 0, 1 2 3 4 5 6 7 8 9 10);
}
