//! `sendmsg4`, `sendmsg6`: deny datagrams to the metadata server from sockets that never called connect(2).

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{
    abi::Counter,
    connection::{is_metadata6, v4_mapped},
};

use crate::{
    context::SockAddr,
    maps::{CONFIG, count},
};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn k2r_sendmsg4(context: SockAddrContext) -> i32 {
    judge(SockAddr::new(context).addr_be())
}

/// The kernel calls `sendmsg4` for an IPv6 socket that sends to a mapped address (Linux 5.10–6.18). The
/// address is also checked here, in case a kernel calls this hook instead.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn k2r_sendmsg6(context: SockAddrContext) -> i32 {
    let words = SockAddr::new(context).addr6_be();
    if let Some(addr_be) = v4_mapped(words) {
        return judge(addr_be);
    }
    if CONFIG.get(0).is_some_and(|config| !is_metadata6(&config.metadata_addr6_be, words)) {
        return ALLOW;
    }
    deny()
}

#[inline(always)]
fn judge(addr_be: u32) -> i32 {
    if CONFIG.get(0).is_some_and(|config| addr_be != config.metadata_addr_be) {
        return ALLOW;
    }
    deny()
}

#[inline(always)]
fn deny() -> i32 {
    count(Counter::DeniedMessage);
    DENY
}
