//! Rung 2: attacks on the handover of an identity, against the eBPF programs in the running kernel. A way to
//! another's identity fails a test here, and so does an attack after which honest pods get none. All in a
//! network namespace of the test's own.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod field;
#[path = "../lab/mod.rs"]
mod lab;
mod options;
mod race;
mod shares;
// The last in the alphabet: it changes the kernel until the next boot.
mod where_sockets_fall_to_the_root;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
};

use kube2ram_agent::{
    datapath::{OriginError, kernel_version},
    identity::CgroupId,
};
use kube2ram_common::abi::{ConnectRecord, Handshake, MAX_HANDSHAKES};
use kube2ram_sandbox::kernel;

use self::field::{Client, Field, Netns, uptime_ns};

/// As a pod's address, which another namespace can have as well.
const POD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 7);

#[test]
#[ignore = "needs root: cargo xtask test"]
fn ports_that_are_reused_at_once_never_mix_identities() {
    const CONNECTS: usize = 2_000;
    let field = Field::new("reuse");
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40039").unwrap();
    let script = |name: u8| {
        format!(
            "import time\nfor _ in range({CONNECTS}):\n  while True:\n    s = tcp()\n    try: s.connect(METADATA); break\n    \
             except OSError as e:\n      assert e.errno == 99, e\n      s.close(); time.sleep(0.001)\n  \
             s.sendall({:?}.encode()); s.recv(1); s.close()",
            char::from(name).to_string()
        )
    };

    let clients = [field.client("pods/a", &script(b'a')), field.client("pods/b", &script(b'b'))];
    for _ in 0..2 * CONNECTS {
        let (mut accepted, origin) = field.next();
        accepted.set_nonblocking(false).unwrap();
        let mut name = [0];
        accepted.read_exact(&mut name).unwrap();
        let expected = if name == *b"a" { "pods/a" } else { "pods/b" };
        assert_eq!(origin.expect("vouched for"), field.lab.id(expected));
        accepted.write_all(b".").unwrap();
    }

    clients.into_iter().for_each(Client::finish);
    assert_eq!(field.pending(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_forged_address_takes_nobodys_identity() {
    let field = Field::new("forged");
    let other = Netns::new("forger");
    // The forger's namespace has the same addresses. Its own "agent" never answers, so that its claim stays
    // pending.
    let forge = "assert ctypes.CDLL(None).setns(os.open('/run/netns/NAME', 0), 0) == 0\nfull = socket()\nfull.bind(AGENT)\nfull.listen(0)\n\
                 queue = [socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK) for _ in range(4)]\n[s.connect_ex(AGENT) for s in queue]\n\
                 s = tcp(41000, '127.0.0.7')\ns.setblocking(False)\ns.connect_ex(METADATA)\nprint('claimed', flush=True)\nwait()\ns.close()";
    let mut forger = field.client("pods/b", &forge.replace("NAME", &other.0));
    assert_eq!(forger.line(), "claimed");
    assert!(field.handshakes().get(&field.handshake_from(POD, 41_000), 0).is_ok(), "the claim is pending");

    let contested = field.dial_from("pods/a", POD, 41_000);

    assert!(matches!(contested, Err(OriginError::Ambiguous)), "{contested:?}");
    assert_ne!(field.counter("ambiguous"), 0);
    forger.finish();
    for pod in ["pods/a", "pods/b"] {
        assert_eq!(field.dial_from(pod, POD, 41_000).unwrap(), field.lab.id(pod), "recovers");
    }
    assert_eq!(field.pending(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_claim_with_the_hosts_address_from_another_namespace_lends_nothing() {
    let field = Field::new("lent");
    let other = Netns::new("lender");
    let enter = ENTER.replace("NAME", &other.0);
    // Anybody can have the agent's address in a namespace of his own, and answer there. The last packet,
    // which would consume the claim, is not heard before data comes.
    let claim = |host: Ipv4Addr| {
        let claim = format!(
            "l = socket()\nl.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)\nl.setsockopt(IPPROTO_TCP, TCP_DEFER_ACCEPT, 60)\nl.bind(AGENT)\nl.listen()\n\
             s = tcp(41000, '{host}')\ns.connect(METADATA)\nprint('claimed', flush=True)\nwait()\ns.close()"
        );
        let mut claimer = field.client("pods/b", &(enter.clone() + &claim));
        assert_eq!(claimer.line(), "claimed");
        (claimer, field.handshakes().get(&field.handshake_from(host, 41_000), 0).ok())
    };

    let (claimer, control) = claim(POD);
    assert_eq!(control.expect("the control: another address").established, 1);
    claimer.finish();
    if kernel_version() < (5, 14) {
        // Where the agent is outside of the pods' cgroup, as here, its own namespace is not known.
        return kernel::skip("a claim with the host's address", "SO_NETNS_COOKIE");
    }
    let (claimer, claimed) = claim(Ipv4Addr::LOCALHOST);
    assert_eq!(claimed, None);
    let origin = dial_as_host(&field, Ipv4Addr::LOCALHOST);

    assert!(matches!(origin, Err(OriginError::Unvouched)), "{origin:?}");
    claimer.finish();
    assert_eq!(field.pending(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_claim_that_was_never_answered_lends_nothing() {
    let field = Field::new("unanswered");
    let other = Netns::new("silent");
    // As from an address that is not the claimer's: no answer comes, because this "agent" has a full queue.
    let claim = ENTER.replace("NAME", &other.0)
        + "full = socket()\nfull.bind(AGENT)\nfull.listen(0)\nqueue = [socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK) for _ in range(4)]\n\
           [s.connect_ex(AGENT) for s in queue]\ns = tcp(41000, '127.0.0.7')\ns.setblocking(False)\ns.connect_ex(METADATA)\n\
           print('claimed', flush=True)\nwait()\ns.close()";
    let mut claimer = field.client("pods/b", &claim);
    assert_eq!(claimer.line(), "claimed");
    let claimed = field.handshakes().get(&field.handshake_from(POD, 41_000), 0);
    assert_eq!(claimed.expect("the claim is pending").established, 0);

    let origin = dial_as_host(&field, POD);

    assert!(matches!(origin, Err(OriginError::Ambiguous)), "{origin:?}");
    claimer.finish();
    assert_eq!(field.dial_from("pods/a", POD, 41_000).unwrap(), field.lab.id("pods/a"), "recovers");
}

const ENTER: &str = "assert ctypes.CDLL(None).setns(os.open('/run/netns/NAME', 0), 0) == 0\n";

/// Who the agent takes a process of the host for, which no hook sees, when it dials from a port that somebody
/// has claimed.
fn dial_as_host(field: &Field, host: Ipv4Addr) -> Result<CgroupId, OriginError> {
    let connect = format!("s = tcp(41000, '{host}')\ns.connect(AGENT)\ns.recv(1)\ns.close()");
    let process = field.client("host", &connect);
    let (accepted, origin) = field.next();
    drop(accepted);
    process.finish();
    origin
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_a_dead_socket_left_is_inherited_by_nobody() {
    let field = Field::new("leftover");
    let (port, mut handshakes) = (41_000, field.handshakes());
    for (script, from) in [("AGENT", "a direct dial"), ("METADATA", "another pod's connect")] {
        // As if another sock_ops program had taken away our notice of the close.
        let left = ConnectRecord {
            cgroup: field.lab.id("pods/a").0,
            cookie: 1,
            connected_at_ns: uptime_ns(),
            established: 1,
            ..ConnectRecord::default()
        };
        handshakes.insert(field.handshake(port), left, 0).unwrap();

        let client =
            field.client("pods/b", &format!("s = tcp({port})\ns.connect({script})\ns.recv(1)\ns.close()"));
        let (accepted, origin) = field.next();
        drop(accepted);
        client.finish();

        assert!(matches!(origin, Err(OriginError::Ambiguous)), "{from}: {origin:?}");
        assert_eq!(field.dial("pods/b", port).unwrap(), field.lab.id("pods/b"), "recovers");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_claim_is_consumed_by_the_accept_while_its_socket_lives() {
    let field = Field::new("consumed");
    let mut client = field
        .client("pods/a", "s = tcp(41000)\ns.connect(METADATA)\ns.recv(1)\nprint('eof', flush=True)\nwait()");
    let (accepted, origin) = field.next();

    assert_eq!(origin.unwrap(), field.lab.id("pods/a"));
    assert_eq!(field.pending(), 0, "nothing for a forged handshake to find");
    drop(accepted);
    assert_eq!(client.line(), "eof"); // now in CLOSE_WAIT
    assert_eq!(field.pending(), 0);
    client.finish();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_direct_dial_is_of_whoever_dials_whatever_the_socket_did_before() {
    let field = Field::new("direct");
    // Redirected, dissolved, handed to another pod, which dials the agent itself, then properly.
    let client = field.client(
        "pods/a",
        "s = tcp(41000)\ns.connect(METADATA)\ns.recv(1)\ndissolve(s)\nmove('b')\ns.connect(AGENT)\n\
         assert s.getpeername() == AGENT\ns.recv(1)\ndissolve(s)\ns.connect(METADATA)\ns.recv(1)",
    );
    let origins: Vec<_> = (0..3).map(|_| field.next().1).collect();
    client.finish();

    assert_eq!(*origins[0].as_ref().unwrap(), field.lab.id("pods/a"));
    assert_eq!(*origins[1].as_ref().unwrap(), field.lab.id("pods/b"));
    assert_eq!(*origins[2].as_ref().unwrap(), field.lab.id("pods/b"));
    assert_eq!(field.pending(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_socket_belongs_to_whoever_connects_it() {
    let field = Field::new("passed");
    // Made by one, connected by the other; then connected by the one, used by the other.
    let client = field.client(
        "pods/a",
        "s = tcp()\nif os.fork() == 0:\n  move('b'); s.connect(METADATA); s.recv(1); os._exit(0)\nassert os.wait()[1] == 0\n\
         s = tcp()\ns.connect(METADATA)\nmove('b')\ns.recv(1)",
    );
    let origins: Vec<_> = (0..2).map(|_| field.next().1.unwrap()).collect();
    client.finish();

    assert_eq!(origins, [field.lab.id("pods/b"), field.lab.id("pods/a")]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_way_to_connect_carries_the_identity() {
    let field = Field::new("ways");
    let ways = [
        ("MSG_FASTOPEN", "s.settimeout(None)\ns.sendto(b'x', MSG_FASTOPEN, METADATA)"),
        ("TCP_FASTOPEN_CONNECT", "s.setsockopt(IPPROTO_TCP, 30, 1)\ns.connect(METADATA)\ns.sendall(b'x')"),
        ("not blocking", "s.setblocking(False)\ns.connect_ex(METADATA)\ns.settimeout(20)"),
        ("bound", "s = tcp(41000)\ns.connect(METADATA)"),
        (
            "mapped",
            "s = socket(AF_INET6, SOCK_STREAM)\ns.bind(('::ffff:127.0.0.1', 41001))\ns.connect(('::ffff:' + METADATA[0], 80))",
        ),
        (
            "mapped MSG_FASTOPEN",
            "s = socket(AF_INET6, SOCK_STREAM)\ns.sendto(b'x', MSG_FASTOPEN, ('::ffff:' + METADATA[0], 80))",
        ),
        ("MPTCP", "s = socket(AF_INET, SOCK_STREAM, 262)\ns.settimeout(20)\ns.connect(METADATA)"),
    ];
    for (way, script) in ways {
        if way == "MPTCP" && !fs::exists("/proc/sys/net/mptcp/enabled").unwrap() {
            kernel::skip(way, "MPTCP");
            continue;
        }
        let client = field.client("pods/a/nested", &format!("s = tcp()\n{script}\ns.recv(1)"));
        let (mut accepted, origin) = field.next();
        // Not a FIN alone: Linux 6.1 now and then loses one that comes while MPTCP falls back to TCP.
        accepted.write_all(b"x").unwrap();
        client.finish();

        assert_eq!(origin.expect(way), field.lab.id("pods/a/nested"), "{way}");
    }
    assert_eq!(field.pending(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_dead_agent_leaves_nothing_pending() {
    let mut field = Field::new("dead");
    let port = field.lab.agent().port();
    field.lab.listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(); // the old one is closed

    let refused = "for way in range(150):\n  s = tcp()\n  s.settimeout(None)\n  try:\n    s.connect(METADATA) if way % 3 else s.sendto(b'x', MSG_FASTOPEN, METADATA)\n    \
                   assert False\n  except ConnectionRefusedError: pass\n  \
                   if way % 3 == 2: dissolve(s)";
    field.client("pods/a", refused).finish();

    assert_eq!(field.pending(), 0);
    assert_eq!(field.counter("redirected"), 150);
    field.lab.listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    assert_eq!(field.dial("pods/a", 0).unwrap(), field.lab.id("pods/a"), "recovers");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_full_handshake_map_vouches_for_nobody() {
    let field = Field::new("full");
    let (mut clients, mut handshakes) = (field.clients(), field.handshakes());
    let filler = |index: usize| Handshake { addrs_be: u64::MAX, ports_be: index as u64 };
    for of_clients in [true, false] {
        for index in 0..MAX_HANDSHAKES {
            if of_clients {
                clients.insert(u64::MAX - index as u64, ConnectRecord::default(), 0).unwrap();
            } else {
                handshakes.insert(filler(index), ConnectRecord::default(), 0).unwrap();
            }
        }
        let before = field.counter("handshakes_full");

        let denied = field.dial("pods/a", 0);

        assert!(matches!(denied, Err(OriginError::Unvouched)), "{denied:?}");
        assert!(field.counter("handshakes_full") > before);
        for index in 0..MAX_HANDSHAKES {
            if of_clients {
                clients.remove(&(u64::MAX - index as u64)).unwrap();
            } else {
                handshakes.remove(&filler(index)).unwrap();
            }
        }
    }
    assert_eq!(field.dial("pods/a", 0).unwrap(), field.lab.id("pods/a"), "recovers");
}
