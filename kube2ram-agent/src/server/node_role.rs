//! The right to the node's own role, which an unannotated hostNetwork pod keeps: CNI, CSI and cloud controllers live on it.
//! Pure; made by `pipeline`, demanded by `route`. [`NodeRole::of`] is the one place that gives it.

use crate::{args::HostNetworkPods, kubernetes::Pod, role::RoleError};

/// The proof that a pod may use the node's role.
#[derive(Debug)]
pub struct NodeRole(());

impl NodeRole {
    /// Gives the right to a hostNetwork pod that has no role of its own. A pod whose annotation cannot be used has asked for a role, so
    /// it does not fall back to the node's.
    pub fn of(pod: &Pod, error: &RoleError, host_network_pods: HostNetworkPods) -> Option<Self> {
        (pod.host_network && matches!(error, RoleError::NoRole) && host_network_pods == HostNetworkPods::Pass)
            .then_some(Self(()))
    }
}
