//! The node as the agent finds it: its address, its cgroups, and whether it has what the agent needs. Called by `app`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::Arc,
};

use tracing::warn;

use super::AppError;
use crate::{
    args::{Config, OpenConnections},
    datapath::{AgentAddr, Settings},
    handover::Hello,
    identity::{CgroupId, CgroupTree, Recent, cgroup_id, find_cgroup_root, find_pods_cgroup, own_cgroup},
    preflight::Preflight,
};

/// What does not change as long as the agent runs.
pub(super) struct Node {
    pub(super) agent: SocketAddrV4,
    pub(super) admin: SocketAddrV4,
    pub(super) cgroups: Arc<Recent<CgroupTree>>,
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
        let agent = SocketAddrV4::new(host_ip(config.host_ip)?, config.app_port);
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
            cgroups: Arc::new(Recent::new(cgroups)),
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
                debug: config.debug,
            },
        })
    }
}

/// The configured address, or the one from which this node would send to the outside. Nothing is sent.
fn host_ip(configured: Option<IpAddr>) -> Result<Ipv4Addr, AppError> {
    /// TEST-NET-1: somewhere outside.
    const OUTSIDE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);
    let found = match configured {
        Some(address) => address,
        None => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
            .and_then(|socket| socket.connect(OUTSIDE).and_then(|()| socket.local_addr()))
            .map_err(|error| AppError::HostIp(Some(error)))?
            .ip(),
    };
    match found {
        IpAddr::V4(address) if !address.is_unspecified() => Ok(address),
        _ => Err(AppError::HostIp(None)),
    }
}
