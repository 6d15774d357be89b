//! Row numbers are those of docs/predecessors.md.

use super::*;

const BASE: &str = "acs:ram::123456789012:role/";

fn keys() -> AnnotationKeys {
    AnnotationKeys {
        role: "role".into(),
        external_id: "external-id".into(),
        policy: "policy".into(),
        duration: "duration".into(),
        session_name: "session-name".into(),
    }
}

fn roles(base: Option<&str>, default_role: Option<&str>) -> Roles {
    let base = base.map(|base| BaseArn::parse(base).unwrap());
    Roles::try_new(keys(), base, default_role, Duration::from_secs(3600)).unwrap()
}

/// The session of a pod `web/shop` with these annotations.
fn session(roles: &Roles, annotations: &[(&str, &str)]) -> Result<RoleSession, RoleError> {
    let annotations = annotations.iter().map(|&(key, value)| (key.into(), value.into())).collect();
    roles.session("web", "shop", &annotations)
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
        let base = base.map(|base| BaseArn::parse(base).unwrap());

        let error = Roles::try_new(keys(), base, Some(default_role), Duration::from_secs(3600)).unwrap_err();

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
