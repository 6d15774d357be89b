//! Network namespaces, made with iproute2: the node's, and each pod's on its own veth to the node's. Called
//! by `node`.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Record;

/// Runs a tool; its output is in the error.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args)).map(drop)
}

/// Both ends of a veth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends<A> {
    pub(super) node: A,
    pub(super) inner: A,
}

/// Makes a namespace whose `eth0` is the other end of the node's `link`, with a default route through the
/// node for each family that has addresses.
pub(super) fn add(
    record: &mut Record,
    netns: &str,
    link: &str,
    v4: Option<Ends<Ipv4Addr>>,
    v6: Option<Ends<Ipv6Addr>>,
) -> Result<()> {
    add_alone(record, netns)?;
    ip(&["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns])?;
    if v6.is_some() {
        // Without a link-local address, which else is not used for a second, the node does not ask for the
        // neighbour that it forwards to.
        let skip_detection =
            |device: &str| fs::write(format!("/proc/sys/net/ipv6/conf/{device}/accept_dad"), "0");
        skip_detection(link)?;
        within(netns, || skip_detection("eth0"))?;
    }
    ip(&["link", "set", link, "up"])?;
    ip(&["-n", netns, "link", "set", "eth0", "up"])?;
    if let Some(Ends { node, inner }) = v4 {
        // Of the input device only: that of a whole machine's network must not be turned into a router.
        fs::write(format!("/proc/sys/net/ipv4/conf/{link}/forwarding"), "1")?;
        ip(&["addr", "add", &format!("{node}/24"), "dev", link])?;
        ip(&["-n", netns, "addr", "add", &format!("{inner}/24"), "dev", "eth0"])?;
        ip(&["-n", netns, "route", "add", "default", "via", &node.to_string()])?;
    }
    if let Some(Ends { node, inner }) = v6 {
        ip(&["addr", "add", &format!("{node}/64"), "dev", link, "nodad"])?;
        ip(&["-n", netns, "addr", "add", &format!("{inner}/64"), "dev", "eth0", "nodad"])?;
        ip(&["-n", netns, "route", "add", "default", "via", &node.to_string()])?;
    }
    Ok(())
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
pub(super) fn path(netns: &str) -> PathBuf {
    Path::new("/run/netns").join(netns)
}

/// Runs a function inside a namespace, on a thread that ends with it. Sockets made there stay there.
pub(super) fn within<T: Send>(netns: &str, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let file = File::open(path(netns))?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            enter(&file)?;
            f()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// The calling thread inside a namespace. Threads and processes that it starts are inside, too. Dropping it
/// leads the thread that drops it back.
#[derive(Debug)]
pub(super) struct Inside {
    outside: File,
}

impl Inside {
    pub(super) fn enter(netns: &str) -> io::Result<Self> {
        // Of the thread, not of the process: the two differ while a node exists.
        let outside = File::open("/proc/thread-self/ns/net")?;
        enter(&File::open(path(netns))?)?;
        Ok(Self { outside })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.outside) {
            crate::say(&format!("cannot leave the node's network namespace: {error}"));
        }
    }
}

fn enter(netns: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
}
