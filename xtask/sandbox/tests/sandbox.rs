//! The sandbox around an agent that does nothing: its life, and a shop window that must not look good.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kube2ram_sandbox::{Sandbox, client, node::PodSpec, node::Record, standin::Accounts};

const BINARY: &str = env!("CARGO_BIN_EXE_kube2ram-sandbox");

/// Cargo builds the examples together with the tests.
fn idle_agent() -> PathBuf {
    Path::new(BINARY).with_file_name("examples").join("idle-agent")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn agent_runs_in_a_pod_of_its_own_and_can_be_killed_terminated_and_restarted() {
    let mut sandbox = Sandbox::create("agent").unwrap();
    let pods_cgroup = sandbox.node().pods_cgroup();
    let agent = sandbox.start_agent(&idle_agent(), &["--extra"]).unwrap();

    assert_eq!(agent.admin("/readyz").unwrap().status, 200);
    assert_eq!(agent.log().lines().collect::<Vec<_>>(), ["started for sandbox-node"]);
    let cgroup = agent.pod().container_cgroup("agent").unwrap().to_owned();
    assert!(cgroup.starts_with(pods_cgroup));
    assert_eq!(fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().lines().count(), 1);

    agent.kill().unwrap();
    assert!(agent.admin("/readyz").is_err());
    assert_eq!(fs::read_to_string(cgroup.join("cgroup.procs")).unwrap(), "");
    agent.start().unwrap();
    assert!(!agent.terminate().unwrap().success());
    agent.start().unwrap();
    agent.restart(None).unwrap();
    assert_eq!(agent.log().lines().count(), 4);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn agent_that_ends_at_once_is_an_error_with_its_log() {
    let mut sandbox = Sandbox::create("fails").unwrap();

    let error = sandbox.start_agent(&idle_agent(), &["--fail=yes"]).unwrap_err().to_string();

    assert!(error.contains("started for sandbox-node") && error.contains("as it was told"), "{error}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_exist_on_the_node_and_in_the_api_until_they_are_removed() {
    let mut sandbox = Sandbox::create("pods").unwrap();
    let list = |sandbox: &Sandbox| {
        let url = sandbox.api().url() + "/api/v1/pods?fieldSelector=spec.nodeName%3Dsandbox-node";
        client::Request::get(url).send().unwrap().body
    };
    sandbox.add_pod(&PodSpec::new("orders").role("orders-role")).unwrap();
    let uid = sandbox.pod("orders").unwrap().pod().spec().uid.clone();
    let cgroup = sandbox.pod("orders").unwrap().pod().cgroup().to_owned();
    assert!(list(&sandbox).contains(&uid) && list(&sandbox).contains("orders-role"));
    assert!(cgroup.ends_with(format!("burstable/pod{uid}")) && cgroup.exists());

    sandbox.remove_pod("orders").unwrap();

    assert!(!list(&sandbox).contains(&uid));
    assert!(!cgroup.exists());
    assert!(sandbox.pod("orders").is_err());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn shop_window_shows_when_pods_are_not_protected() {
    let output = Command::new(BINARY).arg("show").arg("--agent").arg(idle_agent()).output().unwrap();

    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("{}  (should be orders-role)", Accounts::NODE_ROLE)), "{text}");
    assert!(text.contains("✗ ") && text.contains(" packets from pods reached the metadata server"), "{text}");
    assert!(text.contains("✓ host process"), "{text}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn shop_window_of_service_accounts_has_a_node_that_may_assume_nothing() {
    let mut show = Command::new(BINARY);
    show.args(["show", "--credentials-from", "service-account", "--agent"]).arg(idle_agent());
    let output = show.output().unwrap();

    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "nobody protects the pods: {text}");
    assert!(text.lines().any(|line| line.starts_with("✗ orders ")), "{text}");
    let refused = text.lines().filter(|line| line.starts_with("✓ the node's role"));
    assert_eq!(refused.count(), 2, "{text}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn kept_sandbox_can_be_entered_and_is_removed_by_a_signal() {
    let mut kept = Command::new(BINARY);
    kept.args(["show", "--keep", "--agent"]).arg(idle_agent()).stdout(Stdio::piped());
    let mut kept = kept.spawn().unwrap();
    let mut lines = BufReader::new(kept.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("until Ctrl-C") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended");
    }

    // Other sandboxes may have such a pod, too.
    let name = format!("show-{}", kept.id());
    let exec = |target: &str| {
        let arguments = ["exec", "--sandbox", &name, target, "--", "cat", "/proc/self/cgroup"];
        Command::new(BINARY).args(arguments).output()
    };
    let inside = String::from_utf8(exec("orders/sidecar").unwrap().stdout).unwrap();
    let missing = exec("nobody").unwrap();
    let pid = kept.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());

    assert_eq!(kept.wait().unwrap().code(), Some(130));
    assert!(inside.contains(&format!("/kube2ram-{name}/kubepods/burstable/pod")), "{inside}");
    assert!(!missing.status.success());
    assert!(!Path::new(Record::ROOT).join(&name).exists());
    // Whoever still held the pipe would be a process left behind.
    lines.read_to_string(&mut line).unwrap();
}
