//! A namespace's allow-list against a pod's role, on each cloud: what it allows, some pattern by itself
//! matches as a whole, and only an ARN pattern reaches beyond the base. The first byte chooses how patterns
//! are read; the first line is the role, the rest the list.

use std::{collections::BTreeMap, time::Duration};

use kube2ram_agent::{
    identity::PodUid,
    pod::Pod,
    policy::{PatternFormat, Policy, check_allow_list},
    role::{AnnotationKeys, Attribution, CredentialsFrom, Roles},
};
use kube2ram_cloud::{Cloud, role::BaseArn};

use super::model::Tree;

/// Checks one list.
pub fn check(data: &[u8]) {
    let Some((&first, text)) = data.split_first() else { return };
    let format = if first & 1 == 0 { PatternFormat::Glob } else { PatternFormat::Regexp };
    let Some((role, list)) = str::from_utf8(text).ok().and_then(|text| text.split_once('\n')) else { return };
    for cloud in Cloud::ALL {
        check_on(cloud, format, role, list);
    }
}

fn check_on(cloud: Cloud, format: PatternFormat, role: &str, list: &str) {
    let (dialect, tree) = (cloud.dialect(), Tree::of(cloud));
    let annotations = BTreeMap::from([("role".into(), role.into())]);
    let (namespace, name, service_account) = ("n".into(), "p".into(), "s".into());
    let account_annotations = None;
    let uid = PodUid::parse("0a1b2c3d-0000-4000-8000-000000000001").expect("a UID");
    let pod = Pod {
        uid,
        namespace,
        name,
        account_annotations,
        is_mirror: false,
        service_account,
        host_network: false,
        annotations,
    };
    let [role, external_id, policy, duration, session_name] =
        ["role", "external-id", "policy", "duration", "session-name"].map(Box::from);
    let keys = AnnotationKeys { role, account_role: None, external_id, policy, duration, session_name };
    let base = BaseArn::parse_in(dialect.arns, tree.base).expect("a base ARN");
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    let roles = Roles::try_new(dialect, keys, Some(base), None, duration, attribution, CredentialsFrom::Node)
        .expect("no default role");

    let fault = check_allow_list(list, format, dialect.arns).err();
    let Ok(session) = roles.session_for(&pod) else { return };
    let arn = session.role.as_str().to_owned();
    let policy = Policy::new(Some(format), &roles);
    let allowed = policy.permit(session.clone(), Some(Some(list)), None).is_ok();
    assert_eq!(policy.permit(session, Some(Some(list)), None).is_ok(), allowed, "asked again");

    let patterns = serde_json::from_str::<Vec<String>>(list).unwrap_or_default();
    let matching = patterns.iter().any(|pattern| {
        let subject = if tree.is_arn(pattern) { Some(&*arn) } else { arn.strip_prefix(tree.base) };
        subject.is_some_and(|subject| matches(pattern, subject, format))
    });
    assert!(!allowed || matching, "{list} allows {arn}");
    if fault.is_none() {
        assert_eq!(allowed, matching, "{list} and {arn}");
    }
}

fn matches(pattern: &str, subject: &str, format: PatternFormat) -> bool {
    match format {
        PatternFormat::Glob => glob(pattern.as_bytes(), subject.as_bytes()),
        PatternFormat::Regexp => {
            // By itself, so that it cannot lean on what surrounds it.
            let build = |text: &str| regex::bytes::RegexBuilder::new(text).unicode(false).build();
            build(pattern).is_ok()
                && build(&format!(r"\A(?:{pattern})\z")).is_ok_and(|regex| regex.is_match(subject.as_bytes()))
        }
    }
}

/// By the definition, one row of the table at a time.
fn glob(pattern: &[u8], subject: &[u8]) -> bool {
    let mut row: Vec<bool> = (0..=subject.len()).map(|length| length == 0).collect();
    for byte in pattern {
        let mut next = vec![false; row.len()];
        next[0] = *byte == b'*' && row[0];
        for at in 1..row.len() {
            next[at] = match byte {
                b'*' => row[at] || next[at - 1],
                _ => row[at - 1] && *byte == subject[at - 1],
            };
        }
        row = next;
    }
    row[subject.len()]
}
