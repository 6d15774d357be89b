//! The node as the agent finds it: its address, its cgroups, and whether it has what the agent needs. Called by `app`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::Arc,
};

use tracing::warn;

use super::AppError;
use crate::{
    args::{Config, OpenConnections, WireGuardMode},
    datapath::{AgentAddr, Settings},
    handover::Hello,
    identity::{CgroupId, CgroupTree, cgroup_id, find_cgroup_root, find_pods_cgroup, own_cgroup},
    preflight::Preflight,
};

/// What does not change as long as the agent runs.
pub(super) struct Node {
    pub(super) agent: SocketAddrV4,
    pub(super) admin: SocketAddrV4,
    pub(super) cgroups: Arc<CgroupTree>,
    /// What this agent says to another one.
    pub(super) hello: Hello,
    pub(super) own_cgroup: CgroupId,
    pub(super) settings: Settings,
}

impl Node {
    /// Looks, and changes nothing.
    ///
    /// # Errors
    /// When the agent cannot run here; [`AppError::Preflight`] names all that is missing.
    pub(super) fn examine(config: &Config) -> Result<Self, AppError> {
        let agent = SocketAddrV4::new(host_ip(config.host_ip, *config.metadata.v4.ip()), config.app_port);
        let cgroup_root = find_cgroup_root(config.cgroup_root.as_deref()).map_err(AppError::Cgroups)?;
        let pods_cgroup =
            find_pods_cgroup(&cgroup_root, config.pods_cgroup.as_deref()).map_err(AppError::Cgroups)?;
        let cgroups = CgroupTree::open(&cgroup_root, &pods_cgroup).map_err(AppError::Cgroups)?;
        let preflight = Preflight::of_node(&config.node_paths());
        for warning in preflight.warnings() {
            warn!(warning, "preflight found something that does not keep the agent from running");
        }
        let unmet: Vec<_> = preflight.failures().collect();
        if !unmet.is_empty() {
            return Err(AppError::Preflight(unmet.join("; ")));
        }
        let own = own_cgroup(&cgroup_root).map_err(AppError::Cgroups)?;
        let admin = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, config.metrics_port);
        Ok(Self {
            agent,
            admin,
            cgroups: Arc::new(cgroups),
            hello: Hello::new(agent, admin, own.starts_with(&pods_cgroup)),
            own_cgroup: cgroup_id(&own).map_err(AppError::OwnCgroup)?,
            settings: Settings {
                bpf_dir: config.bpf_dir.clone(),
                cgroup_root,
                own_cgroup: own,
                pods_cgroup,
                metadata: config.metadata,
                agent: AgentAddr(agent),
                keeps_open: config.open_connections == OpenConnections::Keep,
                guards_wire: config.wire_guard != WireGuardMode::Off,
                debug: config.debug,
            },
        })
    }
}

/// The configured address, if it is one of this node's; else the one from which this node would send to the outside; else the loopback's, where the node has
/// no IPv4 address that pods could reach. Pods with a network of their own are served by their own listeners there.
fn host_ip(configured: Option<IpAddr>, metadata: Ipv4Addr) -> Ipv4Addr {
    let why = match configured {
        Some(IpAddr::V4(address)) if is_of_this_node(address) => return address,
        Some(IpAddr::V4(_)) => Some("no address of this node"),
        // What the kubelet writes into `status.hostIP` of a node whose first address is IPv6.
        Some(IpAddr::V6(_)) => Some("redirected connections are IPv4's"),
        None => None,
    };
    /// TEST-NET-1: somewhere outside.
    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    // A node without a default route has one to the metadata server.
    let found = address_towards(OUTSIDE).or_else(|| address_towards(metadata));
    if let (Some(why), Some(configured)) = (why, configured) {
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

fn is_of_this_node(address: Ipv4Addr) -> bool {
    !address.is_unspecified() && UdpSocket::bind((address, 0)).is_ok()
}

/// Nothing is sent.
fn address_towards(destination: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((destination, 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) if !address.is_unspecified() => Some(address),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_this_node_is_used_and_any_other_is_replaced() {
        let metadata = Ipv4Addr::new(198, 51, 100, 200);
        let host_ip = |configured| host_ip(configured, metadata);
        let outside = address_towards(Ipv4Addr::new(192, 0, 2, 1)).or_else(|| address_towards(metadata));
        let found = outside.unwrap_or(Ipv4Addr::LOCALHOST);

        assert_eq!(host_ip(Some(Ipv4Addr::LOCALHOST.into())), Ipv4Addr::LOCALHOST);
        for other in ["192.0.2.7", "0.0.0.0", "2001:db8::7", "::"] {
            assert_eq!(host_ip(Some(other.parse().unwrap())), found, "{other}");
        }
        assert_eq!(host_ip(None), found);
    }
}
