//! Names of STS → addresses, by the C library's resolver, absolutely. Depends on nothing; called by
//! `transport`.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{SocketAddr, ToSocketAddrs as _},
};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::task::spawn_blocking;

/// Resolves a name as absolute. The search list of `resolv.conf` is never used: in a cluster it is tried
/// first (`ndots:5`), costs four look-ups, and a wildcard record in one of its domains would answer instead
/// of STS.
#[derive(Debug)]
pub(crate) struct Absolute;

impl Resolve for Absolute {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = spawn_blocking(move || look_up(name.as_str())).await??;
            Ok(Box::new(found) as Addrs)
        })
    }
}

/// `resolv.conf` sets the number and timeout of attempts: the manifests have `dnsConfig` for that.
fn look_up(name: &str) -> io::Result<impl Iterator<Item = SocketAddr> + use<>> {
    let is_local = name.ends_with('.') || hosts().is_ok_and(|hosts| is_listed(&hosts, name));
    let absolute = if is_local { name.to_owned() } else { format!("{name}.") };
    (absolute, 0).to_socket_addrs()
}

/// The node's `/etc/hosts`: an operator may pin an endpoint there. Names in it have no trailing dot, and with
/// one the C library would not find them.
fn hosts() -> io::Result<String> {
    let mut text = String::new();
    File::open("/etc/hosts")?.take(HOSTS_LIMIT_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn is_listed(hosts: &str, name: &str) -> bool {
    let entries = hosts.lines().filter_map(|line| line.split('#').next());
    entries.flat_map(|entry| entry.split_whitespace().skip(1)).any(|listed| listed.eq_ignore_ascii_case(name))
}

const HOSTS_LIMIT_BYTES: u64 = 1024 * 1024;

#[cfg(test)]
mod tests;
