//! The boot guard: until the agent's programs are attached, only the host's own services reach the metadata
//! server. It is a separate object (feature `boot-guard`), attached to the cgroup root: at boot no pod has a
//! cgroup yet, and it is not known where the runtime will create them.
//!
//! A task is denied unless it is known to be the host's. It is the host's if its cgroup has an ancestor among
//! the host's cgroups, and its socket is in the first network namespace. (Some runtimes keep containers in
//! the cgroup of their own service.)

use aya_ebpf::{
    btf_maps::{Array, HashMap, PerCpuArray},
    macros::{btf_map, cgroup_sock_addr, cgroup_sockopt},
    programs::{SockAddrContext, SockoptContext},
};
use kube2ram_common::{
    abi::{BootConfig, MAX_CGROUP_LEVEL, MAX_HOST_CGROUPS},
    connection::{is_metadata6, v4_mapped},
};

use crate::context::{__sk_buff, Network, Packet, SockAddr, SocketOption, current_ancestor_cgroup};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// The metadata server's addresses.
#[btf_map(name = "k2r_boot_config")]
static CONFIG: Array<BootConfig, 1> = Array::new();

/// The ids of the host's own cgroups.
#[btf_map(name = "k2r_boot_hosts")]
static HOSTS: HashMap<u64, u32, MAX_HOST_CGROUPS> = HashMap::new();

/// Number of denied attempts.
#[btf_map(name = "k2r_boot_denied")]
static DENIED: PerCpuArray<u64, 1> = PerCpuArray::new();

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_boot_conn4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, context.addr_be())
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_boot_conn6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context))
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn k2r_boot_send4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, context.addr_be())
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn k2r_boot_send6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context))
}

#[inline(always)]
fn judge(context: &SockAddr, addr_be: u32) -> i32 {
    if is_metadata(addr_be) { judge_task(context) } else { ALLOW }
}

#[inline(always)]
fn judge6(context: &SockAddr) -> i32 {
    let words = context.addr6_be();
    if let Some(addr_be) = v4_mapped(words) {
        return judge(context, addr_be);
    }
    let is_metadata = CONFIG.get(0).is_none_or(|config| is_metadata6(&config.metadata_addr6_be, words));
    if is_metadata { judge_task(context) } else { ALLOW }
}

#[inline(always)]
fn judge_task(context: &SockAddr) -> i32 {
    if context.is_in_first_network() && is_hosts_task() {
        return ALLOW;
    }
    count();
    DENY
}

/// Checks the socket's cgroup: raw sockets, and sockets of a container that another process uses.
#[unsafe(no_mangle)]
#[unsafe(link_section = "cgroup_skb/egress")]
pub(crate) fn k2r_boot_egress(skb: *mut __sk_buff) -> i32 {
    let packet = Packet::new(skb);
    let is_for_metadata = match packet.network() {
        Network::Ipv4 => {
            let Some(addr_be) = packet.destination_be() else { return DENY };
            is_metadata(addr_be) || routes_by_metadata(&packet)
        }
        Network::Ipv6 => CONFIG.get(0).is_none_or(|config| packet.is_for6(&config.metadata_addr6_be)),
        Network::Other => false,
    };
    if !is_for_metadata || is_hosts_packet(&packet) {
        return ALLOW;
    }
    count();
    DENY
}

/// Checks the calling task: denies the socket options with which a packet skips tc.
#[cgroup_sockopt(setsockopt)]
pub(crate) fn k2r_boot_option(context: SockoptContext) -> i32 {
    let context = SocketOption::new(context);
    if context.skips_tc() && !is_hosts_task() {
        count();
        return DENY;
    }
    context.leave_to_kernel();
    ALLOW
}

/// On egress of the node's network cards, as the agent's `k2r_wire`: drops packets of packet sockets that are
/// not the host's, and packets without a socket, which were forwarded.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub(crate) fn k2r_boot_wire(skb: *mut __sk_buff) -> i32 {
    const NEXT: i32 = -1;
    const DROP: i32 = 2;
    let Some(config) = CONFIG.get(0) else { return NEXT };
    let (packet, is_for_metadata) = match Packet::in_frame(skb) {
        Some((packet, Network::Ipv4)) => {
            let is_for = packet.is_for(config.metadata_addr_be).unwrap_or(true);
            (packet, is_for)
        }
        Some((packet, Network::Ipv6)) => {
            let is_for = packet.is_for6(&config.metadata_addr6_be) && !packet.is_neighbour_discovery();
            (packet, is_for)
        }
        Some((packet, Network::Other)) => (packet, false),
        None => (Packet::new(skb), true),
    };
    if !is_for_metadata || packet.sender().is_some() && is_hosts_packet(&packet) {
        return NEXT;
    }
    count();
    DROP
}

/// The array's element always exists; if it were missing, every address would count as the metadata server's.
#[inline(always)]
fn is_metadata(addr_be: u32) -> bool {
    CONFIG.get(0).is_none_or(|config| config.metadata_addr_be == addr_be)
}

#[inline(always)]
fn routes_by_metadata(packet: &Packet) -> bool {
    CONFIG.get(0).is_none_or(|config| packet.options_name(config.metadata_addr_be))
}

/// The ids are looked up on every level, because the slices of a nested node are not on the first one. A task
/// without any level is in the root cgroup: it is the kernel's.
#[inline(always)]
fn is_hosts_task() -> bool {
    let mut level = 1;
    while level <= MAX_CGROUP_LEVEL {
        let cgroup = current_ancestor_cgroup(level);
        if cgroup == 0 {
            return level == 1;
        }
        if is_hosts(cgroup) {
            return true;
        }
        level += 1;
    }
    false
}

#[inline(always)]
fn is_hosts_packet(packet: &Packet) -> bool {
    let mut level = 1;
    while level <= MAX_CGROUP_LEVEL {
        let cgroup = packet.ancestor_cgroup(level);
        if cgroup == 0 {
            return level == 1;
        }
        if is_hosts(cgroup) {
            return true;
        }
        level += 1;
    }
    false
}

#[inline(always)]
fn is_hosts(cgroup: u64) -> bool {
    // SAFETY: the entries are written before anything is attached.
    unsafe { HOSTS.get(cgroup) }.is_some()
}

#[inline(always)]
fn count() {
    if let Some(value) = DENIED.get_ptr_mut(0) {
        // SAFETY: this CPU's own slot. A softirq that counts in between may cost one increment, never more.
        unsafe { *value += 1 }
    }
}
