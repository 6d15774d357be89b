//! The wire guard: tc programs on egress of devices that lead out of the node. They see packets that pass no
//! cgroup hook and no netfilter rule: those of packet sockets, and those that a program of the network plugin
//! redirects.
//!
//! An skb keeps its socket across a veth, and loses it where the node's IP stack receives it. So a packet
//! with a pod's socket is a pod's, and a packet without a socket was forwarded: both are dropped if they are
//! for the metadata server. Packets of the node's own processes pass.

use kube2ram_common::abi::{CONFIG_KEEPS_OPEN, Config, Counter};

use crate::{
    context::{__sk_buff, Network, Packet},
    maps::{CONFIG, PASS, count},
    pods::is_pods_packet,
};

/// `TC_ACT_UNSPEC`, which is also `TCX_NEXT`: the programs and filters that follow decide.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`, which is also `TCX_DROP`.
const DROP: i32 = 2;

/// For devices whose packets have an Ethernet header.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub(crate) fn k2r_wire(skb: *mut __sk_buff) -> i32 {
    // The programs are not configured. The node must not be cut off then.
    let Some(config) = CONFIG.get(0) else { return NEXT };
    match Packet::in_frame(skb) {
        Some((packet, network)) => judge(&packet, network, config),
        None => judge_sender(&Packet::new(skb), Network::Other, config),
    }
}

/// For devices whose packets begin with the IP header, such as tunnels.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub(crate) fn k2r_wire_ip(skb: *mut __sk_buff) -> i32 {
    let Some(config) = CONFIG.get(0) else { return NEXT };
    let packet = Packet::new(skb);
    let network = packet.network_by_version();
    judge(&packet, network, config)
}

#[inline(always)]
fn judge(packet: &Packet, network: Network, config: &Config) -> i32 {
    let is_for_metadata = match network {
        // A packet without a complete header is dropped.
        Network::Ipv4 => packet.is_for(config.metadata_addr_be).unwrap_or(true),
        Network::Ipv6 => packet.is_for6(&config.metadata_addr6_be),
        Network::Other => false,
    };
    if is_for_metadata { judge_sender(packet, network, config) } else { NEXT }
}

#[inline(always)]
fn judge_sender(packet: &Packet, network: Network, config: &Config) -> i32 {
    if let Some(sender) = packet.sender() {
        if sender.full().is_some_and(|socket| socket.stored(&PASS).is_some_and(|pass| *pass != 0)) {
            return NEXT;
        }
        if !is_pods_packet(packet, config) {
            return NEXT;
        }
    } else if network == Network::Ipv6 && packet.is_neighbour_discovery() {
        // The node's own neighbour discovery, which has no socket.
        return NEXT;
    }
    // As in the egress hook, which has counted the packet.
    if config.flags & CONFIG_KEEPS_OPEN != 0 && goes_on(packet, network, config) {
        return NEXT;
    }
    count(Counter::DeniedWire);
    DROP
}

#[inline(always)]
fn goes_on(packet: &Packet, network: Network, config: &Config) -> bool {
    match network {
        Network::Ipv4 => packet.goes_on(config.metadata_port_be),
        Network::Ipv6 => packet.goes_on6(config.metadata_port_be),
        Network::Other => false,
    }
}
