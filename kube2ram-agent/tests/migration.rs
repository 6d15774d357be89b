//! Rung 2: from an iptables predecessor to kube2ram and back, under load, by the commands of
//! docs/migration.md and docs/aws/migration.md: the pages are read, and a command that nobody here knows
//! fails the test. Needs root, iptables, and `kube2ram-sandbox` with its stand-in for the predecessor.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    fmt::Write as _,
    net::SocketAddrV4,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Cloud, Sandbox,
    client::LoadReport,
    node::PodSpec,
    standin::{Predecessor, Role},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const OVERLAY: &str = include_str!("../../deploy/kustomize/components/migration/kustomization.yaml");
const WAYS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bypass/ways.py");
/// No hostNetwork pods: the predecessors never redirected those.
const PODS: [&str; 4] = ["a", "b", "c", "d"];
/// The sandbox's devices to pods, as the predecessors' `--host-interface=cali+` names those of a network
/// plugin.
const DEVICES: &str = "k2r+";
const DEADLINE: Duration = Duration::from_secs(20);

/// A command of the page: its section's number or name, and whether it is root's on a node.
#[derive(Debug)]
struct Step {
    section: &'static str,
    on_node: bool,
    command: &'static str,
}

fn page(cloud: Cloud) -> &'static str {
    match cloud {
        Cloud::Alibaba => include_str!("../../docs/migration.md"),
        Cloud::Aws => include_str!("../../docs/aws/migration.md"),
    }
}

/// How the page calls it.
fn preflight(cloud: Cloud) -> &'static str {
    match cloud {
        Cloud::Alibaba => "kube2ram preflight",
        Cloud::Aws => "kube2ram preflight --cloud=aws",
    }
}

/// What stands in `console` blocks.
fn steps(cloud: Cloud) -> Vec<Step> {
    let (mut section, mut is_console, mut steps) = ("", false, Vec::new());
    for line in page(cloud).lines() {
        if let Some(fence) = line.strip_prefix("```") {
            is_console = fence == "console";
        } else if let Some(title) = line.strip_prefix("## ") {
            section = title.split('.').next().unwrap();
        } else if is_console {
            let (prompt, command) = line.split_once(' ').unwrap();
            assert!(["$", "#"].contains(&prompt), "{line}");
            steps.push(Step { section, on_node: prompt == "#", command });
        }
    }
    steps
}

/// The arguments in the page's manifest.
fn manifest(cloud: Cloud) -> Vec<&'static str> {
    let (_, manifest) = page(cloud).split_once("```yaml").unwrap();
    let (manifest, _) = manifest.split_once("```").unwrap();
    flags(manifest)
}

/// The items of a YAML list that are flags.
fn flags(yaml: &str) -> Vec<&str> {
    let items = yaml.lines().filter_map(|line| line.trim().strip_prefix("- "));
    items.filter(|item| item.starts_with("--")).collect()
}

/// Those arguments, but for the port: the sandbox has its own.
fn args(cloud: Cloud) -> Vec<&'static str> {
    manifest(cloud).into_iter().filter(|arg| !arg.starts_with("--app-port")).collect()
}

/// The node, between two agents.
struct Rehearsal {
    cloud: Cloud,
    sandbox: Sandbox,
    predecessor: Predecessor,
    load: Vec<Child>,
}

fn iptables(arguments: &str) -> String {
    let output = Command::new("iptables-nft").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn role(pod: &str) -> String {
    format!("{pod}-role")
}

impl Rehearsal {
    /// Pods that the predecessor serves, and clients that ask it without an end.
    fn begin(name: &str, cloud: Cloud) -> Self {
        let mut sandbox = Sandbox::create_in(name, cloud).unwrap();
        for pod in PODS {
            sandbox.accounts().add_role(cloud.role_arn(&role(pod)), Role::default());
            sandbox.add_pod(&PodSpec::new(pod).role(&role(pod))).unwrap();
        }
        let predecessor = sandbox.predecessor().unwrap();
        let mut rehearsal = Self { cloud, sandbox, predecessor, load: Vec::new() };
        rehearsal.sandbox.add_agent(AGENT.as_ref(), &args(cloud)).unwrap();
        iptables(&format!("-t nat -A {}", rehearsal.rule()));
        rehearsal.load = PODS.map(|pod| rehearsal.client(pod)).into();
        eventually("the predecessor serves", || rehearsal.predecessor.served() > 100);
        rehearsal
    }

    /// What both predecessors add (iptables.go).
    fn rule(&self) -> String {
        format!(
            "PREROUTING -p tcp -d {} --dport 80 -j DNAT --to-destination {} -i {DEVICES}",
            self.cloud.metadata_ip(),
            self.led_to()
        )
    }

    fn led_to(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.sandbox.node().ip(), self.predecessor.addr().port())
    }

    fn client(&self, pod: &str) -> Child {
        let mut client = self.sandbox.pod(pod).unwrap().client("app").unwrap();
        let (cloud, ip) = (self.cloud.name(), self.cloud.metadata_ip());
        client.args(["load", &format!("--cloud={cloud}"), &format!("--connect={ip}:80")]);
        client.arg(format!("--expect={}", role(pod)));
        client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// Performs a step of the page, and returns what it said.
    fn perform(&mut self, Step { section, on_node, command }: &Step) -> String {
        match (*on_node, *command) {
            (true, command) if command == preflight(self.cloud) => self.preflight(),
            (true, command) if command.starts_with("curl ") => {
                let admin = self.sandbox.agent().unwrap().admin_addr().to_string();
                shell(&command.replace("localhost:9181", &admin))
            }
            (true, command) if command.starts_with("ss ") => {
                shell(&command.replace("8181", &self.predecessor.addr().port().to_string()))
            }
            (true, command) if command.starts_with("iptables-nft-save ") => {
                assert_eq!(self.removal().unwrap(), command, "the page's example is preflight's output");
                shell(command)
            }
            (false, "kubectl apply -f deploy/kube2ram.yaml") if *section == "2" => {
                self.sandbox.agent().unwrap().start().unwrap();
                String::new()
            }
            (false, "kubectl apply -f deploy/kube2ram.yaml") if *section == "5" => {
                let mut next = self.sandbox.surge().unwrap();
                next.add_arg("--open-connections=cut");
                next.start_beside().unwrap();
                let mut former = self.sandbox.replace_agent(next).unwrap();
                assert_eq!(former.terminate().unwrap().code(), Some(0));
                self.sandbox.remove_agent(former).unwrap();
                String::new()
            }
            (false, "kubectl -n kube-system rollout status daemonset/kube2ram") => {
                eventually("ready", || {
                    self.sandbox.agent().unwrap().admin("/readyz").is_ok_and(|it| it.status == 200)
                });
                String::new()
            }
            (false, "kubectl -n kube-system delete daemonset kube2iam") => {
                self.predecessor.stop();
                String::new()
            }
            (false, "kubectl apply -f predecessor.yaml") => {
                self.predecessor.restart().unwrap();
                // It adds its rule unless it is there.
                let rule = self.rule();
                shell(&format!("iptables-nft -t nat -C {rule} 2> /dev/null || iptables-nft -t nat -A {rule}"))
            }
            (false, command) if command.starts_with("kubectl -n kube-system patch daemonset kube2ram ") => {
                let (_, patch) = command.split_once(" -p ").unwrap();
                let patch: serde_json::Value = serde_json::from_str(patch.trim_matches('\'')).unwrap();
                assert_eq!(patch[0]["value"]["maxSurge"], 0, "two at once would be an agent that hands over");
                assert_eq!(patch[1]["value"], serde_json::json!(["uninstall"]));
                assert_eq!(self.sandbox.agent().unwrap().terminate().unwrap().code(), Some(0));
                self.uninstall()
            }
            // It has nothing to delete any more.
            (false, "kubectl delete -f deploy/kube2ram.yaml") => String::new(),
            _ => panic!("nobody rehearses {command:?} of section {section}"),
        }
    }

    fn on_host(&self, subcommand: &str) -> Command {
        let node = self.sandbox.node();
        let mut command = node.host_command(AGENT);
        command.arg(subcommand).arg("--bpf-dir").arg(node.bpffs().join("kube2ram"));
        command
    }

    fn preflight(&self) -> String {
        let node = self.sandbox.node();
        let mut command = self.on_host("preflight");
        command.arg(format!("--cloud={}", self.cloud.name()));
        command.arg("--cgroup-root").arg(node.cgroup_root()).arg("--pods-cgroup").arg(node.pods_cgroup());
        said(&command.output().unwrap())
    }

    fn uninstall(&self) -> String {
        said(
            &self
                .on_host("uninstall")
                .arg("--state-dir")
                .arg(self.sandbox.node().agent_state())
                .output()
                .unwrap(),
        )
    }

    /// The command that preflight prints for this node's predecessor, if there is one. (The machine may have
    /// another one.)
    fn removal(&self) -> Option<String> {
        let led_to = format!("leads to {}.", self.led_to());
        let said = self.preflight();
        let line = said.lines().find(|line| line.starts_with("! predecessors") && line.contains(&led_to))?;
        Some(line.rsplit_once("is removed: ").unwrap().1.to_owned())
    }

    fn metric(&mut self, outcome: &str) -> f64 {
        let sample = format!("kube2ram_kernel_outcomes_total{{outcome=\"{outcome}\"}}");
        self.sandbox.agent().unwrap().metric(&sample).unwrap()
    }

    /// What pods sent to the metadata server past any agent.
    fn leaks(&self) -> usize {
        let node = self.sandbox.node();
        node.sniffer().packets().iter().filter(|packet| !node.owns(packet.source.ip())).count()
    }

    /// Stops the clients, all at once, and returns what they saw together.
    fn end(&mut self) -> LoadReport {
        self.load.iter_mut().for_each(|client| drop(client.stdin.take()));
        let report = |client: Child| -> LoadReport {
            serde_json::from_slice(&client.wait_with_output().unwrap().stdout).unwrap()
        };
        std::mem::take(&mut self.load).into_iter().map(report).fold(LoadReport::default(), LoadReport::plus)
    }

    /// What one pod may do while open connections are kept: nothing that opens another one past the agent.
    fn assert_nothing_new_gets_out(&self) {
        let pod = self.sandbox.pod(PODS[0]).unwrap().pod();
        let ip = pod.ip().to_string();
        for (way, arguments) in
            [("raw_syn", vec![ip.as_str()]), ("udp_sendto", vec![]), ("icmp_sendto", vec![])]
        {
            let mut command = pod.command("app", "python3").unwrap();
            command.env("METADATA", self.cloud.metadata_ip().to_string());
            let output = command.arg(WAYS).arg(way).args(arguments).output().unwrap();
            assert_eq!(said(&output).trim(), "EPERM", "{way}");
        }
        assert_eq!(self.leaks(), 0);
    }
}

impl Drop for Rehearsal {
    #[expect(clippy::print_stderr, reason = "for whoever reads why a test failed")]
    fn drop(&mut self) {
        for client in &mut self.load {
            drop(client.kill());
            drop(client.wait());
        }
        if thread::panicking() {
            let log = self.sandbox.agent().map(|agent| agent.log()).unwrap_or_default();
            let said = log.lines().filter(|line| !line.contains("request answered"));
            eprintln!("the agents' log:\n{}", said.collect::<Vec<_>>().join("\n"));
        }
    }
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn shell(command: &str) -> String {
    said(&Command::new("sh").args(["-c", command]).output().unwrap())
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// That many more requests have been answered by the agent.
fn serve_some(rehearsal: &mut Rehearsal) {
    let before = rehearsal.metric("redirected");
    eventually("the agent serves", || rehearsal.metric("redirected") > before + 50.0);
}

#[test]
fn the_overlay_has_the_flags_of_the_page() {
    let of_the_migration = ["--app-port=8182", "--open-connections=keep"];
    let (of_page, overlay) = (manifest(Cloud::Alibaba), flags(OVERLAY));

    for flag in of_the_migration {
        assert!(of_page.contains(&flag) && overlay.contains(&flag), "{flag}: {of_page:?}, {overlay:?}");
    }
    // The rest of either is a predecessor's.
    assert_eq!(of_page, [&["--auto-discover-base-arn"], &of_the_migration[..]].concat());
    for cloud in [Cloud::Alibaba, Cloud::Aws] {
        let (_, close_up) = page(cloud).split_once("\n## 5. ").unwrap();
        assert!(close_up.contains("Remove `--open-connections=keep`"), "{close_up}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_page_leads_from_a_predecessor_to_kube2ram_without_a_failed_request() {
    leads_there("migration", Cloud::Alibaba);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_page_leads_from_kube2iam_to_kube2ram_on_aws_without_a_failed_request() {
    leads_there("migration-aws", Cloud::Aws);
}

#[expect(clippy::print_stdout, reason = "tells what was measured")]
fn leads_there(name: &str, cloud: Cloud) {
    let mut rehearsal = Rehearsal::begin(name, cloud);
    let mut told = String::new();

    for step in steps(cloud).iter().filter(|step| step.section != "Roll back") {
        let said = rehearsal.perform(step);
        match (step.section, step.command) {
            ("1", _) => {
                assert!(rehearsal.removal().is_some(), "{said}");
                assert!(said.contains("! predecessors     a predecessor's agent listens on port"), "{said}");
            }
            ("2", command) if command.starts_with("kubectl") => {
                // Whoever connects is the agent's, who has been connected is still the predecessor's.
                let before = rehearsal.predecessor.served();
                serve_some(&mut rehearsal);
                eventually("the predecessor serves those who stayed", || {
                    rehearsal.predecessor.served() > before + 50
                });
                rehearsal.assert_nothing_new_gets_out();
            }
            ("2", _) => {
                assert!(said.contains("redirected") && said.contains("kept_open"), "{said}");
                assert!(
                    rehearsal.metric("kept_open") > 0.0 && rehearsal.metric("redirected") > 0.0,
                    "{said}"
                );
                let log = rehearsal.sandbox.agent().unwrap().log();
                assert_eq!(log.matches("leads to ").count(), 1, "said once: {log}");
            }
            ("3", command) if command.starts_with("ss") => {
                write!(told, "{} connections were still open, ", said.lines().count()).unwrap();
                assert!(said.contains("10."), "the clients that keep their connection: {said}");
            }
            ("3", _) => {
                let kept = rehearsal.metric("kept_open");
                serve_some(&mut rehearsal);
                serve_some(&mut rehearsal);
                // The last packets of the connections' end.
                assert!(rehearsal.metric("kept_open") < kept + 100.0);
            }
            ("4", command) if command == preflight(cloud) => {
                assert_eq!(rehearsal.removal(), None);
                let ip = cloud.metadata_ip().to_string();
                assert!(!iptables("-t nat -S PREROUTING").contains(&ip), "{said}");
            }
            ("5", _) => {
                serve_some(&mut rehearsal);
                rehearsal.assert_nothing_new_gets_out();
            }
            _ => {}
        }
    }
    let report = rehearsal.end();

    println!(
        "migrated under the load of {} pods: {} requests, {told}{} sent again on a new connection, the slowest took {} µs",
        PODS.len(),
        report.ok,
        report.resent,
        report.slowest_us
    );
    let bad = (report.wrong, report.refused, report.cut, report.failed);
    assert_eq!((bad, &report.refusals), ((0, 0, 0, 0), &Vec::new()), "{:?}", report.samples);
    // One client a pod keeps its connection, and had it closed once by the predecessor's end.
    assert!(report.resent <= PODS.len() && report.ok > 1000, "{report:?}");
    assert_eq!(rehearsal.leaks(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_page_leads_back_with_refusals_alone() {
    leads_back("roll-back", Cloud::Alibaba);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_page_leads_back_on_aws_with_refusals_alone() {
    leads_back("roll-back-aws", Cloud::Aws);
}

#[expect(clippy::print_stdout, reason = "tells what was measured")]
fn leads_back(name: &str, cloud: Cloud) {
    let all = steps(cloud);
    let (back, there): (Vec<_>, Vec<_>) = all.iter().partition(|step| step.section == "Roll back");
    // From where both run, and from the end.
    for last in ["2", "5"] {
        let mut rehearsal = Rehearsal::begin(name, cloud);
        for step in there.iter().filter(|step| step.section <= last) {
            rehearsal.perform(step);
        }
        serve_some(&mut rehearsal);
        let began = Instant::now();
        let before = rehearsal.predecessor.served();

        for step in &back {
            rehearsal.perform(step);
        }
        let took = began.elapsed();
        // Half of the clients connect for every request, so that these are new connections too.
        eventually("the predecessor serves all", || rehearsal.predecessor.served() > before + 500);
        let report = rehearsal.end();

        println!(
            "back from section {last} in {took:.1?}: {} requests, {} refused, longest outage {} µs",
            report.ok,
            report.refused,
            report.outages_us.iter().max().copied().unwrap_or_default()
        );
        assert_eq!((report.wrong, report.failed), (0, 0), "{:?}", report.samples);
        assert_eq!(rehearsal.leaks(), 0);
        for pod in PODS {
            let reply = rehearsal.sandbox.pod(pod).unwrap().curl(cloud.list()).unwrap();
            assert_eq!((reply.status, reply.body), (200, role(pod)), "{pod}");
        }
    }
}
