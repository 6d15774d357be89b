//! Matches and targets of xtables as bytes (include/uapi/linux/netfilter/{x_tables,xt_tcpudp,nf_nat}.h), in the words of iptables. Both kinds of iptables
//! have them: the legacy tables, and nf_tables within expressions. Pure. Called by `legacy` and `nf_tables`.

use std::net::Ipv4Addr;

use super::rule::Destination;

/// What a target does with a packet, as far as it leads it elsewhere.
pub(super) struct Nat {
    pub(super) to: Destination,
    /// `None` when iptables would say more than that.
    pub(super) words: Option<Vec<String>>,
}

/// The words for a match; `None` when it is not understood.
pub(super) fn match_words(name: &[u8], revision: u8, info: &[u8]) -> Option<Vec<String>> {
    let protocol = match (name, revision) {
        (b"tcp", 0) => "tcp",
        (b"udp", 0) => "udp",
        _ => return None,
    };
    // struct xt_tcp { u16 spts[2], dpts[2]; u8 option, flg_mask, flg_cmp, invflags; }, struct xt_udp { u16 spts[2], dpts[2]; u8 invflags; }
    let ports = info.first_chunk::<8>()?;
    let port = |at: usize| u16::from_ne_bytes([ports[at], ports[at + 1]]);
    let rest = &info[8..];
    let used = if protocol == "tcp" { 4 } else { 1 };
    if (port(0), port(2)) != (0, u16::MAX) || rest.get(..used)?.iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut words = vec!["-m".to_owned(), protocol.to_owned()];
    match (port(4), port(6)) {
        (0, u16::MAX) => {}
        (first, last) if first == last => words.extend(["--dport".to_owned(), first.to_string()]),
        (first, last) => words.extend(["--dport".to_owned(), format!("{first}:{last}")]),
    }
    Some(words)
}

/// What a target leads to; `None` when it leads nowhere else.
pub(super) fn nat(name: &[u8], revision: u8, info: &[u8]) -> Option<Nat> {
    let range = match (name, revision) {
        // struct nf_nat_ipv4_multi_range_compat { u32 rangesize; struct { u32 flags; be32 min, max; be16 min, max; } range[1]; }
        (b"DNAT" | b"REDIRECT", 0) => info.get(4..).and_then(|range| range_of(range, 4)),
        // struct nf_nat_range{,2} { u32 flags; union nf_inet_addr min, max; be16 min, max; [be16 base] }
        (b"DNAT", 1 | 2) => range_of(info, 16),
        (b"DNAT" | b"REDIRECT", _) => None,
        _ => return None,
    };
    // One that is told in a way that nobody knew yet leads elsewhere all the same.
    let unknown = Nat { to: Destination::default(), words: None };
    let Some(range) = range else { return Some(unknown) };
    let to = Destination {
        addr: (name == b"DNAT" && range.flags & MAP_IPS != 0).then_some(range.addrs.0),
        port: (range.flags & PROTO_SPECIFIED != 0).then_some(range.ports.0),
    };
    let is_one = range.flags & !(MAP_IPS | PROTO_SPECIFIED) == 0
        && (to.addr.is_none() || range.addrs.0 == range.addrs.1)
        && (to.port.is_none() || range.ports.0 == range.ports.1);
    let said = match to {
        Destination { addr: Some(addr), port: Some(port) } => {
            Some(("DNAT", "--to-destination", format!("{addr}:{port}")))
        }
        Destination { addr: Some(addr), port: None } => Some(("DNAT", "--to-destination", addr.to_string())),
        Destination { addr: None, port: Some(port) } if name == b"REDIRECT" => {
            Some(("REDIRECT", "--to-ports", port.to_string()))
        }
        Destination { .. } => None,
    };
    let words = said
        .filter(|_| is_one)
        .map(|(target, flag, value)| vec!["-j".to_owned(), target.to_owned(), flag.to_owned(), value]);
    Some(Nat { to, words })
}

/// NF_NAT_RANGE_MAP_IPS.
const MAP_IPS: u32 = 1;
/// NF_NAT_RANGE_PROTO_SPECIFIED.
const PROTO_SPECIFIED: u32 = 2;

struct Range {
    flags: u32,
    addrs: (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
}

/// A range whose addresses take so many bytes each.
fn range_of(bytes: &[u8], width: usize) -> Option<Range> {
    let addr = |at: usize| bytes.get(at..)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets));
    let port = |at: usize| bytes.get(at..)?.first_chunk::<2>().map(|port| u16::from_be_bytes(*port));
    Some(Range {
        flags: u32::from_ne_bytes(*bytes.first_chunk()?),
        addrs: (addr(4)?, addr(4 + width)?),
        ports: (port(4 + 2 * width)?, port(6 + 2 * width)?),
    })
}

/// A device as both kinds of table write it: a name, with what follows of it open when its end is not told.
pub(super) fn device(bytes: &[u8]) -> Option<String> {
    const IFNAMSIZ: usize = 16;
    let (name, end) = match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => (&bytes[..end], ""),
        None if bytes.len() < IFNAMSIZ => (bytes, "+"),
        None => return None,
    };
    std::str::from_utf8(name).ok().filter(|name| !name.is_empty()).map(|name| format!("{name}{end}"))
}
