//! Ends pods' connections to the metadata server that are older than the eBPF programs. `k2r_egress` drops
//! their packets, so that a client would wait for its timeout. Destroyed, they fail at once (`ECONNABORTED`),
//! and the client connects again, to the agent. By sock_diag(7). Blocks; depends on `netlink` and
//! `processes`. Called by `app`, once.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::DirEntryExt as _,
    path::Path,
};

use rustix::net::netlink;
use tracing::debug;

use super::{
    netns::NetnsId,
    pods::PodCgroups,
    processes::{self, Found},
};
use crate::{
    datapath::Settings,
    netlink::{Message, NLM_F_ACK, Socket, attribute},
};
use kube2ram_cloud::MetadataAddr;

/// The result for the connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Connections that were ended.
    pub connections: usize,
    /// Connections, or namespaces, of which the kernel refused to end or to list any. Their clients wait for
    /// a timeout.
    pub failures: usize,
}

/// Ends all of them, in every pod's network namespace and in the host's. The agent's own stay.
///
/// # Errors
/// When the pods' cgroups cannot be listed.
pub fn end_cut_connections(settings: &Settings) -> io::Result<Ended> {
    let (mut ended, mut cgroups) = (Ended::default(), HashSet::new());
    for tree in settings.pods_cgroups() {
        collect_ids(&tree, &settings.own_cgroup, &mut cgroups)?;
    }
    let host = NetnsId::own()?;
    let mut netnses = HashSet::from([host]);
    ended.add(end_here(settings.metadata, &cgroups));
    for cgroup in PodCgroups::new(&settings.cgroup_root, settings.pods_cgroups()).list(|_| ())? {
        if let Ok(Found::Own(netns, _)) = processes::of_pod(&cgroup.path, host)
            && netnses.insert(netns.id)
        {
            ended.add(netns.within(|| end_here(settings.metadata, &cgroups)));
        }
    }
    Ok(ended)
}

impl Ended {
    fn add(&mut self, of_namespace: io::Result<Self>) {
        match of_namespace {
            Ok(Self { connections, failures }) => {
                self.connections += connections;
                self.failures += failures;
            }
            Err(error) => {
                debug!(%error, "cannot list the connections of a network namespace");
                self.failures += 1;
            }
        }
    }
}

/// The ids of a cgroup and of all below, but for one.
fn collect_ids(cgroup: &Path, except: &Path, ids: &mut HashSet<u64>) -> io::Result<()> {
    let mut left = vec![cgroup.to_owned()];
    while let Some(directory) = left.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.path() != except {
                ids.insert(entry.ino());
                left.push(entry.path());
            }
        }
    }
    Ok(())
}

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY`, include/uapi/linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `INET_DIAG_CGROUP_ID`, include/uapi/linux/inet_diag.h (Linux 5.8).
const INET_DIAG_CGROUP_ID: u16 = 21;
/// The length of `struct inet_diag_msg`.
const DIAG_MSG: usize = 72;
/// `struct inet_diag_sockid` in it, and its length.
const SOCKID: usize = 4;
const SOCKID_LENGTH: usize = 48;
/// More than a node has: 32 KiB each.
const MAX_DATAGRAMS: usize = 16 * 1024;
/// `1 << TCP_…`, include/net/tcp_states.h: established, SYN sent, closed by the other side.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 8;

/// In the calling thread's network namespace: connections of sockets that belong to one of the cgroups.
fn end_here(metadata: MetadataAddr, cgroups: &HashSet<u64>) -> io::Result<Ended> {
    let mut socket = Socket::open(Some(netlink::SOCK_DIAG), MAX_DATAGRAMS)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).map_err(io::Error::other)?;
        socket.request(
            &[Message::dump(SOCK_DIAG_BY_FAMILY, request(family, &[0; SOCKID_LENGTH]), vec![])],
            |_, reply| {
                if let Some(id) = connection_of(reply, metadata, cgroups) {
                    found.push(request(family, id));
                }
            },
        )?;
    }
    let mut ended = Ended::default();
    for head in found {
        let destroy = Message { kind: SOCK_DESTROY, flags: NLM_F_ACK, head, attributes: vec![] };
        match socket.request(&[destroy], |_, _| {}) {
            Ok(()) => ended.connections += 1,
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                debug!(%error, "cannot close a connection: check that the kernel has CONFIG_INET_DIAG_DESTROY");
                ended.failures += 1;
            }
        }
    }
    Ok(ended)
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, id: &[u8]) -> Vec<u8> {
    let protocol = 6; // IPPROTO_TCP
    [&[family, protocol, 0, 0], &STATES.to_ne_bytes()[..], id].concat()
}

/// The `struct inet_diag_sockid` of a connection to the metadata server, if its socket belongs to one of the
/// cgroups.
fn connection_of<'a>(reply: &'a [u8], metadata: MetadataAddr, cgroups: &HashSet<u64>) -> Option<&'a [u8]> {
    let (message, attributes) = reply.split_at_checked(DIAG_MSG)?;
    let id = &message[SOCKID..SOCKID + SOCKID_LENGTH];
    // Behind two ports and the source.
    let destination: [u8; 16] = id[20..36].try_into().ok()?;
    let destination = if i32::from(message[0]) == libc::AF_INET {
        IpAddr::from(Ipv4Addr::from(*destination.first_chunk::<4>()?))
    } else {
        Ipv6Addr::from(destination).to_canonical()
    };
    let is_metadata = match destination {
        IpAddr::V4(address) => address == *metadata.v4.ip(),
        IpAddr::V6(address) => metadata.v6 == Some(address),
    };
    let cgroup = attribute(attributes, INET_DIAG_CGROUP_ID)?.first_chunk::<8>()?;
    (is_metadata && cgroups.contains(&u64::from_ne_bytes(*cgroup))).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::identity::{find_cgroup_root, own_cgroup};

    /// A connection over the loopback device, and the metadata server's address as the other side's.
    fn connection(address: &str) -> (MetadataAddr, TcpStream, TcpStream) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let std::net::SocketAddr::V4(v4) = listener.local_addr().unwrap() else { unreachable!() };
        let client = TcpStream::connect(v4).unwrap();
        (MetadataAddr::v4_only(v4), client, listener.accept().unwrap().0)
    }

    #[test]
    #[ignore = "needs root: cargo xtask test"]
    fn ends_those_of_the_cgroups_to_the_address_and_no_others() {
        let own = fs::metadata(own_cgroup(&find_cgroup_root(None).unwrap()).unwrap()).unwrap();
        let own = HashSet::from([std::os::unix::fs::MetadataExt::ino(&own)]);
        // No other process of this machine has connections to this address.
        let (metadata, mut client, _server) = connection("127.0.81.11");
        let (_, mut other, mut others_server) = connection("127.0.81.12");

        assert_eq!(
            end_here(metadata, &HashSet::from([u64::MAX])).unwrap(),
            Ended::default(),
            "another cgroup's"
        );
        assert_eq!(end_here(metadata, &own).unwrap(), Ended { connections: 1, failures: 0 });

        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        others_server.write_all(b"x").unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 1, "the twin");
    }

    #[test]
    fn a_cut_reply_names_no_connection() {
        let metadata = MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap());
        let mut reply = vec![0; DIAG_MSG];
        reply[0] = u8::try_from(libc::AF_INET).unwrap();
        reply[SOCKID + 20..SOCKID + 24].copy_from_slice(&[100, 100, 100, 200]);
        reply.extend(12_u16.to_ne_bytes());
        reply.extend(INET_DIAG_CGROUP_ID.to_ne_bytes());
        reply.extend(7_u64.to_ne_bytes());
        let cgroups = HashSet::from([7]);
        assert!(connection_of(&reply, metadata, &cgroups).is_some(), "the twin");

        for length in 0..reply.len() {
            assert_eq!(connection_of(&reply[..length], metadata, &cgroups), None, "{length}");
        }
        reply[SOCKID + 23] = 201;
        assert_eq!(connection_of(&reply, metadata, &cgroups), None, "another address");
    }
}
