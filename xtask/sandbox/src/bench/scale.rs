//! What grows with the number of pods and namespaces: memory, processor time, the time until ready, and what
//! a connect costs. Depends on `Sandbox`. Called by `bench`.

use std::{
    io::Write,
    ops::Range,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    connect::{Worker, metadata},
    process::Process,
    table::{Target, number},
};
use crate::{Sandbox, node::PodSpec};

const NAMESPACES: usize = 5000;
/// A number of pods, each with its own role, and what the agent may take with them.
struct Crowd {
    pods: usize,
    memory_mib: Target,
    idle_percent: Target,
}

const CROWDS: [Crowd; 3] = [
    Crowd { pods: 1, memory_mib: Target::None, idle_percent: Target::None },
    Crowd { pods: 110, memory_mib: Target::AtMost(16.0), idle_percent: Target::None },
    Crowd { pods: 1000, memory_mib: Target::AtMost(18.0), idle_percent: Target::AtMost(0.3) },
];
/// What makes a pod an object of 6 KB: kubectl writes the manifest into it once more.
const NOTE: &str = "kubectl.kubernetes.io/last-applied-configuration";
const NOTE_BYTES: usize = 5600;
const CONNECTS: usize = 5000;
/// How many pods ask for credentials at a time.
const ASKING: usize = 16;
/// How long STS's limits may let the last of a thousand sessions wait.
const FETCHED: Duration = Duration::from_secs(600);
const HELD: &str = r#"kube2ram_credential_sessions{state="fresh"}"#;
/// What comes of a start is over by then.
const SETTLED: Duration = Duration::from_secs(10);
/// Two of the passes that the agent makes every half minute.
const IDLE: Duration = Duration::from_secs(60);

/// Prints what the agent takes with more and more pods.
pub(super) fn grow(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    let key = sandbox.cloud().annotation("allowed-roles");
    let shared = sandbox.cloud().role_arn("shared/*");
    for index in 0..NAMESPACES {
        let allowed = format!(r#"["team-{index}-*", "{shared}"]"#);
        sandbox.api().apply_namespace(&format!("team-{index}"), &[(&key, &allowed)])?;
    }
    // The pods' own.
    sandbox.api().apply_namespace("default", &[(&key, r#"["crowd-*"]"#)])?;
    if sandbox.agent().is_err() {
        // Without restrictions the agent reads no namespaces.
        sandbox.add_agent(agent, &["--auto-discover-base-arn", "--namespace-restrictions"])?;
    }
    let mut there = 0;
    let note = "x".repeat(NOTE_BYTES);
    for crowd in CROWDS {
        while there < crowd.pods {
            let name = format!("crowd-{there}");
            super::add_role(sandbox, &name);
            sandbox.add_pod(&PodSpec::new(&name).role(&name).annotation(NOTE, &note).alone())?;
            there += 1;
        }
        measure(sandbox, &crowd, out)?;
    }
    Ok(())
}

/// Has pods ask for their roles until the agent has the credentials of all.
fn fetch(sandbox: &mut Sandbox, pods: usize) -> Result<()> {
    let deadline = Instant::now() + FETCHED;
    while sandbox.agent()?.metric(HELD)? < pods as f64 {
        ensure!(Instant::now() < deadline, "the agent has not the credentials of {pods} pods");
        for first in (0..pods).step_by(ASKING) {
            ask(sandbox, first..pods.min(first + ASKING))?;
        }
    }
    Ok(())
}

/// Has each of these pods ask once, all at the same time. STS's limits may let one wait: it gets 503.
fn ask(sandbox: &Sandbox, pods: Range<usize>) -> Result<()> {
    let (ip, list) = (sandbox.cloud().metadata_ip(), sandbox.cloud().list());
    let mut asking = Vec::new();
    for name in pods.map(|index| format!("crowd-{index}")) {
        let mut client = sandbox.pod(&name)?.client("app")?;
        client.args(["get", &format!("http://{ip}{list}{name}")]);
        asking.push(client.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
    }
    for mut client in asking {
        client.wait()?;
    }
    Ok(())
}

fn measure(sandbox: &mut Sandbox, crowd: &Crowd, out: &mut dyn Write) -> Result<()> {
    let pods = crowd.pods;
    let started = Instant::now();
    sandbox.agent()?.start()?;
    let ready = started.elapsed();
    super::listeners_in(sandbox, pods)?;
    let listening = started.elapsed();
    let process = Process(sandbox.agent()?.pid().context("the agent does not run")?);
    fetch(sandbox, pods)?;
    thread::sleep(SETTLED);
    let cpu_before = process.cpu()?;
    thread::sleep(IDLE);
    let cpu = process.cpu()? - cpu_before;
    let what = |what: &str| format!("{pods} pods, {NAMESPACES} namespaces: {what}");
    let ready_target = if pods == 110 { Target::AtMost(1000.0) } else { Target::None };
    number(out, &what("start to ready"), ready.as_secs_f64() * 1000.0, "ms", ready_target)?;
    number(out, &what("a listener in each"), listening.as_secs_f64() * 1000.0, "ms", Target::None)?;
    number(out, &what("resident"), process.resident_mib()?, "MiB", crowd.memory_mib)?;
    let percent = cpu / IDLE.as_secs_f64() * 100.0;
    number(out, &what("processor, nobody asking"), percent, "%", crowd.idle_percent)?;

    let client = sandbox.pod("crowd-0")?.client("app")?;
    let connect = Worker::start(client, metadata(sandbox), false)?.dial(CONNECTS)?;
    number(out, &what("TCP, metadata server"), connect / 1000.0, "µs", Target::None)?;
    sandbox.agent()?.terminate()?;
    Ok(())
}
