//! What a pod writes into TCP's header is no identity. (Agents that carry one in an option believed any pod
//! with CAP_NET_RAW.)

use std::process::Command;

use kube2ram_agent::datapath::OriginError;

use crate::field::Field;

/// A handshake made by hand, from an address whose packets the kernel drops, so that it does not reset what
/// it knows nothing of. The SYN has both experimental options (RFC 4727), with the victim's cgroup id and
/// cookie.
const FORGE: &str = "SOURCE = ('192.0.2.9', 41000)\n\
    def words(data): return sum(struct.unpack(f'!{len(data) // 2}H', data))\n\
    def segment(seq, ack, flags, options=b''):\n  \
      header = lambda sum: struct.pack('!HHIIBBHHH', SOURCE[1], AGENT[1], seq, ack, (5 + len(options) // 4) << 4, flags, 8192, sum, 0) + options\n  \
      ends = inet_aton(SOURCE[0]) + inet_aton(AGENT[0])\n  \
      total = words(header(0) + ends) + IPPROTO_TCP + 20 + len(options)\n  \
      while total >> 16: total = (total & 0xffff) + (total >> 16)\n  \
      tcp = header(~total & 0xffff)\n  \
      return struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(tcp), 1, 0, 64, IPPROTO_TCP, 0) + ends + tcp\n\
    sniffer = socket(AF_PACKET, SOCK_DGRAM, htons(0x800))\nsniffer.bind(('lo', 0x800))\nsniffer.settimeout(20)\n\
    raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW)\n\
    claim = struct.pack('=QQ', CGROUP, COOKIE)\n\
    raw.sendto(segment(1000, 0, 2, b''.join(bytes([kind, 2 + len(claim)]) + claim for kind in (253, 254))), (AGENT[0], 0))\n\
    while True:\n  \
      answer = sniffer.recv(200)\n  \
      if answer[16:20] == inet_aton(SOURCE[0]) and answer[33] == 0x12: break\n\
    raw.sendto(segment(1001, struct.unpack('!I', answer[24:28])[0] + 1, 0x10), (AGENT[0], 0))\nwait()";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_option_in_the_handshake_is_no_identity() {
    let field = Field::new("option");
    let route = Command::new("ip").args(["route", "add", "192.0.2.9", "dev", "lo"]).status().unwrap();
    assert!(route.success());
    let mut victim = field.client(
        "pods/a",
        "s = tcp()\ns.connect(METADATA)\nprint(int.from_bytes(s.getsockopt(SOL_SOCKET, 57, 8), sys.byteorder), flush=True)\nwait()",
    );
    let (of_victim, origin) = field.next();
    assert_eq!(origin.unwrap(), field.lab.id("pods/a"));
    let cookie = victim.line();

    let id = field.lab.id("pods/a").0.to_string();
    let forger = field.client("pods/b", &FORGE.replace("CGROUP", &id).replace("COOKIE", &cookie));
    let (forged, origin) = field.next();

    assert_eq!(forged.peer_addr().unwrap(), "192.0.2.9:41000".parse().unwrap());
    assert!(matches!(origin, Err(OriginError::Unvouched)), "{origin:?}");
    forger.finish();
    victim.finish();
    drop((of_victim, forged));
    for pod in ["pods/a", "pods/b"] {
        assert_eq!(field.dial(pod, 41_000).unwrap(), field.lab.id(pod), "not hindered");
    }
    assert_eq!(field.pending(), 0);
}
