//! Rung 2: the boot guard's programs in the running kernel, at the root of a cgroup tree of the test's own.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod lab;

use std::{
    fs,
    os::fd::AsFd as _,
    process::{Command, Stdio},
    thread,
};

use kube2ram_agent::datapath::{
    BootGuard, BootOutcome, BootSettings, LinkHeader, Origins as _, WireDevice, WireHook, apply_boot_guard,
    boot_guard, kernel_version, remove,
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_common::names::boot;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::lab::{Lab, METADATA, METADATA6};

/// Everything that a socket can try; prints the name of what was refused, or an empty line. Not refused may
/// still be unreachable.
const WAYS: [(&str, &str); 10] = [
    ("connect", "s = socket.socket(); s.settimeout(.2); s.connect((a, 80))"),
    (
        "mapped connect",
        "s = socket.socket(socket.AF_INET6); s.settimeout(.2); s.connect(('::ffff:' + a, 80))",
    ),
    ("datagram", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (a, 9))"),
    ("mapped datagram", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', ('::ffff:' + a, 9))"),
    (
        "raw",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(b'\\x08\\0\\xf7\\xff\\0\\0\\0\\0', (a, 0))",
    ),
    (
        "source route",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
         s.setsockopt(0, 4, bytes([131, 11, 4]) + socket.inet_aton('127.0.0.2') + socket.inet_aton(a) + bytes(1)); \
         s.sendto(b'x', ('127.0.0.1', 9))",
    ),
    ("IPv6 connect", "s = socket.socket(socket.AF_INET6); s.settimeout(.2); s.connect((b, 80))"),
    ("IPv6 datagram", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', (b, 9))"),
    ("IPv6 datagram socket's connect", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect((b, 9))"),
    ("IPv6 message", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendmsg([b'x'], [], 0, (b, 9))"),
];

/// What needs a route before the guard sees it; `c` is another address of the same network.
const IPV6_PACKETS: [(&str, &str); 3] = [
    ("IPv6 raw", "socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58).sendto(b'\\x80' + bytes(7), (b, 0))"),
    (
        "IPv6 raw with its header",
        "w = bytes([96, 0, 0, 0, 0, 0, 59, 64]) + bytes(16) + socket.inet_pton(socket.AF_INET6, b); \
         socket.socket(socket.AF_INET6, socket.SOCK_RAW, 255).sendto(w, (b, 0))",
    ),
    (
        "IPv6 routing header",
        "i = lambda a: socket.inet_pton(socket.AF_INET6, a); \
         w = bytes([96, 0, 0, 0, 0, 24, 43, 64]) + bytes(16) + i(c) + bytes([59, 2, 0, 1, 0, 0, 0, 0]) + i(b); \
         socket.socket(socket.AF_INET6, socket.SOCK_RAW, 255).sendto(w, (c, 0))",
    ),
];

/// In a network with a route to the address, which this machine need not have. A packet is judged by its
/// socket's cgroup, whatever the network.
const UNSHARED: [&str; 6] = [
    "unshare",
    "--net",
    "sh",
    "-c",
    r#"ip link set lo up && ip -6 route add local 2001:db8::/32 dev lo && exec python3 -c "$1""#,
    "sh",
];

fn settings(lab: &Lab) -> BootSettings {
    BootSettings {
        bpf_dir: lab.bpf_dir.clone(),
        cgroup_root: lab.cgroup.clone(),
        host_cgroups: vec!["host".into(), "missing.slice".into()],
        metadata: MetadataAddr { v4: METADATA, v6: Some(METADATA6) },
        wire: Vec::new(),
    }
}

fn apply(lab: &Lab) -> BootOutcome {
    apply_boot_guard(&settings(lab)).unwrap()
}

fn active() -> BootOutcome {
    BootOutcome::Active { missing: vec!["missing.slice".into()] }
}

fn script(way: &str) -> String {
    format!(
        "import socket\na, b, c = '{}', '{METADATA6}', '2001:db8::2'\ntry:\n  {way}\nexcept PermissionError: print('refused')\n\
         except OSError: pass",
        METADATA.ip()
    )
}

fn is_refused(lab: &Lab, cgroup: &str, way: &str) -> bool {
    let output = lab.python(cgroup, &script(way)).wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout == b"refused\n"
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn denies_all_but_the_hosts_own() {
    let lab = Lab::new();
    for (name, way) in WAYS {
        assert!(!is_refused(&lab, "pods/a", way), "{name} without a guard");
    }

    assert_eq!(apply(&lab), active());

    for (name, way) in WAYS {
        for cgroup in ["pods/a", "pods/a/nested", "pods/b"] {
            assert!(is_refused(&lab, cgroup, way), "{name} in {cgroup}");
        }
        assert!(!is_refused(&lab, "host", way), "{name} in host");
    }
    for elsewhere in [
        "s = socket.socket(); s.settimeout(.2); s.connect(('127.0.0.1', 9))",
        "s = socket.socket(socket.AF_INET6); s.settimeout(.2); s.connect(('::1', 9))",
        "s = socket.socket(socket.AF_INET6); s.settimeout(.2); s.connect((c, 80))",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'x', (c, 9))",
    ] {
        assert!(!is_refused(&lab, "pods/a", elsewhere), "{elsewhere}");
    }
    let BootGuard::Active { denied } = boot_guard(&lab.bpf_dir).unwrap() else { panic!("not active") };
    assert_eq!(denied, 3 * WAYS.len() as u64);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn denies_ipv6_packets_of_all_but_the_hosts_own() {
    let lab = Lab::new();
    let is_refused = |cgroup: &str, script: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"echo $$ > "$1" && shift && exec "$@""#, "sh"]);
        shell.arg(lab.cgroup.join(cgroup).join("cgroup.procs")).args(UNSHARED).arg(script);
        let output = shell.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout == b"refused\n"
    };
    apply(&lab);

    for (name, way) in IPV6_PACKETS {
        let script = script(way);
        assert!(is_refused("pods/a", &script), "{name}");
        assert!(!is_refused("host", &script), "{name} of the host");
        let to_another = script.replace(&METADATA6.to_string(), "2001:db8::3");
        assert!(!is_refused("pods/a", &to_another), "{name} to another");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_network_of_its_own_is_not_the_hosts_whatever_the_cgroup() {
    let lab = Lab::new();
    apply(&lab);
    fs::create_dir(lab.cgroup.join("host/container")).unwrap();
    let (_, connect) = WAYS[0];
    let run = |unshare: &[&str]| {
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"echo $$ > "$1" && shift && exec "$@""#, "sh"]);
        shell.arg(lab.cgroup.join("host/container/cgroup.procs")).args(unshare);
        let output = shell.args(["python3", "-c", &script(connect)]).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout == b"refused\n"
    };

    assert!(run(&["unshare", "--net"]));
    assert!(!run(&[]));

    fs::remove_dir(lab.cgroup.join("host/container")).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_takes_over_and_is_not_guarded_again() {
    let lab = Lab::new();
    assert_eq!(boot_guard(&lab.bpf_dir).unwrap(), BootGuard::Absent);
    apply(&lab);
    assert_eq!(boot_guard(&lab.bpf_dir).unwrap(), BootGuard::Active { denied: 0 });

    let datapath = lab.attach();

    assert_eq!(boot_guard(&lab.bpf_dir).unwrap(), BootGuard::TakenOver);
    let client = lab.python("pods/a", &script("s = socket.socket(); s.connect((a, 80)); s.recv(1)"));
    let origin = datapath.origins().unwrap().origin_of(lab.accept().as_fd()).unwrap();
    assert_eq!(origin, lab.task("pods/a"));
    assert!(client.wait_with_output().unwrap().stdout.is_empty());
    assert_eq!(apply(&lab), BootOutcome::AgentActive, "while it runs");
    drop(datapath);
    assert_eq!(apply(&lab), BootOutcome::AgentActive, "its programs stay");
    let (_, datagram) = WAYS[2];
    assert!(is_refused(&lab, "pods/a", datagram));

    remove(&lab.bpf_dir).unwrap();
    assert_eq!(boot_guard(&lab.bpf_dir).unwrap(), BootGuard::Absent);
    assert!(!is_refused(&lab, "pods/a", datagram));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_second_time_swaps_and_an_uninstall_removes() {
    let lab = Lab::new();
    let (_, datagram) = WAYS[2];
    apply(&lab);

    assert_eq!(apply(&lab), active());

    let pinned = |kind: &str| fs::read_dir(lab.bpf_dir.join("boot").join(kind)).unwrap().count();
    // Without the one for socket options below Linux 6.1.
    let programs = boot::PROGRAMS.len() - usize::from(kernel_version() < (6, 1));
    assert_eq!((pinned("links"), pinned("maps")), (programs, boot::MAPS.len()));
    assert!(is_refused(&lab, "pods/a", datagram) && !is_refused(&lab, "host", datagram));

    assert_eq!(remove(&lab.bpf_dir).unwrap().links, programs);
    assert!(!lab.bpf_dir.exists());
    assert!(!is_refused(&lab, "pods/a", datagram));
}

/// A SYN by a packet socket on the loopback device of a namespace; prints whether it came out of it.
const PACKET: &str = r#"
import ctypes, os, socket, struct, sys
assert not ctypes.CDLL(None).setns(os.open("/run/netns/NETNS", os.O_RDONLY), 0x40000000)
seen = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
seen.bind(("lo", 3))
seen.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING
seen.setblocking(False)
def arrives(kind, data):
    frame = bytes(12) + struct.pack("!H", kind) + data
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).sendto(frame, ("lo", kind))
    except OSError as error:
        assert error.errno == 105, error
    try:
        return "1" if seen.recv(4096) == frame else "?"
    except BlockingIOError:
        return "0"
v4 = lambda to: struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 6, 0, bytes(4), socket.inet_aton(to)) + bytes(20)
v6 = lambda to: struct.pack("!IHBB", 6 << 28, 20, 6, 64) + bytes(16) + socket.inet_pton(socket.AF_INET6, to) + bytes(20)
print(arrives(0x800, v4("A")) + arrives(0x86dd, v6("B")) + arrives(0x800, v4("198.51.100.201")))
"#;
const BYPASS: &str = "import socket\ntry: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).setsockopt(263, 20, 1)\n\
                      except PermissionError: print('refused')";

/// A network namespace whose loopback device is the node's card, for packet sockets.
struct Card<'a> {
    lab: &'a Lab,
    netns: &'a str,
}

impl<'a> Card<'a> {
    fn new(lab: &'a Lab) -> Self {
        let netns = lab.cgroup.file_name().unwrap().to_str().unwrap();
        let ip = |arguments: &[&str]| assert!(Command::new("ip").args(arguments).status().unwrap().success());
        ip(&["netns", "add", netns]);
        let card = Self { lab, netns };
        ip(&["-n", netns, "link", "set", "lo", "up"]);
        card
    }

    /// Activates the guard, with its program on the device.
    fn apply(&self) -> BootOutcome {
        let netns = fs::File::open(format!("/run/netns/{}", self.netns)).unwrap();
        let inside = || {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let lo = WireDevice { index: 1, header: LinkHeader::Ethernet };
            apply_boot_guard(&BootSettings { wire: vec![lo], ..settings(self.lab) }).unwrap()
        };
        thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }

    /// Which packets of a packet socket leave by the device, as digits: to the metadata server by IPv4 and by
    /// IPv6, and to another address.
    fn arrivals(&self, cgroup: &str) -> String {
        let packet = PACKET.replace("NETNS", self.netns);
        let packet = packet.replace("\"A\"", &format!("\"{}\"", METADATA.ip()));
        let packet = packet.replace("\"B\"", &format!("\"{METADATA6}\""));
        let output = self.lab.python(cgroup, &packet).wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Card<'_> {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "delete", self.netns]).status());
    }
}

/// What [`Card::arrivals`] returns for a pod when the guard is on the device.
fn closed() -> &'static str {
    if WireHook::of_kernel() == WireHook::Tcx { "001" } else { "111" }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn packet_sockets_are_denied_on_the_nodes_devices_but_for_the_hosts_own() {
    let lab = Lab::new();
    let card = Card::new(&lab);
    let bypass = |cgroup: &str| lab.python(cgroup, BYPASS).wait_with_output().unwrap().stdout;
    assert_eq!(card.arrivals("pods/a"), "111", "the control");

    // The second time in place of the first.
    for _ in 0..2 {
        assert_eq!(card.apply(), active());

        assert_eq!(card.arrivals("pods/a"), closed());
        assert_eq!(card.arrivals("host"), "111");
        let refused = if kernel_version() < (6, 1) { Vec::new() } else { b"refused\n".to_vec() };
        assert_eq!((bypass("pods/a"), bypass("host")), (refused, Vec::new()));
    }
    remove(&lab.bpf_dir).unwrap();
    assert_eq!((card.arrivals("pods/a"), bypass("pods/a")), ("111".to_owned(), Vec::new()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_programs_on_network_devices_stay_until_the_wire_guard_is_there() {
    let lab = Lab::new();
    let card = Card::new(&lab);
    assert_eq!(card.arrivals("pods/a"), "111", "the control");
    card.apply();
    let devices = usize::from(WireHook::of_kernel() == WireHook::Tcx);

    // Killed in between; the next start finds them.
    drop(lab.attach());
    assert_eq!(card.arrivals("pods/a"), closed());
    let datapath = lab.attach();
    assert_eq!(card.arrivals("pods/a"), closed());
    let state = boot_guard(&lab.bpf_dir).unwrap();
    assert_eq!(matches!(state, BootGuard::Active { .. }), devices > 0, "{state:?}");
    assert_eq!(datapath.has_boot_wires().unwrap(), devices > 0);

    assert_eq!(datapath.retire_boot_wires().unwrap(), devices);

    assert!(!datapath.has_boot_wires().unwrap());
    assert_eq!(boot_guard(&lab.bpf_dir).unwrap(), BootGuard::TakenOver);
    assert_eq!(fs::read_dir(lab.bpf_dir.join("boot/maps")).unwrap().count(), 0);
    // This datapath has no wire guard.
    assert_eq!(card.arrivals("pods/a"), "111");
}
