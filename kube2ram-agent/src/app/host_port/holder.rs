//! Finds the process that listens on a port, by `/proc`. Blocks; called by the parent.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use crate::identity::PodUid;

/// A process that listens on a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holder {
    process: Option<Process>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// `comm`, 15 bytes at the most.
    name: String,
    pod: Option<PodUid>,
}

/// `TCP_LISTEN`, include/net/tcp_states.h.
const LISTEN: &str = "0A";

impl Holder {
    /// Finds the socket that prevents a bind of `address` in this thread's network namespace, and the oldest
    /// process that holds it.
    pub(super) fn find(address: SocketAddr) -> Self {
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        let inodes: Vec<_> = tables
            .iter()
            .filter_map(|table| fs::read_to_string(table).ok())
            .flat_map(|table| listeners(&table, address))
            .map(|inode| format!("socket:[{inode}]"))
            .collect();
        let mut pids: Vec<u32> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        let holds = |pid: &u32| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            descriptors
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .any(|target| inodes.iter().any(|inode| target == Path::new(inode)))
        };
        Self { process: pids.into_iter().find(holds).map(Process::examine) }
    }

    /// For people.
    pub(super) fn describe(&self, pod_name: impl Fn(&PodUid) -> Option<String>) -> String {
        let Some(Process { pid, name, pod }) = &self.process else {
            return "a process that could not be found".to_owned();
        };
        let pod = pod.as_ref().map(|uid| match pod_name(uid) {
            Some(name) => format!(" of pod {name}"),
            None => format!(" of the pod with UID {uid}"),
        });
        format!("process {name} (pid {pid}){}", pod.unwrap_or_default())
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.pid)
    }
}

impl Process {
    fn examine(pid: u32) -> Self {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        Self { pid, name: read("comm").trim_end().to_owned(), pod: pod_of(&read("cgroup")) }
    }
}

/// The pod that a process's cgroup names. From within a cgroup namespace the path begins with `/../`, so that
/// it cannot be resolved; good enough for a report.
fn pod_of(cgroups: &str) -> Option<PodUid> {
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    path.split('/').find_map(|segment| {
        let segment = segment.strip_suffix(".slice").unwrap_or(segment);
        PodUid::parse(segment.rsplit_once("pod")?.1)
    })
}

/// The inodes of listening sockets in a table of proc_pid_net(5) that conflict with `address`: at its port,
/// and at its address or at all addresses.
fn listeners(table: &str, address: SocketAddr) -> Vec<u64> {
    let conflicts = |ip: IpAddr| ip == address.ip() || ip.is_unspecified() || address.ip().is_unspecified();
    let inode = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (ip, port) = fields.nth(1)?.split_once(':')?;
        let is_listening = fields.nth(1)? == LISTEN;
        let port = u16::from_str_radix(port, 16).ok()?;
        let inode = fields.nth(5)?.parse().ok()?;
        (is_listening && port == address.port() && conflicts(parse_ip(ip)?)).then_some(inode)
    };
    table.lines().skip(1).filter_map(inode).collect()
}

/// Words in the machine's byte order, each as a number.
fn parse_ip(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn finds_the_process_that_listens_at_the_address_or_at_all() {
        let own = std::process::id();
        for bound in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(bound).unwrap();
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));

            let found = Holder::find(address);

            assert_eq!(found.pid(), Some(own), "{bound}");
            let process = found.process.unwrap();
            assert!(!process.name.is_empty());
            drop(listener);
            assert_eq!(Holder::find(address).pid(), None, "{bound}");
        }
    }

    #[test]
    fn a_listener_at_another_address_or_port_is_no_conflict() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1FF5 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n\
            1: 0200000A:1FF5 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1\n\
            2: 0200000A:1FF6 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1\n\
            3: 0200000A:1FF5 0300000A:C000 01 00000000:00000000 00:00000000 00000000     0        0 14 1\n";
        let at = |address: &str| listeners(table, address.parse().unwrap());

        if cfg!(target_endian = "little") {
            assert_eq!(at("10.0.0.2:8181"), [12]);
            assert_eq!(at("0.0.0.0:8181"), [11, 12]);
            assert!(at("10.0.0.2:8183").is_empty());
        }
    }

    #[test]
    fn the_pod_is_read_from_the_cgroup() {
        let uid = PodUid::parse("0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a").unwrap();
        let rows = [
            "0::/../../pod0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a/cri-containerd-abc",
            "1:name=systemd:/x\n0::/kubepods.slice/kubepods-burstable-pod0c5a1e7b_3f0d_4d0e_9a55_1f2e3d4c5b6a.slice/x",
        ];
        for row in rows {
            assert_eq!(pod_of(row).as_ref(), Some(&uid), "{row}");
        }
        assert_eq!(pod_of("0::/system.slice/nginx.service"), None);
        let holder =
            Holder { process: Some(Process { pid: 7, name: "nginx".to_owned(), pod: Some(uid.clone()) }) };
        assert_eq!(
            holder.describe(|_| Some("web/nginx-1".to_owned())),
            "process nginx (pid 7) of pod web/nginx-1"
        );
        assert_eq!(holder.describe(|_| None), format!("process nginx (pid 7) of the pod with UID {uid}"));
        assert_eq!(Holder::default().describe(|_| None), "a process that could not be found");
    }
}
