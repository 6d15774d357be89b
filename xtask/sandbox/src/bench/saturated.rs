//! Requests and probes while busy loops want all processors, with the agent at the weight of its CPU request.
//! The weight is a nice value: no cgroup controller of the machine is touched. Depends on `Sandbox` and
//! nice(1). Called by `bench`.

use std::{
    io::Write,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    connect::metadata,
    table::{Target, number},
};
use crate::{Sandbox, agent::Agent, client::LoadReport, node::PodSpec};

const ROLE: &str = "orders-role";
/// The manifest's CPU request, in processors.
const REQUEST: f64 = 0.1;
/// Busy loops on each processor.
const LOOPS: usize = 4;
/// How long each variant is measured.
const DURATION: Duration = Duration::from_secs(30);
/// The scheduler's weight of a thread by its nice value, from 0 on (`sched_prio_to_weight` of Linux).
const WEIGHTS: [f64; 20] = [
    1024.0, 820.0, 655.0, 526.0, 423.0, 335.0, 272.0, 215.0, 172.0, 137.0, 110.0, 87.0, 70.0, 56.0, 45.0,
    36.0, 29.0, 23.0, 18.0, 15.0,
];

/// Prints how long a pod's requests and the agent's probes take.
pub(super) fn compare(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    sandbox.add_pod(&PodSpec::new("client").role(ROLE))?;
    sandbox.add_agent(agent, &["--auto-discover-base-arn"])?;
    let processors = thread::available_parallelism()?.get();
    let loops = LOOPS * processors;
    // The requests of a full node's pods add up to its processors.
    let niceness = niceness(REQUEST / processors as f64);
    for (what, loops, niceness) in [
        ("no other work".to_owned(), 0, 0),
        (format!("{loops} busy loops, agent of the same weight"), loops, 0),
        (format!("{loops} busy loops, agent of 100m (nice {niceness})"), loops, niceness),
    ] {
        writeln!(out, "  {what}:")?;
        let running = sandbox.agent()?;
        running.set_wrapper(&["nice", "-n", &niceness.to_string()]);
        running.start()?;
        super::listeners_in(sandbox, 1)?;
        let loops = Loops::start(sandbox, loops)?;
        measure(sandbox, agent, niceness, out)?;
        drop(loops);
        sandbox.agent()?.terminate()?;
    }
    Ok(())
}

/// The nice value that gives a thread this share of a processor beside the busy loops. In a cgroup, an agent
/// with one running thread gets more: the weight is then that thread's alone.
fn niceness(share: f64) -> usize {
    let wanted = share / (1.0 - share) * LOOPS as f64 * WEIGHTS[0];
    let distance = |index: &usize| (WEIGHTS[*index] - wanted).abs();
    (0..WEIGHTS.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or_default()
}

fn measure(sandbox: &mut Sandbox, binary: &Path, niceness: usize, out: &mut dyn Write) -> Result<()> {
    let mut load = sandbox.pod("client")?.client("app")?;
    load.args(["load", "--cloud", sandbox.cloud().name(), "--expect", ROLE]);
    load.args(["--connect", &metadata(sandbox).to_string()]);
    let mut load = load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let begun = Instant::now();
    let (mut ready, mut live) = (Probe::default(), Probe::default());
    while begun.elapsed() < DURATION {
        ready.ask(sandbox.agent()?, binary, niceness, "ready")?;
        live.ask(sandbox.agent()?, binary, niceness, "live")?;
    }
    drop(load.stdin.take());
    let report = load.wait_with_output()?.stdout;
    let mut report: LoadReport = serde_json::from_slice(&report).context("the client reported nothing")?;
    ensure!(report.wrong == 0 && !report.latencies_us.is_empty(), "{:?}", report.samples);
    report.latencies_us.sort_unstable();
    let latencies = &report.latencies_us;
    let percentile = |percent: usize| latencies[latencies.len() * percent / 100] as f64 / 1000.0;
    let unserved = report.refusals.len() + report.refused + report.cut + report.failed;
    number(out, "  requests: p50", percentile(50), "ms", Target::None)?;
    // What AWS's SDK for Go waits, the least patient one.
    number(out, "  requests: p99", percentile(99), "ms", Target::AtMost(500.0))?;
    number(out, "  requests: longest", report.slowest_us as f64 / 1000.0, "ms", Target::None)?;
    number(out, "  requests that were not served", unserved as f64, "", Target::AtMost(0.0))?;
    ready.print(out, "  kube2ram ready: longest", Target::AtMost(3000.0))?;
    live.print(out, "  kube2ram live: longest", Target::AtMost(10_000.0))
}

/// A probe of the kubelet's, which runs in the agent's container and so has the agent's weight.
#[derive(Default)]
struct Probe {
    longest: Duration,
    failures: u32,
}

impl Probe {
    fn ask(&mut self, agent: &Agent, binary: &Path, niceness: usize, question: &str) -> Result<()> {
        let mut command = agent.pod().command(Agent::CONTAINER, "nice")?;
        command.args(["-n", &niceness.to_string()]).arg(binary).arg(question);
        command.arg(format!("--pod-dir={}", agent.pod_dir_path().display())).stdin(Stdio::null());
        let begun = Instant::now();
        let output = command.output()?;
        self.longest = self.longest.max(begun.elapsed());
        self.failures += u32::from(!output.status.success());
        Ok(())
    }

    fn print(&self, out: &mut dyn Write, what: &str, target: Target) -> Result<()> {
        number(out, what, self.longest.as_secs_f64() * 1000.0, "ms", target)?;
        number(out, "    failed", f64::from(self.failures), "", Target::AtMost(0.0))
    }
}

/// Processes of the host that never wait.
struct Loops(Vec<Child>);

impl Loops {
    fn start(sandbox: &Sandbox, count: usize) -> Result<Self> {
        let mut loops = Self(Vec::new());
        for _ in 0..count {
            let mut command = sandbox.node().host_command("sh");
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            loops.0.push(command.spawn().context("cannot start a busy loop")?);
        }
        Ok(loops)
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Its own child, so the id cannot have been reused.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_nice_value_of_the_nearest_weight() {
        // On two processors 5 % of each, beside four loops of weight 1024: 215.6.
        assert_eq!(niceness(REQUEST / 2.0), 7);
        assert_eq!(niceness(REQUEST / 4.0), 10);
        assert_eq!(niceness(0.2), 0, "as much as each of the loops");
    }
}
