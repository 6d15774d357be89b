//! The rows of the metadata server's IPv6 address. More packets, which Linux would not route, are tried in
//! `datapath_kernel::ipv6_packets`. The node follows the routing headers of segment routing and of RPL, which
//! few nodes do.

use std::{fs, process::Command};

use kube2ram_sandbox::Sandbox;

use super::{REDIRECTED, Row, no_packet_arrives, nothing_is_forwarded, sandbox};

const FROM_POD: [Row; 35] = [
    ("v6_tcp", false, REDIRECTED),
    ("v6_tcp_443", false, "EPERM"),
    ("v6_nonblocking", false, REDIRECTED),
    ("v6_bind_any", false, REDIRECTED),
    // The in-pod listener is at ::1 as well.
    ("v6_only", false, REDIRECTED),
    ("v6_bind_first", true, REDIRECTED),
    ("v6_bind_to_device", false, "timeout"),
    ("v6_scoped", false, REDIRECTED),
    ("v6_reconnect", false, REDIRECTED),
    // The kernel goes on sending IPv4 for such a socket: it reaches nothing over IPv6, with the agent or
    // without.
    ("v6_after_mapped", false, "timeout"),
    ("v6_mptcp", false, REDIRECTED),
    ("v6_fast_open", false, REDIRECTED),
    ("v6_fast_open_connect", false, REDIRECTED),
    ("v6_mptcp_fast_open", false, REDIRECTED),
    ("v6_uring", false, REDIRECTED),
    ("v6_uring_send", false, "EPERM"),
    ("v6_udp_connect", false, "EPERM"),
    ("v6_udp_sendto", false, "EPERM"),
    ("v6_udp_sendmsg", false, "EPERM"),
    ("v6_udp_other_address", true, "EPERM"),
    ("v6_udp_dissolved", true, "EPERM"),
    ("v6_udplite", false, "EPERM"),
    ("v6_icmp_sendto", false, "EPERM"),
    ("v6_icmp_connect", false, "EPERM"),
    // The kernel does not report to such a socket what happens to the packet.
    ("v6_icmp_datagram", false, "sent"),
    ("v6_raw_syn", false, "EPERM"),
    ("v6_raw_whole", false, "EPERM"),
    ("v6_raw_fragment", false, "EPERM"),
    ("v6_route", false, "EPERM"),
    ("v6_route_compressed", false, "EPERM"),
    ("v6_route_in_fragments", false, "EPERM"),
    ("v6_route_of_socket", false, "EPERM"),
    ("v6_next_hop", false, "timeout"),
    ("v6_next_hop_datagram", false, "EPERM"),
    // Translated by the pod itself, behind the connect hook's back.
    ("v6_translated", false, "timeout"),
];

/// Makes the node a router of routing headers: both switches, of all devices and of each, are on.
fn follow_routing_headers() {
    for device in fs::read_dir("/proc/sys/net/ipv6/conf").unwrap() {
        let device = device.unwrap().path();
        fs::write(device.join("seg6_enabled"), "1").unwrap();
        // Linux 5.7.
        drop(fs::write(device.join("rpl_seg_enabled"), "1"));
    }
}

fn ip6(sandbox: &Sandbox) -> String {
    sandbox.pod("pod").unwrap().pod().ip6().to_string()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_way_out_of_a_pod_reaches_the_ipv6_address() {
    let sandbox = sandbox("bypass-ipv6");
    follow_routing_headers();
    let ip = ip6(&sandbox);
    no_packet_arrives(sandbox, &FROM_POD, &ip);
}

/// Ways past every hook of a cgroup.
const FORWARDED: [Row; 6] = [
    ("v6_packet_socket", true, "sent"),
    ("v6_packet_route", true, "sent"),
    ("v6_tunnel", true, "sent"),
    ("v6_rewritten", true, "timeout"),
    ("v6_service", true, "timeout"),
    ("v6_tun", true, "sent"),
];

/// Makes the node a Service's proxy.
fn proxy_a_service() {
    const SERVICE: &str = "table ip6 kube2ram-test { chain prerouting { type nat hook prerouting priority dstnat; \
                           ip6 daddr fd00:96::9 dnat to fd00:100::100:200; }; }";
    assert!(Command::new("nft").arg(SERVICE).status().unwrap().success());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_of_a_pod_is_forwarded_to_the_ipv6_address() {
    let sandbox = sandbox("bypass-fwd6");
    proxy_a_service();
    follow_routing_headers();
    let ip = ip6(&sandbox);
    nothing_is_forwarded(sandbox, &FORWARDED, &ip);
}
