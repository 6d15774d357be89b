//! No pod can use up what all of them need for their handshakes.

use kube2ram_agent::datapath::OriginError;
use kube2ram_common::abi::{ConnectRecord, HANDSHAKE_MAX_AGE_NS, MAX_HANDSHAKES_OF_POD, place_in, share_of};

use crate::field::{Field, Netns, uptime_ns};

/// Connects more often than a share allows, to an "agent" that never answers, from a container and from cgroups that it made itself.
const HANG: &str = "assert ctypes.CDLL(None).setns(os.open('/run/netns/NAME', 0), 0) == 0\n\
    open('/proc/sys/net/ipv4/ip_local_port_range', 'w').write('20000 29999')\nfull = socket()\nfull.bind(AGENT)\nfull.listen(0)\n\
    queue = [socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK) for _ in range(4)]\n[s.connect_ex(AGENT) for s in queue]\n\
    hanging = []\nfor number in range(900):\n  if number % 300 == 0:\n    \
      os.makedirs(PODS + f'/a/nested/{number}', exist_ok=True)\n    move(f'a/nested/{number}')\n  \
    s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK)\n  s.connect_ex(METADATA)\n  hanging.append(s)\n\
    print('hanging', flush=True)\nwait()\nmove('a')\nfor s in hanging: s.close()\n\
    for number in (0, 300, 600): os.rmdir(PODS + f'/a/nested/{number}')";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_whose_handshakes_hang_takes_nothing_from_the_others() {
    let field = Field::new("hang");
    let other = Netns::new("silent");
    let mut attacker = field.client("pods/a/nested", &HANG.replace("NAME", &other.0));
    assert_eq!(attacker.line(), "hanging");

    let pending = field.pending() as u64;
    let refused = field.dial("pods/a/nested", 0);
    let honest: Vec<_> = (0..20).map(|_| field.dial("pods/b", 0)).collect();

    assert!((MAX_HANDSHAKES_OF_POD / 2..=MAX_HANDSHAKES_OF_POD).contains(&pending), "{pending}");
    // Counted again where the agent's own cgroup is above the pods'.
    assert!(field.counter("share_full") >= 900 - pending + u64::from(refused.is_err()));
    for origin in honest {
        assert_eq!(origin.unwrap(), field.lab.id("pods/b"));
    }
    attacker.finish();
    assert_eq!(field.pending(), 0);
    assert_eq!(field.shares().keys().count(), 0, "every place was given back");
    assert_eq!(field.dial("pods/a/nested", 0).unwrap(), field.lab.id("pods/a/nested"), "recovers");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_share_is_full_only_as_long_as_a_handshake_can_last() {
    let field = Field::new("share");
    let mut shares = field.shares();
    let pod = field.lab.id("pods/a").0;
    let mut take_all = |since_ns: u64| {
        for place in 0..MAX_HANDSHAKES_OF_POD {
            shares.insert(place_in(share_of(pod), place), since_ns, 0).unwrap();
        }
    };

    take_all(uptime_ns());
    let full = field.dial("pods/a", 0);
    // As if nobody had ever given one back.
    take_all(uptime_ns().wrapping_sub(HANDSHAKE_MAX_AGE_NS + 2_000_000_000));
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
    let (mut handshakes, mut shares) = (field.handshakes(), field.shares());
    let pod = field.lab.id("pods/a").0;
    let young = uptime_ns();
    let old = young.wrapping_sub(HANDSHAKE_MAX_AGE_NS + 2_000_000_000);
    // As if the notice of the close had been lost, twice.
    for (place, port, connected_at_ns) in [(0, 41_000, old), (1, 41_001, young)] {
        let share = place_in(share_of(pod), place);
        let record = ConnectRecord { cgroup: pod, connected_at_ns, share, ..ConnectRecord::default() };
        handshakes.insert(field.handshake(port), record, 0).unwrap();
        shares.insert(share, connected_at_ns, 0).unwrap();
    }

    field.datapath.upkeep().unwrap();

    let left: Vec<_> = field.handshakes().keys().map(Result::unwrap).collect();
    assert_eq!(left, [field.handshake(41_001)], "the old one is removed, the young one stays");
    let left: Vec<_> = field.shares().keys().map(Result::unwrap).collect();
    assert_eq!(left, [place_in(share_of(pod), 1)]);
}
