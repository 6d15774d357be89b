//! Rung 2: the life of the wire guard, with the whole agent in a sandbox: devices that come later or move,
//! what others change, pods with NET_ADMIN, switching it off, and removal.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod first_start;
mod flushed;
mod sender;

use std::{
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use kube2ram_agent::{datapath::WireHook, wire_guard::LOOK_EVERY};
use kube2ram_sandbox::{
    Sandbox,
    node::PodSpec,
    standin::{Accounts, Role},
};
use serde_json::Value;

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const WAYS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bypass/ways.py");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// A busy machine may take its time; how long it really took is shown.
const SOON: Duration = Duration::from_secs(30);
const OF_NODE: &str = r#"kube2ram_wire_guard_devices{of="node"}"#;
const OF_PODS: &str = r#"kube2ram_wire_guard_devices{of="pods"}"#;

fn sandbox(name: &str) -> Sandbox {
    let mut sandbox = Sandbox::create(name).unwrap();
    for role in ["pod-role", "host-role"] {
        sandbox.accounts().add_role(Accounts::role_arn(role), Role::default());
    }
    sandbox.add_pod(&PodSpec::new("pod").role("pod-role")).unwrap();
    sandbox.add_pod(&PodSpec::new("host-pod").role("host-role").host_network()).unwrap();
    sandbox.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    sandbox
}

fn started(name: &str) -> Sandbox {
    let mut sandbox = sandbox(name);
    sandbox.agent().unwrap().start().unwrap();
    sandbox
}

fn metric(sandbox: &mut Sandbox, sample: &str) -> f64 {
    sandbox.agent().unwrap().metric(sample).unwrap()
}

/// Sends a SYN to the metadata server by a packet socket, by IPv4 and IPv6, and returns how many arrived.
fn arriving(sandbox: &Sandbox, pod: &str, device: &str) -> usize {
    let before = from_senders(sandbox);
    let mut command = sandbox.pod(pod).unwrap().pod().command("app", "python3").unwrap();
    let mut child =
        command.args([WAYS, "frames"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut orders = child.stdin.take().unwrap();
    writeln!(orders, "{device} metadata 4 tcp packet plain\n{device} metadata 6 tcp packet plain").unwrap();
    drop(orders);
    assert!(child.wait_with_output().unwrap().status.success());
    thread::sleep(Duration::from_millis(20)); // what is under way arrives
    from_senders(sandbox) - before
}

fn from_senders(sandbox: &Sandbox) -> usize {
    let sources = ["198.18.0.7", "2001:2::7"].map(|source| source.parse::<std::net::IpAddr>().unwrap());
    sources.iter().map(|source| sandbox.node().sniffer().packets_from(*source).len()).sum()
}

#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SOON, "{what}: not within {SOON:?}");
        thread::sleep(Duration::from_millis(10));
    }
    say(&format!("{what}: after {} ms (looks every {LOOK_EVERY:?})", begun.elapsed().as_millis()));
}

#[expect(clippy::print_stderr, reason = "tells what was measured")]
fn say(line: &str) {
    eprintln!("\nrow wire guard: {line}");
}

fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

/// As the pod's process with NET_ADMIN, which is root here.
fn in_pod(sandbox: &Sandbox, pod: &str, program: &str, arguments: &[&str]) {
    let mut command = sandbox.pod(pod).unwrap().pod().command("app", program).unwrap();
    assert!(command.args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

fn pins(sandbox: &Sandbox) -> Vec<PathBuf> {
    let bpffs = sandbox.node().bpffs();
    let found = Command::new("find").arg(bpffs).args(["-path", "*/links/k2r_wire*/*"]).output().unwrap();
    String::from_utf8(found.stdout).unwrap().lines().map(PathBuf::from).collect()
}

fn link(pin: &Path) -> Value {
    let shown = Command::new("bpftool").args(["-j", "link", "show", "pinned"]).arg(pin).output().unwrap();
    serde_json::from_slice(&shown.stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_device_that_appears_later_is_covered_and_so_is_a_pod() {
    let mut sandbox = started("wire-later");
    sandbox.agent().unwrap().await_metric(OF_NODE, 1.0).unwrap();
    assert_eq!(metric(&mut sandbox, OF_PODS), 0.0);

    let card = sandbox.node().add_card(sandbox.pod("pod").unwrap().pod()).unwrap();
    eventually("a card of a pod that is there", || metric(&mut sandbox, OF_PODS) == 1.0);
    assert_eq!(arriving(&sandbox, "pod", card), 0);

    sandbox.add_pod(&PodSpec::new("late").role("pod-role")).unwrap();
    let moved = sandbox.node().add_card(sandbox.pod("late").unwrap().pod()).unwrap();
    eventually("a card of a new pod", || metric(&mut sandbox, OF_PODS) == 2.0);
    assert_eq!(arriving(&sandbox, "late", moved), 0);

    sandbox.remove_pod("late").unwrap();
    eventually("a pod that is gone", || metric(&mut sandbox, OF_PODS) == 1.0);
    sandbox.agent().unwrap().await_metric("kube2ram_wire_guard_in_force", 1.0).unwrap();
    assert_eq!(metric(&mut sandbox, "kube2ram_wire_guard_repairs_total"), 0.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_new_device_is_covered_within_a_second() {
    // On a busy machine any of them may be late.
    const PODS: [&str; 3] = ["pod", "second", "third"];
    let is_emulated = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG");
    let limit = SignedDuration::from_secs(if is_emulated { 10 } else { 1 });
    let mut sandbox = sandbox("wire-second");
    for pod in &PODS[1..] {
        sandbox.add_pod(&PodSpec::new(pod).role("pod-role")).unwrap();
    }
    sandbox.agent().unwrap().start().unwrap();

    let took = PODS.map(|pod| {
        let before = sandbox.agent().unwrap().log().lines().count();
        let added = Timestamp::now();
        sandbox.node().add_card(sandbox.pod(pod).unwrap().pod()).unwrap();
        let mut covered = None;
        eventually("a new device", || {
            let log = sandbox.agent().unwrap().log();
            let line =
                log.lines().skip(before).find(|line| line.contains("the wire guard is active on a device"));
            covered = line.map(|line| line.split_whitespace().next().unwrap().parse::<Timestamp>().unwrap());
            covered.is_some()
        });
        covered.unwrap().duration_since(added)
    });

    say(&format!("new devices were covered after {took:?}"));
    assert!(took.iter().any(|time| *time <= limit), "{took:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_somebody_detaches_is_back_and_counted() {
    let mut sandbox = started("wire-repair");
    let uplink = sandbox.node().uplink();
    assert_eq!(arriving(&sandbox, "host-pod", &uplink), 0);

    if WireHook::of_kernel() == WireHook::Tcx {
        let pin = pins(&sandbox).remove(0);
        run("bpftool", &["link", "detach", "pinned", pin.to_str().unwrap()]);
    } else {
        run("tc", &["qdisc", "del", "dev", &uplink, "clsact"]);
    }
    eventually("a detached program", || metric(&mut sandbox, "kube2ram_wire_guard_repairs_total") == 1.0);

    assert_eq!(arriving(&sandbox, "host-pod", &uplink), 0);
    for pin in pins(&sandbox) {
        std::fs::remove_file(pin).unwrap();
    }
    if WireHook::of_kernel() == WireHook::Tcx {
        eventually("a removed pin", || pins(&sandbox).len() == 1);
    }
    let status = sandbox.agent().unwrap().exec(&["status"]).unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("active on 1 devices of the node and 0 of pods"), "{status}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_with_net_admin_does_not_get_rid_of_it() {
    let mut sandbox = sandbox("wire-admin");
    let card = sandbox.node().add_card(sandbox.pod("pod").unwrap().pod()).unwrap();
    assert_eq!(arriving(&sandbox, "pod", card), 2, "the control");
    sandbox.agent().unwrap().start().unwrap();
    assert_eq!(arriving(&sandbox, "pod", card), 0);

    if WireHook::of_kernel() == WireHook::Tcx {
        in_pod(&sandbox, "pod", "tc", &["qdisc", "add", "dev", card, "clsact"]);
    }
    in_pod(&sandbox, "pod", "tc", &["qdisc", "del", "dev", card, "clsact"]);

    if WireHook::of_kernel() == WireHook::Tcx {
        assert_eq!(arriving(&sandbox, "pod", card), 0, "at once");
        assert_eq!(metric(&mut sandbox, "kube2ram_wire_guard_repairs_total"), 0.0);
    } else {
        eventually("a discipline that a pod removed", || {
            metric(&mut sandbox, "kube2ram_wire_guard_repairs_total") == 1.0
        });
        assert_eq!(arriving(&sandbox, "pod", card), 0);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_uplink_that_moves_into_a_pod_stays_covered() {
    let mut sandbox = started("wire-moves");
    let uplink = sandbox.node().uplink();
    let netns = sandbox.pod("pod").unwrap().pod().netns().unwrap();
    let before: Vec<_> = pins(&sandbox).iter().map(|pin| link(pin)["id"].clone()).collect();

    run("ip", &["link", "set", &uplink, "netns", netns.to_str().unwrap()]);
    in_pod(&sandbox, "pod", "ip", &["link", "set", &uplink, "up"]);

    if WireHook::of_kernel() == WireHook::Tcx {
        assert_eq!(arriving(&sandbox, "pod", &uplink), 0, "at once");
        let after: Vec<_> = pins(&sandbox).iter().map(|pin| link(pin)["id"].clone()).collect();
        assert_eq!(before, after, "the same link");
    }
    eventually("an uplink that moved into a pod", || {
        let status = sandbox.agent().unwrap().exec(&["status"]).unwrap();
        String::from_utf8(status.stdout).unwrap().contains("on 0 devices of the node and 1 of pods")
    });
    assert_eq!(arriving(&sandbox, "pod", &uplink), 0);
}

/// Nothing in the pod's own namespace reports it: its end of the pair only shows another namespace at its
/// other end.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pods_pair_whose_other_end_leaves_the_node_is_covered() {
    let mut sandbox = started("wire-peer");
    sandbox.add_pod(&PodSpec::new("other").role("pod-role")).unwrap();
    eventually("nothing leads out of pods", || metric(&mut sandbox, OF_PODS) == 0.0);
    let shown = |command: &mut Command| String::from_utf8(command.output().unwrap().stdout).unwrap();
    let inside = shown(
        sandbox.pod("pod").unwrap().pod().command("app", "ip").unwrap().args(["-o", "link", "show", "eth0"]),
    );
    let index = inside.split_once("@if").unwrap().1.split_once(':').unwrap().0;
    let all = shown(Command::new("ip").args(["-o", "link"]));
    let peer = all.lines().find_map(|line| line.strip_prefix(&format!("{index}: "))).unwrap();
    let peer = peer.split_once('@').unwrap().0;
    let elsewhere = sandbox.pod("other").unwrap().pod().netns().unwrap();

    run("ip", &["link", "set", peer, "netns", elsewhere.to_str().unwrap()]);

    eventually("both ends of a pair between two pods", || metric(&mut sandbox, OF_PODS) == 2.0);
    sandbox.agent().unwrap().await_metric("kube2ram_wire_guard_in_force", 1.0).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn it_outlives_the_agent_and_goes_with_the_flag_or_the_rest() {
    let mut sandbox = started("wire-off");
    let uplink = sandbox.node().uplink();
    let card = sandbox.node().add_card(sandbox.pod("pod").unwrap().pod()).unwrap();
    eventually("a card", || metric(&mut sandbox, OF_PODS) == 1.0);

    sandbox.agent().unwrap().kill().unwrap();
    assert_eq!(arriving(&sandbox, "host-pod", &uplink) + arriving(&sandbox, "pod", card), 0, "no agent");

    let agent = sandbox.agent().unwrap();
    agent.set_env("KUBE2RAM_WIRE_GUARD", "off");
    agent.start().unwrap();
    assert!(agent.log().contains("--wire-guard=off: packet sockets"));
    assert_eq!(arriving(&sandbox, "host-pod", &uplink) + arriving(&sandbox, "pod", card), 4, "off");
    assert_eq!(pins(&sandbox), Vec::<PathBuf>::new());

    let agent = sandbox.agent().unwrap();
    agent.terminate().unwrap();
    agent.set_env("KUBE2RAM_WIRE_GUARD", "on");
    agent.start().unwrap();
    assert_eq!(arriving(&sandbox, "host-pod", &uplink) + arriving(&sandbox, "pod", card), 0, "on");
    sandbox.agent().unwrap().terminate().unwrap();
    let mut uninstall = sandbox.node().host_command(AGENT);
    uninstall.arg("uninstall").arg("--bpf-dir").arg(sandbox.node().bpffs().join("kube2ram"));
    let removed = uninstall.arg("--state-dir").arg(sandbox.node().agent_state()).output().unwrap();
    assert!(removed.status.success(), "{removed:?}");

    assert_eq!(arriving(&sandbox, "host-pod", &uplink) + arriving(&sandbox, "pod", card), 4, "removed");
    for arguments in [&["qdisc", "show"][..], &["-n", &netns_name(&sandbox), "qdisc", "show"]] {
        let disciplines = Command::new("tc").args(arguments).output().unwrap();
        let disciplines = String::from_utf8(disciplines.stdout).unwrap();
        assert!(!disciplines.contains("clsact"), "{disciplines}");
    }
}

fn netns_name(sandbox: &Sandbox) -> String {
    let netns = sandbox.pod("pod").unwrap().pod().netns().unwrap();
    netns.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn on_makes_an_agent_unready_that_cannot_cover_a_device() {
    let mut sandbox = sandbox("wire-on");
    sandbox.agent().unwrap().set_env("KUBE2RAM_WIRE_GUARD", "on");
    sandbox.agent().unwrap().start().unwrap();
    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, "pod-role");

    let full = Full::fill(&sandbox);
    eventually("a device without room", || metric(&mut sandbox, "kube2ram_wire_guard_in_force") == 0.0);
    assert_eq!(sandbox.agent().unwrap().admin("/readyz").unwrap().status, 503);
    let status = sandbox.agent().unwrap().exec(&["status"]).unwrap();
    assert!(String::from_utf8(status.stdout).unwrap().contains("packet sockets of pods may reach"));
    drop(full);
    eventually("room again", || metric(&mut sandbox, "kube2ram_wire_guard_in_force") == 1.0);
    eventually("readiness", || sandbox.agent().unwrap().admin("/readyz").unwrap().status == 200);
    assert_eq!(arriving(&sandbox, "host-pod", &sandbox.node().uplink()), 0);
}

/// The uplink without the program and without room for it.
struct Full {
    others: Option<Child>,
    uplink: String,
}

/// As many other programs as the kernel allows; ours gives way to the last one.
const FILL: &str = r#"
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(321, command, buffer, len(attributes))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
code = ctypes.create_string_buffer(struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0))
text = ctypes.create_string_buffer(b"GPL")
load = lambda: bpf(5, struct.pack("=IIQQ", 3, 2, ctypes.addressof(code), ctypes.addressof(text)))
attach = lambda: bpf(28, struct.pack("=IIII", load(), int(sys.argv[1]), 47, 0))
links = [attach() for _ in range(62)]
last = load()
def take_our_place():
    # Each link that the agent makes has another number, which is its pin's name.
    newest = max(os.listdir(sys.argv[2]), key=int)
    pin = ctypes.create_string_buffer(os.path.join(sys.argv[2], newest).encode())
    bpf(34, struct.pack("=I", bpf(7, struct.pack("=QII", ctypes.addressof(pin), 0, 0))))
    return bpf(28, struct.pack("=IIII", last, int(sys.argv[1]), 47, 0))
for tries_left in reversed(range(50)):
    try:
        links.append(take_our_place())
        break
    except (AssertionError, OSError, ValueError): # the agent was back before us
        assert tries_left
        time.sleep(0.05)
print("full", flush=True)
sys.stdin.read()
"#;

impl Full {
    fn fill(sandbox: &Sandbox) -> Self {
        let uplink = sandbox.node().uplink();
        if WireHook::of_kernel() == WireHook::Clsact {
            // Another discipline in its place.
            let swap = format!("tc qdisc del dev {uplink} clsact && tc qdisc add dev {uplink} ingress");
            run("sh", &["-c", &swap]);
            return Self { others: None, uplink };
        }
        let shown = Command::new("ip").args(["-o", "link", "show", &uplink]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let (index, _) = shown.split_once(':').unwrap();
        let pin = pins(sandbox).remove(0);
        let mut others = Command::new("python3")
            .args(["-c", FILL, index, pin.parent().unwrap().to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 5];
        others.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        Self { others: Some(others), uplink }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        match &mut self.others {
            Some(others) => {
                others.kill().unwrap();
                others.wait().unwrap();
            }
            None => run("tc", &["qdisc", "del", "dev", &self.uplink, "ingress"]),
        }
    }
}

/// A host's connections that end in each way, two of them by packets of a socket that is only half of one: a
/// reset, and the acknowledgement of TIME_WAIT.
const ENDINGS: &str = r#"
import socket, struct, sys, time
request = b"GET /latest/meta-data/region-id HTTP/1.1\r\nHost: m\r\nConnection: keep-alive\r\n\r\n"
for address in sys.argv[1:]:
    for ending in ["shutdown", "abort", "unread", "server"]:
        s = socket.create_connection((address, 80), timeout=5)
        s.sendall(request if ending != "server" else request.replace(b"keep-alive", b"close"))
        if ending == "unread":
            time.sleep(0.2)
        else:
            assert s.recv(4096).startswith(b"HTTP/1.1 200"), ending
        if ending == "abort":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if ending == "shutdown":
            s.shutdown(socket.SHUT_WR)
            while s.recv(4096): pass
        s.close()
"#;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_nodes_and_the_agents_own_connections_are_whole() {
    let mut sandbox = started("wire-own");
    let mut addresses = vec!["100.100.100.200"];
    addresses.extend(sandbox.node().has_ipv6().then_some("fd00:100::100:200"));
    let before = sandbox.node().sniffer().packets().len();

    let mut host = sandbox.node().host_command("python3");
    assert!(host.args(["-c", ENDINGS]).args(&addresses).status().unwrap().success());
    for _ in 0..5 {
        // By the agent's own socket.
        let passed_through = sandbox.pod("pod").unwrap().curl("/latest/meta-data/region-id").unwrap();
        assert_eq!(passed_through.status, 200);
    }

    assert!(sandbox.node().sniffer().packets().len() > before + 20);
    let denied = r#"kube2ram_kernel_outcomes_total{outcome="denied_wire"}"#;
    assert_eq!(metric(&mut sandbox, denied), 0.0);
    assert_eq!(arriving(&sandbox, "host-pod", &sandbox.node().uplink()), 0);
    assert_ne!(metric(&mut sandbox, denied), 0.0, "it counts");
}
