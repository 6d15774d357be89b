//! Denies the socket options with which a packet bypasses the wire guard. They can be set only by
//! setsockopt(2) and by io_uring's socket command. Both run these programs, for every protocol family.

use aya_ebpf::{macros::cgroup_sockopt, programs::SockoptContext};
use kube2ram_common::abi::Counter;

use crate::{
    context::SocketOption,
    maps::{CONFIG, count},
    pods::is_pods_task,
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// Checks the socket's cgroup: applies to a pod's sockets, whichever task calls.
#[cgroup_sockopt(setsockopt)]
pub(crate) fn k2r_option(context: SockoptContext) -> i32 {
    let context = SocketOption::new(context);
    if context.skips_tc() {
        count(Counter::DeniedSocketOption);
        return DENY;
    }
    context.leave_to_kernel();
    ALLOW
}

/// Checks the calling task: applies to a socket that was created outside of the pods and passed in.
#[cgroup_sockopt(setsockopt)]
pub(crate) fn k2r_task_option(context: SockoptContext) -> i32 {
    let context = SocketOption::new(context);
    // Without the array's element the programs are not configured. The host must not be cut off then.
    if context.skips_tc() && CONFIG.get(0).is_some_and(is_pods_task) {
        // Also counts a pod's own socket, which the other program has denied already: both programs run.
        count(Counter::DeniedTask);
        return DENY;
    }
    context.leave_to_kernel();
    ALLOW
}
