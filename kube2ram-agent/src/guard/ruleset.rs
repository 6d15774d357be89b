//! The forward guard's table as nf_tables messages (include/uapi/linux/netfilter/nf_tables.h), and whether what the kernel tells is that
//! table. Pure. Called by `guard`.

use std::net::Ipv4Addr;

use super::netlink::{Attribute, Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, all_in};

pub(super) const TABLE: &str = "kube2ram";
const CHAIN: &str = "forward";

const NFPROTO_IPV4: u8 = 2;
const NF_INET_FORWARD: u32 = 2;
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
    Message { kind, flags, family: NFPROTO_IPV4, resource: 0, attributes }
}

/// Messages that take effect together or not at all.
fn batch(messages: Vec<Message>) -> Vec<Message> {
    let edge =
        |kind| Message { kind, flags: 0, family: 0, resource: NFNL_SUBSYS_NFTABLES, attributes: vec![] };
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

fn chain_name() -> Vec<Attribute> {
    const NFTA_CHAIN_TABLE: u16 = 1;
    const NFTA_CHAIN_NAME: u16 = 3;
    vec![Attribute::text(NFTA_CHAIN_TABLE, TABLE), Attribute::text(NFTA_CHAIN_NAME, CHAIN)]
}

fn chain() -> Vec<Attribute> {
    const NFTA_CHAIN_HOOK: u16 = 4;
    const NFTA_CHAIN_POLICY: u16 = 5;
    const NFTA_CHAIN_TYPE: u16 = 7;
    const NFTA_HOOK_HOOKNUM: u16 = 1;
    const NFTA_HOOK_PRIORITY: u16 = 2;
    let hook = vec![
        Attribute::number(NFTA_HOOK_HOOKNUM, NF_INET_FORWARD),
        Attribute::number(NFTA_HOOK_PRIORITY, PRIORITY.cast_unsigned()),
    ];
    let rest = vec![
        Attribute::Nest(NFTA_CHAIN_HOOK, hook),
        Attribute::number(NFTA_CHAIN_POLICY, NF_ACCEPT),
        Attribute::text(NFTA_CHAIN_TYPE, "filter"),
    ];
    [chain_name(), rest].concat()
}

fn rule_place() -> Vec<Attribute> {
    const NFTA_RULE_TABLE: u16 = 1;
    const NFTA_RULE_CHAIN: u16 = 2;
    vec![Attribute::text(NFTA_RULE_TABLE, TABLE), Attribute::text(NFTA_RULE_CHAIN, CHAIN)]
}

/// `ip daddr <metadata> counter drop`.
fn rule(metadata: Ipv4Addr) -> Vec<Attribute> {
    const NFTA_RULE_EXPRESSIONS: u16 = 4;
    const NFT_REG_VERDICT: u32 = 0;
    const NFT_REG_1: u32 = 1;
    const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
    /// RFC 791: where the destination stands in the header.
    const DESTINATION: (u32, u32) = (16, 4);
    const NFT_CMP_EQ: u32 = 0;
    const NFTA_DATA_VALUE: u16 = 1;
    const NFTA_DATA_VERDICT: u16 = 2;
    const NFTA_VERDICT_CODE: u16 = 1;
    // Numbers of each expression's own attributes follow their order: NFTA_PAYLOAD_{DREG,BASE,OFFSET,LEN}, NFTA_CMP_{SREG,OP,DATA},
    // NFTA_IMMEDIATE_{DREG,DATA}.
    let load = vec![
        Attribute::number(1, NFT_REG_1),
        Attribute::number(2, NFT_PAYLOAD_NETWORK_HEADER),
        Attribute::number(3, DESTINATION.0),
        Attribute::number(4, DESTINATION.1),
    ];
    let compare = vec![
        Attribute::number(1, NFT_REG_1),
        Attribute::number(2, NFT_CMP_EQ),
        Attribute::Nest(3, vec![Attribute::Value(NFTA_DATA_VALUE, metadata.octets().into())]),
    ];
    let verdict = vec![Attribute::number(NFTA_VERDICT_CODE, NF_DROP)];
    let drop = vec![
        Attribute::number(1, NFT_REG_VERDICT),
        Attribute::Nest(2, vec![Attribute::Nest(NFTA_DATA_VERDICT, verdict)]),
    ];
    let expressions = vec![
        expression("payload", load),
        expression("cmp", compare),
        expression("counter", vec![]), // whatever it has counted
        expression("immediate", drop),
    ];
    [rule_place(), vec![Attribute::Nest(NFTA_RULE_EXPRESSIONS, expressions)]].concat()
}

fn expression(name: &str, data: Vec<Attribute>) -> Attribute {
    const NFTA_LIST_ELEM: u16 = 1;
    const NFTA_EXPR_NAME: u16 = 1;
    const NFTA_EXPR_DATA: u16 = 2;
    let attributes = vec![Attribute::text(NFTA_EXPR_NAME, name), Attribute::Nest(NFTA_EXPR_DATA, data)];
    Attribute::Nest(NFTA_LIST_ELEM, attributes)
}

/// Makes the table anew, whatever it was before, in one transaction: the old chain is unhooked when the new one is in place.
pub(super) fn install(metadata: Ipv4Addr) -> Vec<Message> {
    batch(vec![
        // Added first, because what does not exist cannot be deleted.
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table_name()),
        message(NFT_MSG_DELTABLE, 0, table_name()),
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table()),
        message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain()),
        message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_ACK, rule(metadata)),
    ])
}

/// Deletes the table. The kernel's error is `ENOENT` when there is none.
pub(super) fn remove() -> Vec<Message> {
    batch(vec![message(NFT_MSG_DELTABLE, NLM_F_ACK, table_name())])
}

/// The requests whose replies tell what is in force: table, chain, rules. The former two are errors when there is none.
pub(super) fn queries() -> [Message; 3] {
    [
        message(NFT_MSG_GETTABLE, NLM_F_ACK, table_name()),
        message(NFT_MSG_GETCHAIN, NLM_F_ACK, chain_name()),
        message(NFT_MSG_GETRULE, NLM_F_DUMP, rule_place()),
    ]
}

/// Tells whether the replies are what [`install`] makes: that table, that chain in it, and that rule alone in the chain.
pub(super) fn is_installed(metadata: Ipv4Addr, replies: &[Vec<Vec<u8>>; 3]) -> bool {
    [table(), chain(), rule(metadata)]
        .iter()
        .zip(replies)
        .all(|(wanted, found)| matches!(found.as_slice(), [one] if all_in(wanted, one)))
}

#[cfg(test)]
mod tests {
    use super::{super::netlink::encode, *};

    const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

    /// The attributes as the kernel would tell them.
    fn told(attributes: Vec<Attribute>) -> Vec<Vec<u8>> {
        vec![encode(&[message(0, 0, attributes)], 0)[20..].to_vec()]
    }

    #[test]
    fn only_the_whole_table_is_the_table() {
        let whole = [told(table()), told(chain()), told(rule(METADATA))];
        let with = |at: usize, reply: Vec<Vec<u8>>| {
            let mut replies = whole.clone();
            replies[at] = reply;
            is_installed(METADATA, &replies)
        };

        assert!(is_installed(METADATA, &whole));
        assert!(!is_installed(Ipv4Addr::new(100, 100, 100, 201), &whole));
        let dormant = [table_name(), vec![Attribute::number(2, 1)]].concat();
        assert!(!with(0, told(dormant)));
        for at in 0..3 {
            assert!(!with(at, vec![]), "{at}");
        }
        assert!(!with(2, [told(rule_place()), told(rule(METADATA))].concat()), "a rule before ours");
    }
}
