//! What the wire guard costs those that it does not concern: a setsockopt(2), and a packet that leaves by the
//! uplink. Depends on `Sandbox` and `client repeat`. Called by `bench`.

use std::{io::Write, net::Ipv4Addr, path::Path, process::Command};

use anyhow::Result;

use super::{
    connect::{Worker, uninstall},
    kernel,
    table::{Rounds, Target, row},
};
use crate::{
    Sandbox,
    node::{Node, PodSpec},
};

/// Interleaved, so that what else the machine does falls on all of them alike.
const ROUNDS: usize = 15;
const CALLS: usize = 100_000;
/// By the same device and next hop as the metadata server, whose neighbour it is.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::from_bits(Node::METADATA_IP.to_bits() + 1);

#[derive(Default)]
struct Took {
    host_option: [Rounds; 2],
    pod_option: [Rounds; 2],
    /// Without the agent, with the agent but not the wire guard, with both.
    send: [Rounds; 3],
}

/// Prints what calls and packets cost.
pub(super) fn compare(sandbox: &mut Sandbox, agent: &Path, out: &mut dyn Write) -> Result<()> {
    sandbox.add_pod(&PodSpec::new("caller").role("orders-role"))?;
    sandbox.add_agent(agent, &["--auto-discover-base-arn"])?;
    sandbox.node().route_by_uplink(ELSEWHERE.into())?;
    let host = |sandbox: &Sandbox| -> Result<Command> {
        let mut command = sandbox.node().host_command(std::env::current_exe()?);
        command.arg("client");
        Ok(command)
    };
    let target = format!("{ELSEWHERE}:9");
    let mut host_option = Worker::of(host(sandbox)?.arg("repeat"))?;
    let mut pod_option = Worker::of(sandbox.pod("caller")?.client("app")?.arg("repeat"))?;
    let mut sender = Worker::of(host(sandbox)?.args(["repeat", "--send-to", &target]))?;
    let mut took = Took::default();
    for _ in 0..ROUNDS {
        took.host_option[0].push(host_option.dial(CALLS)?);
        took.pod_option[0].push(pod_option.dial(CALLS)?);
        took.send[0].push(sender.dial(CALLS)?);
        for (guard, send) in [("off", 1), ("auto", 2)] {
            sandbox.agent()?.set_env("KUBE2RAM_WIRE_GUARD", guard);
            sandbox.agent()?.start()?;
            took.send[send].push(sender.dial(CALLS)?);
            if guard == "auto" {
                took.host_option[1].push(host_option.dial(CALLS)?);
                took.pod_option[1].push(pod_option.dial(CALLS)?);
            }
            sandbox.agent()?.terminate()?;
        }
        uninstall(sandbox, agent)?;
    }
    took.print(out)?;
    sandbox.agent()?.start()?;
    let counting = kernel::Counting::start()?;
    sender.dial(CALLS)?;
    writeln!(out, "  by the kernel's own count, packets elsewhere:")?;
    counting.report(CALLS, out)?;
    let counting = kernel::Counting::start()?;
    pod_option.dial(CALLS)?;
    writeln!(out, "  setsockopt(2) of a pod's process:")?;
    counting.report(CALLS, out)
}

impl Took {
    fn print(&self, out: &mut dyn Write) -> Result<()> {
        let mut line = |what: &str, rounds: &Rounds, baseline: &Rounds| {
            let ratio = (!std::ptr::eq(rounds, baseline)).then(|| rounds.over(baseline));
            row(out, what, &format!("{:.0} ns", rounds.median()), ratio, Target::None)
        };
        let [without, with] = &self.host_option;
        line("setsockopt(2), a host's process: without kube2ram", without, without)?;
        line("  with kube2ram / without", with, without)?;
        let [without, with] = &self.pod_option;
        line("setsockopt(2), a pod's process: without kube2ram", without, without)?;
        line("  with kube2ram / without", with, without)?;
        let [without, off, on] = &self.send;
        line("a datagram by the uplink: without kube2ram", without, without)?;
        line("  with kube2ram, --wire-guard=off / without", off, without)?;
        line("  with kube2ram / without", on, without)?;
        line("  with kube2ram / --wire-guard=off", on, off)
    }
}
