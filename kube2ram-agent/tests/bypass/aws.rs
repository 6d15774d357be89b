//! The main rows at AWS's addresses: 169.254.169.254, which is link-local, and fd00:ec2::254. And pods behind
//! a branch interface, which have a routing table of their own on the node.

use std::{fs, process::Command};

use kube2ram_sandbox::{Cloud, Sandbox};

use super::{
    REDIRECTED, Row, command, ip, no_packet_arrives, outcome, packets_of_pods, sandbox_in, start_agent,
};

/// The rows in which the address matters: what depends on a system call alone is tried at Alibaba Cloud's.
const FROM_POD: [Row; 7] = [
    ("tcp4", false, REDIRECTED),
    ("tcp4_443", false, "EPERM"),
    ("bind_to_device", false, "timeout"),
    ("transparent", false, REDIRECTED),
    ("udp_sendto", false, "EPERM"),
    ("icmp_sendto", false, "EPERM"),
    ("raw_syn", true, "EPERM"),
];

/// The same of IPv6, as far as they exist.
const FROM_POD6: [Row; 6] = [
    ("v6_tcp", false, REDIRECTED),
    ("v6_tcp_443", false, "EPERM"),
    ("v6_bind_to_device", false, "timeout"),
    ("v6_udp_sendto", false, "EPERM"),
    ("v6_icmp_sendto", false, "EPERM"),
    ("v6_raw_syn", false, "EPERM"),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_way_out_of_a_pod_reaches_the_link_local_address() {
    let sandbox = sandbox_in("bypass-aws", Cloud::Aws);
    let ip = ip(&sandbox);
    no_packet_arrives(sandbox, &FROM_POD, &ip);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_way_out_of_a_pod_reaches_the_ipv6_address_of_ec2() {
    let sandbox = sandbox_in("bypass-aws6", Cloud::Aws);
    let ip = sandbox.pod("pod").unwrap().pod().ip6().to_string();
    no_packet_arrives(sandbox, &FROM_POD6, &ip);
}

/// Runs a tool in the node's network namespace, where this thread is.
fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

/// Puts the pod behind an interface as amazon-vpc-cni-k8s makes it for a pod with security groups: by its
/// name, and with a routing table for what comes in by it. That leads to the metadata server as the node's
/// own does, or, in strict mode, nowhere on the node: not even to its own address.
fn move_to_branch(sandbox: &Sandbox, is_strict: bool) {
    const BRANCH: &str = "vlan0123456789a";
    const TABLE: &str = "101";
    let veth = sandbox.node().device_of(sandbox.pod("pod").unwrap().pod()).unwrap();
    run("ip", &["link", "set", &veth, "down"]);
    run("ip", &["link", "set", &veth, "name", BRANCH]);
    run("ip", &["link", "set", BRANCH, "up"]);
    assert_eq!(
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{BRANCH}/forwarding")).unwrap().trim(),
        "1"
    );
    let target = Cloud::Aws.metadata_ip().to_string();
    let shown = Command::new("ip").args(["route", "show", &target]).output().unwrap();
    let of_node = String::from_utf8(shown.stdout).unwrap();
    let route: Vec<&str> =
        if is_strict { vec!["blackhole", "default"] } else { of_node.split_whitespace().collect() };
    run("ip", &[&["route", "add"][..], &route, &["table", TABLE]].concat());
    run("ip", &["rule", "add", "iif", BRANCH, "lookup", TABLE]);
    if is_strict {
        let closed = format!(
            "table ip kube2ram-test {{ chain input {{ type filter hook input priority 0; iifname \"{BRANCH}\" drop; }}; }}"
        );
        run("nft", &[&closed]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_behind_a_branch_interface_gets_its_role_and_sends_no_packet() {
    for is_strict in [false, true] {
        let mut sandbox = sandbox_in("bypass-vlan", Cloud::Aws);
        move_to_branch(&sandbox, is_strict);
        let attempt = |sandbox: &Sandbox, way: &str| {
            let before = packets_of_pods(sandbox);
            let came = outcome(command(sandbox, "pod", way), way, &[]);
            (came, packets_of_pods(sandbox) - before)
        };
        // The control.
        let (came, packets) = attempt(&sandbox, "tcp4");
        assert_eq!((came == "timeout", packets > 0), (is_strict, !is_strict), "{came}, {packets} packets");

        start_agent(&mut sandbox);
        sandbox.agent().unwrap().await_metric("kube2ram_pod_listeners", 1.0).unwrap();

        for (way, expected) in [
            ("tcp4", REDIRECTED),
            ("v6_tcp", REDIRECTED),
            ("tcp4_443", "EPERM"),
            ("udp_sendto", "EPERM"),
            ("icmp_sendto", "EPERM"),
        ] {
            assert_eq!(attempt(&sandbox, way), (expected.to_owned(), 0), "strict {is_strict}: {way}");
        }
    }
}
