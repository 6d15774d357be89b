//! Network namespaces, each on a veth of its own to the node, made with iproute2.
//! Forwarding is turned on for the veths alone, so the machine's own settings stay as they are. Called by `node`.

use std::{fs, io, net::Ipv4Addr, os::fd::AsFd as _, path::Path, process::Command, thread};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Record;

/// Runs a tool; what it says is in the error.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args)).map(drop)
}

/// Makes a namespace whose `eth0` is the other end of the node's `link`, with a default route through the node.
pub(super) fn add(
    record: &mut Record,
    netns: &str,
    link: &str,
    node_ip: Ipv4Addr,
    inner_ip: Ipv4Addr,
) -> Result<()> {
    record.netns.push(netns.to_owned());
    record.links.push(link.to_owned());
    record.save()?;
    ip(&["netns", "add", netns])?;
    ip(&["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns])?;
    ip(&["addr", "add", &format!("{node_ip}/24"), "dev", link])?;
    // Of the input device only: without it the node would not forward, with the global switch the machine would be a router.
    fs::write(format!("/proc/sys/net/ipv4/conf/{link}/forwarding"), "1")?;
    ip(&["link", "set", link, "up"])?;
    ip(&["-n", netns, "link", "set", "lo", "up"])?;
    ip(&["-n", netns, "addr", "add", &format!("{inner_ip}/24"), "dev", "eth0"])?;
    ip(&["-n", netns, "link", "set", "eth0", "up"])?;
    ip(&["-n", netns, "route", "add", "default", "via", &node_ip.to_string()])
}

/// Makes a namespace with nothing but a loopback device.
pub(super) fn add_alone(record: &mut Record, netns: &str) -> Result<()> {
    record.netns.push(netns.to_owned());
    record.save()?;
    ip(&["netns", "add", netns])?;
    ip(&["-n", netns, "link", "set", "lo", "up"])
}

/// Makes a namespace whose packets pass another one, `outer`.
pub(super) fn add_behind(
    record: &mut Record,
    outer: &str,
    netns: &str,
    outer_ip: Ipv4Addr,
    inner_ip: Ipv4Addr,
) -> Result<()> {
    add_alone(record, netns)?;
    ip(&["-n", outer, "link", "add", "inner", "type", "veth", "peer", "name", "eth0", "netns", netns])?;
    ip(&["-n", outer, "addr", "add", &format!("{outer_ip}/24"), "dev", "inner"])?;
    ip(&["-n", outer, "link", "set", "inner", "up"])?;
    ip(&["-n", netns, "addr", "add", &format!("{inner_ip}/24"), "dev", "eth0"])?;
    ip(&["-n", netns, "link", "set", "eth0", "up"])?;
    ip(&["-n", netns, "route", "add", "default", "via", &outer_ip.to_string()])
}

/// Where iproute2 keeps a namespace.
pub(super) fn path(netns: &str) -> std::path::PathBuf {
    Path::new("/run/netns").join(netns)
}

/// Runs a function inside a namespace, on a thread that ends with it. Sockets made there stay there.
pub(super) fn within<T: Send>(netns: &str, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let file = fs::File::open(path(netns))?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            f()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// Every IPv4 destination in every routing table: network and prefix length.
pub(super) fn routes() -> Result<Vec<(Ipv4Addr, u8)>> {
    let routes = run(Command::new("ip").args(["-4", "route", "show", "table", "all"]))?;
    Ok(routes.lines().filter_map(|line| line.split(' ').take(2).find_map(prefix)).collect())
}

fn prefix(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (net, len) = text.split_once('/').unwrap_or((text, "32"));
    Some((net.parse().ok()?, len.parse().ok()?))
}
