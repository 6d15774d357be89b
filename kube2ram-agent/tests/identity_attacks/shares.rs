//! No pod can use up what all of them need for their handshakes.

use std::time::Duration;

use kube2ram_agent::datapath::OriginError;
use kube2ram_common::abi::{
    ANNOUNCE_WITHIN_NS, ConnectRecord, HANDSHAKE_MAX_AGE_NS, MAX_HANDSHAKES, MAX_HANDSHAKES_OF_POD,
    MAX_LEASES, lease_in, share_of,
};

use crate::field::{Field, Netns, uptime_ns};

/// Connects more often than a share allows, to an "agent" that never answers, from one container after the
/// other of a pod without a class, and from cgroups below.
const HANG: &str = "assert ctypes.CDLL(None).setns(os.open('/run/netns/NAME', 0), 0) == 0\n\
    open('/proc/sys/net/ipv4/ip_local_port_range', 'w').write('20000 29999')\nfull = socket()\nfull.bind(AGENT)\nfull.listen(0)\n\
    queue = [socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK) for _ in range(4)]\n[s.connect_ex(AGENT) for s in queue]\n\
    hanging = []\nfor number in range(900):\n  if number % 300 == 0:\n    \
      os.makedirs(PODS + f'/a/{number}/below', exist_ok=True)\n    move(f'a/{number}/below')\n  \
    s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK)\n  s.bind(('127.0.0.7', 0))\n  s.connect_ex(METADATA)\n  hanging.append(s)\n\
    print('hanging', flush=True)\nwait()\nmove('a')\nfor s in hanging: s.close()\n\
    for number in (0, 300, 600): os.rmdir(PODS + f'/a/{number}/below'); os.rmdir(PODS + f'/a/{number}')";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_whose_handshakes_hang_takes_nothing_from_the_others() {
    let field = Field::new("hang");
    let other = Netns::new("silent");
    let mut attacker = field.client("pods/a/nested", &HANG.replace("NAME", &other.0));
    assert_eq!(attacker.line(), "hanging");

    let pending = field.pending();
    let refused = field.dial("pods/a/nested", 0);
    let honest: Vec<_> = (0..20).map(|_| field.dial("pods/b", 0)).collect();

    assert!((MAX_HANDSHAKES_OF_POD / 2..=MAX_HANDSHAKES_OF_POD).contains(&pending), "{pending}");
    // Counted again where the agent's own cgroup is above the pods'.
    assert!(field.counter("share_full") >= (900 - pending) as u64 + u64::from(refused.is_err()));
    for origin in honest {
        assert_eq!(origin.unwrap(), field.lab.id("pods/b"));
    }
    attacker.finish();
    assert_eq!(field.pending(), 0, "every place was given back");
    assert_eq!(field.dial("pods/a/nested", 0).unwrap(), field.lab.id("pods/a/nested"), "recovers");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_share_is_full_only_as_long_as_a_handshake_can_last() {
    let field = Field::new("share");
    let mut shares = field.shares();
    let pod = field.lab.id("pods/a").0;
    let mut take_all = |until_ns: u64| {
        for lease in 0..MAX_HANDSHAKES_OF_POD {
            shares.insert(lease_in(share_of(pod), lease as u64), until_ns, 0).unwrap();
        }
    };

    take_all(uptime_ns() + HANDSHAKE_MAX_AGE_NS);
    let full = field.dial("pods/a", 0);
    // As if nobody had ever given one back.
    take_all(uptime_ns() - 2_000_000_000);
    let over = field.dial("pods/a", 0);

    assert!(matches!(full, Err(OriginError::Unvouched)), "{full:?}");
    assert_ne!(field.counter("share_full"), 0);
    assert_eq!(over.unwrap(), field.lab.id("pods/a"));
    assert_eq!(field.dial("pods/b", 0).unwrap(), field.lab.id("pods/b"), "a share is one pod's");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agent_removes_what_no_handshake_can_still_need() {
    let mut field = Field::new("sweep");
    let (mut clients, mut handshakes, mut shares) = (field.clients(), field.handshakes(), field.shares());
    let pod = field.lab.id("pods/a").0;
    let young = uptime_ns();
    let old = young.wrapping_sub(HANDSHAKE_MAX_AGE_NS + 2_000_000_000);
    // As if the notice of the close had been lost, twice.
    for (number, port, connected_at_ns) in [(0, 41_000, old), (1, 41_001, young)] {
        let lease = lease_in(share_of(pod), number);
        let record = ConnectRecord { cgroup: pod, connected_at_ns, lease, ..ConnectRecord::default() };
        clients.insert(number, record, 0).unwrap();
        handshakes.insert(field.handshake(port), record, 0).unwrap();
        shares.insert(lease, connected_at_ns + HANDSHAKE_MAX_AGE_NS, 0).unwrap();
    }

    field.datapath.upkeep().unwrap();

    let left: Vec<_> = field.clients().keys().map(Result::unwrap).collect();
    assert_eq!(left, [1]);
    let left: Vec<_> = field.handshakes().keys().map(Result::unwrap).collect();
    assert_eq!(left, [field.handshake(41_001)], "the old one is removed, the young one stays");
    let left: Vec<_> = field.shares().keys().map(Result::unwrap).collect();
    assert_eq!(left, [lease_in(share_of(pod), 1)]);
}

/// Recorded, dissolved and kept; then recorded in a cgroup of the pod's own making, again and again.
const HOARD: &str = "kept = []\nfor number in range(900):\n  s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK)\n  s.connect_ex(METADATA)\n  dissolve(s)\n  \
    kept.append(s)\nprint('hoarded', flush=True)\nwait()";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn sockets_that_a_pod_keeps_leave_nothing_in_the_ebpf_programs() {
    let field = Field::new("hoard");
    let mut hoarder = field.client("pods/a", HOARD);
    assert_eq!(hoarder.line(), "hoarded");

    assert_eq!(field.counter("redirected"), 900);
    assert_eq!(field.pending(), 0);
    hoarder.finish();
}

/// As one whose connect(2) comes to nothing after the hook: this namespace has no way to the agent.
const STRAND: &str = "assert ctypes.CDLL(None).setns(os.open('/run/netns/NAME', 0), 0) == 0\n\
    os.system('ip addr flush dev lo; ip link set lo down')\nkept = []\nfor number in range(900):\n  \
      s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK)\n  assert s.connect_ex(METADATA) == 101\n  kept.append(s)\nprint('stranded', flush=True)\nwait()";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn connects_that_come_to_nothing_take_no_more_than_the_pods_share() {
    let field = Field::new("strand");
    let nowhere = Netns::new("nowhere");
    let mut attacker = field.client("pods/a", &STRAND.replace("NAME", &nowhere.0));
    assert_eq!(attacker.line(), "stranded");

    let left = field.pending();
    assert!((MAX_HANDSHAKES_OF_POD / 2..=MAX_HANDSHAKES_OF_POD).contains(&left), "{left}");
    assert!(field.counter("share_full") >= (900 - left) as u64);
    assert_eq!(field.dial("pods/b", 0).unwrap(), field.lab.id("pods/b"));
    attacker.finish();
    // A connect(2) without a SYN has its place for a moment only.
    std::thread::sleep(Duration::from_nanos(ANNOUNCE_WITHIN_NS));
    assert_eq!(field.dial("pods/a", 0).unwrap(), field.lab.id("pods/a"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn fill_levels_count_each_entry_once() {
    // More than one call to the kernel copies.
    const MANY: u64 = 3000;
    let field = Field::new("levels");
    let levels = field.datapath.fill_levels().unwrap();
    let read = || levels.read().map(|level| (level.map, level.entries)).collect::<Vec<_>>();
    assert_eq!(read(), [("clients", 0), ("handshakes", 0), ("shares", 0)]);

    let (mut clients, mut handshakes, mut shares) = (field.clients(), field.handshakes(), field.shares());
    for number in 0..MANY {
        clients.insert(number, ConnectRecord::default(), 0).unwrap();
        shares.insert(number, 1, 0).unwrap();
    }
    for port in 41_000..41_007 {
        handshakes.insert(field.handshake(port), ConnectRecord::default(), 0).unwrap();
    }

    let many = usize::try_from(MANY).unwrap();
    assert_eq!(read(), [("clients", many), ("handshakes", 7), ("shares", many)]);
    let capacities: Vec<_> = levels.read().map(|level| level.capacity).collect();
    assert_eq!(capacities, [MAX_HANDSHAKES, MAX_HANDSHAKES, MAX_LEASES]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn where_the_shares_of_all_pods_are_taken_nobody_is_vouched_for_and_that_is_reported() {
    let field = Field::new("shares-full");
    let (mut shares, until) = (field.shares(), uptime_ns() + HANDSHAKE_MAX_AGE_NS);
    let other = |number: usize| u64::MAX - number as u64;
    (0..MAX_LEASES).for_each(|number| shares.insert(other(number), until, 0).unwrap());

    let refused = field.dial("pods/a", 0);

    assert!(matches!(refused, Err(OriginError::Unvouched)), "{refused:?}");
    assert_ne!(field.counter("shares_full"), 0);
    assert_eq!(field.counter("share_full"), 0, "the pod is not to blame");
    (0..MAX_LEASES).for_each(|number| shares.remove(&other(number)).unwrap());
    assert_eq!(field.dial("pods/a", 0).unwrap(), field.lab.id("pods/a"), "recovers");
}
