//! Row numbers are those of docs/predecessors.md.

use super::*;
use crate::identity::PodUid;
use kube2ram_cloud::{
    alibaba, aws,
    role::{ServiceAccount, SessionRules},
};

const BASE: &str = "acs:ram::123456789012:role/";
const AWS_BASE: &str = "arn:aws:iam::123456789012:role/";
const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

fn keys() -> AnnotationKeys {
    AnnotationKeys {
        role: "role".into(),
        account_role: None,
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
    Roles::try_new(dialect, keys(), base, default_role, duration, attribution, CredentialsFrom::Node)
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
        is_mirror: false,
        service_account: "shop".into(),
        host_network: false,
        annotations: annotations.iter().map(|&(key, value)| (key.into(), value.into())).collect(),
    }
}

/// Roles that also come from ServiceAccounts, with a base ARN and a default role.
fn reading(from: CredentialsFrom) -> Roles {
    let keys = AnnotationKeys { account_role: Some("alias".into()), ..keys() };
    let base = BaseArn::parse(BASE).unwrap();
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    Roles::try_new(&alibaba::DIALECT, keys, Some(base), Some("usual"), duration, attribution, from).unwrap()
}

/// The same pod, whose ServiceAccount has these annotations.
fn pod_of(annotations: &[(&str, &str)], account: &[(&str, &str)]) -> Pod {
    Pod { account_annotations: Some(pod(account).annotations.into()), ..pod(annotations) }
}

fn setting_of_account(key: &str) -> Setting {
    let pod = pod_of(&[], &[(key, "")]);
    Found::on_account(&pod, key).unwrap().setting()
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
    let (duration, from) = (Duration::from_secs(3600), CredentialsFrom::Node);
    Roles::try_new(dialect, keys(), Some(base), None, duration, attribution, from).unwrap()
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

#[test]
fn a_role_is_the_pods_own_then_its_service_accounts_then_the_default() {
    let both = [CredentialsFrom::Node, CredentialsFrom::ServiceAccount];
    // By whether the pod, its ServiceAccount, and its ServiceAccount by the other key have one.
    let all = (0..8_u8).map(|bits| [bits & 4 != 0, bits & 2 != 0, bits & 1 != 0]);
    for ([on_pod, on_account, by_alias], from) in all.flat_map(|has| both.map(|from| (has, from))) {
        let own: &[_] = if on_pod { &[("role", "own")] } else { &[] };
        let of_account = [(on_account, ("role", "accounts")), (by_alias, ("alias", "other"))];
        let of_account: Vec<_> = of_account.into_iter().filter(|(is, _)| *is).map(|(_, pair)| pair).collect();
        let (pod, roles) = (pod_of(own, &of_account), reading(from));

        let session = roles.session_for(&pod).unwrap();
        let source = roles.role_annotation(&pod);

        let (name, setting) = match (on_pod, on_account, by_alias) {
            (true, ..) => ("own", Some(("role".into(), "own"))),
            (false, true, _) => ("accounts", Some((setting_of_account("role"), "accounts"))),
            (false, false, true) => ("other", Some((setting_of_account("alias"), "other"))),
            (false, false, false) => ("usual", None),
        };
        assert_eq!(session.role.name(), name, "{own:?} {of_account:?}");
        assert_eq!(source, setting, "{own:?} {of_account:?}");
        assert_eq!(roles.is_asked_for_by(&pod), name != "usual");
    }
}

#[test]
fn the_other_parameters_are_the_pods_own_or_its_service_accounts() {
    let roles = reading(CredentialsFrom::Node);
    let policy = |version: u8| format!("{{\"Version\":\"{version}\"}}");
    let (first, second) = (policy(1), policy(2));
    let account = [("policy", &*second), ("duration", "2h"), ("session-name", "accounts")];
    let own = [("policy", &*first), ("duration", "1h30m"), ("session-name", "own")];

    for (annotations, policy, minutes, name, is_own) in
        [(&own[..], &first, 90, "own", true), (&[], &second, 120, "accounts", false)]
    {
        let pod = pod_of(annotations, &account);
        let session = roles.session_for(&pod).unwrap();

        assert_eq!(session.policy.unwrap().as_str(), policy);
        assert_eq!(session.duration, Duration::from_secs(minutes * 60));
        assert_eq!(session.session_name.as_str(), name);
        let setting = roles.duration_annotation(&pod).unwrap();
        assert_eq!(setting.account().is_none(), is_own, "{setting}");
    }
    assert_eq!(roles.duration_annotation(&pod_of(&[], &[])), None);
}

#[test]
fn a_static_pod_has_no_service_account_whatever_its_object_says() {
    let [by_node, by_account] = [CredentialsFrom::Node, CredentialsFrom::ServiceAccount].map(reading);
    for own in [&[][..], &[("role", "own")]] {
        let mirror = Pod { is_mirror: true, ..pod_of(own, &[]) };
        let twin = Pod { is_mirror: false, ..mirror.clone() };

        assert_eq!(by_account.session_for(&mirror), Err(RoleError::NoServiceAccount));
        assert!(by_account.session_for(&twin).is_ok());
        assert_eq!(by_node.session_for(&mirror), by_node.session_for(&twin), "as before");
    }
}

#[test]
fn an_unusable_annotation_of_a_service_account_denies_its_pods_and_is_named() {
    let roles = reading(CredentialsFrom::Node);

    for (account, message) in [
        (("role", ""), "the value of role of ServiceAccount web/shop is empty"),
        (("alias", ""), "the value of alias of ServiceAccount web/shop is empty"),
        (
            ("alias", "a//b"),
            "the value of alias of ServiceAccount web/shop has an empty, '.' or '..' segment in the role's path",
        ),
        (("policy", "["), "the value of policy of ServiceAccount web/shop is not a JSON object"),
        (
            ("session-name", "x"),
            "the value of session-name of ServiceAccount web/shop has 1 characters instead of 2 to 64",
        ),
    ] {
        assert_eq!(roles.session_for(&pod_of(&[], &[account])).unwrap_err().to_string(), message);
        // It does not count where the pod has its own, except that the alias and the role are one value.
        let own = match account.0 {
            "role" | "alias" => ("role", "own"),
            "policy" => ("policy", "{}"),
            key => (key, "own"),
        };
        assert!(roles.session_for(&pod_of(&[own], &[account])).is_ok(), "{account:?}");
    }
    // Nor does one of the pod's lead to the ServiceAccount's.
    let error = roles.session_for(&pod_of(&[("role", "")], &[("role", "accounts")])).unwrap_err();
    assert_eq!(error, RoleError::Malformed { key: "role".into(), reason: ValueError::Empty });
    let error = roles.session_for(&pod_of(&[], &[("role", ""), ("alias", "other")])).unwrap_err();
    assert_eq!(error, RoleError::Malformed { key: setting_of_account("role"), reason: ValueError::Empty });
}

#[test]
fn a_bare_name_of_a_service_account_needs_a_base_arn_too() {
    let keys = AnnotationKeys { account_role: Some("alias".into()), ..keys() };
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    let from = CredentialsFrom::Node;
    let roles = Roles::try_new(&alibaba::DIALECT, keys, None, None, duration, attribution, from).unwrap();

    let error = roles.session_for(&pod_of(&[], &[("alias", "orders")])).unwrap_err();

    assert_eq!(error, RoleError::NoBaseArn { key: setting_of_account("alias") });
    assert!(error.to_string().contains("alias of ServiceAccount web/shop is a bare role name"), "{error}");
    assert!(roles.session_for(&pod_of(&[], &[("alias", "acs:ram::1:role/orders")])).is_ok());
}

#[test]
fn what_is_not_known_of_a_service_account_denies_the_pod_and_is_no_missing_role() {
    for from in [CredentialsFrom::Node, CredentialsFrom::ServiceAccount] {
        let roles = reading(from);

        for annotations in [&[][..], &[("role", "own")]] {
            assert_eq!(roles.session_for(&pod(annotations)), Err(RoleError::AccountUnknown));
            assert!(roles.is_asked_for_by(&pod(annotations)));
            assert!(roles.session_for(&pod_of(annotations, &[])).is_ok());
        }
        assert!(!roles.is_asked_for_by(&pod_of(&[], &[])));
    }
}

#[test]
fn annotations_of_service_accounts_count_only_where_they_are_read() {
    let roles = roles(Some(BASE), Some("usual"));
    let account = [("role", "accounts"), ("alias", "other"), ("session-name", "accounts"), ("policy", "[")];

    let session = roles.session_for(&pod_of(&[], &account)).unwrap();

    assert_eq!((session.role.name(), session.session_name.as_str()), ("usual", "web.shop"));
    assert!(!roles.is_asked_for_by(&pod_of(&[], &account)) && !roles.reads_accounts());
    assert_eq!(keys().account_bounded(), None);
}

#[test]
fn each_way_has_its_own_grant_and_neither_leads_to_the_other() {
    let account = ServiceAccount { namespace: "web".into(), name: "shop".into() };
    let tenant = [("role", "own"), ("external-id", "tenant:7")];
    let by_node = reading(CredentialsFrom::Node);
    let by_account = reading(CredentialsFrom::ServiceAccount);

    for annotations in [&[][..], &tenant[..1]] {
        let pod = pod_of(annotations, &[("alias", "other")]);

        let [first, second] = [&by_node, &by_account].map(|roles| roles.session_for(&pod).unwrap());

        assert_eq!(first.grant, Grant::ASSUME_ROLE);
        assert_eq!(second.grant, Grant::ServiceAccount(account.clone()));
        assert_eq!(first.role, second.role);
    }
    let external_id = Some(ExternalId::parse("tenant:7").unwrap());
    let session = by_node.session_for(&pod_of(&tenant, &[])).unwrap();
    assert_eq!(session.grant, Grant::AssumeRole { external_id });
}

#[test]
fn an_external_id_is_of_the_pod_and_refused_with_a_service_accounts_token() {
    let (by_node, by_account) = (reading(CredentialsFrom::Node), reading(CredentialsFrom::ServiceAccount));
    let own = |value| pod_of(&[("role", "own"), ("external-id", value)], &[]);

    for value in ["tenant:7", ""] {
        let error = by_account.session_for(&own(value)).unwrap_err();

        let subject_key = "oidc:sub";
        assert_eq!(error, RoleError::NoExternalId { key: "external-id".into(), subject_key });
        let text = error.to_string();
        assert!(text.contains("external-id") && text.contains(subject_key), "{text}");
    }
    assert!(by_node.session_for(&own("tenant:7")).is_ok());
    // A ServiceAccount's has no meaning: it is not even kept.
    let of_account = pod_of(&[], &[("role", "r"), ("external-id", "")]);
    for roles in [by_node, by_account] {
        assert!(roles.session_for(&of_account).is_ok());
    }
}

#[test]
fn pods_of_two_service_accounts_never_share_a_session() {
    let roles = reading(CredentialsFrom::ServiceAccount);
    let annotations = [("role", "own"), ("session-name", "one-name")];
    let first = pod_of(&annotations, &[]);
    let uid = PodUid::parse("0a1b2c3d-0000-4000-8000-000000000002").unwrap();
    let twin = Pod { uid, name: "shop-1".into(), ..first.clone() };
    let others = [
        Pod { service_account: "other".into(), ..first.clone() },
        Pod { namespace: "other".into(), ..first.clone() },
    ];
    let session = |pod| roles.session_for(pod).unwrap();

    assert_eq!(session(&first), session(&twin));
    for other in &others {
        assert_ne!(session(&first), session(other), "{}/{}", other.namespace, other.service_account);
    }
}

#[test]
fn the_keys_of_a_service_account_are_those_that_count_with_their_bounds() {
    let keys = AnnotationKeys { account_role: Some("alias".into()), ..keys() };
    let of_pod = keys.bounded();

    let of_account = keys.account_bounded().unwrap();

    for (key, bytes) in of_account {
        let role = of_pod[0].1;
        assert!(of_pod.contains(&(key, bytes)) || (key, bytes) == ("alias", role), "{key}");
    }
    assert!(!of_account.iter().any(|(key, _)| *key == "external-id"));
    assert_eq!(of_account.len(), of_pod.len());
}
