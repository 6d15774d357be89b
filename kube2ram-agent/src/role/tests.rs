//! Row numbers are those of docs/predecessors.md.

use super::*;
use crate::identity::PodUid;
use kube2ram_cloud::{alibaba, aws, role::SessionRules};

const BASE: &str = "acs:ram::123456789012:role/";
const AWS_BASE: &str = "arn:aws:iam::123456789012:role/";
const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

fn keys() -> AnnotationKeys {
    AnnotationKeys {
        role: "role".into(),
        external_id: "external-id".into(),
        policy: "policy".into(),
        duration: "duration".into(),
        session_name: "session-name".into(),
    }
}

fn try_roles(
    dialect: &'static Dialect,
    base: Option<&str>,
    default_role: Option<&str>,
) -> Result<Roles, RoleError> {
    let base = base.map(|base| BaseArn::parse_in(dialect.arns, base).unwrap());
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    Roles::try_new(dialect, keys(), base, default_role, duration, attribution)
}

fn roles(base: Option<&str>, default_role: Option<&str>) -> Roles {
    try_roles(&alibaba::DIALECT, base, default_role).unwrap()
}

/// A pod of the service account `shop` in the namespace `web`.
fn pod(annotations: &[(&str, &str)]) -> Pod {
    Pod {
        uid: PodUid::parse(UID).unwrap(),
        namespace: "web".into(),
        name: "shop-0".into(),
        account_annotations: None,
        service_account: "shop".into(),
        host_network: false,
        annotations: annotations.iter().map(|&(key, value)| (key.into(), value.into())).collect(),
    }
}

/// The session of a pod `web/shop` with these annotations.
fn session(roles: &Roles, annotations: &[(&str, &str)]) -> Result<RoleSession, RoleError> {
    roles.session_for(&pod(annotations))
}

fn arn(text: &str) -> RoleArn {
    RoleArn::parse(text).unwrap()
}

#[test]
fn refuses_a_bare_name_without_base_arn_row_1_4() {
    let error = session(&roles(None, None), &[("role", "my-role")]).unwrap_err();

    assert_eq!(error, RoleError::NoBaseArn { key: "role".into() });
    assert!(session(&roles(Some(BASE), None), &[("role", "my-role")]).is_ok());
    assert!(session(&roles(None, None), &[("role", "acs:ram::1:role/my-role")]).is_ok());
}

#[test]
fn an_empty_annotation_is_malformed_and_not_the_default_role_row_1_7() {
    for base in [Some(BASE), None] {
        let roles = roles(base, Some("acs:ram::1:role/default-role"));

        let error = session(&roles, &[("role", "")]).unwrap_err();

        assert_eq!(error, RoleError::Malformed { key: "role".into(), reason: ValueError::Empty });
        assert_eq!(session(&roles, &[]).unwrap().role, arn("acs:ram::1:role/default-role"));
    }
}

#[test]
fn returns_the_pods_role_rows_2_1_to_2_7() {
    let foreign = "acs:ram::999999999999:role/explicit-arn";
    let default = Some("explicit-default-role");
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Option<&'a str>, Option<&'a str>);
    let cases: [Case<'_>; 7] = [
        ("2.1", &[], None, None),
        ("2.2", &[("role", "explicit-role")], None, Some("acs:ram::123456789012:role/explicit-role")),
        ("2.3", &[], default, Some("acs:ram::123456789012:role/explicit-default-role")),
        ("2.4", &[("role", "something")], default, Some("acs:ram::123456789012:role/something")),
        ("2.5", &[("role", foreign)], default, Some(foreign)),
        ("2.6", &[("other", "something")], default, Some("acs:ram::123456789012:role/explicit-default-role")),
        (
            "2.7",
            &[("role", "something"), ("external-id", "externalID")],
            default,
            Some("acs:ram::123456789012:role/something"),
        ),
    ];

    for (row, annotations, default_role, expected) in cases {
        let session = session(&roles(Some(BASE), default_role), annotations);

        match expected {
            Some(expected) => assert_eq!(session.unwrap().role.as_str(), expected, "row {row}"),
            None => assert_eq!(session, Err(RoleError::NoRole), "row {row}"),
        }
    }
}

#[test]
fn a_pod_without_role_has_none_with_and_without_base_arn_rows_2_8_and_2_9() {
    for base in [Some(BASE), None] {
        assert_eq!(session(&roles(base, None), &[]), Err(RoleError::NoRole));
    }
}

#[test]
fn refuses_a_default_role_that_cannot_be_used() {
    let cases = [
        (Some(BASE), "", RoleError::Malformed { key: "--default-role".into(), reason: ValueError::Empty }),
        (
            Some(BASE),
            "a//b",
            RoleError::Malformed { key: "--default-role".into(), reason: ValueError::Segment },
        ),
        (None, "my-role", RoleError::NoBaseArn { key: "--default-role".into() }),
    ];

    for (base, default_role, expected) in cases {
        let error = try_roles(&alibaba::DIALECT, base, Some(default_role)).unwrap_err();

        assert_eq!(error, expected);
    }
}

#[test]
fn takes_the_other_parameters_from_annotations_and_defaults() {
    let roles = roles(Some(BASE), None);
    let policy = r#"{"Version":"1","Statement":[]}"#;

    let plain = session(&roles, &[("role", "r")]).unwrap();
    let full = session(
        &roles,
        &[
            ("role", "r"),
            ("external-id", "tenant:7"),
            ("policy", policy),
            ("duration", "1h30m"),
            ("session-name", "nightly@shop"),
        ],
    )
    .unwrap();

    assert_eq!((plain.grant, plain.policy), (Grant::ASSUME_ROLE, None));
    assert_eq!(plain.session_name.as_str(), "web.shop");
    assert_eq!(plain.duration, Duration::from_secs(3600));
    assert_eq!(full.grant, Grant::AssumeRole { external_id: Some(ExternalId::parse("tenant:7").unwrap()) });
    assert_eq!(full.policy.unwrap().as_str(), policy);
    assert_eq!(full.session_name.as_str(), "nightly@shop");
    assert_eq!(full.duration, Duration::from_secs(5400));
}

#[test]
fn denies_a_malformed_annotation_and_names_its_key() {
    let cases = [
        (
            "role",
            "a b",
            "the value of role contains ' '; only letters, digits, '.', '_', '-' and '/' are allowed",
        ),
        ("external-id", "", "the value of external-id has 0 characters instead of 2 to 1224"),
        (
            "external-id",
            "a b",
            "the value of external-id contains ' '; only letters, digits and any of _+=,.@:/- are allowed",
        ),
        ("policy", "[]", "the value of policy is not a JSON object"),
        ("policy", "{", "the value of policy is not a JSON object"),
        ("policy", "", "the value of policy has 0 characters instead of 1 to 2048"),
        (
            "duration",
            "soon",
            "the value of duration is not a duration between 15m and 12h, such as 90m, 1h30m or 5400 (seconds)",
        ),
        ("session-name", "x", "the value of session-name has 1 characters instead of 2 to 64"),
        (
            "session-name",
            "a/b",
            "the value of session-name contains '/'; only letters, digits, '.', '@', '_' and '-' are allowed",
        ),
    ];
    let roles = roles(Some(BASE), Some("default-role"));

    for (key, value, message) in cases {
        let error = session(&roles, &[(key, value)]).unwrap_err();

        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn names_roles_on_the_wire_rows_4_5_and_4_16b() {
    let with_path = "acs:ram::123456789012:role/team/";
    let cases = [
        ("4.16b", Some(BASE), "acs:ram::123456789012:role/my-role", "my-role"),
        ("4.16b path", Some(BASE), "acs:ram::123456789012:role/team/foo", "team/foo"),
        ("below the base", Some(with_path), "acs:ram::123456789012:role/team/foo", "foo"),
        ("beside the base", Some(with_path), "acs:ram::123456789012:role/ops/foo", "ops/foo"),
        ("4.5", Some(BASE), "acs:ram::999999999999:role/cross-role", "acs:ram::999999999999:role/cross-role"),
        ("prefix of account", Some(BASE), "acs:ram::12345678901:role/x", "acs:ram::12345678901:role/x"),
        ("no base", None, "acs:ram::123456789012:role/my-role", "acs:ram::123456789012:role/my-role"),
    ];

    for (row, base, role, expected) in cases {
        assert_eq!(roles(base, None).wire_name(&arn(role)), expected, "row {row}");
    }
}

/// `kubernetes` keeps so many bytes of each annotation, and marks what it cuts.
#[test]
fn longest_legal_values_fit_their_bounds_and_what_is_cut_is_refused() {
    let roles = roles(Some(BASE), None);
    let policy = |characters: usize| format!("{{\"a\":\"{}\"}}", "\u{10348}".repeat(characters - 8));
    let longest = [
        ("role", format!("acs:ram::1:role/{}", "x".repeat(512 - 16))),
        ("external-id", "x".repeat(1224)),
        ("policy", policy(2048)),
        ("duration", "11hours 59minutes 59seconds".to_owned()),
        ("session-name", "x".repeat(64)),
    ];

    for ((key, bound), (named, value)) in keys().bounded().into_iter().zip(longest) {
        assert_eq!(key, named);
        assert!(value.len() <= bound, "{key}: {}", value.len());
        let with = |value: &str| match key {
            "role" => session(&roles, &[(key, value)]),
            _ => session(&roles, &[("role", "reader"), (key, value)]),
        };
        assert!(with(&value).is_ok(), "{key}");
        let cut = with(&format!("{value}…")).unwrap_err();
        assert!(matches!(cut, RoleError::Malformed { .. }), "{key}: {cut}");
        assert!(with("reader…").is_err() && with("{}…").is_err() && with("1h…").is_err(), "{key}");
    }
}

#[test]
fn values_are_read_as_the_agents_cloud_has_them_and_errors_name_its_form() {
    let roles = |base| try_roles(&aws::DIALECT, base, None).unwrap();
    for base in [Some(AWS_BASE), None] {
        let arn = "arn:aws-cn:iam::999999999999:role/team/a+b=c";
        assert_eq!(session(&roles(base), &[("role", arn)]).unwrap().role.as_str(), arn);
    }
    let named = session(&roles(Some(AWS_BASE)), &[("role", "r"), ("session-name", "a+b=c,d")]).unwrap();
    assert_eq!(
        (named.role.as_str(), named.session_name.as_str()),
        ("arn:aws:iam::123456789012:role/r", "a+b=c,d")
    );

    for (base, key, value, message) in [
        (
            Some(AWS_BASE),
            "role",
            "arn:aws:iam::1:role/x",
            "the value of role is not an IAM role's ARN, arn:<partition>:iam::<12 digits>:role/<name>",
        ),
        (
            None,
            "role",
            "arn:aws:iam::1:role/x",
            "the value of role is not an IAM role's ARN, arn:<partition>:iam::<12 digits>:role/<name>",
        ),
        (
            Some(AWS_BASE),
            "role",
            "acs:ram::1:role/x",
            "the value of role contains ':'; only letters, digits and any of +=,.@_-/ are allowed",
        ),
        (
            None,
            "role",
            "acs:ram::1:role/x",
            "the value of role is a bare role name, and the agent knows no base ARN to complete it with",
        ),
        (
            Some(AWS_BASE),
            "session-name",
            "a/b",
            "the value of session-name contains '/'; only letters, digits and any of _+=,.@- are allowed",
        ),
        (
            Some(AWS_BASE),
            "policy",
            "{\"a\": \"Ā\"}",
            "the value of policy contains 'Ā'; only characters up to U+00FF as they stand are allowed",
        ),
    ] {
        let annotations = [("role", "r"), (key, value)];
        let error = session(&roles(base), &annotations[usize::from(key == "role")..]).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    let error = try_roles(&aws::DIALECT, None, Some("acs:ram::1:role/x")).unwrap_err();
    assert_eq!(error, RoleError::NoBaseArn { key: "--default-role".into() });
    assert!(try_roles(&aws::DIALECT, None, Some("arn:aws:iam::123456789012:role/x")).is_ok());
}

/// Roles on AWS with these flags.
fn attributed(tags: SessionTags, cluster: Option<&str>, has_source_identity: bool) -> Roles {
    let dialect = &aws::DIALECT;
    let attribution = Attribution::try_new(&dialect.sessions, tags, cluster, has_source_identity).unwrap();
    let base = BaseArn::parse_in(dialect.arns, AWS_BASE).unwrap();
    Roles::try_new(dialect, keys(), Some(base), None, Duration::from_secs(3600), attribution).unwrap()
}

fn tags(session: &RoleSession) -> Vec<(&str, &str)> {
    session.tags.iter().map(|tag| (tag.key, tag.value.as_str())).collect()
}

#[test]
fn sessions_have_the_tags_that_the_flag_asks_for() {
    let cluster = ("eks-cluster-name", "prod-1");
    let workload = [("kubernetes-namespace", "web"), ("kubernetes-service-account", "shop")];
    let pod = [("kubernetes-pod-name", "shop-0"), ("kubernetes-pod-uid", UID)];

    for (flag, name, expected) in [
        (SessionTags::None, None, vec![]),
        (SessionTags::None, Some("prod-1"), vec![]),
        (SessionTags::Workload, None, workload.to_vec()),
        (SessionTags::Workload, Some("prod-1"), [&[cluster][..], &workload].concat()),
        (SessionTags::Pod, None, [workload, pod].concat()),
        (SessionTags::Pod, Some("prod-1"), [&[cluster][..], &workload, &pod].concat()),
    ] {
        let session = session(&attributed(flag, name, false), &[("role", "r")]).unwrap();

        assert_eq!(tags(&session), expected, "{flag:?} {name:?}");
        assert_eq!(session.source_identity, None);
    }
}

#[test]
fn pods_of_a_workload_share_a_session_unless_tags_name_the_pod() {
    let first = pod(&[("role", "r")]);
    let twin = Pod {
        uid: PodUid::parse("0a1b2c3d-0000-4000-8000-000000000002").unwrap(),
        name: "shop-1".into(),
        ..first.clone()
    };
    let other = Pod { namespace: "stage".into(), ..pod(&[("role", "r"), ("session-name", "web.shop")]) };

    for (flag, are_shared) in
        [(SessionTags::None, true), (SessionTags::Workload, true), (SessionTags::Pod, false)]
    {
        let roles = attributed(flag, None, true);
        let session = |pod| roles.session_for(pod).unwrap();

        assert_eq!(session(&first) == session(&twin), are_shared, "{flag:?}");
        assert_ne!(session(&first), session(&other), "{flag:?}: the name alone can be chosen");
    }
}

#[test]
fn the_source_identity_is_the_workload_whatever_the_pod_calls_its_session() {
    let roles = attributed(SessionTags::None, None, true);

    let session = session(&roles, &[("role", "r"), ("session-name", "billing.admin")]).unwrap();

    assert_eq!(session.session_name.as_str(), "billing.admin");
    assert_eq!(session.source_identity.unwrap().as_str(), "web.shop");
    let long = Pod { service_account: "s".repeat(253).into(), ..pod(&[("role", "r")]) };
    let identity = roles.session_for(&long).unwrap().source_identity.unwrap();
    assert_eq!(identity.as_str().len(), 64);
    assert!(identity.as_str().starts_with("web.sss"), "{identity:?}");
}

#[test]
fn a_name_that_can_be_no_tag_denies_the_pod() {
    let odd = Pod { namespace: "we,b".into(), ..pod(&[("role", "r")]) };

    let error = attributed(SessionTags::Workload, None, false).session_for(&odd).unwrap_err();

    assert!(error.to_string().starts_with("the value of kubernetes-namespace contains ','"), "{error}");
    assert!(attributed(SessionTags::None, None, false).session_for(&odd).is_ok());
}

#[test]
fn flags_that_the_cloud_does_not_have_are_errors() {
    use AttributionError::{ClusterName, NoSessionTags, NoSourceIdentity};
    let (acs, aws) = (&SessionRules::ACS, &SessionRules::AWS);
    let too_long = "x".repeat(257);
    for (rules, tags, cluster, has_source_identity, error) in [
        (acs, "none", None, false, None),
        (acs, "workload", None, false, Some(NoSessionTags)),
        (acs, "pod", Some("c"), false, Some(NoSessionTags)),
        (acs, "none", None, true, Some(NoSourceIdentity)),
        (aws, "pod", Some("c"), true, None),
        (
            aws,
            "none",
            Some("a,b"),
            false,
            Some(ClusterName {
                name: "a,b".into(),
                reason: ValueError::Character {
                    found: ',',
                    legal: "letters, digits, blanks and any of _.:/=+@-",
                },
            }),
        ),
        (
            aws,
            "workload",
            Some(&*too_long),
            false,
            Some(ClusterName {
                name: too_long.as_str().into(),
                reason: ValueError::Length { found: 257, min: 1, max: 256 },
            }),
        ),
    ] {
        let tags = tags.parse().unwrap();

        let result = Attribution::try_new(rules, tags, cluster, has_source_identity);

        assert_eq!(result.err(), error, "{tags:?} {cluster:?}");
    }
    assert_eq!("Pod".parse::<SessionTags>(), Err("give none, workload or pod"));
}
