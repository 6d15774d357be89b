//! The node as the agent finds it: its cgroups, and whether it has what the agent needs. Called by `app`.

mod address;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
};

use tracing::warn;

pub(super) use self::address::{HostAddress, is_of_this_node};
use super::AppError;
use crate::{
    args::{Config, OpenConnections, WireGuardMode},
    datapath::{AgentAddr, Settings},
    handover::Hello,
    identity::{
        CgroupId, CgroupTree, cgroup_id, find_cgroup_root, find_pods_cgroup, other_pods_cgroups, own_cgroup,
    },
    preflight::Preflight,
};

/// What does not change as long as the agent runs.
pub(super) struct Node {
    /// The address to which pods without an in-pod listener are redirected. The node's address may change
    /// later.
    pub(super) agent: AgentAddr,
    /// Where the host listener listens: at all IPv4 addresses, so that it need not be opened again when the
    /// node's address changes.
    pub(super) app: SocketAddr,
    /// Where the admin listener listens: at all addresses of both families.
    pub(super) admin: SocketAddr,
    pub(super) cgroups: Arc<CgroupTree>,
    /// The handover greeting of this agent.
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
        let ip = HostAddress::new(config).find();
        let agent = AgentAddr(SocketAddrV4::new(ip, config.app_port));
        let cgroup_root = find_cgroup_root(config.cgroup_root.as_deref()).map_err(AppError::Cgroups)?;
        let pods_cgroup =
            find_pods_cgroup(&cgroup_root, config.pods_cgroup.as_deref()).map_err(AppError::Cgroups)?;
        let other_pods_cgroups =
            other_pods_cgroups(&cgroup_root, &pods_cgroup, config.pods_cgroup.as_deref());
        let preflight = Preflight::of_agent(&config.node_paths());
        for warning in preflight.warnings() {
            warn!(warning, "preflight warning; it does not keep the agent from running");
        }
        let unmet: Vec<_> = preflight.failures().collect();
        if !unmet.is_empty() {
            return Err(AppError::Preflight(unmet.join("; ")));
        }
        let own = own_cgroup(&cgroup_root).map_err(AppError::Cgroups)?;
        let app = SocketAddr::from((Ipv4Addr::UNSPECIFIED, config.app_port));
        let admin = all_addresses(config.metrics_port);
        let (hello, own_id) = (Hello::new(app, admin, own.starts_with(&pods_cgroup)), cgroup_id(&own));
        let settings = Settings {
            bpf_dir: config.bpf_dir.clone(),
            cgroup_root,
            own_cgroup: own,
            pods_cgroup,
            other_pods_cgroups,
            metadata: config.metadata,
            agent,
            keeps_open: config.open_connections == OpenConnections::Keep,
            guards_wire: config.wire_guard != WireGuardMode::Off,
            debug: config.debug,
        };
        let cgroups = CgroupTree::open(&settings.cgroup_root, &settings.pods_cgroups());
        Ok(Self {
            agent,
            app,
            admin,
            cgroups: Arc::new(cgroups.map_err(AppError::Cgroups)?),
            hello,
            own_cgroup: own_id.map_err(AppError::OwnCgroup)?,
            settings,
        })
    }
}

/// All addresses of both families, or of IPv4 alone where the kernel has no IPv6.
fn all_addresses(port: u16) -> SocketAddr {
    let has_ipv6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
    if has_ipv6 { (Ipv6Addr::UNSPECIFIED, port).into() } else { (Ipv4Addr::UNSPECIFIED, port).into() }
}
