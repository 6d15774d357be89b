//! A Kubernetes node made of this machine: a cgroup tree as a kubelet lays it out, pods with namespaces of their own, and a network
//! namespace that owns the metadata address and counts what arrives there. Depends on iproute2, nftables and util-linux. Called by `sandbox`.
//!
//! Everything has a name of its own and is written down before it is made, so that a crashed run is cleaned up by the next one.

mod cgroup;
mod netns;
mod pod;
mod record;
mod router;
mod sniffer;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};

pub use self::{
    cgroup::{CgroupDriver, Qos},
    pod::{Pod, PodNetwork, PodSpec},
    record::{PodRecord, Record},
    router::Router,
    sniffer::{Packet, Sniffer},
};
use self::{netns::ip, sniffer::Sniffed};
use crate::standin::Bind;

/// The node. Dropping it removes everything it made.
#[derive(Debug)]
pub struct Node {
    driver: CgroupDriver,
    /// Held by the one node of this machine: the metadata address can be routed to one place only.
    _lock: File,
    net: [u8; 2],
    next_pod: u8,
    record: Record,
    sniffer: Sniffed,
}

impl Node {
    /// The address of Alibaba Cloud's metadata server.
    pub const METADATA_IP: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

    /// Makes a node, after removing what crashed runs have left. Waits while another process has one.
    ///
    /// # Errors
    /// When the process is not root, another node exists for ten minutes, the machine has a route to the metadata address, or
    /// cgroup v2, iproute2 or util-linux is missing.
    pub fn create(name: &str, driver: CgroupDriver) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "making a node needs root");
        ensure!(
            (1..=32).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "a node's name has 1 to 32 characters of a-z, 0-9 and -"
        );
        let lock = lock()?;
        Record::undo_all()?;
        let net = free_net()?;

        let cgroup = cgroup::mount_point()?.join(format!("kube2ram-{name}"));
        let mut record = Record::new(name, cgroup);
        record.save()?;
        match Self::build(&mut record, driver, net) {
            Ok(sniffer) => Ok(Self { driver, _lock: lock, net, next_pod: 0, record, sniffer }),
            Err(error) => {
                record.undo();
                Err(error)
            }
        }
    }

    fn build(record: &mut Record, driver: CgroupDriver, net: [u8; 2]) -> Result<Sniffed> {
        fs::create_dir_all(record.cgroup.join(driver.kubepods()))?;
        fs::create_dir_all(record.cgroup.join("host"))?;
        // A bpffs of its own: unmounting it detaches whatever is pinned there.
        let bpffs = record.bpffs();
        fs::create_dir_all(&bpffs)?;
        netns::run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpffs))?;
        // As /run is on a node; not everywhere that this runs.
        let state = record.agent_state();
        fs::create_dir_all(&state)?;
        netns::run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=700", "tmpfs"]).arg(&state))?;

        let metadata = format!("kube2ram-{}-metadata", record.name);
        let (node_ip, metadata_ip) = veth_ips(net, METADATA_NET);
        netns::add(record, &metadata, &record.link(METADATA_NET), node_ip, metadata_ip)?;
        ip(&["-n", &metadata, "addr", "add", &format!("{}/32", Self::METADATA_IP), "dev", "lo"])?;
        ip(&["route", "add", &format!("{}/32", Self::METADATA_IP), "via", &metadata_ip.to_string()])?;
        Sniffed::start(&metadata, Self::METADATA_IP)
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// An address of the node that pods can reach.
    pub fn ip(&self) -> Ipv4Addr {
        veth_ips(self.net, METADATA_NET).0
    }

    /// Where cgroup v2 is mounted.
    pub fn cgroup_root(&self) -> &Path {
        self.record.cgroup.parent().unwrap_or(Path::new("/sys/fs/cgroup"))
    }

    /// The kubepods cgroup, as a directory.
    pub fn pods_cgroup(&self) -> PathBuf {
        self.record.cgroup.join(self.driver.kubepods())
    }

    /// A bpffs that belongs to this node.
    pub fn bpffs(&self) -> PathBuf {
        self.record.bpffs()
    }

    /// A tmpfs that this node's agents share, and that goes away with it.
    pub fn agent_state(&self) -> PathBuf {
        self.record.agent_state()
    }

    /// A directory for logs and the like, which goes away with the node.
    pub fn directory(&self) -> PathBuf {
        self.record.directory()
    }

    /// A listener on 100.100.100.200:80, in the namespace that owns the address.
    pub fn metadata_bind(&self) -> Bind {
        let netns = format!("kube2ram-{}-metadata", self.record.name);
        let addr = SocketAddr::from((Self::METADATA_IP, 80));
        Bind::new(addr, move |addr| netns::within(&netns, || TcpListener::bind(addr)))
    }

    /// What arrives at the metadata server's door.
    pub fn sniffer(&self) -> &Sniffer {
        &self.sniffer
    }

    /// Makes a pod: its cgroups, its network namespace unless it shares the node's, and its pause process.
    ///
    /// # Errors
    /// When the node has 250 pods with a way out, or one of that name, or the machine refuses.
    pub fn add_pod(&mut self, spec: &PodSpec) -> Result<Pod> {
        ensure!(!self.record.pods.contains_key(&spec.name), "there is a pod {:?} already", spec.name);
        let index = match spec.network {
            PodNetwork::Veth => Some(self.next_net()?),
            PodNetwork::Alone | PodNetwork::Host => None,
        };

        let cgroup = self.pods_cgroup().join(self.driver.pod(spec.qos, &spec.uid));
        let container_names = spec.containers.iter().map(String::as_str).chain([pod::PAUSE]);
        let containers = container_names
            .map(|name| (name.to_owned(), cgroup.join(self.driver.container(&spec.uid, name))))
            .collect::<BTreeMap<_, _>>();
        let netns = (spec.network != PodNetwork::Host).then(|| match index {
            Some(index) => format!("kube2ram-{}-{index}", self.record.name),
            None => format!("kube2ram-{}-{}", self.record.name, spec.name),
        });
        let pod_record = PodRecord { cgroup, containers, netns };
        self.record.pods.insert(spec.name.clone(), pod_record.clone());
        self.record.save()?;
        for directory in pod_record.containers.values() {
            fs::create_dir_all(directory)?;
        }
        let ip = match (&pod_record.netns, index) {
            (Some(netns), Some(index)) => {
                let (node_ip, pod_ip) = veth_ips(self.net, index);
                let link = self.record.link(index);
                netns::add(&mut self.record, netns, &link, node_ip, pod_ip)?;
                pod_ip
            }
            (Some(netns), None) => {
                netns::add_alone(&mut self.record, netns)?;
                Ipv4Addr::LOCALHOST
            }
            (None, _) => self.ip(),
        };

        Pod::start(spec.clone(), pod_record, ip)
    }

    /// Kills a pod's processes and removes its cgroups and namespace, as a kubelet does.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn remove_pod(&mut self, pod: Pod) -> Result<()> {
        let name = pod.spec().name.clone();
        drop(pod);
        self.remove(&name)
    }

    /// The same, whoever has the pod.
    pub(crate) fn remove(&mut self, name: &str) -> Result<()> {
        let Some(record) = self.record.pods.remove(name) else { return Ok(()) };
        cgroup::remove(&record.cgroup)?;
        if let Some(netns) = &record.netns {
            // The veth goes with the namespace that holds its end.
            ip(&["netns", "delete", netns])?;
            self.record.netns.retain(|known| known != netns);
        }
        self.record.save()
    }

    /// Makes a namespace that routes with rules of its own, and a client behind it.
    ///
    /// # Errors
    /// As [`Self::add_pod`].
    pub fn add_router(&mut self) -> Result<Router> {
        let (outer, inner) = (self.next_net()?, self.next_net()?);
        let (name, client) = (
            format!("kube2ram-{}-router", self.record.name),
            format!("kube2ram-{}-client", self.record.name),
        );
        let (node_ip, router_ip) = veth_ips(self.net, outer);
        let link = self.record.link(outer);
        netns::add(&mut self.record, &name, &link, node_ip, router_ip)?;
        let (ip, client_ip) = veth_ips(self.net, inner);
        netns::add_behind(&mut self.record, &name, &client, ip, client_ip)?;
        Ok(Router { cgroup: self.record.cgroup.join("host"), client, ip, name })
    }

    fn next_net(&mut self) -> Result<u8> {
        let index = self.next_pod;
        ensure!(index < METADATA_NET, "a node has room for 250 pods");
        self.next_pod += 1;
        Ok(index)
    }

    /// A command that will run as a host daemon: outside kubepods, in the node's namespaces.
    pub fn host_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        pod::join(&self.record.cgroup.join("host"), None, program.as_ref())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.record.undo();
    }
}

/// The metadata server's is the last of the /24s that pods have one each of.
const METADATA_NET: u8 = 250;

/// How long to wait for another process's node to go away.
const LOCK_DEADLINE: Duration = Duration::from_secs(600);

fn lock() -> Result<File> {
    fs::create_dir_all(Record::ROOT)?;
    let file = File::create(Path::new(Record::ROOT).join("lock"))?;
    let deadline = Instant::now() + LOCK_DEADLINE;
    while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        ensure!(error == rustix::io::Errno::WOULDBLOCK, "cannot lock {}: {error}", Record::ROOT);
        ensure!(Instant::now() < deadline, "another sandbox is running (cargo xtask sandbox --keep?)");
        thread::sleep(Duration::from_millis(50));
    }

    Ok(file)
}

/// A /16 that this machine has no route into; refuses a machine that already routes the metadata address somewhere.
fn free_net() -> Result<[u8; 2]> {
    let routes = netns::routes()?;
    if routes.iter().any(|(net, len)| *net == Node::METADATA_IP && *len == 32) {
        bail!("this machine has a route to {} of its own", Node::METADATA_IP);
    }
    let taken = |candidate: Ipv4Addr| {
        routes.iter().any(|(net, len)| {
            let mask = u32::MAX.checked_shl(32 - u32::from((*len).min(16))).unwrap_or(0);
            *len > 0 && u32::from(*net) & mask == u32::from(candidate) & mask
        })
    };
    (213..=223)
        .map(|second| [10, second])
        .find(|[first, second]| !taken(Ipv4Addr::new(*first, *second, 0, 0)))
        .context("10.213.0.0/16 to 10.223.0.0/16 are all in use on this machine")
}

/// Both ends of a pod's veth: the node's and the pod's.
fn veth_ips([first, second]: [u8; 2], index: u8) -> (Ipv4Addr, Ipv4Addr) {
    (Ipv4Addr::new(first, second, index, 1), Ipv4Addr::new(first, second, index, 2))
}
