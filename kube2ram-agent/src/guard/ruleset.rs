//! The forward guard's table as nf_tables messages (include/uapi/linux/netfilter/nf_tables.h), and whether what the kernel tells is that
//! table. Pure. Called by `guard`.

use std::net::Ipv4Addr;

use crate::netlink::{Attribute, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, all_in};

pub(super) const TABLE: &str = "kube2ram";

/// What the table is against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) metadata: Ipv4Addr,
    /// Whether IPVS may send there for sockets of this namespace. Telling takes connection tracking, which is not for nodes that do without.
    pub(super) has_ipvs: bool,
}

/// A chain of the table. Both, because neither sees all: the first one comes before a Service's proxy that sends again what it received (IPVS), and before
/// source routing has changed the destination; the second one, being later, knows where a packet came in only from Linux 5.7 on.
#[derive(Clone, Copy, Debug)]
struct Chain {
    name: &'static str,
    hook: u32,
}

const FORWARD: Chain = Chain { name: "forward", hook: NF_INET_FORWARD };
const POSTROUTING: Chain = Chain { name: "postrouting", hook: NF_INET_POST_ROUTING };

/// The length of `struct nfgenmsg`.
pub(super) const NFGENMSG: usize = 4;
const NFPROTO_IPV4: u8 = 2;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
/// `NF_IP_PRI_RAW`: before any firewall's own rules. An *accept* there would not matter, since each chain decides for itself.
const PRIORITY: i32 = -300;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;

fn message(kind: u16, flags: u16, attributes: Vec<Attribute>) -> Message {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Message { kind, flags, head: nfgenmsg(NFPROTO_IPV4, 0), attributes }
}

/// What every message of netfilter begins with: `struct nfgenmsg`.
fn nfgenmsg(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

/// Messages that take effect together or not at all.
fn batch(messages: Vec<Message>) -> Vec<Message> {
    let head = nfgenmsg(0, NFNL_SUBSYS_NFTABLES);
    let edge = |kind| Message { kind, flags: 0, head: head.clone(), attributes: vec![] };
    [vec![edge(NFNL_MSG_BATCH_BEGIN)], messages, vec![edge(NFNL_MSG_BATCH_END)]].concat()
}

fn table_name() -> Vec<Attribute> {
    const NFTA_TABLE_NAME: u16 = 1;
    vec![Attribute::text(NFTA_TABLE_NAME, TABLE)]
}

/// A table that is not dormant.
fn table() -> Vec<Attribute> {
    const NFTA_TABLE_FLAGS: u16 = 2;
    [table_name(), vec![Attribute::number(NFTA_TABLE_FLAGS, 0)]].concat()
}

fn chain_name(chain: Chain) -> Vec<Attribute> {
    const NFTA_CHAIN_TABLE: u16 = 1;
    const NFTA_CHAIN_NAME: u16 = 3;
    vec![Attribute::text(NFTA_CHAIN_TABLE, TABLE), Attribute::text(NFTA_CHAIN_NAME, chain.name)]
}

fn base_chain(chain: Chain) -> Vec<Attribute> {
    const NFTA_CHAIN_HOOK: u16 = 4;
    const NFTA_CHAIN_POLICY: u16 = 5;
    const NFTA_CHAIN_TYPE: u16 = 7;
    const NFTA_HOOK_HOOKNUM: u16 = 1;
    const NFTA_HOOK_PRIORITY: u16 = 2;
    let hook = vec![
        Attribute::number(NFTA_HOOK_HOOKNUM, chain.hook),
        Attribute::number(NFTA_HOOK_PRIORITY, PRIORITY.cast_unsigned()),
    ];
    let rest = vec![
        Attribute::Nest(NFTA_CHAIN_HOOK, hook),
        Attribute::number(NFTA_CHAIN_POLICY, NF_ACCEPT),
        Attribute::text(NFTA_CHAIN_TYPE, "filter"),
    ];
    [chain_name(chain), rest].concat()
}

fn rule_place(chain: Chain) -> Vec<Attribute> {
    const NFTA_RULE_TABLE: u16 = 1;
    const NFTA_RULE_CHAIN: u16 = 2;
    vec![Attribute::text(NFTA_RULE_TABLE, TABLE), Attribute::text(NFTA_RULE_CHAIN, chain.name)]
}

const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

// Numbers of each expression's own attributes follow their order: NFTA_PAYLOAD_{DREG,BASE,OFFSET,LEN}, NFTA_CMP_{SREG,OP,DATA}, NFTA_META_{DREG,KEY},
// NFTA_IMMEDIATE_{DREG,DATA}, NFTA_CT_{DREG,KEY,DIRECTION}, NFTA_BITWISE_{SREG,DREG,LEN,MASK,XOR}.

/// `ip daddr <metadata>`.
fn is_for(metadata: Ipv4Addr) -> [Attribute; 2] {
    const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
    /// RFC 791: where the destination stands in the header.
    const DESTINATION: (u32, u32) = (16, 4);
    let load = vec![
        Attribute::number(1, NFT_REG_1),
        Attribute::number(2, NFT_PAYLOAD_NETWORK_HEADER),
        Attribute::number(3, DESTINATION.0),
        Attribute::number(4, DESTINATION.1),
    ];
    [expression("payload", load), compare(NFT_CMP_EQ, metadata.octets().into())]
}

/// `iif != 0`: it came in by a device, so it is not from a socket of this namespace. (The socket alone would not tell: one that was closed and still
/// has something to say has no owner any more.) Linux 5.7.
fn came_in() -> [Attribute; 2] {
    const NFT_META_IIF: u32 = 4;
    [expression("meta", meta(NFT_META_IIF)), compare(NFT_CMP_NEQ, vec![0; 4])]
}

/// `meta skuid != 4294967295`, which nobody has: true of any socket, and of nothing else. Packets of raw sockets that bring their own header look as if
/// they had come in.
fn has_socket() -> [Attribute; 2] {
    const NFT_META_SKUID: u32 = 10;
    [expression("meta", meta(NFT_META_SKUID)), compare(NFT_CMP_NEQ, vec![0xff; 4])]
}

/// `ct direction original ct original ip daddr != <metadata> ct status ! dnat`: IPVS has made it the metadata server's. (What netfilter has translated
/// says so, and passes the hooks of its socket's cgroup.)
fn by_ipvs(metadata: Ipv4Addr) -> [Attribute; 7] {
    const NFT_CT_DIRECTION: u32 = 1;
    const NFT_CT_STATUS: u32 = 2;
    const NFT_CT_DST_IP: u32 = 20;
    const IP_CT_DIR_ORIGINAL: u8 = 0;
    const IPS_DST_NAT: u32 = 1 << 5;
    let destination = [meta(NFT_CT_DST_IP), vec![Attribute::Value(3, vec![IP_CT_DIR_ORIGINAL])]].concat();
    [
        expression("ct", meta(NFT_CT_DIRECTION)),
        compare(NFT_CMP_EQ, vec![IP_CT_DIR_ORIGINAL]),
        expression("ct", destination),
        compare(NFT_CMP_NEQ, metadata.octets().into()),
        expression("ct", meta(NFT_CT_STATUS)),
        only_bits(IPS_DST_NAT),
        compare(NFT_CMP_EQ, vec![0; 4]),
    ]
}

/// `ct state untracked`: so does IPVS mark what it sends unless it was told to have its connections tracked, as kube-proxy does.
fn untracked() -> [Attribute; 3] {
    const NFT_CT_STATE: u32 = 0;
    const NF_CT_STATE_UNTRACKED_BIT: u32 = 1 << 6;
    [
        expression("ct", meta(NFT_CT_STATE)),
        only_bits(NF_CT_STATE_UNTRACKED_BIT),
        compare(NFT_CMP_NEQ, vec![0; 4]),
    ]
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

fn counter() -> Attribute {
    expression("counter", vec![]) // whatever it has counted
}

fn verdict(code: u32) -> Attribute {
    const NFTA_DATA_VERDICT: u16 = 2;
    const NFTA_VERDICT_CODE: u16 = 1;
    let verdict = vec![Attribute::number(NFTA_VERDICT_CODE, code)];
    let data = vec![Attribute::Nest(NFTA_DATA_VERDICT, verdict)];
    expression("immediate", vec![Attribute::number(1, NFT_REG_VERDICT), Attribute::Nest(2, data)])
}

/// `ip daddr <metadata> counter drop` where packets are forwarded; elsewhere `ip daddr <metadata> meta skuid != 4294967295 accept`, then
/// `ip daddr <metadata> iif != 0 counter drop`; and before them, against IPVS, `ip daddr <metadata> ct … counter drop` for what is tracked and what is not.
fn rules(chain: Chain, Target { metadata, has_ipvs }: Target) -> Vec<Vec<Attribute>> {
    const NFTA_RULE_EXPRESSIONS: u16 = 4;
    let mut expressions = if chain.hook == NF_INET_FORWARD {
        vec![[&is_for(metadata)[..], &[counter(), verdict(NF_DROP)]].concat()]
    } else {
        vec![
            [&is_for(metadata)[..], &has_socket(), &[verdict(NF_ACCEPT)]].concat(),
            [&is_for(metadata)[..], &came_in(), &[counter(), verdict(NF_DROP)]].concat(),
        ]
    };
    if has_ipvs && chain.hook == NF_INET_POST_ROUTING {
        let drop = |what: &[Attribute]| [&is_for(metadata), what, &[counter(), verdict(NF_DROP)]].concat();
        expressions.splice(..0, [drop(&by_ipvs(metadata)), drop(&untracked())]);
    }
    let rule =
        |expressions| [rule_place(chain), vec![Attribute::Nest(NFTA_RULE_EXPRESSIONS, expressions)]].concat();
    expressions.into_iter().map(rule).collect()
}

fn expression(name: &str, data: Vec<Attribute>) -> Attribute {
    const NFTA_LIST_ELEM: u16 = 1;
    const NFTA_EXPR_NAME: u16 = 1;
    const NFTA_EXPR_DATA: u16 = 2;
    let attributes = vec![Attribute::text(NFTA_EXPR_NAME, name), Attribute::Nest(NFTA_EXPR_DATA, data)];
    Attribute::Nest(NFTA_LIST_ELEM, attributes)
}

/// Makes the table anew, whatever it was before, in one transaction: the old chains are unhooked when the new ones are in place.
pub(super) fn install(target: Target) -> Vec<Message> {
    let mut messages = vec![
        // Added first, because what does not exist cannot be deleted.
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table_name()),
        message(NFT_MSG_DELTABLE, 0, table_name()),
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table()),
    ];
    for chain in [FORWARD, POSTROUTING] {
        messages.push(message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, base_chain(chain)));
        let rules = rules(chain, target).into_iter();
        messages.extend(rules.map(|rule| message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule)));
    }
    // The acknowledgement of the last one is that of all.
    if let Some(last) = messages.last_mut() {
        last.flags |= NLM_F_ACK;
    }
    batch(messages)
}

/// Deletes the table. The kernel's error is `ENOENT` when there is none.
pub(super) fn remove() -> Vec<Message> {
    batch(vec![message(NFT_MSG_DELTABLE, NLM_F_ACK, table_name())])
}

/// The requests whose replies tell what is in force: the table, then chain and rules of each. All but those for rules are errors when there is none.
pub(super) fn queries() -> Vec<Message> {
    let of_chain = |chain| {
        [
            message(NFT_MSG_GETCHAIN, NLM_F_ACK, chain_name(chain)),
            message(NFT_MSG_GETRULE, NLM_F_DUMP, rule_place(chain)),
        ]
    };
    let table = message(NFT_MSG_GETTABLE, NLM_F_ACK, table_name());
    [vec![table], of_chain(FORWARD).into(), of_chain(POSTROUTING).into()].concat()
}

/// Tells whether the replies are what [`install`] makes: that table, those chains in it, and in each its rules alone, in their order.
pub(super) fn is_installed(target: Target, replies: &[Vec<Vec<u8>>]) -> bool {
    let wanted =
        [FORWARD, POSTROUTING].into_iter().flat_map(|chain| [vec![base_chain(chain)], rules(chain, target)]);
    let wanted: Vec<_> = [vec![table()]].into_iter().chain(wanted).collect();
    wanted.len() == replies.len()
        && wanted.iter().zip(replies).all(|(wanted, found)| {
            wanted.len() == found.len() && wanted.iter().zip(found).all(|(one, found)| all_in(one, found))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{HEADER, encode};

    const TARGET: Target = Target { metadata: Ipv4Addr::new(100, 100, 100, 200), has_ipvs: true };

    /// The attributes as the kernel would tell them.
    fn told(attributes: Vec<Attribute>) -> Vec<Vec<u8>> {
        vec![encode(&[message(0, 0, attributes)], 0)[HEADER + NFGENMSG..].to_vec()]
    }

    #[test]
    fn only_the_whole_table_is_the_table() {
        let all = |chain| rules(chain, TARGET).into_iter().flat_map(told).collect::<Vec<_>>();
        let whole = [
            told(table()),
            told(base_chain(FORWARD)),
            all(FORWARD),
            told(base_chain(POSTROUTING)),
            all(POSTROUTING),
        ];
        let with = |at: usize, reply: Vec<Vec<u8>>| {
            let mut replies = whole.clone();
            replies[at] = reply;
            is_installed(TARGET, &replies)
        };

        assert!(is_installed(TARGET, &whole));
        assert!(!is_installed(Target { metadata: Ipv4Addr::new(100, 100, 100, 201), ..TARGET }, &whole));
        assert!(!is_installed(Target { has_ipvs: false, ..TARGET }, &whole));
        assert!(!is_installed(TARGET, &whole[..4]));
        let dormant = [table_name(), vec![Attribute::number(2, 1)]].concat();
        assert!(!with(0, told(dormant)));
        for at in 0..whole.len() {
            assert!(!with(at, vec![]), "{at}");
        }
        assert!(!with(2, [told(rule_place(FORWARD)), all(FORWARD)].concat()), "a rule before ours");
        assert!(!with(4, all(POSTROUTING).into_iter().rev().collect()), "another order");
    }
}
