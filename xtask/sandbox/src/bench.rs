//! What kube2ram costs, each number next to what it is compared with, in one run on one machine. Depends on
//! `Sandbox` and on `login`. Called by the binary's `bench`, which `cargo xtask bench` runs.

mod authenticator;
mod connect;
mod held;
mod hello;
mod kernel;
mod process;
mod saturated;
mod scale;
mod service;
mod table;
mod wire;
mod wrk;

use std::{
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

pub use self::hello::hello;
use crate::{Cloud, Sandbox, node::PodSpec, standin::Role};

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Subject {
    /// Logins by the authenticator, alone and next to a flood of garbage.
    Authenticator,
    /// connect(2), with kube2ram, without and with iptables rules.
    Connect,
    /// Each program, by the kernel's statistics, and the kernel's memory for held connections.
    Kernel,
    /// Requests and probes while other work wants all processors.
    Saturated,
    /// Memory, processor time and start with many pods.
    Scale,
    /// Requests per second and latencies of the metadata service.
    Service,
    /// setsockopt(2), and packets that leave by the uplink.
    Wire,
}

/// The programs that are measured.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// The agent, for all subjects but one.
    pub agent: Option<PathBuf>,
    /// `kube2ram-authenticator`, for [`Subject::Authenticator`].
    pub authenticator: Option<PathBuf>,
}

impl Programs {
    fn agent(&self) -> Result<&Path> {
        self.agent.as_deref().context("--agent is missing")
    }

    fn authenticator(&self) -> Result<&Path> {
        self.authenticator.as_deref().context("--authenticator is missing")
    }
}

/// What the sandbox of a bench is called.
pub const NAME: &str = "bench";

/// Measures and prints.
///
/// # Errors
/// When a program is missing, the sandbox cannot be made, or something that is measured fails; never because
/// of a number.
pub fn bench(programs: &Programs, cloud: Cloud, subjects: &[Subject], out: &mut dyn Write) -> Result<()> {
    writeln!(out, "medians; ratios of rounds in turn: median (lowest–highest)")?;
    let node = || {
        let sandbox = Sandbox::create_in(NAME, cloud)?;
        add_role(&sandbox, "orders-role");
        anyhow::Ok(sandbox)
    };
    for subject in subjects {
        match subject {
            Subject::Authenticator => {
                writeln!(out, "\nauthenticator")?;
                authenticator::measure(programs.authenticator()?, out)?;
            }
            Subject::Connect => {
                writeln!(out, "\nconnect(2)")?;
                connect::compare(&mut node()?, programs.agent()?, out)?;
            }
            Subject::Kernel => {
                writeln!(out, "\nprograms, by the kernel's own count")?;
                let mut sandbox = node()?;
                kernel_programs(&mut sandbox, programs.agent()?, out)?;
                writeln!(out, "\nconnections that are held, by the kernel's slab")?;
                held::compare(&mut sandbox, out)?;
            }
            Subject::Saturated => {
                writeln!(out, "\na saturated node")?;
                saturated::compare(&mut node()?, programs.agent()?, out)?;
            }
            Subject::Scale => {
                writeln!(out, "\nmany pods")?;
                scale::grow(&mut node()?, programs.agent()?, out)?;
            }
            Subject::Service => {
                writeln!(out, "\nmetadata service")?;
                service::compare(&mut node()?, programs.agent()?, out)?;
            }
            Subject::Wire => {
                writeln!(out, "\nwire guard")?;
                wire::compare(&mut node()?, programs.agent()?, out)?;
            }
        }
    }
    Ok(())
}

/// One connect after the other, elsewhere and to the metadata server.
fn kernel_programs(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    const CONNECTS: usize = 5000;
    sandbox.add_pod(&PodSpec::new("dialer").role("orders-role"))?;
    sandbox.start_agent(agent, &["--auto-discover-base-arn"])?;
    let elsewhere = connect::sink(std::net::TcpListener::bind((sandbox.node().ip(), 0))?)?;
    for (what, addr) in [("elsewhere", elsewhere), ("metadata server", connect::metadata(sandbox))] {
        let mut worker = connect::Worker::start(sandbox.pod("dialer")?.client("app")?, addr, false)?;
        let counting = kernel::Counting::start()?;
        worker.dial(CONNECTS)?;
        writeln!(out, "  TCP, {what}:")?;
        counting.report(CONNECTS, out)?;
    }
    Ok(())
}

/// How long listeners in a thousand pods may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// Waits until as many pods have an in-pod listener.
fn listeners_in(sandbox: &mut Sandbox, pods: usize) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if sandbox.agent()?.metric("kube2ram_pod_listeners")? >= pods as f64 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not every pod has its listener after {DEADLINE:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn add_role(sandbox: &Sandbox, name: &str) {
    sandbox.accounts().add_role(sandbox.cloud().role_arn(name), Role::default());
}
