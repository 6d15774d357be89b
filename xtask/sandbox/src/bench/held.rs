//! The kernel's memory for connections that clients hold: at in-pod listeners and at the host listener, next
//! to connections without kube2ram. Counts the slab of the whole machine, because not each machine counts it
//! by cgroup; other work on the machine adds to it. Depends on `Sandbox` and `client hold`. Called by
//! `bench`.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    connect::metadata,
    table::{Rounds, Target, row},
};
use crate::{Sandbox, client::Holder, node::PodSpec};

const ROUNDS: usize = 5;
/// Together they hold less than the agent's limit of connections, and than this process's of descriptors.
const PODS: usize = 8;
/// Connections of a pod: the most that it may have, and few, for what its process takes without them.
const MANY: usize = 64;
const FEW: usize = 4;
/// The kernel frees the memory of closed connections later.
const SETTLED: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Prints what a connection takes. The agent runs, and serves one other pod with its own network.
pub(super) fn compare(sandbox: &mut Sandbox, out: &mut dyn Write) -> Result<()> {
    let (mut own, mut host) = (Vec::new(), Vec::new());
    for index in 0..PODS {
        let role = "orders-role";
        own.push(format!("holder-{index}"));
        host.push(format!("daemon-{index}"));
        sandbox.add_pod(&PodSpec::new(&own[index]).role(role))?;
        sandbox.add_pod(&PodSpec::new(&host[index]).role(role).host_network())?;
    }
    super::listeners_in(sandbox, PODS + 1)?;
    let elsewhere = holding_sink(TcpListener::bind((sandbox.node().ip(), 0))?)?;
    let metadata = metadata(sandbox);
    let [mut plain, mut in_pod, mut at_host] = <[Rounds; 3]>::default();
    for _ in 0..ROUNDS {
        plain.push(each(sandbox, &own, elsewhere)?);
        in_pod.push(each(sandbox, &own, metadata)?);
        at_host.push(each(sandbox, &host, metadata)?);
    }
    let shown = |rounds: &Rounds| format!("{:.1} KiB", rounds.median());
    row(out, "a held connection, both ends: elsewhere", &shown(&plain), None, Target::None)?;
    for (what, rounds) in [("in-pod listener", &in_pod), ("host listener", &at_host)] {
        let ratio = Some(rounds.over(&plain));
        row(out, &format!("  {what} / elsewhere"), &shown(rounds), ratio, Target::None)?;
    }
    Ok(())
}

/// KiB of slab for one connection.
fn each(sandbox: &mut Sandbox, pods: &[String], to: SocketAddrV4) -> Result<f64> {
    let few = held(sandbox, pods, to, FEW)?;
    let many = held(sandbox, pods, to, MANY)?;
    Ok((many - few) / (PODS * (MANY - FEW)) as f64)
}

/// KiB of slab that are added while each pod holds as many connections.
fn held(sandbox: &mut Sandbox, pods: &[String], to: SocketAddrV4, connections: usize) -> Result<f64> {
    thread::sleep(SETTLED);
    let before = slab()?;
    let holder =
        |pod: &String| Holder::start(sandbox.pod(pod)?.client("app")?, &to.to_string(), connections, "", "");
    let holders = pods.iter().map(holder).collect::<Result<Vec<_>>>()?;
    thread::sleep(SETTLED);
    let added = slab()? - before;
    if to == metadata(sandbox) {
        let open = sandbox.agent()?.metric("kube2ram_connections")?;
        ensure!(open >= (PODS * connections) as f64, "only {open} connections are held");
    }
    drop(holders);
    Ok(added)
}

/// KiB of slab that the kernel cannot reclaim, in which it keeps sockets.
fn slab() -> Result<f64> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let line = memory.lines().find_map(|line| line.strip_prefix("SUnreclaim:")).context("no SUnreclaim")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Accepts whatever comes and keeps it until the client ends it.
fn holding_sink(listener: TcpListener) -> Result<SocketAddrV4> {
    let SocketAddr::V4(addr) = listener.local_addr()? else { bail!("not an IPv4 address") };
    listener.set_nonblocking(true)?;
    thread::Builder::new().name("holding-sink".into()).spawn(move || hold(&listener))?;
    Ok(addr)
}

/// Ends with the process.
fn hold(listener: &TcpListener) {
    let mut held = Vec::<TcpStream>::new();
    loop {
        while let Ok((connection, _)) = listener.accept() {
            if connection.set_nonblocking(true).is_ok() {
                held.push(connection);
            }
        }
        // Without data there is an error; the client's end is no error.
        held.retain(|connection| connection.peek(&mut [0]).is_err());
        thread::sleep(LOOK_EVERY);
    }
}
