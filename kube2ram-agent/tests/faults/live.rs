//! The running agent, and changes of its node by other processes: the agent repairs them within a second.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::node::PodSpec;

use crate::{
    node::{Node, ROLE, Start, bpftool},
    steps::Step,
};

/// How long a repair may take on a busy machine. On a quiet one, changes with an event take milliseconds, and
/// others wait for the next check, for at most a second.
const SOON: Duration = Duration::from_secs(30);

/// The second between two checks, and what a repair takes.
const CHECKED: Duration = Duration::from_secs(3);

/// Waits, and returns how long it took.
#[track_caller]
fn soon(mut done: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < SOON, "not after {SOON:?}");
        thread::sleep(Duration::from_millis(2));
    }
    began.elapsed()
}

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split(' ')).output().expect("nft");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether all of the netfilter rules are there; one table without the other fails.
fn guard_is_there() -> bool {
    let tables = nft("list tables");
    let [ip, ip6] = ["table ip kube2ram\n", "table ip6 kube2ram\n"].map(|table| tables.contains(table));
    assert_eq!(ip, ip6, "{tables}");
    ip
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_somebody_detaches_or_removes_is_back_and_counted() {
    let mut node = Node::new("live-drift", "auto");
    node.start_plainly("at first");
    let before = node.leaks_so_far();
    node.sandbox.agent().unwrap().await_metric("kube2ram_datapath_in_force", 1.0).unwrap();
    let pins = node.links();

    for name in ["k2r_connect4", "k2r_egress"] {
        let pin = node.bpf_dir().join("v2/links/pods").join(name);
        bpftool(&["link", "detach", "pinned", pin.to_str().unwrap()]);
    }
    soon(|| node.metric(r#"kube2ram_datapath_repairs_total{kind="detached"}"#) == 2.0);
    fs::remove_file(node.bpf_dir().join("v2/links/pods/k2r_connect4")).unwrap();
    let took = soon(|| node.links() == pins);
    soon(|| node.metric(r#"kube2ram_datapath_repairs_total{kind="link_pin"}"#) == 1.0);
    nft("delete table ip kube2ram");
    let guarded = soon(|| nft("list tables").contains("table ip kube2ram\n"));
    soon(|| node.metric("kube2ram_forward_guard_repairs_total") == 1.0);
    nft("delete table ip6 kube2ram");
    let guarded6 = soon(|| nft("list tables").contains("table ip6 kube2ram\n"));
    soon(|| node.metric("kube2ram_forward_guard_repairs_total") == 2.0);
    node.sandbox.agent().unwrap().await_metric("kube2ram_forward_guard_in_force", 1.0).unwrap();

    assert_eq!(node.role(), ROLE);
    node.tries_again();
    // The connect hook was missing for a moment, and egress with it; the netfilter rules stopped what they
    // let through.
    assert_eq!(node.leaks()[before..], []);
    let log = node.sandbox.agent().unwrap().log();
    assert_eq!(log.matches("the eBPF programs were changed").count(), 3, "once for each repair");
    println!("a removed pin was back after {took:?}, netfilter tables after {guarded:?} and {guarded6:?}");
    // Any one may have come late on a busy machine.
    assert!(took.min(guarded).min(guarded6) < CHECKED, "it is checked each second");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pods_cgroup_made_again_is_protected_and_served_at_once() {
    let mut node = Node::new("live-anew", "off");
    // A cgroup with an agent in it cannot be deleted.
    node.move_agent_out();
    node.start_plainly("at first");
    let listeners = "kube2ram_pod_listeners";
    soon(|| node.metric(listeners) == 1.0);
    let pods = node.sandbox.node().pods_cgroup();
    node.stop_trying();
    node.sandbox.remove_pod("pod").unwrap();
    let former = fs::metadata(&pods).unwrap().ino();
    remove_tree(&pods);
    soon(|| node.sandbox.agent().unwrap().admin("/readyz").unwrap().status == 503);
    let reason = node.sandbox.agent().unwrap().admin("/readyz").unwrap().body;
    assert!(reason.contains("the eBPF programs"), "{reason}");

    fs::create_dir(&pods).unwrap();
    let took = soon(|| node.denies());
    node.sandbox.add_pod(&PodSpec::new("pod").role(ROLE)).unwrap();

    assert_ne!(fs::metadata(&pods).unwrap().ino(), former);
    assert_eq!(node.role(), ROLE);
    soon(|| node.metric(listeners) == 1.0);
    assert_eq!(node.role(), ROLE, "by its own listener");
    soon(|| node.metric(r#"kube2ram_datapath_repairs_total{kind="cgroup"}"#) >= 8.0);
    soon(|| node.sandbox.agent().unwrap().admin("/readyz").unwrap().status == 200);
    assert_eq!(node.leaks(), []);
    println!("programs were on the new cgroup after {took:?}");
}

/// Removes a cgroup and those below it, which hold no process.
fn remove_tree(cgroup: &std::path::Path) {
    for entry in fs::read_dir(cgroup).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(cgroup).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_bpf_file_system_the_agent_serves_on_and_is_unready_until_it_is_back() {
    let mut node = Node::new("live-bpffs", "off");
    node.start_plainly("at first");
    let (before, pins) = (node.leaks_so_far(), node.links());
    let status = |node: &mut Node| node.sandbox.agent().unwrap().admin("/readyz").unwrap().status;
    let bpffs = node.sandbox.node().bpffs();
    assert!(Command::new("umount").arg("-l").arg(&bpffs).status().unwrap().success());

    soon(|| status(&mut node) == 503);
    assert_eq!(node.role(), ROLE);
    node.sandbox.agent().unwrap().await_metric("kube2ram_datapath_in_force", 0.0).unwrap();
    assert!(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpffs).status().unwrap().success());
    soon(|| status(&mut node) == 200);

    assert_eq!(node.links(), pins);
    node.kill();
    node.tries_again();
    assert_eq!(node.leaks().len(), before, "pinned again, it holds without the agent");
    node.start_plainly("in the end");
    let log = node.sandbox.agent().unwrap().log();
    assert_eq!(log.matches("the eBPF programs are not in the expected state").count(), 1, "said once");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_start_that_an_uninstall_takes_the_directory_from_makes_it_again() {
    let mut node = Node::new("live-race", "off");
    node.start_plainly("at first");
    node.kill();
    let directory = fs::metadata(node.bpf_dir()).unwrap().ino();

    // The start has opened the directory, and waits before it locks it.
    let delayed = ["--output=/dev/null".to_owned(), "--inject=flock:delay_enter=1500000:when=1".to_owned()];
    node.spawn(&delayed);
    thread::sleep(Duration::from_millis(700));
    node.uninstall_plainly("meanwhile");

    assert_eq!(node.wait(), Start::Ready);
    assert_ne!(fs::metadata(node.bpf_dir()).unwrap().ino(), directory);
    assert_eq!(node.role(), ROLE);
    assert!(node.denies());
    let refused = node.uninstall(&[]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another agent uses"), "{refused:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_forward_guard_survives_a_fault_at_every_message_of_its_own() {
    let mut node = Node::new("live-guard", "auto");
    let is_send = |step: &Step| step.call == "sendto" && step.is_netfilter();
    let start = |node: &mut Node, strace: &[String]| assert_eq!(node.start(strace), Start::Ready);
    let steps = node.steps_of_thread(is_send, start);
    node.kill();
    let sends: Vec<_> = steps.iter().filter(|step| is_send(step)).collect();
    assert!(sends.len() >= 3, "{steps:?}");

    for step in sends {
        for fault in [crate::steps::Fault::Kill, crate::steps::Fault::Error("EPERM")] {
            node.uninstall_plainly("before");
            assert!(!guard_is_there());
            if node.start(&step.inject(fault)) == Start::Ready {
                // The programs hold without it; it is said, and tried again.
                assert_eq!(node.role(), ROLE, "{step:?}");
            }
            node.kill();
            node.start_plainly("after");
            assert!(guard_is_there(), "{step:?}");
            node.kill();
        }
    }
    let removal = ["--output=/dev/null".to_owned(), "--inject=sendto:error=EPERM".to_owned()];
    assert_eq!(node.uninstall(&removal).status.code(), Some(1));
    assert!(guard_is_there());
    node.uninstall_plainly("again");
    assert!(!guard_is_there());
}
