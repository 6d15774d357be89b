//! A node with pods of every kind, a load on it, and agents that follow one another. Used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    client::LoadReport,
    node::{Packet, PodSpec},
    standin::{Accounts, Role},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
pub(crate) const LIST: &str = "/latest/meta-data/ram/security-credentials/";

/// How long something that must happen may take on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// One shares the host's network, one has no loopback device and so no in-pod listener.
pub(crate) const PODS: [&str; 8] = ["a", "b", "c", "d", "e", "f", HOST_NETWORK, NO_LOOPBACK];
const HOST_NETWORK: &str = "daemon";
const NO_LOOPBACK: &str = "no-loopback";
pub(crate) const POD_LISTENERS: f64 = 6.0;

pub(crate) struct Lab(Sandbox);

/// Clients in every pod, which ask until they are told to stop.
pub(crate) struct Running(Vec<Child>);

impl Lab {
    pub(crate) fn with_agent(name: &str) -> Self {
        let mut lab = Self::without_agent(name);
        lab.agent().unwrap().start().unwrap();
        // From here on each pod is where it will be.
        eventually("pods have their listeners", || lab.metric("kube2ram_pod_listeners") == POD_LISTENERS);
        lab
    }

    pub(crate) fn without_agent(name: &str) -> Self {
        let mut lab = Self(Sandbox::create(name).unwrap());
        for pod in PODS {
            let spec = PodSpec::new(pod).role(&role(pod));
            lab.accounts().add_role(Accounts::role_arn(&role(pod)), Role::default());
            lab.add_pod(&if pod == HOST_NETWORK { spec.host_network() } else { spec }).unwrap();
        }
        let netns = lab.pod(NO_LOOPBACK).unwrap().pod().netns().unwrap();
        let netns = netns.file_name().unwrap().to_str().unwrap().to_owned();
        let cut = Command::new("ip").args(["-n", &netns, "link", "set", "lo", "down"]).status().unwrap();
        assert!(cut.success());
        lab.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
        lab
    }

    /// What a DaemonSet with a surge does: another agent, which gets ready; then the former one is told to
    /// end, and its pod goes.
    pub(crate) fn upgrade(&mut self) {
        let mut next = self.surge().unwrap();
        next.start_beside().unwrap();
        let mut former = self.replace_agent(next).unwrap();
        assert_eq!(former.terminate().unwrap().code(), Some(0));
        self.remove_agent(former).unwrap();
    }

    pub(crate) fn load(&self) -> Running {
        let start = |pod: &str| {
            let mut client = self.pod(pod).unwrap().client("app").unwrap();
            client.args(["load", "--connect=100.100.100.200:80", &format!("--expect={}", role(pod))]);
            client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        };
        Running(PODS.map(start).into())
    }

    /// Asserts that every pod gets its own role.
    pub(crate) fn assert_served(&self) {
        for pod in PODS {
            let reply = self.pod(pod).unwrap().curl(LIST).unwrap();
            assert_eq!((reply.status, reply.body), (200, role(pod)), "{pod}");
        }
    }

    pub(crate) fn is_served(&self) -> bool {
        let asked = |pod: &str| self.pod(pod).unwrap().curl(LIST);
        PODS.iter().all(|pod| asked(pod).is_ok_and(|reply| reply.status == 200))
    }

    /// Asserts that no pod gets anything from anybody: it is refused, or gets no answer.
    pub(crate) fn assert_not_served(&self) {
        let (with_own, without) = (PODS[0], HOST_NETWORK);
        for pod in [with_own, without] {
            let mut curl = self.pod(pod).unwrap().pod().command("app", "curl").unwrap();
            let url = format!("http://100.100.100.200{LIST}");
            let status =
                curl.args(["--silent", "--max-time", "1", &url]).stdout(Stdio::null()).status().unwrap();
            // Refused, reset, or no answer in time.
            assert!(matches!(status.code(), Some(7 | 28 | 52 | 56)), "{pod}: {status}");
        }
    }

    /// What pods sent to the metadata server past the agent. The node's own address is the agent's and the
    /// host's.
    pub(crate) fn leaks(&self) -> Vec<Packet> {
        let mut packets = self.node().sniffer().packets();
        packets.retain(|packet| !self.node().owns(packet.source.ip()));
        packets
    }

    /// A sample of the serving agent's metrics; zero when it has none of that name.
    pub(crate) fn metric(&mut self, sample: &str) -> f64 {
        self.agent().unwrap().metric(sample).unwrap()
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.node().agent_state()
    }

    /// The output of `kube2ram uninstall`, or why it refuses.
    pub(crate) fn uninstall(&self) -> Result<String, String> {
        let mut command = self.node().host_command(AGENT);
        command.arg("uninstall").arg("--bpf-dir").arg(self.node().bpffs().join("kube2ram"));
        let output = command.arg("--state-dir").arg(self.state_dir()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }
}

impl Running {
    /// Stops the clients, and returns what they saw together.
    pub(crate) fn end(mut self) -> LoadReport {
        // All at once: whoever goes on alone would see what the others do not.
        self.0.iter_mut().for_each(|client| drop(client.stdin.take()));
        let report = |client: Child| -> LoadReport {
            serde_json::from_slice(&client.wait_with_output().unwrap().stdout).unwrap()
        };
        std::mem::take(&mut self.0).into_iter().map(report).fold(LoadReport::default(), LoadReport::plus)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for client in &mut self.0 {
            drop(client.kill());
            drop(client.wait());
        }
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

pub(crate) fn role(pod: &str) -> String {
    format!("{pod}-role")
}

pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
