//! Rung 2: every known way past the connect hook, tried from a pod of a sandbox, before and after the agent
//! started. What counts is the sniffer in the namespace that really owns the metadata address: not one packet
//! of a pod may arrive there.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod aws;
mod ipv6;
mod of_a_module;
mod wire;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use kube2ram_sandbox::{
    Cloud, Sandbox, kernel,
    node::PodSpec,
    standin::{Accounts, Role},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const WAYS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bypass/ways.py");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// What a way that was redirected prints: the pod's role.
const REDIRECTED: &str = "pod-role";

/// Name of the way, whether it needs the pod's address, what comes of it with the agent.
type Row = (&'static str, bool, &'static str);

const FROM_POD: [Row; 50] = [
    ("tcp4", false, REDIRECTED),
    ("tcp4_443", false, "EPERM"),
    ("tcp4_8080", false, "EPERM"),
    ("nonblocking", false, REDIRECTED),
    ("bind_first", true, REDIRECTED),
    // Bound to eth0, it cannot reach the agent's listener on the pod's loopback device: fails closed.
    ("bind_to_device", false, "timeout"),
    ("reconnect", false, REDIRECTED),
    ("accepted_reused", true, REDIRECTED),
    ("tcp6_mapped", false, REDIRECTED),
    ("mptcp4", false, REDIRECTED),
    ("mptcp6_mapped", false, REDIRECTED),
    ("fast_open", false, REDIRECTED),
    ("fast_open6_mapped", false, REDIRECTED),
    ("fast_open_connect", false, REDIRECTED),
    ("repair", true, "ECONNRESET"),
    ("udp_connect", false, "EPERM"),
    ("udp6_connect", false, "EPERM"),
    ("udp_sendto", false, "EPERM"),
    ("udp6_sendto", false, "EPERM"),
    ("udp_reconnect", true, "EPERM"),
    ("icmp_sendto", false, "EPERM"),
    ("icmp_connect", false, "EPERM"),
    ("raw_syn", true, "EPERM"),
    ("tcp6_443", false, "EPERM"),
    ("fast_open6_connect", false, REDIRECTED),
    ("mptcp_fast_open", false, REDIRECTED),
    ("mptcp_fast_open_connect", false, REDIRECTED),
    // The agent's listener answers to an address that is not the pod's, and so to nobody.
    ("transparent", false, REDIRECTED),
    ("uring", false, REDIRECTED),
    ("uring6_mapped", false, REDIRECTED),
    ("uring_polled", false, REDIRECTED),
    ("uring_worker", false, REDIRECTED),
    ("uring_socket", false, REDIRECTED),
    ("uring_send", false, "EPERM"),
    ("uring_send6_mapped", false, "EPERM"),
    ("uring_send_polled", false, "EPERM"),
    ("udp_dissolved", true, "EPERM"),
    ("udp_other_address", true, "EPERM"),
    ("udp_sendmsg", false, "EPERM"),
    ("udp_sendmmsg", false, "EPERM"),
    ("udplite_connect", false, "EPERM"),
    ("udplite_sendto", false, "EPERM"),
    ("udplite6_sendto", false, "EPERM"),
    ("icmp_datagram", false, "EPERM"),
    ("source_route", true, "timeout"),
    ("raw_source_route", true, "EPERM"),
    // Translated by the pod itself, behind the connect hook's back.
    ("translated", false, "timeout"),
    ("nested_cgroup", false, REDIRECTED),
    ("cgroup_namespace", false, REDIRECTED),
    ("network_namespace", false, "ENETUNREACH"),
];

/// Ways of a process that is no pod's and becomes one, with a socket from before.
const INTO_POD: [[&str; 2]; 11] = [
    ["moved", "tcp4"],
    ["moved", "tcp6"],
    ["moved", "udp"],
    ["moved", "uring"],
    ["moved", "uring_polled"],
    ["passed", "tcp4"],
    ["moved", "v6_tcp"],
    ["moved", "v6_udp"],
    ["moved", "v6_uring"],
    ["moved", "v6_uring_polled"],
    ["passed", "v6_tcp"],
];

fn sandbox(name: &str) -> Sandbox {
    sandbox_in(name, Cloud::Alibaba)
}

fn sandbox_in(name: &str, cloud: Cloud) -> Sandbox {
    let mut sandbox = Sandbox::create_in(name, cloud).unwrap();
    for role in [REDIRECTED, "host-role"] {
        sandbox.accounts().add_role(cloud.role_arn(role), Role::default());
    }
    sandbox.add_pod(&PodSpec::new("pod").role(REDIRECTED)).unwrap();
    sandbox.add_pod(&PodSpec::new("host-pod").role("host-role").host_network()).unwrap();
    sandbox
}

fn start_agent(sandbox: &mut Sandbox) {
    sandbox.start_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
}

fn command(sandbox: &Sandbox, pod: &str, way: &str) -> Command {
    let (pod, cloud) = (sandbox.pod(pod).unwrap().pod(), sandbox.cloud());
    let mut command = match way {
        "nested_cgroup" => pod.nested_command("app", "nested/deeper", "python3").unwrap(),
        "cgroup_namespace" => prefixed(pod.command("app", "unshare").unwrap(), &["-C", "python3"]),
        "network_namespace" => prefixed(pod.command("app", "unshare").unwrap(), &["-Urn", "python3"]),
        _ => pod.command("app", "python3").unwrap(),
    };
    command
        .env("METADATA", cloud.metadata_ip().to_string())
        .env("METADATA6", cloud.metadata_ip6().to_string());
    command.env("LIST", cloud.list());
    command
}

fn prefixed(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments);
    command
}

fn outcome(mut command: Command, way: &str, arguments: &[&str]) -> String {
    let function = match way {
        "nested_cgroup" | "cgroup_namespace" | "network_namespace" => "tcp4",
        way => way,
    };
    let output = command.arg(WAYS).arg(function).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{way}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Reports a way that needs what this kernel lacks.
fn is_skipped(way: &str, outcome: &str) -> bool {
    let lack = outcome.strip_prefix("absent: ");
    lack.inspect(|lack| kernel::skip(way, lack)).is_some()
}

#[expect(clippy::print_stderr, reason = "tells what was tried, to whoever wants to see")]
fn say(line: &str) {
    // On its own line, whatever the test harness has begun.
    eprintln!("\n{line}");
}

/// Makes the node a router that follows source routes, which few do: both switches, of all devices and of
/// each, are on.
fn follow_source_routes() {
    for device in fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
        fs::write(device.unwrap().path().join("accept_source_route"), "1").unwrap();
    }
}

/// Packets of pods: all that do not come from the node's own address.
fn packets_of_pods(sandbox: &Sandbox) -> usize {
    thread::sleep(Duration::from_millis(20)); // what is under way arrives
    let node = sandbox.node();
    node.sniffer().packets().iter().filter(|packet| !node.owns(packet.source.ip())).count()
}

/// Packets that begin something, whoever sent them: those of the agent's and the host's old connections may
/// still trickle in.
fn openings(sandbox: &Sandbox) -> usize {
    const SYN: u8 = 2;
    thread::sleep(Duration::from_millis(20));
    let tcp = u8::try_from(libc::IPPROTO_TCP).unwrap();
    let packets = sandbox.node().sniffer().packets();
    packets.iter().filter(|packet| packet.protocol != tcp || packet.tcp_flags & SYN != 0).count()
}

fn ip(sandbox: &Sandbox) -> String {
    sandbox.pod("pod").unwrap().pod().ip().to_string()
}

/// Tries each row before and after the agent started.
fn no_packet_arrives(mut sandbox: Sandbox, rows: &[Row], ip: &str) {
    let attempt = |sandbox: &Sandbox, way: &str, needs_ip: bool| {
        let before = packets_of_pods(sandbox);
        let arguments: &[&str] = if needs_ip { &[ip] } else { &[] };
        let outcome = outcome(command(sandbox, "pod", way), way, arguments);
        (outcome, packets_of_pods(sandbox) - before)
    };

    // The control: without the agent each way leads there, or the row proves nothing.
    let (mut present, mut unproven) = (Vec::new(), Vec::new());
    for &(way, needs_ip, with_agent) in rows {
        let (outcome, packets) = attempt(&sandbox, way, needs_ip);
        if is_skipped(way, &outcome) {
            continue;
        }
        say(&format!("row {way} without the agent: {outcome}, {packets} packets"));
        if packets == 0 && !(outcome == with_agent && way == "network_namespace") {
            unproven.push(way);
        }
        present.push((way, needs_ip, with_agent));
    }
    start_agent(&mut sandbox);
    assert_eq!(sandbox.pod("pod").unwrap().curl(sandbox.cloud().list()).unwrap().body, REDIRECTED);
    let wrong: Vec<_> = present
        .into_iter()
        .filter_map(|(way, needs_ip, expected)| {
            let (outcome, packets) = attempt(&sandbox, way, needs_ip);
            say(&format!("row {way} with the agent: {outcome}, {packets} packets"));
            (outcome != expected || packets > 0)
                .then(|| format!("{way}: {outcome} instead of {expected}, {packets} packets"))
        })
        .collect();

    assert_eq!((wrong, unproven), (Vec::<String>::new(), Vec::new()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_way_out_of_a_pod_reaches_the_metadata_server() {
    let sandbox = sandbox("bypass");
    follow_source_routes();
    let ip = ip(&sandbox);
    no_packet_arrives(sandbox, &FROM_POD, &ip);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_socket_from_outside_serves_a_pod() {
    let mut sandbox = sandbox("bypass-task");
    let pod = sandbox.pod("pod").unwrap().pod();
    let procs = pod.container_cgroup("app").unwrap().join("cgroup.procs");
    let netns = format!("--net={}", pod.netns().unwrap().display());
    // In the pod's network namespace, so that its packets would be the pod's; and in the node's.
    let attempt = |sandbox: &Sandbox, way: [&str; 2], namespace: &[&str]| {
        let mut command = sandbox.node().host_command(namespace.first().unwrap_or(&"python3"));
        command.args(namespace.get(1..).unwrap_or_default());
        outcome(command, way[0], &[procs.to_str().unwrap(), way[1]])
    };
    let namespaces: [&[&str]; 2] = [&["nsenter", &netns, "python3"], &[]];

    for way in INTO_POD {
        for namespace in namespaces {
            let without = attempt(&sandbox, way, namespace);
            assert!(
                without == Accounts::NODE_ROLE || without == "sent",
                "{way:?} without the agent: {without}"
            );
        }
    }
    start_agent(&mut sandbox);
    for way in INTO_POD {
        for namespace in namespaces {
            let before = openings(&sandbox);
            assert_eq!(attempt(&sandbox, way, namespace), "EPERM", "{way:?} in {namespace:?}");
            assert_eq!(openings(&sandbox), before, "{way:?} in {namespace:?}");
        }
    }
    // Host processes are none of its business.
    assert_eq!(sandbox.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn host_network_pods_are_pods() {
    // Linux takes no packet from outside with one of its own addresses as the source, which the second hop of
    // a source route from the node itself would be: without the agent, this arrives nowhere either.
    const UNPROVEN: &str = "source_route";
    let mut sandbox = sandbox("bypass-host");
    let node = sandbox.node().ip().to_string();
    let rows: [(&str, &[&str], &str); 11] = [
        ("tcp4", &[], "host-role"),
        ("tcp6_mapped", &[], "host-role"),
        ("udp_sendto", &[], "EPERM"),
        ("icmp_sendto", &[], "EPERM"),
        ("raw_syn", &[&node], "EPERM"),
        ("source_route", &[&node], "EPERM"),
        ("v6_tcp", &[], "host-role"),
        ("v6_udp_sendto", &[], "EPERM"),
        ("v6_icmp_sendto", &[], "EPERM"),
        ("v6_raw_syn", &[], "EPERM"),
        ("v6_next_hop_datagram", &[], "EPERM"),
    ];
    let attempt = |sandbox: &Sandbox, way: &str, arguments: &[&str]| {
        let before = openings(sandbox);
        let outcome = outcome(command(sandbox, "host-pod", way), way, arguments);
        (outcome, openings(sandbox) - before)
    };

    // The control: without the agent each way leads there, or the row proves nothing.
    for (way, arguments, _) in rows {
        let (outcome, packets) = attempt(&sandbox, way, arguments);
        say(&format!("row hostNetwork {way} without the agent: {outcome}, {packets} packets"));
        assert!(packets > 0 || way == UNPROVEN, "{way} without the agent: {outcome}");
    }
    start_agent(&mut sandbox);
    for (way, arguments, expected) in rows {
        let (outcome, packets) = attempt(&sandbox, way, arguments);
        say(&format!("row hostNetwork {way} with the agent: {outcome}, {packets} packets"));
        assert!(outcome == expected || way == UNPROVEN && outcome == "timeout", "{way}: {outcome}");
        assert_eq!(packets, 0, "{way}");
    }
}

/// Ways past every hook of a cgroup, whether they need the pod's address, what comes of them with the
/// netfilter rules.
const FORWARDED: [Row; 8] = [
    ("packet_socket", true, "sent"),
    ("packet_socket_bypass", true, "sent"),
    ("packet_source_route", true, "sent"),
    ("express", true, "sent"),
    ("tunnel", true, "sent"),
    ("rewritten", true, "timeout"),
    ("service", false, "timeout"),
    ("tun", true, "sent"),
];

const GUARD: &str = "KUBE2RAM_FORWARD_GUARD";
const WIRE_GUARD: &str = "KUBE2RAM_WIRE_GUARD";

/// Starts the agent without the netfilter rules; and without the wire guard, which also drops what is
/// forwarded.
fn start_unguarded(sandbox: &mut Sandbox) {
    let agent = sandbox.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    agent.set_env(GUARD, "off");
    agent.set_env(WIRE_GUARD, "off");
    agent.start().unwrap();
    assert!(agent.log().contains("--forward-guard=off: packet sockets"));
}

/// Starts it again with the guard.
fn restart_guarded(sandbox: &mut Sandbox) {
    let agent = sandbox.agent().unwrap();
    agent.terminate().unwrap();
    agent.set_env(GUARD, "auto");
    agent.start().unwrap();
    let metrics = agent.admin("/metrics").unwrap().body;
    assert!(metrics.contains("kube2ram_forward_guard_in_force 1"), "{metrics}");
}

/// Makes the node a Service's proxy: a virtual address stands for the metadata server.
fn proxy_a_service() {
    const SERVICE: &str = "table ip kube2ram-test { chain prerouting { type nat hook prerouting priority dstnat; \
                           ip daddr 10.96.0.9 dnat to 100.100.100.200; }; }";
    assert!(Command::new("nft").arg(SERVICE).status().unwrap().success());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_of_a_pod_is_forwarded_to_the_metadata_server() {
    let sandbox = sandbox("bypass-fwd");
    proxy_a_service();
    follow_source_routes();
    let ip = ip(&sandbox);
    nothing_is_forwarded(sandbox, &FORWARDED, &ip);
}

/// Tries each row without the netfilter rules, with them, and after the agent has ended.
fn nothing_is_forwarded(mut sandbox: Sandbox, rows: &[Row], ip: &str) {
    let attempt = |sandbox: &Sandbox, way: &str, needs_ip: bool| {
        let before = openings(sandbox);
        let arguments: &[&str] = if needs_ip { &[ip] } else { &[] };
        let outcome = outcome(command(sandbox, "pod", way), way, arguments);
        (outcome, openings(sandbox) - before)
    };

    // The control: the rest of the ring does not see these.
    start_unguarded(&mut sandbox);
    let mut present = Vec::new();
    for &(way, needs_ip, expected) in rows {
        let (outcome, packets) = attempt(&sandbox, way, needs_ip);
        if is_skipped(way, &outcome) {
            continue;
        }
        assert!(packets > 0, "{way} without the guard: {outcome}");
        present.push((way, needs_ip, expected));
    }
    restart_guarded(&mut sandbox);
    let guarded = |sandbox: &Sandbox| {
        for &(way, needs_ip, expected) in &present {
            assert_eq!(attempt(sandbox, way, needs_ip), (expected.to_owned(), 0), "{way}");
        }
    };
    guarded(&sandbox);
    // Those who may: pods through the agent, the agent itself, the node.
    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, REDIRECTED);
    assert_eq!(
        sandbox.pod("pod").unwrap().curl("/latest/meta-data/region-id").unwrap().status,
        200,
        "pass-through"
    );
    assert_eq!(sandbox.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);

    // The guard does not end with the agent.
    sandbox.agent().unwrap().kill().unwrap();
    guarded(&sandbox);
    assert_eq!(sandbox.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn connections_from_before_are_cut() {
    for family in ["4", "6"] {
        let mut sandbox = sandbox("bypass-old");
        let mut child = command(&sandbox, "pod", "existing")
            .args([WAYS, "existing", family])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "connected");

        start_agent(&mut sandbox);
        let before = packets_of_pods(&sandbox);
        child.stdin.take().unwrap().write_all(b"\n").unwrap();

        let outcome = lines.next().unwrap().unwrap();
        child.wait().unwrap();
        // Ended by the agent, so that the client need not wait for what egress drops.
        assert_eq!(outcome, "ECONNABORTED", "IPv{family}");
        assert_eq!(packets_of_pods(&sandbox), before, "IPv{family}");
    }
}
