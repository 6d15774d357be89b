//! Socket options that lead a packet past the wire guard. The only ways to ask for that are setsockopt(2) and io_uring's
//! socket command, and both run these programs, whatever the protocol family.

use aya_ebpf::{macros::cgroup_sockopt, programs::SockoptContext};
use kube2ram_common::abi::Counter;

use crate::{
    context::SocketOption,
    maps::{CONFIG, count},
    pods::is_pods_task,
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// By the socket's cgroup: a pod's sockets, whoever calls.
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

/// By the calling task: a socket that was made outside of the pods and passed in.
#[cgroup_sockopt(setsockopt)]
pub(crate) fn k2r_task_option(context: SockoptContext) -> i32 {
    let context = SocketOption::new(context);
    // Without the array's element no program of ours is configured at all; this must not cut the host off.
    if context.skips_tc() && CONFIG.get(0).is_some_and(is_pods_task) {
        // Of a pod's own socket, too, which the other program has denied: both run.
        count(Counter::DeniedTask);
        return DENY;
    }
    context.leave_to_kernel();
    ALLOW
}
