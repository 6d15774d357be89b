//! Rung 2: `kube2ram uninstall` leaves no trace, and opens nothing before it is asked to.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    node::PodSpec,
    standin::{Accounts, Role},
};
use serde_json::Value;

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
const ROLE: &str = "pod-role";

fn sandbox(name: &str) -> Sandbox {
    let mut sandbox = Sandbox::create(name).unwrap();
    sandbox.accounts().add_role(Accounts::role_arn(ROLE), Role::default());
    sandbox.add_pod(&PodSpec::new("pod").role(ROLE)).unwrap();
    sandbox.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    sandbox
}

fn bpf_dir(sandbox: &Sandbox) -> PathBuf {
    sandbox.node().bpffs().join("kube2ram")
}

fn uninstall(sandbox: &Sandbox) -> Output {
    let mut command = sandbox.node().host_command(AGENT);
    command.arg("uninstall").arg("--bpf-dir").arg(bpf_dir(sandbox));
    command.arg("--state-dir").arg(state_dir(sandbox)).output().unwrap()
}

fn state_dir(sandbox: &Sandbox) -> PathBuf {
    sandbox.node().agent_state()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn role_of_pod(sandbox: &Sandbox) -> String {
    sandbox.pod("pod").unwrap().curl(LIST).map_or_else(|error| format!("{error:#}"), |reply| reply.body)
}

fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").arg("-j").args(arguments).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

fn pinned_links(sandbox: &Sandbox) -> Vec<PathBuf> {
    let pins = Command::new("find").arg(bpf_dir(sandbox)).args(["-path", "*/links/*/*"]).output().unwrap();
    String::from_utf8(pins.stdout).unwrap().lines().map(PathBuf::from).collect()
}

/// Numbers of everything that has them: `kind` is `link` or `prog`.
fn ids(kind: &str) -> BTreeSet<u64> {
    bpftool(&[kind, "show"]).as_array().unwrap().iter().filter_map(|one| one["id"].as_u64()).collect()
}

/// Whether all of the netfilter rules are there; one table without the other fails.
fn guard_is_there() -> bool {
    let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
    let tables = String::from_utf8(tables.stdout).unwrap();
    let [ip, ip6] = ["table ip kube2ram\n", "table ip6 kube2ram\n"].map(|table| tables.contains(table));
    assert_eq!(ip, ip6, "{tables}");
    ip
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn leaves_no_trace_when_asked_and_nothing_open_before() {
    let mut sandbox = sandbox("uninstall");
    sandbox.agent().unwrap().start().unwrap();
    assert_eq!(role_of_pod(&sandbox), ROLE);
    // The machine may have others' links: what counts are those of this agent.
    let links: Vec<Value> = pinned_links(&sandbox)
        .iter()
        .map(|pin| bpftool(&["link", "show", "pinned", pin.to_str().unwrap()]))
        .collect();
    let numbers = |key: &str| links.iter().map(|link| link[key].as_u64().unwrap()).collect::<BTreeSet<_>>();
    let (link_ids, program_ids) = (numbers("id"), numbers("prog_id"));
    assert!(links.len() >= 11 && program_ids.is_subset(&ids("prog")), "{links:?}");

    // Before Linux 6.6 the wire guard has filters of traffic control, not links.
    let is_wire = |pin: &PathBuf| pin.to_string_lossy().contains("k2r_wire");
    let filters = match pinned_links(&sandbox).iter().any(is_wire) {
        true => 0.0,
        false => sandbox.agent().unwrap().metric(r#"kube2ram_wire_guard_devices{of="node"}"#).unwrap(),
    };

    let refused = uninstall(&sandbox);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("an agent runs on this node"), "{refused:?}");
    assert_eq!(role_of_pod(&sandbox), ROLE);
    sandbox.agent().unwrap().terminate().unwrap();
    assert!(guard_is_there());

    let removed = said(&uninstall(&sandbox));

    let detached = links.len() as f64 + filters;
    assert!(removed.starts_with(&format!("detached {detached} programs, removed 10 maps")), "{removed}");
    assert!(removed.contains("netfilter rules: removed"), "{removed}");
    assert_eq!(role_of_pod(&sandbox), Accounts::NODE_ROLE);
    assert!(!bpf_dir(&sandbox).exists() && !guard_is_there());
    // A mount stays, as a container's would.
    let left = fs::read_dir(state_dir(&sandbox)).into_iter().flatten().count();
    assert_eq!(left, 0, "in the state directory");
    assert!(ids("link").is_disjoint(&link_ids));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ids("prog").is_disjoint(&program_ids) {
        assert!(Instant::now() < deadline, "programs are left");
        thread::sleep(Duration::from_millis(10)); // the kernel frees them when it likes
    }
    assert!(said(&uninstall(&sandbox)).starts_with("nothing of kube2ram was active"));

    // And back.
    sandbox.agent().unwrap().start().unwrap();
    assert_eq!(role_of_pod(&sandbox), ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_crash_between_any_two_steps_leaves_nothing_open_and_is_repaired() {
    let mut sandbox = sandbox("uninstall-half");
    let agent = sandbox.agent().unwrap();
    // So that what denies is what is left of the programs.
    agent.set_env("KUBE2RAM_FORWARD_GUARD", "off");
    agent.set_env("KUBE2RAM_WIRE_GUARD", "off");
    agent.start().unwrap();
    agent.terminate().unwrap();
    let pod = sandbox.pod("pod").unwrap().pod();
    let addresses: [IpAddr; 2] = [pod.ip().into(), pod.ip6().into()];
    let name = |pin: &Path| pin.file_name().unwrap().to_str().unwrap().to_owned();
    let mut pins = pinned_links(&sandbox);
    let order = [
        "k2r_peer_name",
        "k2r_connect",
        "k2r_sendmsg",
        "k2r_option",
        "k2r_task",
        "k2r_sock_ops",
        "k2r_egress",
    ];
    pins.sort_by_key(|pin| order.iter().position(|prefix| name(pin).starts_with(prefix)).unwrap());

    let (last, steps) = pins.split_last().unwrap();
    assert_eq!(name(last), "k2r_egress");
    for pin in steps {
        fs::remove_file(pin).unwrap();
        assert_ne!(role_of_pod(&sandbox), Accounts::NODE_ROLE, "without {}", name(pin));
        let over_ipv6 = sandbox.pod("pod").unwrap().curl6(LIST);
        assert!(!over_ipv6.is_ok_and(|reply| reply.body == Accounts::NODE_ROLE), "without {}", name(pin));
        for address in addresses {
            assert_eq!(sandbox.node().sniffer().packets_from(address), [], "without {}", name(pin));
        }
    }

    assert!(said(&uninstall(&sandbox)).starts_with("detached 1 programs, removed 10 maps"));
    assert!(!bpf_dir(&sandbox).exists());
    assert_eq!(role_of_pod(&sandbox), Accounts::NODE_ROLE);
}
