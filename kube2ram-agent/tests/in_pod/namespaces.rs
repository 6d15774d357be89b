//! Processes of a pod in other network namespaces than the pod's: they do not change where the pod is
//! answered.

use std::{
    fs,
    io::Write as _,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use kube2ram_sandbox::node::PodSpec;

use crate::{
    LIST, pods,
    support::{Lab, NEXT_PASS, eventually, eventually_within, ip_in, output},
};

/// A process that is ended with the test.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).spawn().unwrap())
    }

    /// What it is by now called, as it becomes one program after the other.
    fn is(&self, name: &str) -> bool {
        fs::read_to_string(format!("/proc/{}/comm", self.0.id())).is_ok_and(|comm| comm.trim() == name)
    }

    fn becomes(self, name: &str) -> Self {
        eventually(|| self.is(name).then_some(()));
        self
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A process of a pod in its own namespace, in which a listener can be opened.
fn nested(lab: &Lab, pod: &str) -> Process {
    // Younger than the pause process by the kernel's unit of start times: hundredths of a second.
    thread::sleep(Duration::from_millis(20));
    let mut unshare = lab.pod(pod).unwrap().pod().command("app", "unshare").unwrap();
    let process = Process::start(unshare.args(["--net", "sh", "-c", "ip link set lo up && exec sleep 600"]));
    process.becomes("sleep")
}

/// A pod's first process where there is no pause process.
fn first(lab: &Lab, pod: &str) -> Process {
    let mut sleep = lab.pod(pod).unwrap().pod().command("app", "sleep").unwrap();
    Process::start(sleep.arg("600")).becomes("sleep")
}

/// A process in the pod's cgroup and the host's namespace, as CRI-O has one for each container.
fn monitor(lab: &Lab, pod: &str) -> Process {
    let cgroup = lab.pod(pod).unwrap().pod().cgroup().join("crio-conmon-0f1e.scope");
    fs::create_dir(&cgroup).unwrap();
    let mut sh = Command::new("sh");
    let script = r#"echo $$ > "$1/cgroup.procs" && exec sleep 600"#;
    Process::start(sh.args(["-c", script, "sh"]).arg(&cgroup)).becomes("sleep")
}

fn end_pause(lab: &Lab, pod: &str) {
    let pause = lab.pod(pod).unwrap().pod().container_cgroup("pause").unwrap().join("cgroup.procs");
    let pid = fs::read_to_string(&pause).unwrap();
    assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success());
    eventually(|| fs::read_to_string(&pause).unwrap().is_empty().then_some(()));
}

/// A pod of one process, which has its own namespace until it is told to go to the host's.
fn restless(lab: &Lab, pod: &str) -> Process {
    end_pause(lab, pod);
    let host = lab.node().netns();
    let script = format!("ip link set lo up && read go && exec nsenter --net={} sleep 600", host.display());
    let mut unshare = lab.pod(pod).unwrap().pod().command("app", "unshare").unwrap();
    Process::start(unshare.args(["--net", "sh", "-c", &script]))
}

/// Asserts that the agent opened as many listeners as there are pods with their own namespaces, once it has
/// looked at all.
fn assert_listeners(lab: &mut Lab, expected: f64) {
    let open = eventually(|| Some(lab.metric("kube2ram_pod_listeners")).filter(|open| *open >= expected));
    assert_eq!(open, expected);
    assert_eq!(lab.metric(r#"kube2ram_pod_listener_failures_total{step="listen"}"#), 0.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn namespaces_that_a_pod_makes_do_not_change_where_it_is_answered() {
    let mut lab = Lab::without_agent("in-pod-nested", &pods());
    let nested = ["orders", "daemon"].map(|pod| nested(&lab, pod));

    lab.start();

    assert_listeners(&mut lab, 2.0);
    assert_eq!(lab.target("daemon"), None);
    assert_eq!(lab.role("daemon"), "daemon-role", "in the host's namespace, while one is elsewhere");
    // It has no way to the host any more, so it is answered in its own namespace, not in the nested one.
    ip_in(&lab, "orders", &["link", "set", "eth0", "down"]);
    assert_eq!(lab.role("orders"), "orders-role");
    drop(nested);
    assert_eq!(lab.role("daemon"), "daemon-role");
    assert_eq!(lab.role("orders"), "orders-role");
    assert_eq!(lab.target("daemon"), None);
}

/// What a pod's process is answered in namespaces that it made: body and status, which is 000 without an
/// answer.
fn answer_within(lab: &Lab, pod: &str, unshare: &[&str], address: &str) -> String {
    let mut command = lab.pod(pod).unwrap().pod().command("app", "unshare").unwrap();
    let url = format!("http://{address}{LIST}");
    let curl = ["curl", "--silent", "--globoff", "--max-time", "3", "--write-out", " %{http_code}", &url];
    output(command.args(unshare).args(curl))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_process_in_a_user_namespace_has_its_pods_role_or_none() {
    let mut lab = Lab::with_agent("in-pod-users", &pods());
    for pod in ["orders", "billing"] {
        lab.own_target(pod);
    }
    // With a network namespace, a process has all capabilities there.
    let alone = ["-Urn", "sh", "-c", r#"ip link set lo up && exec "$@""#, "sh"];

    for pod in ["orders", "billing", "daemon"] {
        for address in ["100.100.100.200", "[fd00:100::100:200]"] {
            for users in ["-U", "-Ur", "-UrC", "-Urm"] {
                let answer = answer_within(&lab, pod, &[users], address);
                assert_eq!(answer, format!("{pod}-role 200"), "{users} at {address}");
            }
            let answer = answer_within(&lab, pod, &alone, address);
            assert_eq!(answer, " 000", "{pod} in its own network, at {address}");
        }
    }
    // Nobody was refused for what these processes did.
    for pod in ["orders", "billing", "daemon"] {
        assert_eq!(lab.role(pod), format!("{pod}-role"));
    }
    assert_listeners(&mut lab, 2.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_host_network_pod_that_makes_a_namespace_while_the_agent_looks_keeps_its_role() {
    let mut lab = Lab::with_agent("in-pod-netns-exec", &pods());
    assert_listeners(&mut lab, 2.0);
    lab.add(&PodSpec::new("plugin").role("plugin-role").host_network());
    let nested = nested(&lab, "plugin");

    // Looked at again and again in its first seconds, and last by the agent that follows.
    for _ in 0..20 {
        assert_eq!(lab.role("plugin"), "plugin-role");
    }
    lab.agent().unwrap().restart(None).unwrap();
    assert_listeners(&mut lab, 2.0);
    assert_eq!(lab.role("plugin"), "plugin-role");
    drop(nested);
    assert_eq!(lab.role("plugin"), "plugin-role");
    assert_eq!(lab.target("plugin"), None);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn monitors_of_cri_o_do_not_change_where_a_pod_is_answered() {
    let mut lab = Lab::without_agent("in-pod-monitors", &pods());
    // CRI-O starts no pause process where none is needed.
    let processes = ["orders", "daemon"].map(|pod| {
        end_pause(&lab, pod);
        [monitor(&lab, pod), first(&lab, pod), nested(&lab, pod)]
    });

    lab.start();

    assert_listeners(&mut lab, 2.0);
    assert_eq!(lab.target("daemon"), None);
    assert_eq!(lab.role("daemon"), "daemon-role");
    ip_in(&lab, "orders", &["link", "set", "eth0", "down"]);
    assert_eq!(lab.role("orders"), "orders-role");
    drop(processes);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_moves_to_the_hosts_namespace_is_left_to_the_hosts_listener() {
    let mut lab = Lab::with_agent("in-pod-moves", &pods());
    let mut process = restless(&lab, "daemon");
    lab.own_target("daemon");

    process.tell("go");
    let _process = process.becomes("sleep");

    eventually_within(NEXT_PASS, || lab.target("daemon").is_none().then_some(()));
    assert_eq!(lab.role("daemon"), "daemon-role");
    eventually(|| (lab.metric("kube2ram_pod_listeners") == 2.0).then_some(()));
    assert_eq!(lab.role("orders"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_a_former_agent_opened_for_a_pod_of_the_hosts_namespace_is_not_continued() {
    let mut lab = Lab::with_agent("in-pod-next", &pods());
    let mut process = restless(&lab, "daemon");
    lab.own_target("daemon");
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();

    process.tell("go");
    let _process = process.becomes("sleep");
    let mut former = lab.replace_agent(next).unwrap();
    assert_eq!(former.terminate().unwrap().code(), Some(0));
    lab.remove_agent(former).unwrap();

    eventually(|| lab.target("daemon").is_none().then_some(()));
    assert_eq!(lab.role("daemon"), "daemon-role");
    assert_listeners(&mut lab, 2.0);
    assert_eq!(lab.role("orders"), "orders-role");
}
