//! The predecessors' way, to be measured against: a client whose packets pass another network namespace,
//! which rewrites them with iptables. Depends on iptables. Made by `Node::add_router`, used by `bench`; the
//! machine's own rules stay as they are.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{Node, netns, pod};

/// A namespace that routes, and one behind it. They go away with the node.
#[derive(Debug)]
pub struct Router {
    pub(super) cgroup: PathBuf,
    pub(super) client: String,
    pub(super) ip: Ipv4Addr,
    pub(super) name: String,
}

impl Router {
    /// The router's address on the client's link.
    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// A listener on a free port of the router.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn bind(&self) -> io::Result<TcpListener> {
        netns::within(&self.name, || TcpListener::bind((self.ip, 0)))
    }

    /// A command that will run behind the router, in a cgroup outside of kubepods.
    pub fn client_command(&self, program: impl AsRef<OsStr>) -> Command {
        pod::join(&self.cgroup, Some(&self.client), program.as_ref())
    }

    /// Makes these the router's only NAT rules: `others` that do not match, as kube-proxy has for Services,
    /// and after them, when a destination is given, the one that sends the metadata server's clients there.
    /// Without both, NAT and its connection tracking are off.
    ///
    /// # Errors
    /// When iptables refuses.
    pub fn rewrite(&self, others: u16, to: Option<SocketAddrV4>) -> Result<()> {
        let mut rules = String::from("*nat\n:PREROUTING ACCEPT\n");
        for index in 0..others {
            let [high, low] = index.to_be_bytes();
            writeln!(
                rules,
                "-A PREROUTING -d 10.96.{high}.{low}/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.97.{high}.{low}:8443"
            )?;
        }
        if let Some(to) = to {
            let metadata = Node::METADATA_IP;
            writeln!(
                rules,
                "-A PREROUTING -d {metadata}/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination {to}"
            )?;
        }
        rules += "COMMIT\n";
        self.iptables("iptables-restore", &[], &rules)
    }

    fn iptables(&self, program: &str, args: &[&str], input: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).args(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }
}
