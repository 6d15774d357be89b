//! Packets through the guard: the test's namespace is the node, between a pod and the metadata server, each
//! in its own namespace.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use super::{METADATA, guard, isolated, nft};

/// Another address of the metadata server's machine, and the node's on the same link.
const OTHER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 99)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0, 99)),
];
const NODE: &str = "fd00:100::1";
/// The link-layer addresses of the node and of the other end, on each link.
const LINK_LAYER: (&str, &str) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
/// For what takes no time but the machine's.
const SOON: Duration = Duration::from_secs(5);

/// A network namespace, which lives as long as a process in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "120"]).spawn().unwrap();
        let comm = format!("/proc/{}/comm", child.id());
        eventually("a namespace", || fs::read_to_string(&comm).is_ok_and(|comm| comm == "sleep\n"));
        Self(child)
    }

    fn run(&self, command: &str) -> String {
        run(Command::new("nsenter").args(["-t", &self.0.id().to_string(), "-n", "sh", "-c", command]))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn sh(command: &str) -> String {
    run(Command::new("sh").args(["-c", command]))
}

#[track_caller]
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < SOON, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// One UDP packet.
fn packet_to(address: IpAddr) -> String {
    format!("bash -c 'echo > /dev/udp/{address}/9'")
}

struct Network {
    pod: Namespace,
    server: Namespace,
}

impl Network {
    fn new() -> Self {
        let (pod, server) = (Namespace::new(), Namespace::new());
        let link = |device, peer: &Namespace, v4, v6| {
            sh(&format!(
                "ip link add {device} address {} type veth peer name eth0 address {} netns {}; ip addr add {v4} dev {device}; \
                 ip addr add {v6} dev {device} nodad; ip link set {device} up",
                LINK_LAYER.0,
                LINK_LAYER.1,
                peer.0.id()
            ));
        };
        link("pod0", &pod, "10.1.0.1/24", "fd00:1::1/64");
        link("server0", &server, "100.100.100.1/24", "fd00:100::1/64");
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
        pod.run(
            "ip addr add 10.1.0.2/24 dev eth0; ip addr add fd00:1::2/64 dev eth0 nodad; ip link set eth0 up; \
             ip route add default via 10.1.0.1; ip route add default via fd00:1::1",
        );
        let (v4, v6) = (*METADATA.v4.ip(), METADATA.v6.unwrap());
        let [other_v4, other_v6] = OTHER;
        // What it sends itself, it sends from the metadata server's address.
        server.run(&format!(
            "ip addr add {v4}/24 dev eth0; ip addr add {other_v4}/24 dev eth0; ip addr add {v6}/64 dev eth0 nodad; \
             ip addr add {other_v6}/64 dev eth0 nodad preferred_lft 0; ip link set eth0 up; \
             ip route add default via 100.100.100.1; ip route add default via {NODE}"
        ));
        let count = |family: &str, address: IpAddr| {
            format!("{family} daddr {address} udp dport 9 counter comment \"{address}\";")
        };
        let rules =
            [count("ip", v4.into()), count("ip6", v6.into()), count("ip", other_v4), count("ip6", other_v6)];
        server.run(&format!(
            "nft 'table inet seen {{ chain in {{ type filter hook input priority 0; {} }}; }}'",
            rules.concat()
        ));
        Self { pod, server }
    }

    /// Lets packets arrive at once: none waits until its neighbour's link-layer address is found.
    fn introduce_neighbours(&self) {
        let permanent = |device: &str, link_layer: &str, addresses: &[String]| {
            let line = |address| {
                format!("ip neigh replace {address} lladdr {link_layer} dev {device} nud permanent;")
            };
            addresses.iter().map(line).collect::<String>()
        };
        let metadata = [METADATA.v4.ip().to_string(), METADATA.v6.unwrap().to_string()];
        let addresses = |addresses: [&str; 2]| addresses.map(str::to_owned);
        sh(&permanent("pod0", LINK_LAYER.1, &addresses(["10.1.0.2", "fd00:1::2"])));
        sh(&permanent("server0", LINK_LAYER.1, &[metadata, OTHER.map(|other| other.to_string())].concat()));
        self.pod.run(&permanent("eth0", LINK_LAYER.0, &addresses(["10.1.0.1", "fd00:1::1"])));
        self.server.run(&permanent("eth0", LINK_LAYER.0, &addresses(["100.100.100.1", NODE])));
    }

    /// The number of packets that arrived at an address.
    fn arrived(&self, address: IpAddr) -> u64 {
        let rules = self.server.run("nft list ruleset");
        let rule = rules.lines().find(|rule| rule.contains(&format!("\"{address}\""))).unwrap();
        rule.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    }

    /// Sends a packet to each of the metadata server's addresses, and returns how many IPv4 and IPv6 packets
    /// arrived.
    fn attempt(&self, send: impl Fn(&str)) -> (u64, u64) {
        let metadata = [METADATA.v4.ip().to_owned().into(), METADATA.v6.unwrap().into()];
        let before = metadata.map(|address| self.arrived(address));
        let others = OTHER.map(|address| self.arrived(address));
        metadata.into_iter().chain(OTHER).for_each(|address| send(&packet_to(address)));
        // What was sent later has arrived.
        eventually("packets to other addresses", || {
            OTHER.map(|address| self.arrived(address)) == others.map(|n| n + 1)
        });
        let after = metadata.map(|address| self.arrived(address));
        (after[0] - before[0], after[1] - before[1])
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_forwarded_to_either_address_is_dropped_and_nothing_else() {
    isolated(|| {
        let network = Network::new();
        let by_pod = |network: &Network| network.attempt(|packet| drop(network.pod.run(packet)));
        network.introduce_neighbours();
        assert_eq!(by_pod(&network), (1, 1), "without the guard");

        assert!(guard().check());

        assert_eq!(by_pod(&network), (0, 0));
        assert_eq!(network.attempt(|packet| drop(sh(packet))), (1, 1), "the node itself");
        let ruleset = nft("list ruleset");
        assert_eq!(ruleset.matches("counter packets 1 ").count(), 2, "{ruleset}");
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_metadata_server_on_the_nodes_link_finds_the_node() {
    isolated(|| {
        let network = Network::new();
        let mut guard = guard();
        assert!(guard.check());
        // Asks for the node's link-layer address, from the metadata server's.
        let is_found = || {
            network.server.run("ip -6 neigh flush all; ip -6 neigh flush all nud permanent");
            network.server.run(&packet_to(NODE.parse().unwrap()));
            let state = || network.server.run(&format!("ip -6 neigh show {NODE}"));
            eventually("an outcome", || ["REACHABLE", "FAILED"].iter().any(|end| state().contains(end)));
            state().contains("REACHABLE")
        };

        assert!(is_found());

        // The control: what keeps the node's answer is the guard, but for the rule on neighbour discovery.
        let chain = nft("-a list chain ip6 kube2ram postrouting");
        let rule = chain.lines().find(|rule| rule.contains("hoplimit 255")).unwrap();
        nft(&format!("delete rule ip6 kube2ram postrouting handle {}", rule.split(' ').next_back().unwrap()));
        assert!(!is_found());
        assert!(guard.check());
        assert!(is_found());
    });
}
