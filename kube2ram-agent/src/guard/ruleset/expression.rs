//! The expressions that the rules are made of, as nf_tables attributes. Pure. Called by `ruleset`.
//!
//! Numbers of each expression's own attributes follow their order: NFTA_PAYLOAD_{DREG,BASE,OFFSET,LEN},
//! NFTA_CMP_{SREG,OP,DATA}, NFTA_META_{DREG,KEY}, NFTA_IMMEDIATE_{DREG,DATA}, NFTA_CT_{DREG,KEY,DIRECTION},
//! NFTA_BITWISE_{SREG,DREG,LEN,MASK,XOR}.

use std::net::IpAddr;

use crate::netlink::Attribute;

const NFT_REG_VERDICT: u32 = 0;
/// It has 16 bytes, which an IPv6 address fits in.
const NFT_REG_1: u32 = 1;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

pub(super) const NF_DROP: u32 = 0;
pub(super) const NF_ACCEPT: u32 = 1;

/// `ip daddr <metadata>` or `ip6 daddr <metadata>`.
pub(super) fn is_for(metadata: IpAddr) -> [Attribute; 2] {
    // The destination's offset in the header: RFC 791, RFC 8200.
    let (offset, length) = match metadata {
        IpAddr::V4(_) => (16, 4),
        IpAddr::V6(_) => (24, 16),
    };
    [of_network_header(offset, length), compare(NFT_CMP_EQ, octets(metadata))]
}

/// `meta l4proto ipv6-icmp ip6 hoplimit 255`: neighbour discovery of the node itself. Its packets have no
/// socket in the sense of `meta skuid`, and look like received packets, because the kernel has set their
/// device already (`ndisc_alloc_skb`). Without them the metadata server cannot send to the node if both are
/// on one link. Forwarded packets have a hop limit of at most 254 (RFC 4861, 7.1.1).
pub(super) fn is_neighbour_discovery() -> [Attribute; 4] {
    const NFT_META_L4PROTO: u32 = 16;
    const IPPROTO_ICMPV6: u8 = 58;
    const HOP_LIMIT: (u32, u32) = (7, 1);
    [
        expression("meta", meta(NFT_META_L4PROTO)),
        compare(NFT_CMP_EQ, vec![IPPROTO_ICMPV6]),
        of_network_header(HOP_LIMIT.0, HOP_LIMIT.1),
        compare(NFT_CMP_EQ, vec![u8::MAX]),
    ]
}

/// `iif != 0`: the packet was received by a device, so it is not from a socket of this namespace. (The socket
/// alone is not enough: a closed socket that still sends has no owner.) Linux 5.7.
pub(super) fn came_in() -> [Attribute; 2] {
    const NFT_META_IIF: u32 = 4;
    [expression("meta", meta(NFT_META_IIF)), compare(NFT_CMP_NEQ, vec![0; 4])]
}

/// `meta skuid != 4294967295`, an id that no user has: matches packets with a socket, and no others. Packets
/// of raw sockets with `IP_HDRINCL` look like received packets.
pub(super) fn has_socket() -> [Attribute; 2] {
    const NFT_META_SKUID: u32 = 10;
    [expression("meta", meta(NFT_META_SKUID)), compare(NFT_CMP_NEQ, vec![0xff; 4])]
}

/// `ct direction original ct original ip daddr != <metadata> ct status ! dnat`, or `ip6`: IPVS has rewritten
/// the destination to the metadata server. (A packet that netfilter has translated has the dnat status, and
/// passes the hooks of its socket's cgroup.)
pub(super) fn by_ipvs(metadata: IpAddr) -> [Attribute; 7] {
    const NFT_CT_DIRECTION: u32 = 1;
    const NFT_CT_STATUS: u32 = 2;
    const NFT_CT_DST_IP: u32 = 20;
    const NFT_CT_DST_IP6: u32 = 22;
    const IP_CT_DIR_ORIGINAL: u8 = 0;
    const IPS_DST_NAT: u32 = 1 << 5;
    let key = if metadata.is_ipv4() { NFT_CT_DST_IP } else { NFT_CT_DST_IP6 };
    let destination = [meta(key), vec![Attribute::Value(3, vec![IP_CT_DIR_ORIGINAL])]].concat();
    [
        expression("ct", meta(NFT_CT_DIRECTION)),
        compare(NFT_CMP_EQ, vec![IP_CT_DIR_ORIGINAL]),
        expression("ct", destination),
        compare(NFT_CMP_NEQ, octets(metadata)),
        expression("ct", meta(NFT_CT_STATUS)),
        only_bits(IPS_DST_NAT),
        compare(NFT_CMP_EQ, vec![0; 4]),
    ]
}

/// `ct state untracked`: IPVS marks the packets that it sends this way, unless connection tracking is enabled
/// for it, as kube-proxy does.
pub(super) fn untracked() -> [Attribute; 3] {
    const NFT_CT_STATE: u32 = 0;
    const NF_CT_STATE_UNTRACKED_BIT: u32 = 1 << 6;
    [
        expression("ct", meta(NFT_CT_STATE)),
        only_bits(NF_CT_STATE_UNTRACKED_BIT),
        compare(NFT_CMP_NEQ, vec![0; 4]),
    ]
}

pub(super) fn counter() -> Attribute {
    expression("counter", vec![]) // whatever it has counted
}

pub(super) fn verdict(code: u32) -> Attribute {
    const NFTA_DATA_VERDICT: u16 = 2;
    const NFTA_VERDICT_CODE: u16 = 1;
    let verdict = vec![Attribute::number(NFTA_VERDICT_CODE, code)];
    let data = vec![Attribute::Nest(NFTA_DATA_VERDICT, verdict)];
    expression("immediate", vec![Attribute::number(1, NFT_REG_VERDICT), Attribute::Nest(2, data)])
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

fn of_network_header(offset: u32, length: u32) -> Attribute {
    const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
    let load = vec![
        Attribute::number(1, NFT_REG_1),
        Attribute::number(2, NFT_PAYLOAD_NETWORK_HEADER),
        Attribute::number(3, offset),
        Attribute::number(4, length),
    ];
    expression("payload", load)
}

/// Where to, and what: of the expressions *meta* and *ct* alike.
fn meta(key: u32) -> Vec<Attribute> {
    vec![Attribute::number(1, NFT_REG_1), Attribute::number(2, key)]
}

/// What the register holds and the mask has.
fn only_bits(mask: u32) -> Attribute {
    let bytes = |value: u32| vec![Attribute::Value(NFTA_DATA_VALUE, value.to_ne_bytes().into())];
    let data = vec![
        Attribute::number(1, NFT_REG_1),
        Attribute::number(2, NFT_REG_1),
        Attribute::number(3, 4),
        Attribute::Nest(4, bytes(mask)),
        Attribute::Nest(5, bytes(0)),
    ];
    expression("bitwise", data)
}

fn compare(operator: u32, value: Vec<u8>) -> Attribute {
    let data = Attribute::Nest(3, vec![Attribute::Value(NFTA_DATA_VALUE, value)]);
    expression("cmp", vec![Attribute::number(1, NFT_REG_1), Attribute::number(2, operator), data])
}

fn expression(name: &str, data: Vec<Attribute>) -> Attribute {
    const NFTA_LIST_ELEM: u16 = 1;
    const NFTA_EXPR_NAME: u16 = 1;
    const NFTA_EXPR_DATA: u16 = 2;
    let attributes = vec![Attribute::text(NFTA_EXPR_NAME, name), Attribute::Nest(NFTA_EXPR_DATA, data)];
    Attribute::Nest(NFTA_LIST_ELEM, attributes)
}
