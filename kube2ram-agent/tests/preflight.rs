//! Rung 2: `kube2ram preflight` on a node that has everything, and on one where another program does not
//! share its place.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use kube2ram_sandbox::{Sandbox, node::PodSpec};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");

fn preflight(sandbox: &Sandbox, bpf_dir: &Path) -> Output {
    let mut command = sandbox.node().host_command(AGENT);
    command.arg("preflight").arg("--bpf-dir").arg(bpf_dir);
    // This machine may be one of another cloud.
    command.arg(format!("--metadata-addr={}", sandbox.node().cloud().metadata_ip()));
    command.arg("--cgroup-root").arg(sandbox.node().cgroup_root());
    command.arg("--pods-cgroup").arg(sandbox.node().pods_cgroup()).output().unwrap()
}

fn pins(sandbox: &Sandbox) -> PathBuf {
    sandbox.node().bpffs().join("kube2ram")
}

/// The lines of conditions that are not met.
fn unmet(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines = String::from_utf8(output.stderr.clone()).unwrap();
    lines.lines().filter(|line| line.starts_with('✗')).map(str::to_owned).collect()
}

/// One of the agent's programs, as somebody else's: attached without a link, as before links there was.
struct Legacy {
    cgroup: PathBuf,
    program: PathBuf,
}

impl Legacy {
    fn attach(sandbox: &Sandbox, cgroup: &Path, mode: &[&str]) -> Self {
        let program = sandbox.node().bpffs().join("legacy");
        // Next to the directory of the profile.
        let object = Path::new(AGENT).ancestors().nth(2).unwrap().join("ebpf/kube2ram.bpf.o");
        let loaded =
            Command::new("bpftool").args(["prog", "loadall"]).args([&object, &program]).output().unwrap();
        assert!(loaded.status.success(), "{loaded:?}");
        let program = program.join("k2r_connect4");
        let mut attach = Command::new("bpftool");
        attach.args(["cgroup", "attach"]).arg(cgroup).args(["connect4", "pinned"]).arg(&program).args(mode);
        let attached = attach.output().unwrap();
        assert!(attached.status.success(), "{attached:?}");
        Self { cgroup: cgroup.to_owned(), program }
    }
}

impl Drop for Legacy {
    fn drop(&mut self) {
        let mut detach = Command::new("bpftool");
        detach.args(["cgroup", "detach"]).arg(&self.cgroup).args(["connect4", "pinned"]).arg(&self.program);
        drop(detach.output());
        drop(std::fs::remove_dir_all(self.program.parent().unwrap()));
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_that_has_everything_passes_before_and_while_an_agent_runs() {
    let mut sandbox = Sandbox::create("preflight").unwrap();
    sandbox.add_pod(&PodSpec::new("pod")).unwrap();

    let before = preflight(&sandbox, &pins(&sandbox));
    sandbox.start_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    let meanwhile = preflight(&sandbox, &pins(&sandbox));

    for output in [before, meanwhile] {
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).unwrap();
        assert!(lines.lines().count() == 13 && lines.lines().all(|line| line.starts_with('✓')), "{lines}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn names_what_is_missing() {
    let sandbox = Sandbox::create("preflight-missing").unwrap(); // without a pod

    let unmet = unmet(&preflight(&sandbox, Path::new("/tmp/kube2ram")));

    assert_eq!(unmet.len(), 1, "{unmet:?}");
    assert!(unmet[0].contains("mount -t bpf bpf /sys/fs/bpf"), "{unmet:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_on_which_no_pod_has_started_yet_passes_with_a_warning() {
    let sandbox = Sandbox::create("preflight-empty").unwrap();

    let output = preflight(&sandbox, &pins(&sandbox));

    assert!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let warnings: Vec<_> = lines.lines().filter(|line| line.starts_with('!')).collect();
    assert!(matches!(warnings[..], [line] if line.contains("holds no process")), "{lines}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_installation_is_named_with_its_directory_and_the_remedy() {
    let mut sandbox = Sandbox::create("preflight-other").unwrap();
    sandbox.add_pod(&PodSpec::new("pod")).unwrap();
    sandbox.start_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    sandbox.agent().unwrap().kill().unwrap();
    let (first, second) = (pins(&sandbox), sandbox.node().bpffs().join("second/kube2ram"));

    let unmet = unmet(&preflight(&sandbox, &second));

    let [line] = &*unmet else { panic!("{unmet:?}") };
    assert!(line.contains("another installation of kube2ram has programs there (ids "), "{line}");
    let remedy = format!("kube2ram uninstall --bpf-dir={}", first.display());
    assert!(line.contains(&format!("pinned in {}", first.display())) && line.ends_with(&remedy), "{line}");
    // The agent refuses for the same reason, and changes nothing.
    let agent = sandbox.agent().unwrap();
    agent.add_arg(&format!("--bpf-dir={}", second.display()));
    let refused = agent.start().unwrap_err().to_string();
    assert!(refused.contains("installations: ") && refused.contains(&remedy), "{refused}");
    assert!(!second.exists());
    // Once the other one is removed as the message asks, it starts.
    let mut uninstall = sandbox.node().host_command(AGENT);
    uninstall.arg("uninstall").arg("--bpf-dir").arg(&first);
    let removed = uninstall.arg("--state-dir").arg(sandbox.node().agent_state()).output().unwrap();
    assert!(removed.status.success(), "{removed:?}");
    sandbox.agent().unwrap().start().unwrap();
    assert!(preflight(&sandbox, &second).status.success());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cilium_without_socket_load_balancer_is_warned_of_the_links() {
    let mut sandbox = Sandbox::create("preflight-cilium").unwrap();
    sandbox.add_pod(&PodSpec::new("pod")).unwrap();
    let says = |sandbox: &Sandbox| {
        let output = preflight(sandbox, &pins(sandbox));
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).unwrap();
        lines.lines().find(|line| line.contains(" Cilium ")).map(str::to_owned)
    };
    assert_eq!(says(&sandbox), None);

    std::fs::create_dir(sandbox.node().bpffs().join("cilium")).unwrap();

    let line = says(&sandbox).unwrap();
    assert!(line.starts_with('!') && line.contains("cilium/cilium#43877"), "{line}");
}

/// A network namespace with nothing but a loopback device, removed at the end.
struct Alone(String);

impl Alone {
    fn new(name: &str) -> Self {
        let name = format!("kube2ram-{name}-{}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        let alone = Self(name);
        alone.shell("ip link set lo up");
        alone
    }

    fn shell(&self, command: &str) -> Output {
        let output =
            Command::new("ip").args(["netns", "exec", &self.0, "sh", "-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        output
    }

    /// Preflight's lines about predecessors, whatever else it finds.
    fn predecessors(&self) -> Vec<String> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, AGENT, "preflight", "--metadata-addr=100.100.100.201"]);
        let Output { stdout, stderr, .. } = command.output().unwrap();
        let lines = String::from_utf8([stdout, stderr].concat()).unwrap();
        let lines: Vec<_> =
            lines.lines().filter(|line| line.contains(" predecessors  ")).map(str::to_owned).collect();
        assert!(!lines.is_empty());
        lines
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        run(Command::new("ip").args(["netns", "delete", &self.0]));
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_command_that_it_prints_removes_a_rule_of_a_predecessor() {
    let alone = Alone::new("leftovers");
    let nothing = ["✓ predecessors     left nothing"];
    let rule =
        "PREROUTING -p tcp -d 100.100.100.201 --dport 80 -j DNAT --to-destination 10.0.0.1:8181 -i cali+";
    alone.shell(&format!("iptables-nft -t nat -A {}", rule.replace("201", "200")));
    assert_eq!(alone.predecessors(), nothing, "of another address than --metadata-addr");

    for add in [
        format!("iptables-nft -t nat -A {rule}"),
        format!("iptables-legacy -t nat -A {rule}"),
        format!("iptables-legacy -t nat -A {rule} -m comment --comment 'by hand'"),
        "nft add rule ip nat PREROUTING ip daddr 100.100.100.201 tcp dport 80 redirect to :8181".to_owned(),
    ] {
        alone.shell(&add);

        let lines = alone.predecessors();

        assert_eq!(lines.len(), 1, "{add}: {lines:?}");
        assert!(lines[0].starts_with("! predecessors"), "{lines:?}");
        alone.shell(lines[0].rsplit_once("is removed: ").unwrap().1);
        assert_eq!(alone.predecessors(), nothing, "{add}: {lines:?}");
    }
    // The other one's is as it was.
    let left = alone.shell("iptables-nft -t nat -S PREROUTING");
    assert!(String::from_utf8(left.stdout).unwrap().contains("-d 100.100.100.200/32"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn exclusive_programs_are_refused() {
    let mut sandbox = Sandbox::create("preflight-legacy").unwrap();
    sandbox.add_pod(&PodSpec::new("pod")).unwrap();
    let pods = sandbox.node().pods_cgroup();
    let ancestor = pods.parent().unwrap().to_owned();

    for mode in [&[][..], &["override"]] {
        let legacy = Legacy::attach(&sandbox, &ancestor, mode);

        let unmet = unmet(&preflight(&sandbox, &pins(&sandbox)));

        assert_eq!(unmet.len(), 1, "{unmet:?}");
        assert!(
            unmet[0].contains("cgroup_inet4_connect") && unmet[0].contains("BPF_F_ALLOW_MULTI"),
            "{unmet:?}"
        );
        drop(legacy);
    }
    // The agent makes the same checks.
    let legacy = Legacy::attach(&sandbox, &ancestor, &["override"]);
    let refused = sandbox.start_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap_err().to_string();
    assert!(refused.contains("this node is not ready") && refused.contains("BPF_F_ALLOW_MULTI"), "{refused}");
    drop(legacy);
    // The allowed twin: somebody who shares.
    let _shares = Legacy::attach(&sandbox, &ancestor, &["multi"]);
    sandbox.agent().unwrap().start().unwrap();
}
