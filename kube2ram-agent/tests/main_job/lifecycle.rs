//! The agent goes and comes: pods are refused meanwhile, never let through, and need nobody's help
//! afterwards.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use kube2ram_sandbox::{
    client::LoadReport,
    node::PodSpec,
    standin::{Accounts, StsMode},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{LIST, Lab, eventually, owner, run, url};

fn pods() -> [PodSpec; 2] {
    [PodSpec::new("orders").role("orders-role"), PodSpec::new("daemon").role("daemon-role").host_network()]
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_killed_agent_refuses_pods_until_it_is_back_and_never_the_host() {
    let mut lab = Lab::with_agent("killed", &pods(), &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let before = lab.metadata().seen().len();

    assert_eq!(lab.agent().unwrap().live().unwrap(), "live");

    lab.agent().unwrap().kill().unwrap();

    let said = lab.agent().unwrap().live().unwrap_err().to_string();
    assert!(said.starts_with("kube2ram: the agent of this container does not answer"), "{said}");
    for pod in ["orders", "daemon"] {
        lab.assert_refused(pod);
    }
    assert_eq!(lab.leaks(), []);
    assert_eq!(lab.metadata().seen().len(), before, "nor did the hostNetwork pod reach it");
    assert_eq!(lab.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);

    lab.agent().unwrap().start().unwrap();
    for (pod, role) in [("orders", "orders-role"), ("daemon", "daemon-role")] {
        assert_eq!(lab.credentials(pod, role), role);
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_terminated_agent_finishes_what_it_was_asked_and_exits_with_0() {
    let mut lab = Lab::with_agent("drain", &pods(), &[]);
    lab.sts().set_mode(StsMode::Slow(Duration::from_millis(200))).unwrap();
    let mut client = lab.pod("orders").unwrap().client("app").unwrap();
    client.args(["get", &url(&format!("{LIST}orders-role"))]).stdout(Stdio::piped());
    let client = client.spawn().unwrap();
    eventually(1.0, || lab.metric("kube2ram_connections"));

    let status = lab.agent().unwrap().terminate().unwrap();

    assert_eq!(status.code(), Some(0));
    let reply = client.wait_with_output().unwrap().stdout;
    assert_eq!(owner(&serde_json::from_slice(&reply).unwrap()), "orders-role");
    lab.assert_refused("orders");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_second_signal_ends_the_agent_at_once() {
    let mut lab = Lab::with_agent("second-signal", &pods(), &[]);
    lab.sts().set_mode(StsMode::Slow(Duration::from_secs(5))).unwrap();
    let mut client = lab.pod("orders").unwrap().client("app").unwrap();
    client.args(["get", &url(&format!("{LIST}orders-role"))]).stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    eventually(1.0, || lab.metric("kube2ram_connections"));

    // Another one than the first: two of a kind may become one.
    lab.agent().unwrap().signal(Signal::TERM).unwrap();
    lab.agent().unwrap().signal(Signal::INT).unwrap();
    let status = lab.agent().unwrap().wait().unwrap();

    assert_eq!(status.code(), Some(1), "a drained one ends with 0");
    assert!(lab.agent().unwrap().log().contains("a second signal ended the agent before it had drained"));
    lab.assert_refused("orders");
    drop(client.wait());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn restarts_swap_the_programs_under_the_links_while_pods_connect() {
    const RESTARTS: usize = 5;
    let mut lab = Lab::with_agent("swap", &pods(), &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let before = links(&lab);
    let mut load = lab.pod("orders").unwrap().client("app").unwrap();
    load.args(["load", "--connect=100.100.100.200:80", "--expect=orders-role"]);
    let mut load = load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();

    for _ in 0..RESTARTS {
        // The load has come to the agent before the next one goes.
        eventually(1.0, || lab.metric("kube2ram_connections"));
        lab.agent().unwrap().restart(None).unwrap();
    }
    let after = links(&lab);
    eventually(1.0, || lab.metric("kube2ram_connections"));
    drop(load.stdin.take());
    let report: LoadReport = serde_json::from_slice(&load.wait_with_output().unwrap().stdout).unwrap();

    assert!(before.len() >= 5 && before.keys().eq(after.keys()), "the links stay: {before:?} {after:?}");
    assert!(before.iter().all(|(link, program)| after[link] != *program), "{before:?} {after:?}");
    assert_eq!((report.wrong, report.failed), (0, 0), "{:?}", report.samples);
    assert!(report.ok > 0 && report.refused > 0, "it ran before and during the restarts: {report:?}");
    assert_eq!(lab.leaks(), []);
    println!("{RESTARTS} restarts under load: ok {}, refused {}", report.ok, report.refused);
}

/// The links on the pods' cgroup and their programs.
fn links(lab: &Lab) -> BTreeMap<u64, u64> {
    use std::os::unix::fs::MetadataExt as _;
    let cgroup = std::fs::metadata(lab.node().pods_cgroup()).unwrap().ino();
    let (code, text) = run(std::process::Command::new("bpftool").args(["--json", "link", "show"]));
    assert_eq!(code, Some(0), "{text}");
    let links: Vec<Value> = serde_json::from_str(&text).unwrap();
    let ours = links.iter().filter(|link| link["cgroup_id"] == cgroup);
    ours.map(|link| (link["id"].as_u64().unwrap(), link["prog_id"].as_u64().unwrap())).collect()
}
