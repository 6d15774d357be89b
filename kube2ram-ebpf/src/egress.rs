//! `cgroup_skb/egress`: drops every packet of a pod's socket to the metadata server: of raw sockets, of
//! connections older than the connect hook, after another program's rewrite, after DNAT in the pod's
//! namespace (this hook runs after DNAT), and with source routing.

use kube2ram_common::abi::{CONFIG_KEEPS_OPEN, Counter};

use crate::{
    context::{__sk_buff, Network, Packet},
    maps::{CONFIG, PASS, count},
};

const ALLOW: i32 = 1;
const DROP: i32 = 0;

// Written by hand: aya's macro would add all members of `__sk_buff` to the type information.
#[unsafe(no_mangle)]
#[unsafe(link_section = "cgroup_skb/egress")]
pub(crate) fn k2r_egress(skb: *mut __sk_buff) -> i32 {
    let packet = Packet::new(skb);
    let network = packet.network();
    if network == Network::Other {
        return ALLOW;
    }
    // Without the configuration no address is known.
    let Some(config) = CONFIG.get(0) else { return DROP };
    if network == Network::Ipv6 {
        if !packet.is_for6(&config.metadata_addr6_be) {
            return ALLOW;
        }
    } else {
        // A packet without a complete header is dropped.
        let Some(addr_be) = packet.destination_be() else { return DROP };
        if addr_be != config.metadata_addr_be && !packet.options_name(config.metadata_addr_be) {
            return ALLOW;
        }
    }
    if packet.socket().is_some_and(|socket| socket.stored(&PASS).is_some_and(|pass| *pass != 0)) {
        return ALLOW;
    }
    let goes_on = || match network {
        Network::Ipv6 => packet.goes_on6(config.metadata_port_be),
        Network::Ipv4 | Network::Other => packet.goes_on(config.metadata_port_be),
    };
    if config.flags & CONFIG_KEEPS_OPEN != 0 && goes_on() {
        count(Counter::KeptOpen);
        return ALLOW;
    }
    count(Counter::DeniedEgress);
    DROP
}
