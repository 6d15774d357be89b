//! A sandbox with the agent under test, and the questions that every test asks. Depends on
//! `kube2ram-sandbox`; used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    client::{Credentials, Family, Reply, caller_identity},
    node::{CgroupDriver, Node, Packet, PodSpec},
    standin::{AccessKey, Accounts, Role},
};
use serde_json::Value;

pub(crate) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
pub(crate) const INSTANCE_ID: &str = "/latest/meta-data/instance-id";
pub(crate) const ALLOW_LIST: &str = "ram.aliyuncs.com/allowed-roles";
pub(crate) const ROLE: &str = "ram.aliyuncs.com/role";

/// SDKs give up at 1 s. What they would see of the client's own start is not the agent's.
pub(crate) const SDK_PATIENCE: Duration = Duration::from_secs(1);

/// How long something that must happen may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A sandbox that shows the agent's log when a test fails.
pub(crate) struct Lab(Sandbox);

impl Lab {
    /// Pods without an agent.
    pub(crate) fn new(name: &str, pods: &[PodSpec]) -> Self {
        Self::with_driver(name, CgroupDriver::Cgroupfs, pods)
    }

    pub(crate) fn with_driver(name: &str, driver: CgroupDriver, pods: &[PodSpec]) -> Self {
        let mut lab = Self(Sandbox::create_with(name, driver).unwrap());
        for pod in pods {
            lab.add(pod);
        }
        lab
    }

    /// Pods and the agent, which completes bare role names and is ready.
    pub(crate) fn with_agent(name: &str, pods: &[PodSpec], extra: &[&str]) -> Self {
        let mut lab = Self::new(name, pods);
        lab.start(extra);
        lab
    }

    pub(crate) fn start(&mut self, extra: &[&str]) {
        self.prepare(extra);
        self.agent().unwrap().start().unwrap();
    }

    /// An agent that does not run yet.
    pub(crate) fn prepare(&mut self, extra: &[&str]) {
        let args = [&["--auto-discover-base-arn"], extra].concat();
        self.add_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), &args).unwrap();
    }

    /// Adds a pod, and the role of its annotation to the account.
    pub(crate) fn add(&mut self, pod: &PodSpec) {
        if let Some(role) = pod.annotations.get(ROLE) {
            self.accounts().add_role(Accounts::role_arn(role), Role::default());
        }
        self.add_pod(pod).unwrap();
    }

    /// A GET from a pod's first container. What gets no answer is no [`Reply`].
    pub(crate) fn ask(&self, pod: &str, target: &str) -> Reply {
        self.pod(pod).unwrap().curl(target).unwrap()
    }

    /// Asks for credentials and returns whose they are; a refusal is its status.
    pub(crate) fn credentials(&self, pod: &str, role: &str) -> String {
        owner(&self.ask(pod, &format!("{LIST}{role}")))
    }

    /// The owner of the credentials in a reply, according to STS.
    pub(crate) fn caller(&self, reply: &Reply) -> String {
        let credentials = serde_json::from_str::<Credentials>(&reply.body).unwrap();
        caller_identity(&self.sts().url(), &credentials).unwrap()
    }

    /// Asserts that a pod is refused the connection itself, on either kind of socket.
    pub(crate) fn assert_refused(&self, pod: &str) {
        let output = self.curl(pod, &["--silent", "--show-error", &url(LIST)]);
        assert_eq!(output.0, Some(7), "curl's code for a failed connect: {}", output.1);
        let mapped = self.pod(pod).unwrap().curl_from("app", Family::V6Mapped, &url(LIST)).unwrap_err();
        assert!(format!("{mapped:#}").contains("Connection refused"), "{mapped:#}");
    }

    /// Runs the real curl in a pod: its exit code, and what it printed.
    pub(crate) fn curl(&self, pod: &str, args: &[&str]) -> (Option<i32>, String) {
        run(self.pod(pod).unwrap().pod().command("app", "curl").unwrap().args(["--max-time", "5"]).args(args))
    }

    /// What pods sent to the metadata server past the agent. The node's own address is the agent's and the
    /// host's.
    pub(crate) fn leaks(&self) -> Vec<Packet> {
        let mut packets = self.node().sniffer().packets();
        packets.retain(|packet| !self.node().owns(packet.source.ip()));
        packets
    }

    /// Runs a subcommand in the agent's container: its exit code, and what it printed.
    pub(crate) fn kube2ram(&mut self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.agent().unwrap().exec(args).unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    /// The same as JSON.
    pub(crate) fn document(&mut self, args: &[&str]) -> (Option<i32>, Value) {
        let (code, text) = self.kube2ram(&[args, &["-o", "json"]].concat());
        let document =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"));
        (code, document)
    }

    /// A sample of the agent's metrics; zero when it has none of that name and labels.
    pub(crate) fn metric(&mut self, sample: &str) -> f64 {
        self.agent().unwrap().metric(sample).unwrap()
    }
}

impl Deref for Lab {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.0
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut Sandbox {
        &mut self.0
    }
}

/// Every secret and token of the stand-ins contains one of these.
pub(crate) fn assert_no_secrets(text: &str) {
    for secret in [AccessKey::SECRET_MARKER, "SandboxToken"] {
        assert!(!text.contains(secret), "a secret in:\n{text}");
    }
}

pub(crate) fn url(target: &str) -> String {
    format!("http://{}{target}", Node::METADATA_IP)
}

pub(crate) fn url6(target: &str) -> String {
    format!("http://[{}]{target}", Node::METADATA_IP6)
}

/// Whose credentials a reply holds, `STS.<role>.<unique>`; a refusal is its status.
pub(crate) fn owner(reply: &Reply) -> String {
    if reply.status == 200 { owner_of(&reply.body) } else { reply.status.to_string() }
}

/// Whose credentials a document holds.
pub(crate) fn owner_of(document: &str) -> String {
    let credentials = serde_json::from_str::<Credentials>(document)
        .unwrap_or_else(|error| panic!("no credentials ({error}): {document}"));
    credentials.access_key_id.split('.').nth(1).unwrap().to_owned()
}

/// Runs a command to its end: its exit code, and what it printed.
pub(crate) fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).trim().to_owned())
}

/// A command that will run in any cgroup, in the node's namespaces.
pub(crate) fn command_in(cgroup: &Path, program: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"echo $$ > "$1/cgroup.procs" && shift && exec "$@""#, "sh"])
        .arg(cgroup)
        .arg(program);
    command
}

/// Asks again until the answer is the right one.
pub(crate) fn eventually<T: PartialEq + std::fmt::Debug>(expected: T, mut ask: impl FnMut() -> T) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let answer = ask();
        if answer == expected {
            return;
        }
        assert!(Instant::now() < deadline, "still {answer:?} instead of {expected:?} after {DEADLINE:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Asserts that a reply is a 503 that came while SDKs still wait, with a `Retry-After`.
pub(crate) fn assert_try_again(reply: &Reply) {
    assert_eq!(reply.status, 503, "{reply:?}");
    assert!(reply.headers["retry-after"].parse::<u64>().is_ok_and(|seconds| (1..=60).contains(&seconds)));
    assert_in_time(reply);
}

pub(crate) fn assert_in_time(reply: &Reply) {
    assert!(Duration::from_micros(reply.latency_us) < SDK_PATIENCE, "{reply:?}");
}
