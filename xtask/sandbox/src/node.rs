//! A Kubernetes node: a cgroup tree as a kubelet lays it out, a network namespace that stands for the node's, pods with namespaces of their own, and
//! one that owns the metadata address and counts what arrives there. Depends on iproute2 and util-linux. Called by `sandbox`.
//!
//! Nothing of it touches the machine's own routes, devices or netfilter rules, so that any number of nodes run on one machine. Everything has a
//! name that no other process's node has, and is written down before it is made: the next node removes what a crashed process has left.

mod cgroup;
mod netns;
mod pod;
mod record;
mod router;
mod sniffer;

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

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
    next_pod: u8,
    record: Record,
    sniffer: Sniffed,
    /// Dropped last, for what is removed before is removed from within the namespace.
    _inside: Option<netns::Inside>,
}

impl Node {
    /// The address of Alibaba Cloud's metadata server.
    pub const METADATA_IP: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

    /// Makes a node with a network namespace of its own, after removing what crashed processes have left. The calling thread is inside that namespace
    /// until it drops the node, and so is every process and thread that it starts meanwhile.
    ///
    /// # Errors
    /// When the process is not root or has a node of that name, or cgroup v2, iproute2 or util-linux is missing.
    pub fn create(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::make(name, driver, Network::Own)
    }

    /// Makes a node whose network is the machine's: for a virtual machine that is a node as a whole.
    ///
    /// # Errors
    /// As [`Self::create`]; when the machine has a route to the metadata address.
    pub fn create_of_machine(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::make(name, driver, Network::Machine)
    }

    fn make(name: &str, driver: CgroupDriver, network: Network) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "making a node needs root");
        ensure!(
            (1..=32).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "a node's name has 1 to 32 characters of a-z, 0-9 and -"
        );
        Record::undo_abandoned()?;
        let mut record = Record::create(name, &cgroup::mount_point()?)?;
        match Self::build(&mut record, driver, network) {
            Ok((inside, sniffer)) => Ok(Self { driver, next_pod: 0, record, sniffer, _inside: inside }),
            Err(error) => {
                record.undo();
                Err(error)
            }
        }
    }

    fn build(
        record: &mut Record,
        driver: CgroupDriver,
        network: Network,
    ) -> Result<(Option<netns::Inside>, Sniffed)> {
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

        let inside = match network {
            Network::Machine => None,
            Network::Own => {
                let netns = record.netns_of("node");
                netns::add_alone(record, &netns)?;
                record.node_netns = Some(netns.clone());
                record.save()?;
                Some(netns::Inside::enter(&netns)?)
            }
        };
        let metadata = record.netns_of(METADATA);
        let (node_ip, metadata_ip) = veth_ips(METADATA_NET);
        netns::add(record, &metadata, &link(METADATA_NET), node_ip, metadata_ip)?;
        ip(&["-n", &metadata, "addr", "add", &format!("{}/32", Self::METADATA_IP), "dev", "lo"])?;
        ip(&["route", "add", &format!("{}/32", Self::METADATA_IP), "via", &metadata_ip.to_string()])?;
        Ok((inside, Sniffed::start(&metadata, Self::METADATA_IP)?))
    }

    /// What it is called: the name that it was given, and this process's id.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Its cgroup, which holds the pods' and the host daemons'.
    pub fn cgroup(&self) -> &Path {
        &self.record.cgroup
    }

    /// An address of the node that pods can reach.
    pub fn ip(&self) -> Ipv4Addr {
        veth_ips(METADATA_NET).0
    }

    /// Its network namespace, as a file.
    pub fn netns(&self) -> PathBuf {
        self.record.node_netns.as_deref().map_or_else(|| "/proc/self/ns/net".into(), netns::path)
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
        let netns = self.record.netns_of(METADATA);
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
            Some(index) => self.record.netns_of(&index.to_string()),
            None => self.record.netns_of(&spec.name),
        });
        let node_netns = self.record.node_netns.clone();
        let pod_record = PodRecord { cgroup, containers, netns, node_netns };
        self.record.pods.insert(spec.name.clone(), pod_record.clone());
        self.record.save()?;
        for directory in pod_record.containers.values() {
            fs::create_dir_all(directory)?;
        }
        let ip = match (&pod_record.netns, index) {
            (Some(netns), Some(index)) => {
                let (node_ip, pod_ip) = veth_ips(index);
                netns::add(&mut self.record, netns, &link(index), node_ip, pod_ip)?;
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
        let (name, client) = (self.record.netns_of("router"), self.record.netns_of("client"));
        let (node_ip, router_ip) = veth_ips(outer);
        netns::add(&mut self.record, &name, &link(outer), node_ip, router_ip)?;
        let (ip, client_ip) = veth_ips(inner);
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
        pod::join(&self.record.cgroup.join("host"), self.record.node_netns.as_deref(), program.as_ref())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.record.undo();
    }
}

/// Where a node's network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    Machine,
    Own,
}

/// The namespace that owns the metadata address.
const METADATA: &str = "metadata";
/// The metadata server's is the last of the /24s that pods have one each of.
const METADATA_NET: u8 = 250;

/// Both ends of a pod's veth: the node's and the pod's.
fn veth_ips(index: u8) -> (Ipv4Addr, Ipv4Addr) {
    (Ipv4Addr::new(10, 213, index, 1), Ipv4Addr::new(10, 213, index, 2))
}

/// The node's end of a veth.
fn link(index: u8) -> String {
    format!("k2r-pod{index}")
}
