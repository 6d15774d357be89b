//! Rules in nf_tables (include/uapi/linux/netfilter/nf_tables.h): those of `nft`, and those of `iptables-nft`, which hold matches and targets of xtables.
//! All but the questions is pure. Called by `ancestor`; depends on `netlink`.

use std::{collections::HashMap, io, net::Ipv4Addr};

use rustix::net::netlink;

use super::{
    MAX_RULES,
    rule::{Destination, Place, Rule},
    xtables::{self, device},
};
use crate::netlink::{Attribute, Message, Socket, attribute, attributes, uninterrupted};

/// The rules of chains of NAT at PREROUTING and OUTPUT that lead `metadata` elsewhere.
///
/// # Errors
/// The kernel's, unless it is that it has no nf_tables.
pub(super) fn rules(metadata: Ipv4Addr) -> io::Result<Vec<Rule>> {
    match all(metadata) {
        Err(error) if ABSENT.iter().any(|errno| error.raw_os_error() == Some(*errno)) => Ok(Vec::new()),
        outcome => outcome,
    }
}

/// What a kernel without nf_tables says.
const ABSENT: [i32; 4] = [libc::EINVAL, libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT];
/// Of 32 KiB each: kube-proxy may have some 100,000 rules.
const MAX_DATAGRAMS: usize = 4096;
/// A node has one for each tool.
const MAX_CHAINS: usize = 64;

fn all(metadata: Ipv4Addr) -> io::Result<Vec<Rule>> {
    let mut socket = Socket::open(Some(netlink::NETFILTER), MAX_DATAGRAMS)?;
    let chains = uninterrupted(|| {
        let mut chains = Vec::new();
        socket.request(&[query(NFT_MSG_GETCHAIN, UNSPECIFIED, vec![])], |_, payload| {
            chains.extend(Chain::read(payload).filter(|_| chains.len() < MAX_CHAINS));
        })?;
        Ok(chains)
    })?;
    let mut rules = Vec::new();
    for chain in chains {
        let place = vec![
            Attribute::text(NFTA_RULE_TABLE, &chain.table),
            Attribute::text(NFTA_RULE_CHAIN, &chain.name),
        ];
        let of_chain = uninterrupted(|| {
            let mut of_chain = Vec::new();
            socket.request(&[query(NFT_MSG_GETRULE, chain.family, place.clone())], |_, payload| {
                of_chain.extend(chain.rule(payload, metadata).filter(|_| of_chain.len() < MAX_RULES));
            })?;
            Ok(of_chain)
        })?;
        rules.extend(of_chain);
    }
    Ok(rules)
}

const UNSPECIFIED: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFGENMSG: usize = 4;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;

fn query(kind: u16, family: u8, attributes: Vec<Attribute>) -> Message {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    Message::dump(NFNL_SUBSYS_NFTABLES << 8 | kind, vec![family, 0, 0, 0], attributes)
}

/// A chain that packets may be translated in before they are routed.
#[derive(Debug)]
struct Chain {
    family: u8,
    table: String,
    name: String,
}

impl Chain {
    fn read(payload: &[u8]) -> Option<Self> {
        const NFTA_CHAIN_TABLE: u16 = 1;
        const NFTA_CHAIN_NAME: u16 = 3;
        const NFTA_CHAIN_HOOK: u16 = 4;
        const NFTA_CHAIN_TYPE: u16 = 7;
        const NFTA_HOOK_HOOKNUM: u16 = 1;
        const NF_INET_PRE_ROUTING: u32 = 0;
        const NF_INET_LOCAL_OUT: u32 = 3;
        let (family, bytes) = (*payload.first()?, payload.get(NFGENMSG..)?);
        let hook = number(attribute(attribute(bytes, NFTA_CHAIN_HOOK)?, NFTA_HOOK_HOOKNUM)?)?;
        let is_nat = attribute(bytes, NFTA_CHAIN_TYPE)? == b"nat\0";
        if !is_nat
            || ![NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT].contains(&hook)
            || ![NFPROTO_INET, NFPROTO_IPV4].contains(&family)
        {
            return None;
        }
        let text = |kind| attribute(bytes, kind).and_then(text);
        Some(Self { family, table: text(NFTA_CHAIN_TABLE)?, name: text(NFTA_CHAIN_NAME)? })
    }

    fn rule(&self, payload: &[u8], metadata: Ipv4Addr) -> Option<Rule> {
        const NFTA_RULE_HANDLE: u16 = 3;
        const NFTA_RULE_EXPRESSIONS: u16 = 4;
        let bytes = payload.get(NFGENMSG..)?;
        let handle = u64::from_be_bytes(*attribute(bytes, NFTA_RULE_HANDLE)?.first_chunk()?);
        let mut reading = Reading::new(metadata);
        for (_, one) in attributes(attribute(bytes, NFTA_RULE_EXPRESSIONS)?) {
            reading.expression(one);
        }
        let to = reading.to.filter(|_| reading.names_metadata)?;
        let table = self.table.clone();
        let place = if self.family == NFPROTO_IPV4 && reading.by_iptables && table == "nat" {
            Place::Iptables { table, handle }
        } else {
            let family = if self.family == NFPROTO_IPV4 { "ip" } else { "inet" };
            Place::Nft { family, table, handle }
        };
        Some(Rule { place, chain: self.name.clone(), metadata, words: reading.words(), to })
    }
}

/// What a register holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Loaded {
    Device(&'static str),
    /// Of the network header, from here on.
    Header(usize),
    DestinationPort,
    Protocol,
    Value(Vec<u8>),
}

/// A rule, as far as its expressions were read.
struct Reading {
    metadata: Ipv4Addr,
    registers: HashMap<u32, Loaded>,
    names_metadata: bool,
    by_iptables: bool,
    /// What each expression says.
    said: Option<Vec<Vec<String>>>,
    protocol: Option<&'static str>,
    to: Option<Destination>,
}

const NFT_REG_VERDICT: u32 = 0;
/// Where the addresses stand in the header (RFC 791).
const SOURCE: usize = 12;
const DESTINATION: usize = 16;
const PROTOCOL: usize = 9;

impl Reading {
    fn new(metadata: Ipv4Addr) -> Self {
        Self {
            metadata,
            registers: HashMap::new(),
            names_metadata: false,
            by_iptables: false,
            said: Some(Vec::new()),
            protocol: None,
            to: None,
        }
    }

    fn expression(&mut self, bytes: &[u8]) {
        const NFTA_EXPR_NAME: u16 = 1;
        const NFTA_EXPR_DATA: u16 = 2;
        let name = attribute(bytes, NFTA_EXPR_NAME).unwrap_or_default();
        let data = attribute(bytes, NFTA_EXPR_DATA).unwrap_or_default();
        // Numbers of each expression's own attributes follow their order: NFTA_META_{DREG,KEY}, NFTA_PAYLOAD_{DREG,BASE,OFFSET,LEN},
        // NFTA_CMP_{SREG,OP,DATA}, NFTA_IMMEDIATE_{DREG,DATA}, NFTA_{MATCH,TARGET}_{NAME,REV,INFO}, NFTA_NAT_{TYPE,FAMILY,REG_ADDR_MIN,
        // REG_ADDR_MAX,REG_PROTO_MIN}, NFTA_REDIR_REG_PROTO_MIN.
        let of = |kind| attribute(data, kind).and_then(number);
        let understood = match name.strip_suffix(b"\0").unwrap_or(name) {
            b"counter" => Some(vec![]),
            b"meta" => self.load(of(1), of(2).and_then(meta)),
            b"payload" => self.load(of(1), payload(of(2), of(3))),
            b"immediate" => {
                let value = attribute(data, 2).and_then(|data| attribute(data, NFTA_DATA_VALUE));
                self.load(of(1), value.map(|value| Loaded::Value(value.into())))
            }
            b"cmp" => self.compare(of(1), of(2), data),
            b"match" => extension(data, xtables::match_words),
            b"target" => {
                self.by_iptables = true;
                let nat = extension(data, xtables::nat);
                nat.and_then(|nat| {
                    self.to = Some(nat.to);
                    nat.words
                })
            }
            b"nat" if of(1) == Some(NFT_NAT_DNAT) => {
                self.to = Some(Destination { addr: self.addr_in(of(3)), port: self.port_in(of(5)) });
                None
            }
            b"redir" => {
                self.to = Some(Destination { addr: None, port: self.port_in(of(1)) });
                None
            }
            _ => None,
        };
        match (understood, &mut self.said) {
            (Some(more), Some(said)) => said.push(more),
            (Some(_), None) => {}
            (None, said) => *said = None,
        }
    }

    /// In the order in which iptables lists them.
    fn words(self) -> Option<Vec<String>> {
        const ORDER: [&str; 5] = ["-s", "-d", "-i", "-o", "-p"];
        let place = |words: &Vec<String>| {
            let flag = words.iter().find(|word| *word != "!");
            ORDER.iter().position(|known| flag.is_some_and(|flag| flag == known)).unwrap_or(ORDER.len())
        };
        let mut said = self.said?;
        said.sort_by_key(place);
        Some(said.concat())
    }

    /// Nothing to be said yet.
    fn load(&mut self, register: Option<u32>, what: Option<Loaded>) -> Option<Vec<String>> {
        let register = register.filter(|register| *register != NFT_REG_VERDICT)?;
        match what {
            Some(what) => self.registers.insert(register, what),
            None => self.registers.remove(&register),
        };
        Some(vec![])
    }

    fn compare(&mut self, register: Option<u32>, operator: Option<u32>, data: &[u8]) -> Option<Vec<String>> {
        const NFT_CMP_EQ: u32 = 0;
        const NFT_CMP_NEQ: u32 = 1;
        let value = attribute(attribute(data, 3)?, NFTA_DATA_VALUE)?;
        let is_equal = match operator? {
            NFT_CMP_EQ => true,
            NFT_CMP_NEQ => false,
            _ => return None,
        };
        let not = if is_equal { vec![] } else { vec!["!".to_owned()] };
        let words = |flag: &str, value: String| Some([not, vec![flag.to_owned(), value]].concat());
        match self.registers.get(&register?)? {
            Loaded::Device(flag) => words(flag, device(value)?),
            Loaded::Header(offset) => {
                let destination = DESTINATION.checked_sub(*offset).and_then(|at| value.get(at..at + 4));
                if destination == Some(&self.metadata.octets()) && is_equal {
                    self.names_metadata = true;
                }
                match (*offset, <[u8; 4]>::try_from(value)) {
                    (DESTINATION, Ok(addr)) => words("-d", format!("{}/32", Ipv4Addr::from(addr))),
                    (SOURCE, Ok(addr)) => words("-s", format!("{}/32", Ipv4Addr::from(addr))),
                    _ => None,
                }
            }
            Loaded::Protocol if is_equal => {
                let protocol = match value {
                    [6] => "tcp",
                    [17] => "udp",
                    _ => return None,
                };
                self.protocol = Some(protocol);
                words("-p", protocol.to_owned())
            }
            Loaded::DestinationPort if is_equal => {
                let port = u16::from_be_bytes(value.try_into().ok()?);
                let protocol = self.protocol?.to_owned();
                Some(vec!["-m".to_owned(), protocol, "--dport".to_owned(), port.to_string()])
            }
            Loaded::DestinationPort | Loaded::Protocol | Loaded::Value(_) => None,
        }
    }

    fn addr_in(&self, register: Option<u32>) -> Option<Ipv4Addr> {
        let Loaded::Value(value) = self.registers.get(&register?)? else { return None };
        <[u8; 4]>::try_from(value.as_slice()).ok().map(Ipv4Addr::from)
    }

    fn port_in(&self, register: Option<u32>) -> Option<u16> {
        let Loaded::Value(value) = self.registers.get(&register?)? else { return None };
        value.first_chunk().map(|port| u16::from_be_bytes(*port))
    }
}

const NFTA_DATA_VALUE: u16 = 1;
const NFT_NAT_DNAT: u32 = 1;

fn meta(key: u32) -> Option<Loaded> {
    match key {
        6 => Some(Loaded::Device("-i")),
        7 => Some(Loaded::Device("-o")),
        16 => Some(Loaded::Protocol),
        _ => None,
    }
}

fn payload(base: Option<u32>, offset: Option<u32>) -> Option<Loaded> {
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    match (base?, usize::try_from(offset?).ok()?) {
        (NETWORK, PROTOCOL) => Some(Loaded::Protocol),
        (NETWORK, offset) => Some(Loaded::Header(offset)),
        (TRANSPORT, 2) => Some(Loaded::DestinationPort),
        _ => None,
    }
}

/// Has a match or a target read.
fn extension<T>(data: &[u8], read: fn(&[u8], u8, &[u8]) -> Option<T>) -> Option<T> {
    let name = attribute(data, 1)?;
    let revision = u8::try_from(number(attribute(data, 2)?)?).ok()?;
    read(name.strip_suffix(b"\0").unwrap_or(name), revision, attribute(data, 3)?)
}

fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|value| u32::from_be_bytes(*value))
}

fn text(value: &[u8]) -> Option<String> {
    std::str::from_utf8(value.strip_suffix(b"\0").unwrap_or(value)).ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn reads_any_bytes(bytes: Vec<u8>, name in "counter|meta|payload|immediate|cmp|match|target|nat|redir", register: u32, second: u32) {
            let data = vec![
                Attribute::number(1, register),
                Attribute::number(2, second),
                Attribute::Value(3, bytes.clone()),
            ];
            let expression = vec![Attribute::text(1, &name), Attribute::Nest(2, data)];
            let rule = vec![Attribute::Value(3, vec![0; 8]), Attribute::Nest(4, vec![Attribute::Nest(1, expression)])];
            let chain = Chain { family: NFPROTO_IPV4, table: "nat".to_owned(), name: "PREROUTING".to_owned() };
            let whole = crate::netlink::encode(&[query(0, 0, rule)], 0);

            for payload in [&bytes[..], &whole[crate::netlink::HEADER..]] {
                prop_assert!(chain.rule(payload, Ipv4Addr::LOCALHOST).is_none());
                prop_assert!(Chain::read(payload).is_none());
            }
        }
    }
}
