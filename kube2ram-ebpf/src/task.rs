//! The task gate, at the cgroup root: a pod's task must not use a socket that was made outside of the pods (passed over, or kept while its
//! process moved in). Which programs run is the socket's matter, so those on the pods' cgroup never see it; the calling task is what counts here.
//! And nobody, of a pod or not, is at a pod's listener but that pod.
//!
//! It runs after the pods' own programs, which have rewritten what is legitimate, so it only ever sees leftovers.

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

/// Mapped addresses are seen by `sendmsg4`.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn k2r_task_send6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context))
}

// Unlike below the pods, not knowing must not cut the host off: without the array's element no program of ours is configured at all.

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
