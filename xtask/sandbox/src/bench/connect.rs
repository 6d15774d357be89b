//! What a connect(2) costs: with our programs, without, and where iptables rewrites packets as the
//! predecessors have it do. Depends on `Sandbox` and `client dial`. Called by `bench`.

use std::{
    io::{BufRead as _, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::table::{Rounds, Target, row};
use crate::{
    Sandbox,
    node::{PodSpec, Router},
};

/// Interleaved, so that what else the machine does falls on all of them alike.
const ROUNDS: usize = 15;
/// Connects of one variant in one round. The agent's backlog has room for them all.
const CONNECTS: usize = 1500;
/// Of datagram sockets, which cost a hundredth.
const UDP_CONNECTS: usize = 100_000;
/// An agent that has just started uses a processor that the connects want, and so does the kernel that frees
/// what it had.
const SETTLED: Duration = Duration::from_secs(2);

pub(super) fn metadata(sandbox: &Sandbox) -> SocketAddrV4 {
    SocketAddrV4::new(sandbox.cloud().metadata_ip(), 80)
}
/// How many rules there are before the one that matches.
const RULES: [u16; 3] = [0, 1000, 5000];

/// Prints what connects cost.
pub(super) fn compare(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    sandbox.add_pod(&PodSpec::new("dialer").role("orders-role"))?;
    sandbox.add_agent(agent, &["--auto-discover-base-arn", "--pass-through-rate=0", "--request-rate=0"])?;
    let router = sandbox.node_mut().add_router()?;
    let outside = sink(TcpListener::bind((sandbox.node().ip(), 0))?)?;
    let behind = sink(router.bind()?)?;
    let pod = |addr: SocketAddrV4, udp| -> Result<Worker> {
        Worker::start(sandbox.pod("dialer")?.client("app")?, addr, udp)
    };
    let mut workers = Workers {
        unrelated: pod(outside, false)?,
        datagram: pod(SocketAddrV4::new(sandbox.node().ip(), 9), true)?,
        redirected: pod(metadata(sandbox), false)?,
        routed: Worker::start(client(&router)?, behind, false)?,
        rewritten: Worker::start(client(&router)?, metadata(sandbox), false)?,
    };
    let mut took = Took::default();
    for _ in 0..ROUNDS {
        sandbox.agent()?.start()?;
        // Every pod has an in-pod listener a moment after it came up.
        super::listeners_in(sandbox, 1)?;
        thread::sleep(SETTLED);
        took.redirected.push(workers.redirected.dial(CONNECTS)?);
        took.datagram_with.push(workers.datagram.dial(UDP_CONNECTS)?);
        took.with.push(workers.unrelated.dial(CONNECTS)?);
        sandbox.agent()?.terminate()?;
        uninstall(sandbox, agent)?;
        thread::sleep(SETTLED);
        took.without.push(workers.unrelated.dial(CONNECTS)?);
        took.datagram_without.push(workers.datagram.dial(UDP_CONNECTS)?);
        router.rewrite(0, None)?;
        took.routed.push(workers.routed.dial(CONNECTS)?);
        for (rules, (unrelated, redirected)) in RULES.into_iter().zip(&mut took.rules) {
            router.rewrite(rules, Some(behind))?;
            unrelated.push(workers.routed.dial(CONNECTS)?);
            redirected.push(workers.rewritten.dial(CONNECTS)?);
        }
    }
    took.print(out)
}

struct Workers {
    unrelated: Worker,
    datagram: Worker,
    redirected: Worker,
    routed: Worker,
    rewritten: Worker,
}

#[derive(Default)]
struct Took {
    without: Rounds,
    with: Rounds,
    datagram_without: Rounds,
    datagram_with: Rounds,
    redirected: Rounds,
    routed: Rounds,
    rules: [(Rounds, Rounds); RULES.len()],
}

impl Took {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
        let [(one, one_redirected), (thousand, thousand_redirected), (many, many_redirected)] = &self.rules;
        let mut line = |what: &str, rounds: &Rounds, baseline: &Rounds, target| {
            let value = format!("{:.2} µs", rounds.median() / 1000.0);
            let ratio = (!std::ptr::eq(rounds, baseline)).then(|| rounds.over(baseline));
            row(out, what, &value, ratio, target)
        };
        line("TCP, elsewhere: without kube2ram", &self.without, &self.without, Target::None)?;
        line("  with kube2ram / without", &self.with, &self.without, Target::AtMost(1.05))?;
        line("  behind a router without NAT", &self.routed, &self.routed, Target::None)?;
        line("  one DNAT rule / no NAT", one, &self.routed, Target::None)?;
        line("  1,000 rules / no NAT", thousand, &self.routed, Target::None)?;
        line("  5,000 rules / no NAT", many, &self.routed, Target::None)?;
        line(
            "UDP, elsewhere: without kube2ram",
            &self.datagram_without,
            &self.datagram_without,
            Target::None,
        )?;
        line("  with kube2ram / without", &self.datagram_with, &self.datagram_without, Target::None)?;
        line("TCP, metadata server: kube2ram", &self.redirected, &self.redirected, Target::None)?;
        line("  kube2ram / TCP elsewhere without kube2ram", &self.redirected, &self.without, Target::None)?;
        line("  kube2ram / one DNAT rule", &self.redirected, one_redirected, Target::None)?;
        line("  kube2ram / 1,000 rules", &self.redirected, thousand_redirected, Target::AtMost(0.45))?;
        line("  kube2ram / 5,000 rules", &self.redirected, many_redirected, Target::None)
    }
}

/// A process that dials when it is told to.
pub(super) struct Worker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts `… client` as `client dial`.
    pub(super) fn start(mut client: Command, addr: SocketAddrV4, udp: bool) -> Result<Self> {
        client.args(["dial", "--connect", &addr.to_string()]);
        if udp {
            client.arg("--udp");
        }
        Self::of(&mut client)
    }

    /// Starts a client that is told how often to do something, and answers with nanoseconds.
    pub(super) fn of(client: &mut Command) -> Result<Self> {
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("no standard input")?;
        let answers = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, orders, answers })
    }

    /// Nanoseconds of the median of `count` connects, or the mean of as many calls.
    pub(super) fn dial(&mut self, count: usize) -> Result<f64> {
        writeln!(self.orders, "{count}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        ensure!(!answer.is_empty(), "a client that connects ended");
        Ok(answer.trim().parse()?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Its own child, so the id cannot have been reused.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn client(router: &Router) -> Result<Command> {
    let mut command = router.client_command(std::env::current_exe()?);
    command.arg("client");
    Ok(command)
}

/// Accepts whatever comes, until the process ends.
pub(super) fn sink(listener: TcpListener) -> Result<SocketAddrV4> {
    let SocketAddr::V4(addr) = listener.local_addr()? else { anyhow::bail!("not an IPv4 address") };
    ensure!(*addr.ip() != Ipv4Addr::UNSPECIFIED, "an address that can be dialled");
    thread::Builder::new().name("sink".into()).spawn(move || listener.incoming().for_each(drop))?;
    Ok(addr)
}

/// Deactivates the agent's programs.
pub(super) fn uninstall(sandbox: &Sandbox, agent: &Path) -> Result<()> {
    let bpf_dir = format!("--bpf-dir={}", sandbox.node().bpffs().join("kube2ram").display());
    let state_dir = format!("--state-dir={}", sandbox.node().directory().join("agent").display());
    let output = Command::new(agent).args(["uninstall", &bpf_dir, &state_dir]).output()?;
    ensure!(output.status.success(), "uninstall: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
