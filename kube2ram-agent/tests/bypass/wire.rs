//! Packet sockets where no netfilter rule sees what they send: of pods in the node's network namespace, with
//! their own network card, on ipvlan, and where a program of the network plugin redirects pods' packets.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use kube2ram_sandbox::{Sandbox, kernel, standin::Accounts};

use super::{LIST, REDIRECTED, WAYS, is_skipped, sandbox, say, start_agent};

/// How a packet is sent, and in what frame.
type Shape = (&'static str, &'static str);

const SHAPES: [Shape; 13] = [
    ("packet", "plain"),
    ("packet", "tagged"),
    ("packet", "twice"),
    ("packet", "thrice"),
    ("packet", "snap"),
    ("packet", "claimed"),
    ("datagram", "plain"),
    ("ring", "plain"),
    ("ring", "tagged"),
    ("bypass", "plain"),
    ("bypass", "tagged"),
    ("express", "plain"),
    ("express", "tagged"),
];
/// Those that ipvlan sends on in mode L2.
const IPVLAN_L2: [Shape; 9] = [
    ("packet", "plain"),
    ("packet", "tagged"),
    ("datagram", "plain"),
    ("ring", "plain"),
    ("ring", "tagged"),
    ("bypass", "plain"),
    ("bypass", "tagged"),
    ("express", "plain"),
    ("express", "tagged"),
];
/// Those that ipvlan sends on in mode L3, where it reads the IP header. It finds none behind a tag, and on
/// some kernels not that of a ring, of a socket with the bypass or of AF_XDP.
const IPVLAN_L3: [Shape; 2] = [("packet", "plain"), ("datagram", "plain")];
/// What is denied when it is asked for, before there is a packet.
const DENIED: [&str; 2] = ["bypass", "express"];

/// A process that sends what it is told to.
struct Sender {
    child: Child,
    orders: ChildStdin,
    outcomes: BufReader<ChildStdout>,
}

impl Sender {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.args([WAYS, "frames"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (orders, outcomes) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, orders, outcomes: BufReader::new(outcomes) }
    }

    /// The outcome, and how many packets arrived at the metadata server and at its neighbour.
    fn send(&mut self, sandbox: &Sandbox, order: &str) -> (String, usize, usize) {
        let sniffer = sandbox.node().sniffer();
        let (packets, twins) = (from_senders(sandbox), sniffer.twins());
        writeln!(self.orders, "{order}").unwrap();
        let mut outcome = String::new();
        self.outcomes.read_line(&mut outcome).unwrap();
        thread::sleep(Duration::from_millis(10)); // what is under way arrives
        (outcome.trim().to_owned(), from_senders(sandbox) - packets, sniffer.twins() - twins)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Packets with the addresses that only senders use: the agent's own are on their way, too.
fn from_senders(sandbox: &Sandbox) -> usize {
    let sources = ["198.18.0.7", "2001:2::7"].map(|source| source.parse::<std::net::IpAddr>().unwrap());
    sources.iter().map(|source| sandbox.node().sniffer().packets_from(*source).len()).sum()
}

/// Each packet of each kind: means, shape, family, protocol.
fn orders(device: &str, shapes: &[Shape], has_ipv6: bool) -> Vec<(Shape, String)> {
    let mut orders = Vec::new();
    for &shape in shapes {
        for family in if has_ipv6 { &["4", "6"][..] } else { &["4"] } {
            for protocol in ["tcp", "udp"] {
                let order = format!("{device} metadata {family} {protocol} {} {}", shape.0, shape.1);
                orders.push((shape, order));
            }
        }
    }
    orders
}

/// Sends everything without the agent, and with it; a host's process may send all the same, if it `can`. Of
/// `optional` frames, those that do not arrive without the agent are named and not tried with it.
fn nothing_leaves(
    mut sandbox: Sandbox,
    case: &str,
    (device, shapes, optional): (&str, &[Shape], &[Shape]),
    command: impl Fn(&Sandbox) -> Command,
    host: impl Fn(&Sandbox) -> Option<Command>,
) {
    let has_ipv6 = sandbox.node().has_ipv6();
    let mut present = Vec::new();
    let mut sender = Sender::start(command(&sandbox));
    for (shape, order) in orders(device, &[shapes, optional].concat(), has_ipv6) {
        let (outcome, packets, _) = sender.send(&sandbox, &order);
        if is_skipped(&order, &outcome) {
            continue;
        }
        if packets == 0 && optional.contains(&shape) {
            say(&format!(
                "row wire {case}: left out: {order}: does not arrive without the agent ({outcome})"
            ));
            continue;
        }
        assert_eq!((outcome.as_str(), packets), ("sent", 1), "{case}: {order} without the agent");
        present.push((shape, order));
    }
    drop(sender);
    // The netfilter rules see nothing of these.
    start_agent(&mut sandbox);
    let mut sender = Sender::start(command(&sandbox));
    let mut wrong = Vec::new();
    for (shape, order) in &present {
        let (outcome, packets, _) = sender.send(&sandbox, order);
        let is_denied = DENIED.contains(&shape.0);
        let is_expected =
            if is_denied { outcome == "EPERM" } else { ["ENOBUFS", "sent"].contains(&&*outcome) };
        if packets != 0 || !is_expected {
            wrong.push(format!("{order}: {outcome}, {packets} packets"));
        }
        // To a neighbour, and by what it may use: as before. More tags than are looked through may hide
        // anything.
        let twin = order.replace("metadata", "neighbour");
        if !is_denied && shape.1 != "thrice" {
            let (outcome, _, twins) = sender.send(&sandbox, &twin);
            if (outcome.as_str(), twins) != ("sent", 1) {
                wrong.push(format!("{twin}: {outcome}, {twins} packets"));
            }
        }
    }
    if let Some(command) = host(&sandbox) {
        let mut sender = Sender::start(command);
        for (_, order) in &present {
            let (outcome, packets, _) = sender.send(&sandbox, order);
            if (outcome.as_str(), packets) != ("sent", 1) {
                wrong.push(format!("the host's {order}: {outcome}, {packets} packets"));
            }
        }
    }
    say(&format!("row wire {case}: {} kinds of packets", present.len()));
    assert_eq!(wrong, Vec::<String>::new(), "{case}");
    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, REDIRECTED);
    assert_eq!(sandbox.pod("host-pod").unwrap().curl(LIST).unwrap().body, "host-role");
    let passed_through = sandbox.pod("pod").unwrap().curl("/latest/meta-data/region-id").unwrap();
    assert_eq!(passed_through.status, 200);
    assert_eq!(sandbox.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);
}

fn in_pod(sandbox: &Sandbox, pod: &str) -> Command {
    sandbox.pod(pod).unwrap().pod().command("app", "python3").unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_leaves_from_the_nodes_own_network() {
    let sandbox = sandbox("wire-host");
    let uplink = sandbox.node().uplink();
    let host = |sandbox: &Sandbox| Some(sandbox.node().host_command("python3"));
    nothing_leaves(
        sandbox,
        "hostNetwork",
        (&uplink, &SHAPES, &[]),
        |sandbox| in_pod(sandbox, "host-pod"),
        host,
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_leaves_by_a_card_of_the_pods() {
    let sandbox = sandbox("wire-card");
    let card = sandbox.node().add_card(sandbox.pod("pod").unwrap().pod()).unwrap();
    // A process of the node's in the pod's network.
    let host = |sandbox: &Sandbox| {
        let netns = sandbox.pod("pod").unwrap().pod().netns().unwrap();
        let mut command = sandbox.node().host_command("nsenter");
        command.args([&format!("--net={}", netns.display()), "python3"]);
        Some(command)
    };
    nothing_leaves(sandbox, "card", (card, &SHAPES, &[]), |sandbox| in_pod(sandbox, "pod"), host);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_leaves_where_packets_are_redirected() {
    let sandbox = sandbox("wire-redirected");
    let device = sandbox.node().device_of(sandbox.pod("pod").unwrap().pod()).unwrap();
    redirect(&device, &sandbox.node().uplink());
    nothing_leaves(sandbox, "redirected", ("eth0", &SHAPES, &[]), |sandbox| in_pod(sandbox, "pod"), |_| None);
}

/// As a program of the network plugin does with what a pod sends, before the node's IP stack sees it.
fn redirect(from: &str, to: &str) {
    tc(&["qdisc", "add", "dev", from, "clsact"]);
    let filter =
        ["filter", "add", "dev", from, "ingress", "protocol", "all", "prio", "9", "u32", "match", "u32"];
    let action = ["0", "0", "action", "mirred", "egress", "redirect", "dev", to];
    tc(&[&filter[..], &action].concat());
}

fn tc(arguments: &[&str]) {
    assert!(Command::new("tc").args(arguments).status().unwrap().success(), "tc {arguments:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_leaves_by_ipvlan() {
    for mode in ["l2", "l3"] {
        let sandbox = sandbox(&format!("wire-ipvlan-{mode}"));
        let Some(device) = add_ipvlan(&sandbox, mode) else {
            return kernel::skip(&format!("ipvlan {mode}"), "ipvlan");
        };
        let case = format!("ipvlan {mode}");
        let optional: Vec<_> = IPVLAN_L2.into_iter().filter(|shape| !IPVLAN_L3.contains(shape)).collect();
        let frames = match mode {
            "l3" => (device, &IPVLAN_L3[..], &optional[..]),
            _ => (device, &IPVLAN_L2[..], &optional[..0]),
        };
        nothing_leaves(sandbox, &case, frames, |sandbox| in_pod(sandbox, "pod"), |_| None);
    }
}

/// Gives a pod a device on the uplink, with addresses and routes by which replies would come.
fn add_ipvlan(sandbox: &Sandbox, mode: &str) -> Option<&'static str> {
    const DEVICE: &str = "ipvl0";
    let netns = sandbox.pod("pod").unwrap().pod().netns().unwrap();
    let netns = netns.file_name().unwrap().to_str().unwrap();
    let uplink = sandbox.node().uplink();
    let add = ["link", "add", DEVICE, "link", &uplink, "netns", netns, "type", "ipvlan", "mode", mode];
    if !Command::new("ip").args(add).status().unwrap().success() {
        return None;
    }
    ip(&["-n", netns, "link", "set", DEVICE, "up"]);
    ip(&["-n", netns, "addr", "add", "198.18.0.7/32", "dev", DEVICE]);
    // In mode L3 the node decides where a packet goes.
    sandbox.node().route_by_uplink("100.100.100.201".parse().unwrap()).unwrap();
    if sandbox.node().has_ipv6() {
        ip(&["-n", netns, "addr", "add", "2001:2::7/128", "dev", DEVICE, "nodad"]);
        sandbox.node().route_by_uplink("fd00:100::100:201".parse().unwrap()).unwrap();
    }
    Some(DEVICE)
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}
