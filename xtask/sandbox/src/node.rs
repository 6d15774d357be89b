//! A Kubernetes node: a cgroup tree as a kubelet lays it out, a network namespace that stands for the node's,
//! pods with their own namespaces, and one that owns the metadata address and counts what arrives there.
//! Depends on iproute2 and util-linux. Called by `sandbox`.
//!
//! Nothing of it touches the machine's own routes, devices or netfilter rules, so that any number of nodes
//! run on one machine. Everything has a name that no other process's node has, and is written down before it
//! is made: the next node removes what a crashed process has left.

mod cgroup;
mod netns;
mod pod;
mod record;
mod router;
mod sniffer;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

pub use self::{
    cgroup::{CgroupDriver, Qos},
    pod::{Pod, PodNetwork, PodSpec},
    record::{PodRecord, Record},
    router::Router,
    sniffer::{Packet, Sniffer},
};
use self::{
    netns::{Ends, ip},
    sniffer::Sniffed,
};
use crate::{Cloud, standin::Bind};

/// The node. Dropping it removes everything it made.
#[derive(Debug)]
pub struct Node {
    cloud: Cloud,
    driver: CgroupDriver,
    has_ipv6: bool,
    next_pod: u8,
    record: Record,
    sniffer: Sniffed,
    /// Dropped last, for what is removed before is removed from within the namespace.
    _inside: Option<netns::Inside>,
}

impl Node {
    /// The IPv4 address of Alibaba Cloud's metadata server.
    pub const METADATA_IP: Ipv4Addr = Cloud::Alibaba.metadata_ip();
    /// Its IPv6 address.
    pub const METADATA_IP6: Ipv6Addr = Cloud::Alibaba.metadata_ip6();

    /// Makes a node of Alibaba Cloud with its own network namespace, after removing what crashed processes
    /// have left. The calling thread is inside that namespace until it drops the node, and so is every
    /// process and thread that it starts meanwhile.
    ///
    /// # Errors
    /// When the process is not root or has a node of that name, or cgroup v2, iproute2 or util-linux is
    /// missing.
    pub fn create(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::create_in(name, driver, Cloud::Alibaba)
    }

    /// The same of any cloud.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_in(name: &str, driver: CgroupDriver, cloud: Cloud) -> Result<Self> {
        Self::make(name, driver, cloud, Network::Own)
    }

    /// Makes a node whose network is the machine's: for a virtual machine that is a node as a whole.
    ///
    /// # Errors
    /// As [`Self::create`]; when the machine has a route to the metadata address.
    pub fn create_of_machine(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::make(name, driver, Cloud::Alibaba, Network::Machine)
    }

    fn make(name: &str, driver: CgroupDriver, cloud: Cloud, network: Network) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "making a node needs root");
        ensure!(
            (1..=32).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "a node's name has 1 to 32 characters of a-z, 0-9 and -"
        );
        Record::undo_abandoned()?;
        let mut record = Record::create(name, &cgroup::mount_point()?)?;
        match Self::build(&mut record, driver, cloud, network) {
            Ok((inside, sniffer)) => {
                let has_ipv6 = has_ipv6(network);
                Ok(Self { cloud, driver, has_ipv6, next_pod: 0, record, sniffer, _inside: inside })
            }
            Err(error) => {
                record.undo();
                Err(error)
            }
        }
    }

    fn build(
        record: &mut Record,
        driver: CgroupDriver,
        cloud: Cloud,
        network: Network,
    ) -> Result<(Option<netns::Inside>, Sniffed)> {
        fs::create_dir_all(record.cgroup.join(driver.kubepods()))?;
        fs::create_dir_all(record.cgroup.join("host"))?;
        // Its own bpffs: unmounting it detaches whatever is pinned there.
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
        let (v4, mut v6) = (veth_ips(METADATA_NET), None);
        if has_ipv6(network) {
            // In the node's own namespace: IPv6 has no switch for one device below Linux 6.17.
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
            v6 = Some(veth_ip6s(METADATA_NET));
        }
        netns::add(record, &metadata, &link(METADATA_NET), Some(v4), v6)?;
        let mut addresses = vec![(IpAddr::from(cloud.metadata_ip()), IpAddr::from(v4.inner))];
        addresses.extend(v6.map(|v6| (cloud.metadata_ip6().into(), v6.inner.into())));
        for (address, next_hop) in &addresses {
            let address = address.to_string();
            // Without detection of duplicates, which would not be over when the server starts.
            ip(&["-n", &metadata, "addr", "add", &address, "dev", "lo", "nodad"])?;
            ip(&["route", "add", &address, "via", &next_hop.to_string()])?;
        }
        Ok((inside, Sniffed::start(&metadata, addresses.iter().map(|(address, _)| *address).collect())?))
    }

    /// What it is called: the name that it was given, and this process's id.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// The cloud that it is of.
    pub fn cloud(&self) -> Cloud {
        self.cloud
    }

    /// Its cgroup, which holds the pods' and the host daemons'.
    pub fn cgroup(&self) -> &Path {
        &self.record.cgroup
    }

    /// An IPv4 address of the node that pods can reach.
    pub fn ip(&self) -> Ipv4Addr {
        veth_ips(METADATA_NET).node
    }

    /// An IPv6 address of the node that pods can reach.
    pub fn ip6(&self) -> Ipv6Addr {
        veth_ip6s(METADATA_NET).node
    }

    /// Whether an address is the node's, and no pod's.
    pub fn owns(&self, address: IpAddr) -> bool {
        address == self.ip() || address == self.ip6()
    }

    /// Whether it has IPv6. A node of the machine's own network has none: routing IPv6 would change what the
    /// machine does on its other devices.
    pub fn has_ipv6(&self) -> bool {
        self.has_ipv6
    }

    /// The device by which its packets reach the metadata server.
    pub fn uplink(&self) -> String {
        link(METADATA_NET)
    }

    /// Leads an address the way of the metadata server.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn route_by_uplink(&self, address: IpAddr) -> Result<()> {
        let next_hop: IpAddr = match address {
            IpAddr::V4(_) => veth_ips(METADATA_NET).inner.into(),
            IpAddr::V6(_) => veth_ip6s(METADATA_NET).inner.into(),
        };
        ip(&["route", "add", &address.to_string(), "via", &next_hop.to_string()])
    }

    /// Gives a pod its own device to the namespace of the metadata server, past the node, and returns its
    /// name.
    ///
    /// # Errors
    /// When the pod shares the node's network, or the machine refuses.
    pub fn add_card(&self, pod: &Pod) -> Result<&'static str> {
        const CARD: &str = "card0";
        let netns = pod.netns().context("the pod has no network of its own")?;
        let netns = netns.file_name().and_then(|name| name.to_str()).context("no name")?;
        let (metadata, end) = (self.record.netns_of(METADATA), format!("card{}", pod.ip().octets()[2]));
        ip(&["-n", netns, "link", "add", CARD, "type", "veth", "peer", "name", &end, "netns", &metadata])?;
        ip(&["-n", &metadata, "link", "set", &end, "up"])?;
        ip(&["-n", netns, "link", "set", CARD, "up"])?;
        Ok(CARD)
    }

    /// The node's end of a pod's veth.
    ///
    /// # Errors
    /// When the pod has none.
    pub fn device_of(&self, pod: &Pod) -> Result<String> {
        let index = pod.ip().octets()[2];
        ensure!(pod.netns().is_some() && veth_ips(index).inner == pod.ip(), "the pod has no veth");
        Ok(link(index))
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

    /// Listeners on port 80 of the metadata server's addresses, in the namespace that owns these.
    pub fn metadata_bind(&self) -> Bind {
        let bind = |address: IpAddr| {
            let netns = self.record.netns_of(METADATA);
            Bind::new(SocketAddr::from((address, 80)), move |addr| {
                netns::within(&netns, || TcpListener::bind(addr))
            })
        };
        let v4 = bind(self.cloud.metadata_ip().into());
        if self.has_ipv6 { v4.and(bind(self.cloud.metadata_ip6().into())) } else { v4 }
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
        ensure!(self.has_ipv6 || spec.network != PodNetwork::VethIpv6, "this node has no IPv6");
        let index = match spec.network {
            PodNetwork::Veth | PodNetwork::VethIpv6 => Some(self.next_net()?),
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
        const LOOPBACK: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
        let ips = match (&pod_record.netns, index) {
            (Some(netns), Some(index)) => {
                let v4 = (spec.network != PodNetwork::VethIpv6).then(|| veth_ips(index));
                let v6 = self.has_ipv6.then(|| veth_ip6s(index));
                netns::add(&mut self.record, netns, &link(index), v4, v6)?;
                (v4.map_or(LOOPBACK.0, |v4| v4.inner), v6.map_or(LOOPBACK.1, |v6| v6.inner))
            }
            (Some(netns), None) => {
                netns::add_alone(&mut self.record, netns)?;
                LOOPBACK
            }
            (None, _) => (self.ip(), self.ip6()),
        };

        Pod::start(spec.clone(), pod_record, ips)
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

    /// Makes a namespace that routes with its own rules, and a client behind it.
    ///
    /// # Errors
    /// As [`Self::add_pod`].
    pub fn add_router(&mut self) -> Result<Router> {
        let (outer, inner) = (self.next_net()?, self.next_net()?);
        let (name, client) = (self.record.netns_of("router"), self.record.netns_of("client"));
        netns::add(&mut self.record, &name, &link(outer), Some(veth_ips(outer)), None)?;
        let Ends { node: ip, inner: client_ip } = veth_ips(inner);
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

/// The addresses of a pod's veth.
fn veth_ips(index: u8) -> Ends<Ipv4Addr> {
    let ip = |end| Ipv4Addr::new(10, 213, index, end);
    Ends { node: ip(1), inner: ip(2) }
}

/// The same of IPv6.
fn veth_ip6s(index: u8) -> Ends<Ipv6Addr> {
    let ip = |end| Ipv6Addr::new(0xfd00, 0x213, u16::from(index), 0, 0, 0, 0, end);
    Ends { node: ip(1), inner: ip(2) }
}

/// Only a node with its own namespace, and only where the kernel has IPv6.
fn has_ipv6(network: Network) -> bool {
    network == Network::Own && Path::new("/proc/sys/net/ipv6").exists()
}

/// The node's end of a veth.
fn link(index: u8) -> String {
    format!("k2r-pod{index}")
}
