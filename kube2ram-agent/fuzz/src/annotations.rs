//! A pod's annotations, written by users who may create pods: on each cloud, each value is used as a whole or
//! denies the pod, and none leads out of the base. The fields are separated by line feeds: role, external id,
//! policy, duration, session name, namespace, service account, and what a client asks for.

use std::{collections::BTreeMap, time::Duration};

use kube2ram_agent::{
    identity::PodUid,
    pod::Pod,
    policy::Policy,
    role::{AnnotationKeys, Attribution, CredentialsFrom, Roles},
};
use kube2ram_cloud::{Cloud, role::BaseArn};

use super::model::Tree;

const KEYS: [&str; 5] = ["role", "external-id", "policy", "duration", "session-name"];

/// Checks one pod.
pub fn check(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    for cloud in Cloud::ALL {
        check_on(cloud, text);
    }
}

fn check_on(cloud: Cloud, text: &str) {
    let (dialect, tree) = (cloud.dialect(), Tree::of(cloud));
    let base = format!("{}team/", tree.base);
    let fields: Vec<&str> = text.split('\n').collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or_default();
    // A tilde alone is an annotation that is absent.
    let annotations: BTreeMap<Box<str>, Box<str>> = KEYS
        .iter()
        .enumerate()
        .filter(|(index, _)| field(*index) != "~")
        .map(|(index, key)| ((*key).into(), field(index).into()))
        .collect();
    let pod = Pod {
        uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").expect("a UID"),
        namespace: field(5).into(),
        name: "web-0".into(),
        account_annotations: None,
        is_mirror: false,
        service_account: field(6).into(),
        host_network: false,
        annotations,
    };
    let [role, external_id, policy, duration, session_name] = KEYS.map(Box::from);
    let keys = AnnotationKeys { role, account_role: None, external_id, policy, duration, session_name };
    let base_arn = BaseArn::parse_in(dialect.arns, &base).expect("a base ARN");
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    let roles =
        Roles::try_new(dialect, keys, Some(base_arn), None, duration, attribution, CredentialsFrom::Node)
            .expect("no default role");
    let Ok(session) = roles.session_for(&pod) else { return };

    let annotation = |key: &str| pod.annotations.get(key).map(|value| &**value);
    let role = annotation("role").expect("a pod without role has no session");
    let expected = if tree.is_arn(role) { role.to_owned() } else { format!("{base}{role}") };
    assert_eq!(session.role.as_str(), expected, "of {role:?}");
    assert!(is_role_arn(&expected, cloud), "{expected:?}");
    assert_eq!(session.grant.external_id().map(|id| id.as_str()), annotation("external-id"));
    assert_eq!(session.policy.as_ref().map(|policy| policy.as_str()), annotation("policy"));
    assert!(session.policy.is_none_or(|policy| {
        serde_json::from_str::<serde_json::Value>(policy.as_str()).is_ok_and(|policy| policy.is_object())
    }));
    let is_sts_name = |c: u8| c.is_ascii_alphanumeric() || tree.session_marks.contains(&c);
    let name = session.session_name.as_str();
    assert!((2..=64).contains(&name.len()) && name.bytes().all(is_sts_name), "{name:?}");
    assert!(annotation("session-name").is_none_or(|annotated| annotated == name));
    assert!((900..=43_200).contains(&session.duration.as_secs()));

    // Only the listed name and the role's other names may be requested.
    let (arn, wire_name) = (session.role.clone(), roles.wire_name(&session.role).to_owned());
    let permitted = |requested: &str| {
        let session = roles.session_for(&pod).expect("it has one");
        Policy::new(None, &roles).permit(session, None, Some(requested)).is_ok()
    };
    assert!(permitted(&wire_name), "{wire_name:?} of {arn}");
    let requested = field(7);
    let names = [arn.as_str(), arn.as_str().split_once(":role/").map_or("", |(_, name)| name), &wire_name];
    let own =
        names.iter().any(|name| name.eq_ignore_ascii_case(requested.strip_suffix('/').unwrap_or(requested)));
    assert_eq!(permitted(requested), own, "{requested:?} of {arn}");
}

fn is_role_arn(text: &str, cloud: Cloud) -> bool {
    let is_word = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_lowercase());
    let is_partition = |text: &str| text.starts_with("aws") && text.split('-').all(is_word);
    let (rest, account_length) = match cloud {
        Cloud::Alibaba => (text.get(4..).and_then(|rest| rest.strip_prefix("ram::")), 1..=text.len()),
        Cloud::Aws => {
            let parts = text.get(4..).and_then(|rest| rest.split_once(":iam::"));
            (parts.filter(|(partition, _)| is_partition(partition)).map(|(_, rest)| rest), 12..=12)
        }
    };
    let Some((account, name)) = rest.and_then(|rest| rest.split_once(":role/")) else { return false };
    let is_legal = |c: u8| c.is_ascii_alphanumeric() || c == b'/' || Tree::of(cloud).role_marks.contains(&c);
    account_length.contains(&account.len())
        && account.bytes().all(|c| c.is_ascii_digit())
        && name.bytes().all(is_legal)
        && name.split('/').all(|segment| !matches!(segment, "" | "." | ".."))
}
