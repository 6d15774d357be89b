//! `cgroup_skb/egress`: no packet of a pod's socket to the metadata server, however it came about: raw sockets, connections older than the
//! connect hook, another program's rewrite, DNAT in the pod's namespace (it runs after that), source routing.

use kube2ram_common::abi::{CONFIG_KEEPS_OPEN, Counter};

use crate::{
    context::{__sk_buff, Packet},
    maps::{CONFIG, PASS, count},
};

const ALLOW: i32 = 1;
const DROP: i32 = 0;

// By hand, because aya's macro says what `__sk_buff` consists of.
#[unsafe(no_mangle)]
#[unsafe(link_section = "cgroup_skb/egress")]
pub(crate) fn k2r_egress(skb: *mut __sk_buff) -> i32 {
    let packet = Packet::new(skb);
    if !packet.is_ipv4() {
        return ALLOW;
    }
    // Nothing is known without it, and a packet too short to have a destination goes nowhere good.
    let (Some(config), Some(addr_be)) = (CONFIG.get(0), packet.destination_be()) else { return DROP };
    if addr_be != config.metadata_addr_be && !packet.options_name(config.metadata_addr_be) {
        return ALLOW;
    }
    if packet.socket().is_some_and(|socket| socket.stored(&PASS).is_some_and(|pass| *pass != 0)) {
        return ALLOW;
    }
    if config.flags & CONFIG_KEEPS_OPEN != 0 && packet.goes_on(config.metadata_port_be) {
        count(Counter::KeptOpen);
        return ALLOW;
    }
    count(Counter::DeniedEgress);
    DROP
}
