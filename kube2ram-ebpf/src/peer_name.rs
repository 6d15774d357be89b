//! `getpeername4`, `getpeername6`: a redirected client sees the address it asked for. Linux 5.8.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{abi::ConnectRecord, connection::v4_mapped};

use crate::{
    context::SockAddr,
    maps::{CLIENTS, CONFIG},
};

/// getpeername hooks cannot deny: the verifier accepts no other value.
const ALLOW: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn k2r_peer_name4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    // A socket that asked for the IPv6 address can become an IPv4 one later (IPV6_ADDRFORM). It asked for no IPv4 address.
    if let Some(record) = redirected(&context, context.addr_be())
        && record.metadata_addr_be != 0
    {
        context.set_destination(record.metadata_addr_be, record.metadata_port_be);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn k2r_peer_name6(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    if let Some(addr_be) = v4_mapped(context.addr6_be())
        && let Some(record) = redirected(&context, addr_be)
    {
        if record.metadata_addr_be != 0 {
            context.set_mapped_destination(record.metadata_addr_be, record.metadata_port_be);
        } else if let Some(config) = CONFIG.get(0) {
            context.set_destination6(config.metadata_addr6_be, record.metadata_port_be);
        }
    }
    ALLOW
}

/// The socket's record, if its peer is the one that we chose.
#[inline(always)]
fn redirected(context: &SockAddr, addr_be: u32) -> Option<&'static ConnectRecord> {
    let record = context.socket()?.stored(&CLIENTS)?;
    (addr_be == record.target_addr_be && context.port_be() == record.target_port_be).then_some(record)
}
