//! Egress reads IPv6 packets of raw sockets: their destination, and the addresses in routing headers (RFC
//! 8200 §4.4), wherever those are.

use crate::{
    ipv6::{enter_namespace, ip},
    lab::{Lab, METADATA6},
    output, stderr,
};

/// Packets by a name, in Python: what the headers behind the fixed one are made of, and whether egress
/// refuses the packet. `M` is the metadata server, `O` another address; `rh(type, …)` a routing header with
/// segments.
const PACKETS: [(&str, &str, bool); 29] = [
    ("TCP to it", "to(M, TCP, syn)", true),
    ("UDP to it", "to(M, UDP, datagram)", true),
    ("ICMP to it", "to(M, ICMP, echo)", true),
    ("nothing to it", "to(M, 59, b'')", true),
    ("a fragment to it", "to(M, FRAGMENT, fragment(TCP, 8) + bytes(8))", true),
    ("TCP to another", "to(O, TCP, syn)", false),
    ("UDP to another", "to(O, UDP, datagram)", false),
    ("a fragment to another", "to(O, FRAGMENT, fragment(TCP, 0) + syn)", false),
    ("options before TCP", "to(O, OPTIONS, options(TCP) + syn)", false),
    ("its address in the payload", "to(O, UDP, datagram + M + M)", false),
    ("type 0", "to(O, ROUTING, rh(0, M) + syn)", true),
    ("type 0, another's", "to(O, ROUTING, rh(0, O) + syn)", false),
    ("type 0, second of two", "to(O, ROUTING, rh(0, O, M) + syn)", true),
    ("type 0, eighth of eight", "to(O, ROUTING, rh(0, *[O] * 7, M) + syn)", true),
    ("type 0, eight others", "to(O, ROUTING, rh(0, *[O] * 8) + syn)", false),
    ("type 0, more than is looked at", "to(O, ROUTING, rh(0, *[O] * 9) + syn)", true),
    ("type 2", "to(O, ROUTING, rh(2, M) + syn)", true),
    ("type 2, another's", "to(O, ROUTING, rh(2, O) + syn)", false),
    // Its segments may leave out the first bytes of the destination's.
    (
        "type 3",
        "to(O, ROUTING, struct.pack('!BBBBBBH', TCP, 2, 3, 1, 0x11, 0x10, 0) + M[1:] + bytes(1) + syn)",
        true,
    ),
    ("type 4", "to(O, ROUTING, rh(4, M, O) + syn)", true),
    ("type 4, others'", "to(O, ROUTING, rh(4, O, O) + syn)", false),
    // The first is done, and a router looks at the second.
    (
        "behind an empty one",
        "to(O, ROUTING, struct.pack('!BBBBBBH', ROUTING, 0, 4, 0, 0, 0, 0) + rh(4, M) + syn)",
        true,
    ),
    ("behind hop-by-hop options", "to(O, HOPS, options(ROUTING) + rh(0, M) + syn)", true),
    ("behind destination options", "to(O, OPTIONS, options(ROUTING) + rh(0, M) + syn)", true),
    ("behind both", "to(O, HOPS, options(OPTIONS) + options(ROUTING) + rh(0, M) + syn)", true),
    ("in a first fragment", "to(O, FRAGMENT, fragment(ROUTING, 0) + rh(0, M) + syn)", true),
    ("in a later fragment", "to(O, FRAGMENT, fragment(ROUTING, 8) + rh(0, M)[8:] + syn)", true),
    ("behind a long header", "to(O, OPTIONS, options(ROUTING, 30) + rh(0, M) + syn)", true),
    (
        "behind more headers than are looked at",
        "to(O, HOPS, options(OPTIONS) + options(OPTIONS) + options(OPTIONS) + options(ROUTING) + rh(0, M))",
        true,
    ),
];

const SCRIPT: &str = r"
import socket, struct
ROUTING, FRAGMENT, OPTIONS, HOPS, TCP, UDP, ICMP = 43, 44, 60, 0, 6, 17, 58
S, O, M = (socket.inet_pton(socket.AF_INET6, a) for a in ('2001:db8::1', '2001:db8::2', METADATA))
syn = struct.pack('!HHIIBBHHH', 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)
datagram = struct.pack('!HHHH', 40000, 80, 8, 1)
echo = struct.pack('!BBHHH', 128, 0, 0, 0, 0)
raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
def to(destination, header, rest):
    raw.sendto(struct.pack('!IHBB', 6 << 28, len(rest), header, 64) + S + destination + rest, (socket.inet_ntop(socket.AF_INET6, destination), 0))
def rh(kind, *segments):
    return struct.pack('!BBBBBBH', TCP, 2 * len(segments), kind, 1, len(segments) - 1 if kind == 4 else 0, 0, 0) + b''.join(segments)
def options(following, words=0):
    return struct.pack('!BBBB', following, words, 1, 4) + bytes(4) + b''.join(bytes([1, 6, *[0] * 6]) for _ in range(words))
def fragment(following, offset):
    return struct.pack('!BBHI', following, 0, offset | 1, 7)
for line in PACKETS:
    try:
        eval(line)
        print('sent')
    except PermissionError:
        print('refused')
";

fn outcomes(lab: &Lab, cgroup: &str) -> Vec<String> {
    let packets: Vec<_> = PACKETS.iter().map(|(_, packet, _)| *packet).collect();
    let script = format!("METADATA = '{METADATA6}'\nPACKETS = {packets:?}\n{SCRIPT}");
    let output = output(lab, cgroup, &script);
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_packet_that_names_the_ipv6_address_does_not_leave() {
    enter_namespace();
    // A local route: others by way of the loopback device discard packets before egress sees them.
    ip(&["-6", "route", "add", "local", "2001:db8::/32", "dev", "lo"]);
    let lab = Lab::new();
    let _datapath = lab.attach();

    let of_pod = outcomes(&lab, "pods/a");
    let of_host = outcomes(&lab, "host");

    let wrong: Vec<_> = PACKETS
        .iter()
        .zip(of_pod)
        .filter(|((_, _, is_refused), outcome)| outcome != if *is_refused { "refused" } else { "sent" })
        .map(|((name, ..), outcome)| format!("{name}: {outcome}"))
        .collect();
    assert_eq!(wrong, Vec::<String>::new());
    assert_eq!(of_host, vec!["sent"; PACKETS.len()], "the host's are none of its business");
}
