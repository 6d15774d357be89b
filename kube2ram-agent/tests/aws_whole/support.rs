//! A sandbox of AWS with the agent under test, and the questions that every test asks. Depends on
//! `kube2ram-sandbox`; used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Cloud, Sandbox,
    client::{Credentials, Reply, caller_identity},
    node::{Packet, PodSpec},
    standin::Role,
};

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
pub(crate) const LIST: &str = Cloud::Aws.list();
pub(crate) const INSTANCE_ID: &str = "/latest/meta-data/instance-id";
pub(crate) const TOKEN: &str = "/latest/api/token";
pub(crate) const TOKEN_HEADER: &str = Cloud::Aws.token_header();
pub(crate) const TTL_HEADER: &str = Cloud::Aws.token_ttl_header();

/// How long something that must happen may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A sandbox that shows the agent's log when a test fails.
pub(crate) struct Lab(Sandbox);

impl Lab {
    /// Pods without an agent, and the roles of their annotations.
    pub(crate) fn new(name: &str, pods: &[PodSpec]) -> Self {
        let mut lab = Self(Sandbox::create_in(name, Cloud::Aws).unwrap());
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
        self.add_agent(AGENT.as_ref(), &args).unwrap();
    }

    /// Adds a pod, and its role to the account.
    pub(crate) fn add(&mut self, pod: &PodSpec) {
        if let Some(role) = &pod.role {
            self.accounts().add_role(role_arn(role), Role::default());
        }
        self.add_pod(pod).unwrap();
    }

    /// A GET from a pod's first container.
    pub(crate) fn ask(&self, pod: &str, target: &str) -> Reply {
        self.pod(pod).unwrap().curl(target).unwrap()
    }

    /// The same until the answer is another one than "not yet".
    pub(crate) fn ask_until_ready(&self, pod: &str, target: &str) -> Reply {
        self.pod(pod).unwrap().curl_until_ready(target, DEADLINE).unwrap()
    }

    /// A request from a pod's first container, with any method and headers.
    pub(crate) fn request(
        &self,
        pod: &str,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<Reply, String> {
        let mut client = self.pod(pod).unwrap().client("app").unwrap();
        client.args(["get", "-X", method]);
        for (name, value) in headers {
            client.args(["-H", &format!("{name}: {value}")]);
        }
        let output = client.arg(url).output().unwrap();
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Asks for credentials and returns whose they are; a refusal is its status.
    pub(crate) fn credentials(&self, pod: &str, role: &str) -> String {
        owner(&self.ask_until_ready(pod, &format!("{LIST}{role}")))
    }

    /// The owner of the credentials in a reply, according to STS, which verifies the signature.
    pub(crate) fn caller(&self, reply: &Reply) -> String {
        let credentials = serde_json::from_str::<Credentials>(&reply.body).unwrap();
        caller_identity(&self.sts().url(), &credentials).unwrap()
    }

    /// What pods sent to the metadata server past the agent, by either address. The node's own address is
    /// the agent's and the host's.
    pub(crate) fn leaks(&self) -> Vec<Packet> {
        let mut packets = self.node().sniffer().packets();
        packets.retain(|packet| !self.node().owns(packet.source.ip()));
        packets
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

/// A pod called `name` with the role `name-role`.
pub(crate) fn pod(name: &str) -> PodSpec {
    PodSpec::new(name).role(&format!("{name}-role"))
}

pub(crate) fn role_arn(name: &str) -> String {
    Cloud::Aws.role_arn(name)
}

pub(crate) fn url(target: &str) -> String {
    format!("http://{}{target}", Cloud::Aws.metadata_ip())
}

pub(crate) fn url6(target: &str) -> String {
    format!("http://[{}]{target}", Cloud::Aws.metadata_ip6())
}

/// Whose credentials a reply holds; a refusal is its status.
pub(crate) fn owner(reply: &Reply) -> String {
    if reply.status != 200 {
        return reply.status.to_string();
    }
    let credentials = serde_json::from_str::<Credentials>(&reply.body)
        .unwrap_or_else(|error| panic!("no credentials ({error}): {reply:?}"));
    credentials.role().to_owned()
}

/// Runs a command to its end: its exit code, and what it printed.
pub(crate) fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).trim().to_owned())
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
