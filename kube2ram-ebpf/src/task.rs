//! The task gate, at the cgroup root: denies a pod's task a socket that was created outside of the pods
//! (passed in, or kept while its process moved in). The kernel chooses programs by the socket's cgroup, so
//! the programs on the pods' cgroup do not run for such a socket. The gate checks the calling task instead.
//! It also denies every connection to an in-pod listener that its pod's own programs did not redirect there.
//!
//! It runs after the programs on the pods' cgroup, which have rewritten all legitimate connections.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{
    abi::{Config, Counter},
    connection::{is_loopback, is_loopback6, is_metadata6, v4_mapped},
};

use crate::{
    context::SockAddr,
    maps::{CONFIG, count},
    pods::is_pods_task,
    target::{has_pass, is_denied_leftover},
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_task_conn4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    let addr_be = context.addr_be();
    if is_loopback(addr_be) && is_denied_leftover(&context) { DENY } else { judge(&context, addr_be) }
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_task_conn6(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    let words = context.addr6_be();
    let is_loopback = match v4_mapped(words) {
        Some(addr_be) => is_loopback(addr_be),
        None => is_loopback6(words),
    };
    if is_loopback && is_denied_leftover(&context) { DENY } else { judge6(&context) }
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn k2r_task_send4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, context.addr_be())
}

/// For mapped addresses the kernel calls `sendmsg4`.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn k2r_task_send6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context))
}

// Unlike on the pods' cgroup, a missing configuration must not cut the host off: without the array's element
// the programs are not configured.

#[inline(always)]
fn judge(context: &SockAddr, addr_be: u32) -> i32 {
    let Some(config) = CONFIG.get(0) else { return ALLOW };
    if addr_be == config.metadata_addr_be { judge_task(context, config) } else { ALLOW }
}

#[inline(always)]
fn judge6(context: &SockAddr) -> i32 {
    let words = context.addr6_be();
    if let Some(addr_be) = v4_mapped(words) {
        return judge(context, addr_be);
    }
    let Some(config) = CONFIG.get(0) else { return ALLOW };
    if is_metadata6(&config.metadata_addr6_be, words) { judge_task(context, config) } else { ALLOW }
}

#[inline(always)]
fn judge_task(context: &SockAddr, config: &Config) -> i32 {
    if !is_pods_task(config) || has_pass(context) {
        return ALLOW;
    }
    count(Counter::DeniedTask);
    DENY
}
