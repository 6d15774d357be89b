//! Rung 2: the agent does everything with the capabilities that the manifest gives it, and each of them is
//! needed for something.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    node::PodSpec,
    standin::{Accounts, Role},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const MANIFEST: &str = include_str!("../../deploy/kustomize/base/kube2ram.yaml");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
const ROLE: &str = "pod-role";
const DEADLINE: Duration = Duration::from_secs(60);

/// The capabilities of the manifest's container, as setpriv(1) calls them.
fn capabilities_of_manifest() -> Vec<String> {
    let line = MANIFEST.lines().find_map(|line| line.trim().strip_prefix("add: [")).unwrap();
    let names = line.split(']').next().unwrap().split(',');
    names.map(|name| name.trim().to_ascii_lowercase()).collect()
}

/// Root with these capabilities and no others, in its own cgroup namespace, with a read-only /sys and
/// /proc/sys, as runtimes start containers.
fn confined(sandbox: &mut Sandbox, capabilities: &[String]) {
    let state = sandbox.node().directory();
    let bounding = capabilities.iter().fold("-all".to_owned(), |list, name| format!("{list},+{name}"));
    let script = format!(
        "mount -o remount,bind,ro /sys && mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && \
         cd {} && exec setpriv --bounding-set={bounding} --no-new-privs -- \"$@\"",
        state.display()
    );
    let agent = sandbox.agent().unwrap();
    agent.set_wrapper(&["unshare", "--cgroup", "--mount", "--", "sh", "-c", &script, "sh"]);
}

fn sandbox(name: &str) -> Sandbox {
    let mut sandbox = Sandbox::create(name).unwrap();
    sandbox.accounts().add_role(Accounts::role_arn(ROLE), Role::default());
    sandbox.add_pod(&PodSpec::new("pod").role(ROLE)).unwrap();
    sandbox.add_pod(&PodSpec::new("daemon").role(ROLE).host_network()).unwrap();
    sandbox.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    sandbox
}

fn eventually(sandbox: &mut Sandbox, mut condition: impl FnMut(&mut Sandbox) -> bool) -> bool {
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        if condition(sandbox) {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

/// Whether everything that takes a privilege works: programs, rule, listener in the pod, and who asks.
fn everything_works(sandbox: &mut Sandbox) -> bool {
    sandbox.agent().unwrap().start().is_ok()
        && eventually(sandbox, |sandbox| {
            sandbox.agent().unwrap().metric("kube2ram_pod_listeners").unwrap() == 1.0
        })
        && sandbox.agent().unwrap().metric("kube2ram_forward_guard_in_force").unwrap() == 1.0
        && ["pod", "daemon"]
            .iter()
            .all(|pod| sandbox.pod(pod).unwrap().curl(LIST).is_ok_and(|reply| reply.body == ROLE))
        && sandbox
            .pod("pod")
            .unwrap()
            .curl("/latest/meta-data/instance-id")
            .is_ok_and(|reply| reply.status == 200)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_manifests_capabilities_are_enough() {
    let mut sandbox = sandbox("privileges-enough");
    confined(&mut sandbox, &capabilities_of_manifest());

    assert!(everything_works(&mut sandbox), "{}", sandbox.agent().unwrap().log());

    sandbox.agent().unwrap().restart(None).unwrap();
    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_listeners_in_pods_bpf_does_instead_of_sys_admin() {
    let mut sandbox = sandbox("privileges-bpf");
    confined(&mut sandbox, &["bpf", "dac_read_search", "net_admin"].map(str::to_owned));

    sandbox.agent().unwrap().start().unwrap();

    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, ROLE);
    assert_eq!(sandbox.agent().unwrap().metric("kube2ram_pod_listeners").unwrap(), 0.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_of_the_manifests_capabilities_is_needed() {
    // For kernels below 5.11, which count maps against the limit of locked memory.
    let only_elsewhere = ["sys_resource"];
    let all = capabilities_of_manifest();

    for left_out in all.iter().filter(|name| !only_elsewhere.contains(&name.as_str())) {
        let mut sandbox = sandbox("privileges-needed");
        let fewer: Vec<_> = all.iter().filter(|name| *name != left_out).cloned().collect();
        confined(&mut sandbox, &fewer);

        assert!(!everything_works(&mut sandbox), "{left_out} is not needed");
    }
}
