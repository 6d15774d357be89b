//! The metadata service under load, next to a bare hyper server that returns the same bytes, and pass-through
//! next to the metadata server itself. Depends on `Sandbox`, `hello` and `wrk`. Called by `bench`.

use std::{
    fs,
    io::Write,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    process::Process,
    table::{Rounds, Target, number, row},
    wrk::{Load, Seen},
};
use crate::{Sandbox, client::Family, node::PodSpec};

const ROUNDS: usize = 5;
const ROLE: &str = "orders-role";
const HELLO: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
/// As many as a pod may have connections.
const CLIENTS: u16 = 64;
/// How many pods come up and ask at once.
const COLD_PODS: usize = 20;

/// Prints requests per second and latencies.
pub(super) fn compare(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    sandbox.add_pod(&PodSpec::new("client").role(ROLE))?;
    if sandbox.agent().is_err() {
        sandbox
            .add_agent(agent, &["--auto-discover-base-arn", "--pass-through-rate=0", "--request-rate=0"])?;
    }
    sandbox.agent()?.start()?;
    let url = format!("{}{ROLE}", list(sandbox));
    let hello = Hello::start(sandbox, &url)?;
    let process = Process(sandbox.agent()?.pid().context("the agent does not run")?);
    let ours = Server { url: &url, process };

    for (what, close, target) in [("keep-alive", false, 0.9), ("a connection per request", true, 0.85)] {
        let load = Load { connections: 32, close, pause_ms: 0, seconds: 3 };
        let what = format!("credentials, {what} / bare hyper");
        let bare = Server { url: &hello.url(), process: hello.process() };
        in_turn(sandbox, load, &ours, &bare)?.print(out, &what, Target::AtLeast(target))?;
    }
    let bare = Server { url: &hello.url(), process: hello.process() };
    two_pods(sandbox, &ours, &bare, out)?;
    for (how, pause_ms) in [("every 10 ms", 10), ("at once", 0)] {
        let load = Load { connections: CLIENTS, close: false, pause_ms, seconds: 5 };
        for (of, url, target) in
            [("credentials", &url, Target::AtMost(5.0)), ("bare hyper", &hello.url(), Target::None)]
        {
            let seen = pod_load(sandbox, load, url)?;
            let what = format!("{CLIENTS} clients {how}, {of}");
            number(out, &format!("{what}: p50"), seen.p50, "ms", Target::None)?;
            number(out, &format!("{what}: p99"), seen.p99, "ms", target)?;
            number(out, &format!("{what}: p99.9"), seen.p999, "ms", Target::None)?;
        }
    }
    drop(hello);
    pass_through(sandbox, out)?;
    cold_pods(sandbox, out)
}

/// Something that answers requests.
struct Server<'a> {
    url: &'a str,
    process: Process,
}

/// The agent and what it is compared with, in the same rounds.
#[derive(Default)]
struct Compared {
    per_second: [Rounds; 2],
    /// Processor time for a request, in microseconds.
    cpu_us: [Rounds; 2],
}

impl Compared {
    fn print(&self, out: &mut dyn Write, what: &str, per_second: Target) -> Result<()> {
        let [ours, others] = &self.per_second;
        row(out, what, &format!("{:.0}/s", ours.median()), Some(ours.over(others)), per_second)?;
        let [ours, others] = &self.cpu_us;
        let value = format!("{:.1} µs", ours.median());
        row(out, "  its processor time for a request", &value, Some(ours.over(others)), Target::None)
    }
}

fn in_turn(sandbox: &Sandbox, load: Load, ours: &Server<'_>, others: &Server<'_>) -> Result<Compared> {
    let mut compared = Compared::default();
    for _ in 0..ROUNDS {
        for (at, server) in [ours, others].into_iter().enumerate() {
            let before = server.process.cpu()?;
            let seen = pod_load(sandbox, load, server.url)?;
            compared.per_second[at].push(seen.per_second);
            compared.cpu_us[at].push((server.process.cpu()? - before) / seen.requests * 1e6);
        }
    }
    Ok(compared)
}

/// 100 kept connections, more than one pod may have: half of them from each of two pods. Those of the bare
/// server come from its own pod, but from two clients as well.
fn two_pods(sandbox: &mut Sandbox, ours: &Server<'_>, bare: &Server<'_>, out: &mut dyn Write) -> Result<()> {
    sandbox.add_pod(&PodSpec::new("second").role(ROLE))?;
    super::listeners_in(sandbox, 2)?;
    let answer = sandbox.pod("second")?.curl_from("app", Family::V4, ours.url)?;
    ensure!(answer.status == 200, "{answer:?}");
    let load = Load { connections: 50, close: false, pause_ms: 0, seconds: 3 };
    let mut compared = Compared::default();
    for _ in 0..ROUNDS {
        for (at, (server, second)) in [(ours, "second"), (bare, "client")].into_iter().enumerate() {
            let before = server.process.cpu()?;
            let seen = both_loads(sandbox, load, ["client", second], server.url)?;
            let requests: f64 = seen.iter().map(|seen| seen.requests).sum();
            compared.per_second[at].push(seen.iter().map(|seen| seen.per_second).sum());
            compared.cpu_us[at].push((server.process.cpu()? - before) / requests * 1e6);
        }
    }
    let what = "credentials, 100 kept connections of two pods / bare hyper";
    compared.print(out, what, Target::AtLeast(0.9))
}

/// The same load from two pods, or twice from one, at the same time.
fn both_loads(sandbox: &Sandbox, load: Load, pods: [&str; 2], url: &str) -> Result<[Seen; 2]> {
    let [first, second] = pods.map(|pod| sandbox.pod(pod)?.pod().command("app", "wrk"));
    let (first, second, directory) = (first?, second?, sandbox.node().directory());
    // Each client reads a script of its own.
    let other = directory.join("second-client");
    fs::create_dir_all(&other)?;
    thread::scope(|scope| {
        let other = scope.spawn(|| load.run(second, &other, url));
        let one = load.run(first, &directory, url);
        let other = other.join().map_err(|_panic| anyhow::anyhow!("a client panicked"))?;
        Ok([one?, other?])
    })
}

fn list(sandbox: &Sandbox) -> String {
    format!("http://{}{}", sandbox.cloud().metadata_ip(), sandbox.cloud().list())
}

fn pod_load(sandbox: &Sandbox, load: Load, url: &str) -> Result<Seen> {
    load.run(sandbox.pod("client")?.pod().command("app", "wrk")?, &sandbox.node().directory(), url)
}

/// The stand-in is what limits both; what the way through the agent adds is the difference.
fn pass_through(sandbox: &mut Sandbox, out: &mut dyn Write) -> Result<()> {
    let url = format!("http://{}/latest/meta-data/instance-id", sandbox.cloud().metadata_ip());
    let load = Load { connections: 8, close: false, pause_ms: 0, seconds: 2 };
    let agent = Process(sandbox.agent()?.pid().context("the agent does not run")?);
    let (mut through, mut direct, mut cpu_us) = (Rounds::default(), Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        let before = agent.cpu()?;
        let seen = pod_load(sandbox, load, &url)?;
        through.push(seen.per_second);
        cpu_us.push((agent.cpu()? - before) / seen.requests * 1e6);
        let host = sandbox.node().host_command("wrk");
        direct.push(load.run(host, &sandbox.node().directory(), &url)?.per_second);
    }
    let value = format!("{:.0}/s", through.median());
    row(
        out,
        "pass-through, keep-alive / the metadata server itself",
        &value,
        Some(through.over(&direct)),
        Target::AtLeast(0.6),
    )?;
    number(out, "  the agent's processor time for a request", cpu_us.median(), "µs", Target::None)
}

/// From a pod's first connect(2) to its credentials, the pod having existed for some milliseconds and its
/// role being new.
fn cold_pods(sandbox: &mut Sandbox, out: &mut dyn Write) -> Result<()> {
    let list = list(sandbox);
    let mut took = Rounds::default();
    for index in 0..COLD_PODS {
        let (name, role) = (format!("cold-{index}"), format!("cold-{index}-role"));
        super::add_role(sandbox, &role);
        sandbox.add_pod(&PodSpec::new(&name).role(&role))?;
        let pod = sandbox.pod(&name)?;
        let listed = pod.curl_from("app", Family::V4, &list)?;
        let given = pod.curl_from("app", Family::V4, &format!("{list}{role}"))?;
        ensure!(listed.body == role && given.status == 200, "{name}: {} {}", listed.body, given.body);
        took.push((listed.latency_us + given.latency_us) as f64 / 1000.0);
    }
    number(out, "a cold pod: role and credentials, STS at once", took.median(), "ms", Target::None)
}

/// A bare server in the pod that asks.
struct Hello(Child);

impl Hello {
    fn start(sandbox: &Sandbox, url: &str) -> Result<Self> {
        let pod = sandbox.pod("client")?;
        let body = pod.curl_from("app", Family::V4, url)?.body;
        let mut command = pod.client("app")?;
        command.args(["hello", "--listen", &HELLO.to_string()]).stdin(Stdio::piped());
        let mut child = command.spawn()?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(body.as_bytes())?;
        drop(stdin);
        let hello = Self(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        while pod.curl_from("app", Family::V4, &hello.url()).is_err() {
            ensure!(Instant::now() < deadline, "the bare server does not answer");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(hello)
    }

    fn url(&self) -> String {
        format!("http://{HELLO}/")
    }

    fn process(&self) -> Process {
        Process(self.0.id())
    }
}

impl Drop for Hello {
    fn drop(&mut self) {
        // Its own child, so the id cannot have been reused.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
