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
    /// Gives the right to a hostNetwork pod if neither the pod nor its ServiceAccount asks for a role. A
    /// default role does not change that: it is for pods that would otherwise have nothing. An annotation
    /// that cannot be used has asked for a role, so such a pod does not fall back to the node's.
    pub fn of(pod: &Pod, roles: &Roles, host_network_pods: HostNetworkPods) -> Option<Self> {
        (pod.host_network && !roles.is_asked_for_by(pod) && host_network_pods == HostNetworkPods::Pass)
            .then_some(Self(()))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::{
        identity::PodUid,
        role::{AnnotationKeys, Attribution, CredentialsFrom},
    };
    use kube2ram_cloud::alibaba::DIALECT;

    #[test]
    fn is_for_host_network_pods_without_annotation_whatever_the_default_role() {
        let (pass, deny) = (HostNetworkPods::Pass, HostNetworkPods::Deny);

        for roles in [roles(None, None), roles(Some("acs:ram::1:role/default"), None)] {
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

    #[test]
    fn is_not_for_a_pod_whose_service_account_has_a_role_or_is_not_known() {
        let of = |roles: &Roles, account: Option<&[(&str, &str)]>| {
            let pod = Pod { account_annotations: account.map(|it| map(it).into()), ..pod(true, &[]) };
            NodeRole::of(&pod, roles, HostNetworkPods::Pass).is_some()
        };
        let reading = roles(None, Some("alias"));

        for role in ["role", "alias"] {
            assert!(!of(&reading, Some(&[(role, "acs:ram::1:role/own")])), "{role}");
            assert!(!of(&reading, Some(&[(role, "")])), "{role}: an unusable one has asked for a role");
            assert!(of(&roles(None, None), Some(&[(role, "r")])), "{role}: ServiceAccounts are not read");
        }
        assert!(!of(&reading, None));
        assert!(of(&reading, Some(&[])));
        assert!(of(&reading, Some(&[("policy", "{}")])));
    }

    fn roles(default_role: Option<&str>, account_role: Option<&str>) -> Roles {
        let keys = ["role", "external-id", "policy", "duration", "session-name"].map(Box::from);
        let [role, external_id, policy, duration, session_name] = keys;
        let account_role = account_role.map(Box::from);
        let keys = AnnotationKeys { role, account_role, external_id, policy, duration, session_name };
        let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
        let from = CredentialsFrom::Node;
        Roles::try_new(&DIALECT, keys, None, default_role, duration, attribution, from).unwrap()
    }

    fn map(annotations: &[(&str, &str)]) -> BTreeMap<Box<str>, Box<str>> {
        annotations.iter().map(|&(key, value)| (key.into(), value.into())).collect()
    }

    fn pod(host_network: bool, annotations: &[(&str, &str)]) -> Pod {
        Pod {
            uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").unwrap(),
            namespace: "kube-system".into(),
            name: "cni".into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "cni".into(),
            host_network,
            annotations: map(annotations),
        }
    }
}
