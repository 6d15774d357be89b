//! What grows with the number of pods and namespaces: memory, processor time, the time until ready, and what
//! a connect costs. Depends on `Sandbox`. Called by `bench`.

use std::{
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    connect::{Worker, metadata},
    process::Process,
    table::{Target, number},
};
use crate::{Sandbox, node::PodSpec};

const NAMESPACES: usize = 5000;
const ROLES: usize = 50;
/// Pods, and how much memory the agent may have with them, in MiB.
const CROWDS: [(usize, f64); 3] = [(1, f64::INFINITY), (110, 16.0), (1000, 24.0)];
const CONNECTS: usize = 5000;
/// What comes of a start is over by then.
const SETTLED: Duration = Duration::from_secs(10);
/// Long enough for what the agent does every now and then.
const IDLE: Duration = Duration::from_secs(35);

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
    for index in 0..ROLES {
        super::add_role(sandbox, &format!("crowd-{index}"));
    }
    if sandbox.agent().is_err() {
        // Without restrictions the agent reads no namespaces.
        sandbox.add_agent(agent, &["--auto-discover-base-arn", "--namespace-restrictions"])?;
    }
    let mut there = 0;
    for (pods, memory_mib) in CROWDS {
        while there < pods {
            let role = format!("crowd-{}", there % ROLES);
            sandbox.add_pod(&PodSpec::new(&format!("crowd-{there}")).role(&role).alone())?;
            there += 1;
        }
        measure(sandbox, pods, memory_mib, out)?;
    }
    Ok(())
}

fn measure(sandbox: &mut Sandbox, pods: usize, memory_mib: f64, out: &mut dyn Write) -> Result<()> {
    let started = Instant::now();
    sandbox.agent()?.start()?;
    let ready = started.elapsed();
    super::listeners_in(sandbox, pods)?;
    let listening = started.elapsed();
    let process = Process(sandbox.agent()?.pid().context("the agent does not run")?);
    thread::sleep(SETTLED);
    let cpu_before = process.cpu()?;
    thread::sleep(IDLE);
    let cpu = process.cpu()? - cpu_before;
    let what = |what: &str| format!("{pods} pods, {NAMESPACES} namespaces: {what}");
    let ready_target = if pods == 110 { Target::AtMost(1000.0) } else { Target::None };
    number(out, &what("start to ready"), ready.as_secs_f64() * 1000.0, "ms", ready_target)?;
    number(out, &what("a listener in each"), listening.as_secs_f64() * 1000.0, "ms", Target::None)?;
    let memory_target = if memory_mib.is_finite() { Target::AtMost(memory_mib) } else { Target::None };
    number(out, &what("resident"), process.resident_mib()?, "MiB", memory_target)?;
    number(out, &what("processor, nobody asking"), cpu / IDLE.as_secs_f64() * 100.0, "%", Target::None)?;

    let client = sandbox.pod("crowd-0")?.client("app")?;
    let connect = Worker::start(client, metadata(sandbox), false)?.dial(CONNECTS)?;
    number(out, &what("TCP, metadata server"), connect / 1000.0, "µs", Target::None)?;
    sandbox.agent()?.terminate()?;
    Ok(())
}
