//! The first start of an agent on a node whose boot guard is active.

use std::{net::SocketAddrV4, process::Command};

use kube2ram_agent::{
    datapath::{BootOutcome, BootSettings, WireHook, apply_boot_guard},
    wire_guard::devices_of_node,
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_sandbox::{Sandbox, kernel, node::Node};

use super::{arriving, from_senders, sandbox, say, sender::Sender};

/// Enough to be sure that the sender runs, before and after what is tried.
const SOME: usize = 20;

/// Activates the boot guard's programs as its unit would, at the node's cgroup: at the machine's cgroup root
/// they would deny other tests' pods.
fn activate_boot_guard(sandbox: &Sandbox) {
    let v6 = sandbox.node().has_ipv6().then_some(Node::METADATA_IP6);
    let metadata = MetadataAddr { v4: SocketAddrV4::new(Node::METADATA_IP, 80), v6 };
    let settings = BootSettings {
        bpf_dir: sandbox.node().bpffs().join("kube2ram"),
        cgroup_root: sandbox.node().cgroup().to_owned(),
        host_cgroups: vec!["host".into()],
        metadata,
        wire: devices_of_node(metadata).unwrap(),
    };
    assert_eq!(apply_boot_guard(&settings).unwrap(), BootOutcome::Active { missing: Vec::new() });
}

/// The boot guard's links to network devices.
fn boot_wires(sandbox: &Sandbox) -> usize {
    let bpffs = sandbox.node().bpffs();
    let found = Command::new("find").arg(bpffs).args(["-path", "*/boot/links/k2r_boot_wire*"]).output();
    String::from_utf8(found.unwrap().stdout).unwrap().lines().count()
}

/// Starts the agent while a hostNetwork pod sends packets, and returns how many of them arrived.
fn arriving_across_a_first_start(name: &str, wire_guard: &str) -> usize {
    let mut sandbox = sandbox(name);
    let uplink = sandbox.node().uplink();
    activate_boot_guard(&sandbox);
    assert_eq!((boot_wires(&sandbox), arriving(&sandbox, "host-pod", &uplink)), (1, 0));
    let families = if sandbox.node().has_ipv6() { &["4", "6"][..] } else { &["4"] };
    let lines = families.iter().map(|family| format!("{uplink} metadata {family} tcp packet plain"));
    let python = sandbox.pod("host-pod").unwrap().pod().command("app", "python3").unwrap();
    let sender = Sender::start(python, &["frames"], lines.collect());
    sender.await_more(SOME);
    let (before, sent_before) = (from_senders(&sandbox), sender.sent());

    let agent = sandbox.agent().unwrap();
    agent.set_env("KUBE2RAM_WIRE_GUARD", wire_guard);
    agent.start().unwrap();
    sender.await_more(SOME);

    let arrived = from_senders(&sandbox) - before;
    say(&format!(
        "a first start with --wire-guard={wire_guard}: {arrived} of {} packets arrived",
        sender.sent() - sent_before
    ));
    drop(sender);
    assert_eq!(boot_wires(&sandbox), 0);
    // The agent's own packets leave by the same device.
    let passed_through = sandbox.pod("pod").unwrap().curl("/latest/meta-data/region-id").unwrap();
    assert_eq!(passed_through.status, 200);
    let log = sandbox.agent().unwrap().log();
    assert!(log.contains("took over network devices from the boot guard"), "{log}");
    arrived
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_packet_passes_while_the_agent_takes_over_from_the_boot_guard() {
    if WireHook::of_kernel() != WireHook::Tcx {
        return kernel::skip("the boot guard on network devices", "tcx");
    }
    // The control: the same packets arrive where no wire guard follows the boot guard.
    assert_ne!(arriving_across_a_first_start("wire-boot-off", "off"), 0);

    assert_eq!(arriving_across_a_first_start("wire-boot", "auto"), 0);
}
