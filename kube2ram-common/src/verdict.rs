//! The verdict on one connect(2), as pure functions. Most connects have other destinations; only the rest may
//! cost a map look-up.

use crate::{
    abi::{Config, Counter, LISTENER_PORTS},
    connection::{IPPROTO_MPTCP, IPPROTO_TCP},
};

/// What the hook saw.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Destination address, network byte order; of the metadata server's IPv6 address,
    /// [`Config::metadata_addr_be`].
    pub addr_be: u32,
    /// Destination port, network byte order.
    pub port_be: u16,
    /// `IPPROTO_*` of the socket.
    pub protocol: u32,
    /// The agent marked the socket as its own.
    pub has_pass: bool,
}

/// The verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `EPERM`.
    Deny(Counter),
    /// Unchanged: another destination, or one of the agent's own sockets.
    Pass,
    /// Redirected to a listener of the agent.
    Redirect,
}

/// Decides on a connect(2).
#[inline(always)]
#[must_use]
pub const fn verdict(config: &Config, attempt: &Attempt) -> Verdict {
    if attempt.addr_be != config.metadata_addr_be || attempt.has_pass {
        return Verdict::Pass;
    }
    if !is_tcp(attempt.protocol) {
        return Verdict::Deny(Counter::DeniedProtocol);
    }
    if attempt.port_be != config.metadata_port_be {
        return Verdict::Deny(Counter::DeniedPort);
    }
    Verdict::Redirect
}

/// Whether a pod's connect(2) to another address than the metadata server's dials the host listener, as with
/// an `http_proxy` that names the agent. It is not redirected, but it is recorded.
#[inline(always)]
#[must_use]
pub const fn dials_agent(config: &Config, attempt: &Attempt) -> bool {
    attempt.addr_be == config.agent_addr_be
        && attempt.port_be == config.agent_port_be
        && is_tcp(attempt.protocol)
}

/// Whether a protocol is TCP's, or the one of TCP over several paths.
#[inline(always)]
#[must_use]
pub const fn is_tcp(protocol: u32) -> bool {
    protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP
}

/// Whether a port on the loopback device is one of the in-pod listeners' ports.
#[inline(always)]
#[must_use]
pub const fn is_listener_port(port_be: u16) -> bool {
    let port = u16::from_be(port_be);
    port >= LISTENER_PORTS.0 && port <= LISTENER_PORTS.1
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
        agent_netns: 0,
        qos_cgroups: [0; 2],
    };
    const ATTEMPT: Attempt = Attempt {
        addr_be: CONFIG.metadata_addr_be,
        port_be: CONFIG.metadata_port_be,
        protocol: IPPROTO_TCP,
        has_pass: false,
    };

    fn judge(attempt: Attempt) -> Verdict {
        verdict(&CONFIG, &attempt)
    }

    #[test]
    fn redirects_tcp_and_mptcp_to_the_metadata_server() {
        assert_eq!(judge(ATTEMPT), Verdict::Redirect);
        assert_eq!(judge(Attempt { protocol: IPPROTO_MPTCP, ..ATTEMPT }), Verdict::Redirect);
    }

    #[test]
    fn listeners_in_pods_have_reserved_ports() {
        for (port, is_theirs) in [(224, false), (225, true), (232, true), (233, false), (0xe100, false)] {
            assert_eq!(is_listener_port(port_be(port)), is_theirs, "{port}");
        }
    }

    #[test]
    fn denies_other_ports_and_protocols_of_the_metadata_address() {
        assert_eq!(judge(Attempt { port_be: port_be(443), ..ATTEMPT }), Verdict::Deny(Counter::DeniedPort));
        assert_eq!(judge(Attempt { protocol: 17, ..ATTEMPT }), Verdict::Deny(Counter::DeniedProtocol));
    }

    #[test]
    fn passes_other_addresses_and_the_agent() {
        assert_eq!(judge(Attempt { addr_be: addr_be(Ipv4Addr::LOCALHOST), ..ATTEMPT }), Verdict::Pass);
        assert_eq!(judge(Attempt { has_pass: true, port_be: 0, ..ATTEMPT }), Verdict::Pass);
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
        fn never_passes_the_metadata_address_without_a_pass(port_be: u16, protocol: u32) {
            let attempt = Attempt { port_be, protocol, ..ATTEMPT };

            prop_assert_ne!(judge(attempt), Verdict::Pass);
        }
    }
}
