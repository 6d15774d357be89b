//! What an iptables ancestor (kube2iam, the Go kube2ram) left on this node: rules that lead the metadata server's address elsewhere, and an agent that
//! still answers. Looks, and changes nothing. Depends on `netlink` and procfs; called by `preflight`.

use std::{collections::BTreeSet, fmt, io, net::Ipv4Addr};

mod agent;
mod legacy;
mod nf_tables;
mod rule;
mod xtables;

pub use self::rule::Rule;

/// Something that was left, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// An ancestor's agent, which listens on this port.
    Agent(u16),
    /// A rule of the calling thread's network namespace.
    Rule(Rule),
}

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum AncestorError {
    /// The tables of `iptables-legacy`.
    #[error("cannot read the nat table of iptables-legacy: is CAP_NET_ADMIN given?")]
    Legacy(#[source] io::Error),
    /// The tables of `nft` and `iptables-nft`.
    #[error("cannot read nf_tables: is CAP_NET_ADMIN given?")]
    NfTables(#[source] io::Error),
}

/// The ancestors' own default.
const DEFAULT_PORT: u16 = 8181;
/// Who has more of them has another problem.
const MAX_RULES: usize = 16;

/// Looks for rules at PREROUTING and OUTPUT that name `metadata` as their destination and send it elsewhere, and for whoever they lead to. Blocks; asks
/// nobody but the kernel and a port of the loopback device, for 0.6 s at the most.
///
/// Not found are rules of user-defined chains, and those that name the address within a set.
///
/// # Errors
/// [`AncestorError`]: nothing is known.
pub fn leftovers(metadata: Ipv4Addr) -> Result<Vec<Leftover>, AncestorError> {
    let mut rules = nf_tables::rules(metadata).map_err(AncestorError::NfTables)?;
    rules.extend(legacy::rules(metadata).map_err(AncestorError::Legacy)?);
    rules.truncate(MAX_RULES);
    let led_to: BTreeSet<_> = rules.iter().filter_map(Rule::port).collect();
    let agent = agent::find(&led_to, DEFAULT_PORT).map(Leftover::Agent);
    Ok(rules.into_iter().map(Leftover::Rule).chain(agent).collect())
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(port) => write!(
                f,
                "an ancestor's agent listens on port {port}: whoever reaches it is given roles by IP address. Delete its DaemonSet once kube2ram is ready"
            ),
            Self::Rule(rule) => write!(
                f,
                "{rule}. Pods' connections do not come there while kube2ram is in force, what else the node receives or sends does. Once the ancestor \
                 is gone: {}",
                rule.removal()
            ),
        }
    }
}

#[cfg(test)]
mod tests;
