//! The node's IPv4 address, to which pods without an in-pod listener are redirected: finding it, and
//! following changes. Does no I/O except queries of the kernel's addresses and routes. Called by `node` and
//! `service`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, warn};

use crate::{args::Config, datapath::AgentAddr, netlink::Route};

/// How often the agent checks that the address is still the node's.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The operator's setting of the node's address.
#[derive(Clone, Copy, Debug)]
pub(in crate::app) struct HostAddress {
    configured: Option<IpAddr>,
    metadata: Ipv4Addr,
}

impl HostAddress {
    pub(in crate::app) fn new(config: &Config) -> Self {
        Self { configured: config.host_ip, metadata: *config.metadata.v4.ip() }
    }

    /// The configured address, if it is one of this node's; otherwise the one from which this node sends to
    /// the outside; otherwise the loopback device's, if the node has no IPv4 address that pods can reach.
    /// In-pod listeners serve pods with their own network there.
    pub(super) fn find(self) -> Ipv4Addr {
        let why = match self.configured {
            Some(IpAddr::V4(address)) if is_of_this_node(address) => return address,
            Some(IpAddr::V4(_)) => Some("no address of this node"),
            // What the kubelet writes into `status.hostIP` of a node whose first address is IPv6.
            Some(IpAddr::V6(_)) => Some("redirected connections are IPv4's"),
            None => None,
        };
        let found = self.leading_outside();
        if let (Some(why), Some(configured)) = (why, self.configured) {
            let used = found.unwrap_or(Ipv4Addr::LOCALHOST);
            warn!(%configured, %used, why, "the configured host address is not used");
        }
        found.unwrap_or_else(|| {
            warn!(
                "this node has no IPv4 address that leads outside: the host listener serves hostNetwork pods at the loopback address, and no other pod \
                 before its own listener is open"
            );
            Ipv4Addr::LOCALHOST
        })
    }

    /// Sends pods to the node's present address for as long as this runs. The host listener listens at all
    /// addresses, so that nothing is opened again.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub(in crate::app) async fn follow(self, agent: watch::Sender<AgentAddr>) {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let AgentAddr(former) = *agent.borrow();
            let Some(now) = self.successor_of(*former.ip()) else { continue };
            warn!(former = %former.ip(), %now, "the node's address has changed: pods without an in-pod listener are redirected to the new one");
            agent.send_replace(AgentAddr(SocketAddrV4::new(now, former.port())));
        }
    }

    /// The address to use instead of one that is no longer the node's, or was only the loopback device's.
    /// `None` when nothing changes: an address that the node still has is kept, whatever other addresses it
    /// got.
    fn successor_of(self, former: Ipv4Addr) -> Option<Ipv4Addr> {
        let is_fallback = former.is_loopback() && self.configured != Some(former.into());
        if is_of_this_node(former) && !is_fallback {
            return None;
        }
        let configured = match self.configured {
            Some(IpAddr::V4(address)) if is_of_this_node(address) => Some(address),
            _ => None,
        };
        let found = configured.or_else(|| self.leading_outside()).unwrap_or(Ipv4Addr::LOCALHOST);
        (found != former).then_some(found)
    }

    fn leading_outside(self) -> Option<Ipv4Addr> {
        /// TEST-NET-1: somewhere outside.
        const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
        // A node without a default route has one to the metadata server.
        address_towards(OUTSIDE).or_else(|| address_towards(self.metadata))
    }
}

/// Whether this machine has the address.
pub(in crate::app) fn is_of_this_node(address: impl Into<IpAddr>) -> bool {
    let address = address.into();
    !address.is_unspecified() && route_towards(address).is_some_and(|route| route.is_local)
}

/// The address from which the kernel would send there.
fn address_towards(destination: Ipv4Addr) -> Option<Ipv4Addr> {
    match route_towards(destination.into())?.source? {
        IpAddr::V4(address) if !address.is_unspecified() => Some(address),
        _ => None,
    }
}

fn route_towards(destination: IpAddr) -> Option<Route> {
    let asked = Route::towards(destination);
    asked.inspect_err(|error| debug!(%error, "cannot look up a route")).ok()?
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// An address that this machine does not have.
    const NOBODYS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

    fn host_address(configured: Option<IpAddr>) -> HostAddress {
        HostAddress { configured, metadata: Ipv4Addr::new(198, 51, 100, 200) }
    }

    #[test]
    fn an_address_of_this_node_is_used_and_any_other_is_replaced() {
        let found = host_address(None).leading_outside().unwrap_or(Ipv4Addr::LOCALHOST);

        assert_eq!(host_address(Some(Ipv4Addr::LOCALHOST.into())).find(), Ipv4Addr::LOCALHOST);
        for other in ["192.0.2.7", "0.0.0.0", "2001:db8::7", "::"] {
            assert_eq!(host_address(Some(other.parse().unwrap())).find(), found, "{other}");
        }
        assert_eq!(host_address(None).find(), found);
    }

    #[test]
    fn only_an_address_that_was_removed_or_was_a_fallback_is_replaced() {
        let found = host_address(None).leading_outside();
        let loopback = Some(Ipv4Addr::LOCALHOST.into());

        assert_eq!(host_address(loopback).successor_of(Ipv4Addr::LOCALHOST), None, "as configured");
        assert_eq!(host_address(loopback).successor_of(NOBODYS), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(host_address(None).successor_of(Ipv4Addr::LOCALHOST), found, "better than the fallback");
        assert_eq!(host_address(None).successor_of(NOBODYS), found.or(Some(Ipv4Addr::LOCALHOST)));
        if let Some(found) = found {
            assert_eq!(host_address(loopback).successor_of(found), None, "the node still has it");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_moves_is_followed_and_the_port_stays() {
        let (agent, mut moved) = watch::channel(AgentAddr(SocketAddrV4::new(NOBODYS, 8181)));
        let follow = host_address(Some(Ipv4Addr::LOCALHOST.into())).follow(agent);

        let followed = async {
            moved.changed().await.unwrap();
            *moved.borrow_and_update()
        };
        let now = tokio::select! { now = followed => now, () = follow => unreachable!("it never ends") };

        assert_eq!(now, AgentAddr(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8181)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_stays_is_reported_once() {
        let (agent, mut moved) = watch::channel(AgentAddr(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8181)));
        moved.mark_unchanged();

        let follow = host_address(Some(Ipv4Addr::LOCALHOST.into())).follow(agent);

        assert!(timeout(LOOK_EVERY * 20, follow).await.is_err());
        assert!(!moved.has_changed().unwrap_or(false));
    }
}
