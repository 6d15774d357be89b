//! `getpeername4`, `getpeername6`: a client that was redirected to the in-pod listener sees the address it
//! asked for. Linux 5.8.
//!
//! At the host listener it sees the listener's address: no record is kept once the agent has accepted the
//! connection.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{
    abi::Config,
    connection::{LOOPBACK_BE, LOOPBACK6_BE, v4_mapped},
};

use crate::{context::SockAddr, maps::CONFIG, target::is_own_listener};

/// getpeername hooks cannot deny: the verifier accepts no other value.
const ALLOW: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn k2r_peer_name4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    if context.addr_be() == LOOPBACK_BE
        && let Some(config) = redirected(&context)
    {
        context.set_destination(config.metadata_addr_be, config.metadata_port_be);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn k2r_peer_name6(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    let words = context.addr6_be();
    if v4_mapped(words) == Some(LOOPBACK_BE) {
        if let Some(config) = redirected(&context) {
            context.set_mapped_destination(config.metadata_addr_be, config.metadata_port_be);
        }
    } else if words == LOOPBACK6_BE
        && let Some(config) = redirected(&context)
    {
        context.set_destination6(config.metadata_addr6_be, config.metadata_port_be);
    }
    ALLOW
}

/// The configuration, if the socket's peer is the listener of the calling pod.
#[inline(always)]
fn redirected(context: &SockAddr) -> Option<&'static Config> {
    if is_own_listener(context) { CONFIG.get(0) } else { None }
}
