//! A sandbox of either cloud with the agent under test, and the questions that every test asks. Depends on
//! `kube2ram-sandbox`; used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Cloud, CredentialsFrom, Sandbox,
    client::{Credentials, Reply, caller_identity},
    node::{Packet, PodSpec},
    standin::{Call, Role},
};
use serde_json::Value;

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
pub(crate) const CLOUDS: [Cloud; 2] = [Cloud::Alibaba, Cloud::Aws];
/// The namespace of all pods here.
pub(crate) const SHOP: &str = "shop";
/// A pod, and its ServiceAccount, that have no annotation and therefore the default role, `cold-role`. The
/// agent does not fetch that before it is asked for it.
pub(crate) const COLD: &str = "cold";

/// SDKs give up at 1 s. What they would see of the client's own start is not the agent's.
const SDK_PATIENCE: Duration = Duration::from_secs(1);
/// How long something that must happen may take on a busy machine: longer than the longest back-off of a
/// request that pods wait for.
const DEADLINE: Duration = Duration::from_secs(90);

/// A sandbox that shows the agent's log when a test fails.
pub(crate) struct Lab(Sandbox);

impl Lab {
    /// A node whose role may assume nothing, a ServiceAccount with a role of its own for each name, and a pod
    /// of it.
    pub(crate) fn new(name: &str, cloud: Cloud, accounts: &[&str]) -> Self {
        let mut lab = Self(Sandbox::create_in(&format!("{name}-{}", cloud.name()), cloud).unwrap());
        lab.accounts().deny_node();
        for account in accounts {
            lab.add_account(account);
            lab.add_pod(&pod(account)).unwrap();
        }
        lab
    }

    /// A node whose role may assume every role that trusts it.
    pub(crate) fn of_node(name: &str, cloud: Cloud) -> Self {
        Self(Sandbox::create_in(&format!("{name}-{}", cloud.name()), cloud).unwrap())
    }

    /// The same as [`Self::new`] with an agent that is ready.
    pub(crate) fn with_agent(name: &str, cloud: Cloud, accounts: &[&str], extra: &[&str]) -> Self {
        let mut lab = Self::new(name, cloud, accounts);
        lab.start(extra);
        lab
    }

    pub(crate) fn start(&mut self, extra: &[&str]) {
        self.prepare(extra);
        self.agent().unwrap().start().unwrap();
    }

    /// An agent that does not run yet. A pod without any annotation has the default role.
    pub(crate) fn prepare(&mut self, extra: &[&str]) {
        let flags = CredentialsFrom::ServiceAccount.flags(self.cloud());
        let mut args: Vec<&str> = flags.iter().map(String::as_str).collect();
        args.push("--auto-discover-base-arn");
        args.extend(extra);
        self.add_agent(AGENT.as_ref(), &args).unwrap();
    }

    /// Adds a ServiceAccount whose annotation names a role that trusts nobody else.
    pub(crate) fn add_account(&self, name: &str) {
        let role = format!("{name}-role");
        self.add_role_of_account(&role, SHOP, name);
        self.annotate_account(name, &[("role", &*role)]);
    }

    /// Replaces a ServiceAccount's annotations, by what follows the cloud's prefix.
    pub(crate) fn annotate_account(&self, name: &str, annotations: &[(&str, &str)]) {
        let keyed: Vec<_> =
            annotations.iter().map(|(key, value)| (self.cloud().annotation(key), *value)).collect();
        let keyed: Vec<_> = keyed.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        self.api().apply_service_account(SHOP, name, &keyed).unwrap();
    }

    /// Adds a pod of the ServiceAccount [`COLD`], without annotations on either. Its role is
    /// `--default-role=cold-role`.
    pub(crate) fn add_cold_pod(&mut self) {
        self.add_role_of_account("cold-role", SHOP, COLD);
        self.api().apply_service_account(SHOP, COLD, &[]).unwrap();
        self.add_pod(&pod(COLD)).unwrap();
    }

    /// A GET from a pod's first container.
    pub(crate) fn ask(&self, pod: &str, target: &str) -> Reply {
        self.pod(pod).unwrap().curl(target).unwrap()
    }

    /// Asks for credentials of `<name>-role`.
    pub(crate) fn ask_for(&self, pod: &str, name: &str) -> Reply {
        self.ask(pod, &format!("{}{name}-role", self.cloud().list()))
    }

    /// Asks a pod's own question until it is no longer answered "not yet": whose credentials it gets, or the
    /// status of a refusal.
    pub(crate) fn credentials(&self, pod: &str, name: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let reply = self.ask_for(pod, name);
            if reply.status != 503 || Instant::now() > deadline {
                return owner(&reply);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Asserts that a pod gets credentials of `<name>-role`, at the latest after the longest back-off.
    #[track_caller]
    pub(crate) fn assert_served(&self, pod: &str, name: &str) {
        assert_eq!(self.credentials(pod, name), format!("{name}-role"), "{pod}");
    }

    /// Asserts that a pod is told to ask again, in time.
    #[track_caller]
    pub(crate) fn assert_try_again(&self, pod: &str, name: &str) {
        let reply = self.ask_for(pod, name);
        assert_eq!(reply.status, 503, "{pod}: {reply:?}");
        let seconds = reply.headers["retry-after"].parse::<u64>();
        assert!(seconds.is_ok_and(|seconds| (1..=60).contains(&seconds)), "{reply:?}");
        assert!(Duration::from_micros(reply.latency_us) < SDK_PATIENCE, "{reply:?}");
    }

    /// The access key of what a pod gets.
    pub(crate) fn key(&self, pod: &str, name: &str) -> String {
        self.assert_served(pod, name);
        let reply = self.ask_for(pod, name);
        serde_json::from_str::<Credentials>(&reply.body).unwrap().access_key_id
    }

    /// The ARN of what a pod gets, by STS, which verifies the signature.
    pub(crate) fn caller(&self, pod: &str, name: &str) -> String {
        let reply = self.ask_for(pod, name);
        let credentials = serde_json::from_str::<Credentials>(&reply.body).unwrap();
        caller_identity(&self.sts().url(), &credentials).unwrap()
    }

    /// The calls for sessions of `<name>-role`.
    pub(crate) fn exchanges(&self, name: &str) -> Vec<Call> {
        self.sts().assumed(&self.cloud().role_arn(&format!("{name}-role")))
    }

    /// Asserts that the agent made no use of the node's role, although it is offered to it: it neither read
    /// the credentials nor called AssumeRole.
    #[track_caller]
    pub(crate) fn assert_node_role_unused(&self) {
        assert_eq!(self.sts().count("AssumeRole"), 0, "{:?}", self.sts().calls());
        let list = self.cloud().list();
        let seen = self.metadata().seen();
        assert!(!seen.iter().any(|request| request.target.starts_with(list)), "{seen:?}");
    }

    /// What pods sent to the metadata server past the agent.
    pub(crate) fn leaks(&self) -> Vec<Packet> {
        let mut packets = self.node().sniffer().packets();
        packets.retain(|packet| !self.node().owns(packet.source.ip()));
        packets
    }

    /// Waits for an Event on an object of this name.
    #[track_caller]
    pub(crate) fn await_event(&self, name: &str, reason: &str) -> String {
        let mut note = String::new();
        eventually(true, || {
            let events = self.api().events();
            let is_it = |event: &&Value| event["regarding"]["name"] == name && event["reason"] == reason;
            let found = events.iter().find(is_it);
            note = found.and_then(|event| event["note"].as_str()).unwrap_or_default().to_owned();
            found.is_some()
        });
        note
    }

    /// Waits for an Event on the node.
    #[track_caller]
    pub(crate) fn await_node_event(&self, reason: &str) -> String {
        self.await_event(Sandbox::NODE, reason)
    }

    /// How many fetches ended so far with `ok`, or with an error of this kind.
    pub(crate) fn results(&mut self, result: &str) -> f64 {
        self.agent().unwrap().metric(&sample(result)).unwrap()
    }

    /// Waits until one more fetch has ended so.
    #[track_caller]
    pub(crate) fn await_result_after(&mut self, result: &str, before: f64) {
        let agent = self.agent().unwrap();
        eventually(true, || agent.metric(&sample(result)).is_ok_and(|now| now > before));
    }

    /// Waits until a fetch has ended so.
    #[track_caller]
    pub(crate) fn await_result(&mut self, result: &str) {
        self.await_result_after(result, 0.0);
    }

    /// Runs a subcommand in the agent's container: its exit code, and what it printed.
    pub(crate) fn kube2ram(&mut self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.agent().unwrap().exec(args).unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    /// Asserts that `kube2ram explain` gives this verdict on a pod, once the agent knows of it: `granted`,
    /// `denied`, `unavailable`.
    #[track_caller]
    pub(crate) fn await_verdict(&mut self, pod: &str, verdict: &str) {
        let pod = format!("{SHOP}/{pod}");
        eventually(verdict.to_owned(), || {
            let (_, text) = self.kube2ram(&["explain", &pod, "-o", "json"]);
            let document = serde_json::from_str::<Value>(&text).unwrap_or_default();
            document["verdict"].as_str().unwrap_or_default().to_owned()
        });
    }

    /// Asserts that the status has a problem whose text has a word in it, once the agent knows of it. An
    /// agent that has just been started refuses pods before it tells its status.
    #[track_caller]
    pub(crate) fn await_problem(&mut self, word: &str) {
        let mut problems = Value::Null;
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let (_, text) = self.kube2ram(&["status", "-o", "json"]);
            problems = serde_json::from_str::<Value>(&text).unwrap_or_default()["problems"].take();
            if problems.to_string().contains(word) {
                return;
            }
            thread::sleep(Duration::from_millis(200));
        }
        panic!("no problem names {word:?}: {problems:#}");
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

/// The agent's count of fetches that ended so.
fn sample(result: &str) -> String {
    format!(r#"kube2ram_sts_requests_total{{result="{result}"}}"#)
}

/// A pod of the ServiceAccount of its own name, with no annotation.
pub(crate) fn pod(name: &str) -> PodSpec {
    PodSpec::new(name).namespace(SHOP).service_account(name)
}

/// A role that trusts the node as well as a ServiceAccount.
pub(crate) fn trusted_by_both(role: Role) -> Role {
    Role { trusts_node: true, ..role }
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

/// Asks again until the answer is the right one.
#[track_caller]
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
