//! What sessions carry of their pods: tags and the source identity, by which policies tell pods apart.

use std::collections::BTreeMap;

use kube2ram_sandbox::{node::PodSpec, standin::Role};

use crate::support::{LIST, Lab, role_arn};

const FLAGS: [&str; 3] = ["--session-tags=pod", "--cluster-name=prod", "--source-identity"];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_session_names_its_pod_where_the_role_allows_it_and_is_refused_elsewhere() {
    let mut lab = Lab::new("aws-tags", &[]);
    let allowing = Role { allows_tags: true, allows_source_identity: true, ..Role::default() };
    lab.accounts().add_role(role_arn("tagged-role"), allowing);
    lab.accounts().add_role(role_arn("plain-role"), Role::default());
    for pod in ["tagged", "plain"] {
        lab.add_pod(&PodSpec::new(pod).role(&format!("{pod}-role"))).unwrap();
    }
    lab.start(&FLAGS);

    assert_eq!(lab.credentials("tagged", "tagged-role"), "tagged-role");
    assert_eq!(lab.ask_until_ready("plain", &format!("{LIST}plain-role")).status, 403);

    let calls = lab.sts().assumed(&role_arn("tagged-role"));
    let spec = lab.pod("tagged").unwrap().pod().spec().clone();
    let expected = BTreeMap::from([
        ("eks-cluster-name", "prod"),
        ("kubernetes-namespace", "default"),
        ("kubernetes-pod-name", "tagged"),
        ("kubernetes-pod-uid", &*spec.uid),
        ("kubernetes-service-account", "default"),
    ]);
    assert_eq!(calls[0].tags(), expected);
    assert_eq!(calls[0].param("SourceIdentity"), Some("default.default"));
    let transitive = calls[0].params.keys().filter(|name| name.starts_with("TransitiveTagKeys.member."));
    assert_eq!(transitive.count(), expected.len(), "no role assumed with this session sheds them");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_flags_sessions_carry_nothing() {
    let lab = Lab::with_agent("aws-no-tags", &[PodSpec::new("orders").role("orders-role")], &[]);

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    let calls = lab.sts().assumed(&role_arn("orders-role"));
    assert!(calls[0].tags().is_empty() && calls[0].param("SourceIdentity").is_none(), "{calls:?}");
}
