//! The node's address changes while the agent runs.

use std::net::Ipv4Addr;

use kube2ram_sandbox::node::PodSpec;

use crate::support::{LIST, Lab, eventually, run};

/// Replaces the node's address on the device by which it reaches the metadata server.
fn change_address(lab: &Lab, to: Ipv4Addr) {
    let (node, device) = (lab.node(), lab.node().uplink());
    let ip = |arguments: &[&str]| {
        let (code, said) = run(node.host_command("ip").args(arguments));
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
    };
    ip(&["addr", "del", &format!("{}/24", node.ip()), "dev", &device]);
    ip(&["addr", "add", &format!("{to}/24"), "dev", &device]);
    let [a, b, c, _] = to.octets();
    let next_hop = Ipv4Addr::new(a, b, c, 2).to_string();
    ip(&["route", "replace", "100.100.100.200", "via", &next_hop]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_changed_address_of_the_node_is_followed_and_survives_an_upgrade() {
    let pods = [
        PodSpec::new("daemon").role("daemon-role").host_network(),
        PodSpec::new("orders").role("orders-role"),
    ];
    let mut lab = Lab::with_agent("address", &pods, &[]);
    assert_eq!(lab.credentials("daemon", "daemon-role"), "daemon-role");
    let changed = Ipv4Addr::new(10, 213, 250, 9);

    change_address(&lab, changed);
    eventually(true, || {
        let asked = lab.pod("daemon").unwrap().curl(&format!("{LIST}daemon-role"));
        asked.is_ok_and(|reply| reply.status == 200)
    });

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("the node's address has changed").count(), 1, "{log}");
    assert!(log.contains(&changed.to_string()), "{log}");
    // The next agent is told the former address, finds the present one, and takes over.
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();
    let mut former = lab.replace_agent(next).unwrap();
    assert_eq!(former.terminate().unwrap().code(), Some(0));
    let log = lab.agent().unwrap().log();
    assert!(log.contains("another agent serves; waiting for connections"), "{log}");
    lab.remove_agent(former).unwrap();
    for pod in ["daemon", "orders"] {
        let role = format!("{pod}-role");
        assert_eq!(lab.credentials(pod, &role), role);
    }
    let mut leaks = lab.leaks();
    // Its present address is the agent's and the host's.
    leaks.retain(|packet| packet.source.ip() != changed);
    assert_eq!(leaks, []);
}
