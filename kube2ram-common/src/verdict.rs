//! The verdict on one connect(2), as a pure function in two halves: most connects go elsewhere, and only the rest may cost a look-up.
//!
//! Two functions and no closure, because LLVM outlines a closure into a BPF subprogram of its own.

use crate::{
    abi::{Config, Counter, Target},
    connection::{IPPROTO_MPTCP, IPPROTO_TCP},
};

/// What the hook saw.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Destination address, network byte order; of the metadata server's IPv6 address, [`Config::metadata_addr_be`].
    pub addr_be: u32,
    /// Destination port, network byte order.
    pub port_be: u16,
    /// `IPPROTO_*` of the socket.
    pub protocol: u32,
    /// The agent marked the socket as its own.
    pub has_pass: bool,
}

/// The first half's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precheck {
    /// Refused, whatever the target.
    Deny(Counter),
    /// To be redirected, if there is a target.
    NeedTarget,
    /// None of our business, or the agent itself.
    Pass,
}

/// What happens to the connect(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `EPERM`.
    Deny(Counter),
    /// Unchanged.
    Pass,
    /// To the agent's listener instead.
    Redirect(Target),
}

/// First half: is it about the metadata server at all?
#[inline(always)]
#[must_use]
pub const fn precheck(config: &Config, attempt: &Attempt) -> Precheck {
    if attempt.addr_be != config.metadata_addr_be || attempt.has_pass {
        return Precheck::Pass;
    }
    if attempt.protocol != IPPROTO_TCP && attempt.protocol != IPPROTO_MPTCP {
        return Precheck::Deny(Counter::DeniedProtocol);
    }
    if attempt.port_be != config.metadata_port_be {
        return Precheck::Deny(Counter::DeniedPort);
    }
    Precheck::NeedTarget
}

/// Whether a pod's connect(2) to another address than the metadata server's dials the agent's listener on the host: what an `http_proxy`
/// that names the agent does. It is not redirected, but recorded all the same.
#[inline(always)]
#[must_use]
pub const fn dials_agent(config: &Config, attempt: &Attempt) -> bool {
    attempt.addr_be == config.agent_addr_be
        && attempt.port_be == config.agent_port_be
        && (attempt.protocol == IPPROTO_TCP || attempt.protocol == IPPROTO_MPTCP)
}

/// Second half: the target is looked up for [`Precheck::NeedTarget`] only.
#[inline(always)]
#[must_use]
pub const fn verdict(precheck: Precheck, target: Option<Target>) -> Verdict {
    match (precheck, target) {
        (Precheck::Pass, _) => Verdict::Pass,
        (Precheck::Deny(reason), _) => Verdict::Deny(reason),
        (Precheck::NeedTarget, Some(target)) => Verdict::Redirect(target),
        (Precheck::NeedTarget, None) => Verdict::Deny(Counter::DeniedNoTarget),
    }
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::connection::{addr_be, port_be};

    const CONFIG: Config = Config {
        metadata_addr_be: addr_be(Ipv4Addr::new(100, 100, 100, 200)),
        metadata_addr6_be: [0; 4],
        agent_addr_be: addr_be(Ipv4Addr::new(192, 0, 2, 1)),
        metadata_port_be: port_be(80),
        agent_port_be: port_be(8181),
        flags: 0,
        pods_cgroup: 0,
    };
    const ATTEMPT: Attempt = Attempt {
        addr_be: CONFIG.metadata_addr_be,
        port_be: CONFIG.metadata_port_be,
        protocol: IPPROTO_TCP,
        has_pass: false,
    };
    const TARGET: Option<Target> = Some(Target { listener: 1, addr_be: 2, port_be: 3, reserved: 0 });

    fn judge(attempt: Attempt, target: Option<Target>) -> Verdict {
        verdict(precheck(&CONFIG, &attempt), target)
    }

    #[test]
    fn redirects_tcp_and_mptcp_to_the_metadata_server() {
        assert_eq!(judge(ATTEMPT, TARGET), Verdict::Redirect(TARGET.unwrap()));
        assert_eq!(
            judge(Attempt { protocol: IPPROTO_MPTCP, ..ATTEMPT }, TARGET),
            Verdict::Redirect(TARGET.unwrap())
        );
    }

    #[test]
    fn denies_without_a_target() {
        assert_eq!(judge(ATTEMPT, None), Verdict::Deny(Counter::DeniedNoTarget));
    }

    #[test]
    fn denies_other_ports_and_protocols_of_the_metadata_address() {
        assert_eq!(
            judge(Attempt { port_be: port_be(443), ..ATTEMPT }, TARGET),
            Verdict::Deny(Counter::DeniedPort)
        );
        assert_eq!(
            judge(Attempt { protocol: 17, ..ATTEMPT }, TARGET),
            Verdict::Deny(Counter::DeniedProtocol)
        );
    }

    #[test]
    fn passes_other_addresses_and_the_agent() {
        assert_eq!(
            judge(Attempt { addr_be: addr_be(Ipv4Addr::LOCALHOST), ..ATTEMPT }, TARGET),
            Verdict::Pass
        );
        assert_eq!(judge(Attempt { has_pass: true, port_be: 0, ..ATTEMPT }, TARGET), Verdict::Pass);
    }

    #[test]
    fn sees_who_dials_the_agent_itself() {
        let dial = Attempt { addr_be: CONFIG.agent_addr_be, port_be: CONFIG.agent_port_be, ..ATTEMPT };

        assert!(dials_agent(&CONFIG, &dial));
        assert!(dials_agent(&CONFIG, &Attempt { protocol: IPPROTO_MPTCP, ..dial }));
        assert!(!dials_agent(&CONFIG, &Attempt { port_be: port_be(9181), ..dial }));
        assert!(!dials_agent(&CONFIG, &Attempt { addr_be: addr_be(Ipv4Addr::LOCALHOST), ..dial }));
        assert!(!dials_agent(&CONFIG, &Attempt { protocol: 17, ..dial }));
        assert!(!dials_agent(&CONFIG, &ATTEMPT));
    }

    proptest! {
        #[test]
        fn never_passes_the_metadata_address_without_a_pass(port_be: u16, protocol: u32, found: bool) {
            let attempt = Attempt { port_be, protocol, ..ATTEMPT };

            prop_assert_ne!(judge(attempt, TARGET.filter(|_| found)), Verdict::Pass);
        }
    }
}
