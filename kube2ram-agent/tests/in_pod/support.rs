//! A sandbox with the agent, and a look at where the eBPF programs send its pods. Used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    node::PodSpec,
    standin::{Accounts, Role},
};
use serde_json::Value;

pub(crate) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
const ROLE: &str = "ram.aliyuncs.com/role";

/// How long something that an event brings about may take on a busy machine: less than the 30 s after which
/// it would come about without.
pub(crate) const DEADLINE: Duration = Duration::from_secs(25);

/// A full pass is due every 30 s.
pub(crate) const NEXT_PASS: Duration = Duration::from_secs(40);

/// Where a pod is redirected to: the cookie of its namespace, and the port at 127.0.0.1 in there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) netns: u64,
    pub(crate) port: u16,
    bytes: Vec<String>,
}

pub(crate) struct Lab(Sandbox);

impl Lab {
    /// Pods, and the agent, which is ready.
    pub(crate) fn with_agent(name: &str, pods: &[PodSpec]) -> Self {
        let mut lab = Self::without_agent(name, pods);
        lab.start();
        lab
    }

    pub(crate) fn without_agent(name: &str, pods: &[PodSpec]) -> Self {
        let mut lab = Self(Sandbox::create(name).unwrap());
        for pod in pods {
            lab.add(pod);
        }
        lab
    }

    pub(crate) fn start(&mut self) {
        self.start_agent(
            env!("CARGO_BIN_EXE_kube2ram").as_ref(),
            &["--auto-discover-base-arn", "--debug", "--log-level=debug"],
        )
        .unwrap();
    }

    /// As [`Self::start`], for tests in which pods ask more often than they may.
    pub(crate) fn start_without_rates(&mut self) {
        let flags = ["--auto-discover-base-arn", "--debug", "--request-rate=0"];
        self.start_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), &flags).unwrap();
    }

    pub(crate) fn add(&mut self, pod: &PodSpec) {
        self.accounts().add_role(Accounts::role_arn(&pod.annotations[ROLE]), Role::default());
        self.add_pod(pod).unwrap();
    }

    /// What a pod is told its role is; an error when it gets no answer.
    pub(crate) fn role(&self, pod: &str) -> String {
        match self.pod(pod).unwrap().curl(LIST) {
            Ok(reply) if reply.status == 200 => reply.body,
            Ok(reply) => reply.status.to_string(),
            Err(error) => format!("{error:#}"),
        }
    }

    /// Every target, by cgroup.
    pub(crate) fn targets(&self) -> Vec<(u64, Target)> {
        let dump = output(Command::new("bpftool").args(["--json", "map", "dump", "pinned", &self.map()]));
        let entries: Vec<Value> = serde_json::from_str(&dump).unwrap();
        entries.iter().map(target).collect()
    }

    pub(crate) fn target(&self, pod: &str) -> Option<Target> {
        let cgroup = self.cgroup(pod);
        self.targets().into_iter().find_map(|(id, target)| (id == cgroup).then_some(target))
    }

    /// The pod's own target, once it is there.
    pub(crate) fn own_target(&self, pod: &str) -> Target {
        eventually(|| self.target(pod))
    }

    pub(crate) fn remove_target(&self, pod: &str) {
        self.bpftool("delete", pod, &[]);
    }

    pub(crate) fn set_target(&self, pod: &str, target: &Target) {
        self.bpftool("update", pod, &[&["value".to_owned()], &target.bytes[..]].concat());
    }

    fn bpftool(&self, what: &str, pod: &str, value: &[String]) {
        let key = self.cgroup(pod).to_ne_bytes().map(|byte| byte.to_string());
        output(
            Command::new("bpftool").args(["map", what, "pinned", &self.map(), "key"]).args(key).args(value),
        );
    }

    fn map(&self) -> String {
        self.node().bpffs().join("kube2ram/v2/maps/k2r_targets").display().to_string()
    }

    pub(crate) fn cgroup(&self, pod: &str) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(self.pod(pod).unwrap().pod().cgroup()).unwrap().ino()
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

fn target(entry: &Value) -> (u64, Target) {
    let bytes = |name: &str| -> Vec<String> {
        entry[name].as_array().unwrap().iter().map(|byte| byte.as_str().unwrap().to_owned()).collect()
    };
    let number = |byte: &String| u8::from_str_radix(byte.trim_start_matches("0x"), 16).unwrap();
    let raw: Vec<_> = bytes("value").iter().map(number).collect();
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
    let port = u16::from_be_bytes([raw[8], raw[9]]);
    let key: Vec<_> = bytes("key").iter().map(number).collect();
    (word(&key), Target { netns: word(&raw[..8]), port, bytes: bytes("value") })
}

/// Runs iproute2 in a pod's network namespace.
pub(crate) fn ip_in(lab: &Lab, pod: &str, args: &[&str]) {
    let netns = lab.pod(pod).unwrap().pod().netns().unwrap();
    output(Command::new("ip").arg("-n").arg(netns.file_name().unwrap()).args(args));
}

/// Runs a command to its end: what it printed.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Asks until there is an answer.
pub(crate) fn eventually<T>(ask: impl FnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, ask)
}

/// The same, for what no event brings about.
pub(crate) fn eventually_within<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "nothing after {patience:?}");
        thread::sleep(Duration::from_millis(5));
    }
}
