//! The netfilter tables as nf_tables messages (include/uapi/linux/netfilter/nf_tables.h), and the comparison
//! with what the kernel reports. Pure. Called by `guard`.
//!
//! One table for each address family, not one of family `inet` for both. `ip kube2ram` is thus the same in
//! every version: an earlier version does not find an unknown table there, and leaves no rules for IPv4
//! behind. It works on kernels without nf_tables for IPv6. And rules on connection tracking enable tracking
//! only for the table's own family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::{Attribute, Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, all_in};

mod expression;

use self::expression::{
    NF_ACCEPT, NF_DROP, by_ipvs, came_in, counter, has_socket, is_for, is_neighbour_discovery, untracked,
    verdict,
};

/// The name of each family's table.
pub(super) const TABLE: &str = "kube2ram";

/// The addresses and the ways that the tables are against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Option<Ipv6Addr>,
    /// Whether IPVS may send there for sockets of this namespace. Telling takes connection tracking, which is
    /// not for nodes that do without.
    pub(super) has_ipvs: bool,
}

impl Target {
    /// This target, then what is left of it without what a kernel may not have (connection tracking, IPv6,
    /// both).
    pub(super) fn and_less(self) -> Vec<Self> {
        let mut targets = vec![self];
        let less = [
            Self { has_ipvs: false, ..self },
            Self { v6: None, ..self },
            Self { v6: None, has_ipvs: false, ..self },
        ];
        for target in less {
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        targets
    }

    fn addresses(self) -> impl Iterator<Item = IpAddr> {
        [IpAddr::V4(self.v4)].into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// An address family with its own table. The number is `NFPROTO_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Family {
    Ipv4 = 2,
    Ipv6 = 10,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

/// A chain of a table. Both, because neither sees all: the first one comes before a Service's proxy that
/// sends again what it received (IPVS), and before source routing has changed the destination; the second
/// one, being later, knows where a packet came in only from Linux 5.7 on.
#[derive(Clone, Copy, Debug)]
struct Chain {
    name: &'static str,
    hook: u32,
}

const FORWARD: Chain = Chain { name: "forward", hook: NF_INET_FORWARD };
const POSTROUTING: Chain = Chain { name: "postrouting", hook: NF_INET_POST_ROUTING };
const CHAINS: [Chain; 2] = [FORWARD, POSTROUTING];

/// The length of `struct nfgenmsg`.
pub(super) const NFGENMSG: usize = 4;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
/// `NF_IP_PRI_RAW`, `NF_IP6_PRI_RAW`: before any firewall's own rules. An *accept* there would not matter,
/// since each chain decides for itself.
const PRIORITY: i32 = -300;

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

fn message(family: Family, kind: u16, flags: u16, attributes: Vec<Attribute>) -> Message {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Message { kind, flags, head: nfgenmsg(family as u8, 0), attributes }
}

/// What every message of netfilter begins with: `struct nfgenmsg`.
fn nfgenmsg(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

/// Messages that take effect together or not at all.
fn batch(mut messages: Vec<Message>) -> Vec<Message> {
    // The acknowledgement of the last one is that of all.
    if let Some(last) = messages.last_mut() {
        last.flags |= NLM_F_ACK;
    }
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

/// The rules of a chain, each on packets for the metadata server's address alone.
///
/// Where packets are forwarded: drop. Elsewhere: against IPVS, drop what it has made the metadata server's,
/// tracked and untracked; accept what has a socket; drop what came in. Before these, IPv6 accepts the node's
/// own neighbour discovery, which IPv4 does by ARP.
fn rules(chain: Chain, metadata: IpAddr, has_ipvs: bool) -> Vec<Vec<Attribute>> {
    const NFTA_RULE_EXPRESSIONS: u16 = 4;
    let accept = |what: &[Attribute]| [&is_for(metadata), what, &[verdict(NF_ACCEPT)]].concat();
    let drop = |what: &[Attribute]| [&is_for(metadata), what, &[counter(), verdict(NF_DROP)]].concat();
    let mut expressions = Vec::new();
    if chain.hook == NF_INET_FORWARD {
        expressions.push(drop(&[]));
    } else {
        if metadata.is_ipv6() {
            expressions.push(accept(&is_neighbour_discovery()));
        }
        if has_ipvs {
            expressions.extend([drop(&by_ipvs(metadata)), drop(&untracked())]);
        }
        expressions.extend([accept(&has_socket()), drop(&came_in())]);
    }
    let rule =
        |expressions| [rule_place(chain), vec![Attribute::Nest(NFTA_RULE_EXPRESSIONS, expressions)]].concat();
    expressions.into_iter().map(rule).collect()
}

/// Writes the tables in one transaction, whatever they were before: the old chains are unhooked when the new
/// ones are hooked. Removes the IPv6 table if it exists (`is_stale`) and the target has no IPv6 address.
pub(super) fn install(target: Target, is_stale: bool) -> Vec<Message> {
    let mut messages: Vec<_> =
        target.addresses().flat_map(|address| table_of(address, target.has_ipvs)).collect();
    if is_stale && target.v6.is_none() {
        messages.push(message(Family::Ipv6, NFT_MSG_DELTABLE, 0, table_name()));
    }
    batch(messages)
}

fn table_of(metadata: IpAddr, has_ipvs: bool) -> Vec<Message> {
    let message = |kind, flags, attributes| message(Family::of(metadata), kind, flags, attributes);
    let mut messages = vec![
        // Added first, because what does not exist cannot be deleted.
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table_name()),
        message(NFT_MSG_DELTABLE, 0, table_name()),
        message(NFT_MSG_NEWTABLE, NLM_F_CREATE, table()),
    ];
    for chain in CHAINS {
        messages.push(message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, base_chain(chain)));
        let rules = rules(chain, metadata, has_ipvs).into_iter();
        messages.extend(rules.map(|rule| message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule)));
    }
    messages
}

/// Deletes a family's table. The kernel's error is `ENOENT` when it does not exist.
pub(super) fn remove(family: Family) -> Vec<Message> {
    batch(vec![message(family, NFT_MSG_DELTABLE, 0, table_name())])
}

/// The request for a family's table. The kernel's error is `ENOENT` when the table does not exist, or when
/// the kernel does not know the family.
pub(super) fn table_query(family: Family) -> Message {
    message(family, NFT_MSG_GETTABLE, NLM_F_ACK, table_name())
}

/// The requests for the active tables: each table, then chain and rules of each. All requests but those for
/// rules fail if the object does not exist.
pub(super) fn queries(target: Target) -> Vec<Message> {
    let of_table = |address| {
        let family = Family::of(address);
        let of_chain = move |chain| {
            [
                message(family, NFT_MSG_GETCHAIN, NLM_F_ACK, chain_name(chain)),
                message(family, NFT_MSG_GETRULE, NLM_F_DUMP, rule_place(chain)),
            ]
        };
        [table_query(family)].into_iter().chain(CHAINS.into_iter().flat_map(of_chain))
    };
    target.addresses().flat_map(of_table).collect()
}

/// Returns whether the replies are what [`install`] writes: these tables, these chains in each, and in each
/// chain only its rules, in their order.
pub(super) fn is_installed(target: Target, replies: &[Vec<Vec<u8>>]) -> bool {
    let of_table = |address| {
        let of_chain = move |chain| [vec![base_chain(chain)], rules(chain, address, target.has_ipvs)];
        [vec![table()]].into_iter().chain(CHAINS.into_iter().flat_map(of_chain))
    };
    let wanted: Vec<_> = target.addresses().flat_map(of_table).collect();
    wanted.len() == replies.len()
        && wanted.iter().zip(replies).all(|(wanted, found)| {
            wanted.len() == found.len() && wanted.iter().zip(found).all(|(one, found)| all_in(one, found))
        })
}

#[cfg(test)]
mod tests;
