//! The right to the node's own role, which an unannotated hostNetwork pod keeps: CNI, CSI and cloud
//! controllers need it. Pure; depends on `role`; created by `connection`, required by `route`. Only
//! [`NodeRole::of`] creates it.

use crate::{pod::Pod, role::Roles};

/// How a hostNetwork pod without an annotated role is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNetworkPods {
    /// It is treated as other pods: it gets the default role, or nothing.
    Deny,
    /// It keeps the node's own role.
    Pass,
}

/// The proof that a pod may use the node's role.
#[derive(Debug)]
pub struct NodeRole(());

impl NodeRole {
    /// Gives the right to a hostNetwork pod that asks for no role. A default role does not change that: it is
    /// for pods that would otherwise have nothing. An annotation that cannot be used has asked for a role, so
    /// such a pod does not fall back to the node's.
    pub fn of(pod: &Pod, roles: &Roles, host_network_pods: HostNetworkPods) -> Option<Self> {
        (pod.host_network && !roles.is_asked_for_by(pod) && host_network_pods == HostNetworkPods::Pass)
            .then_some(Self(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        identity::PodUid,
        role::{AnnotationKeys, Attribution},
    };
    use kube2ram_cloud::alibaba::DIALECT;

    #[test]
    fn is_for_host_network_pods_without_annotation_whatever_the_default_role() {
        let roles = |default_role| {
            let keys = ["role", "external-id", "policy", "duration", "session-name"].map(Box::from);
            let [role, external_id, policy, duration, session_name] = keys;
            let keys = AnnotationKeys { role, external_id, policy, duration, session_name };
            let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
            Roles::try_new(&DIALECT, keys, None, default_role, duration, attribution).unwrap()
        };
        let pod = |host_network, annotations: &[(&str, &str)]| Pod {
            uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").unwrap(),
            namespace: "kube-system".into(),
            name: "cni".into(),
            account_annotations: None,
            service_account: "cni".into(),
            host_network,
            annotations: annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        };
        let (pass, deny) = (HostNetworkPods::Pass, HostNetworkPods::Deny);

        for roles in [roles(None), roles(Some("acs:ram::1:role/default"))] {
            for (host_network, annotations, policy, expected) in [
                (true, &[][..], pass, true),
                (true, &[("policy", "{}")], pass, true),
                (true, &[], deny, false),
                (true, &[("role", "acs:ram::1:role/own")], pass, false),
                (true, &[("role", "")], pass, false),
                (false, &[], pass, false),
            ] {
                let given = NodeRole::of(&pod(host_network, annotations), &roles, policy).is_some();
                assert_eq!(given, expected, "{host_network} {annotations:?} {policy:?} {roles:?}");
            }
        }
    }
}
