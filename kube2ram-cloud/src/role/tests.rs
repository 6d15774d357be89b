//! Row numbers are those of docs/predecessors.md.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const BASE: &str = "acs:ram::123456789012:role/";

fn arn(text: &str) -> RoleArn {
    RoleArn::parse(text).unwrap()
}

#[test]
fn completes_names_and_takes_arns_as_they_are_rows_1_1_to_1_8() {
    let cases = [
        ("1.1", BASE, "my-role", "acs:ram::123456789012:role/my-role"),
        ("1.2", BASE, "acs:ram::999999999999:role/cross-account", "acs:ram::999999999999:role/cross-account"),
        ("1.3", BASE, "ACS:ram::999999999999:role/upper-case", "ACS:ram::999999999999:role/upper-case"),
        ("1.5", BASE, "team/foo", "acs:ram::123456789012:role/team/foo"),
        ("1.6", "acs:ram::123456789012:role/team/", "foo", "acs:ram::123456789012:role/team/foo"),
        ("1.8", "acs:ram::123456789012:role", "my-role", "acs:ram::123456789012:role/my-role"),
        ("1.8 path", "acs:ram::123456789012:role/team", "my-role", "acs:ram::123456789012:role/team/my-role"),
    ];

    for (row, base, role, expected) in cases {
        let completed = BaseArn::parse(base).unwrap().arn_for(role).unwrap();

        assert_eq!(completed.as_str(), expected, "row {row}");
    }
}

#[test]
fn accepts_the_base_arns_that_the_predecessor_accepts() {
    let accepted = [
        "acs:ram::123456789012:role/path",
        "acs:ram::123456789012:role/path/",
        "acs:ram::123456789012:role/path/sub-path",
        "acs:ram::123456789012:role/path/sub_path",
        "acs:ram::123456789012:role/subdomain.domain",
        "acs:ram::123456789012:role",
        "acs:ram::123456789012:role/",
        "acs:ram::123456789012:role-part",
        "acs:ram::123456789012:role_part",
        "acs:ram::123456789012:role_123",
    ];

    for text in accepted {
        let base = BaseArn::parse(text).unwrap();

        assert_eq!(base.as_str().trim_end_matches('/'), text.trim_end_matches('/'));
        assert!(base.as_str().ends_with('/') && !base.as_str().ends_with("//"), "{base}");
    }
}

#[test]
fn refuses_the_base_arns_that_the_predecessors_refuse() {
    let refused = [
        "acs:ram::123456789012::role/path",
        "acs:ram:us-east-1:123456789012:role/path",
        "acs:oss::123456789012:role/path",
        "acs:ram::123456789012:role/$",
        "acs:ram::12345-6789012:role/",
        "acs:ram::abcdef:role/",
        "acs:ram:::role",
        "",
        "not-an-arn",
        "acs:ram::123456789012:user/my-user",
        "arn:aws:iam::123456789012:role/",
    ];

    for text in refused {
        assert_eq!(BaseArn::parse(text), Err(ValueError::NotBaseArn), "{text}");
    }
}

#[test]
fn returns_account_and_name_of_an_arn() {
    let role = arn("ACS:ram::999999999999:role/team/foo");

    assert_eq!(role.account(), "999999999999");
    assert_eq!(role.name(), "team/foo");
    assert_eq!(role.to_string(), "ACS:ram::999999999999:role/team/foo");
}

#[test]
fn refuses_what_is_no_role_arn_and_reports_why() {
    let legal = "letters, digits, '.', '_', '-' and '/'";
    let cases = [
        ("", ValueError::Empty),
        ("my-role", ValueError::NotArn),
        ("acs:ram::1:user/me", ValueError::NotArn),
        ("acs:ram:::role/foo", ValueError::NotArn),
        ("acs:ram::1a:role/foo", ValueError::NotArn),
        ("acs:RAM::1:role/foo", ValueError::NotArn),
        ("acs:ram::1:role/", ValueError::Segment),
        ("acs:ram::1:role//foo", ValueError::Segment),
        ("acs:ram::1:role/foo/", ValueError::Segment),
        ("acs:ram::1:role/../foo", ValueError::Segment),
        ("acs:ram::1:role/a:role/b", ValueError::Character { found: ':', legal }),
        ("acs:ram::1:role/foo\n", ValueError::Character { found: '\n', legal }),
        ("acs:ram::1:role/ü", ValueError::Character { found: 'ü', legal }),
    ];

    for (text, reason) in cases {
        assert_eq!(RoleArn::parse(text), Err(reason), "{text}");
    }
    let long = |length: usize| format!("acs:ram::1:role/{}", "x".repeat(length - 16));
    assert!(RoleArn::parse(&long(512)).is_ok());
    assert_eq!(RoleArn::parse(&long(513)), Err(ValueError::Length { found: 513, min: 1, max: 512 }));
}

const AWS_BASE: &str = "arn:aws:iam::123456789012:role/";

fn aws_base(text: &str) -> Result<BaseArn, ValueError> {
    BaseArn::parse_in(ArnStyle::Aws, text)
}

#[test]
fn completes_names_and_takes_arns_as_they_are_on_aws() {
    for (base, role, expected) in [
        (AWS_BASE, "my-role", "arn:aws:iam::123456789012:role/my-role"),
        (AWS_BASE, "team/a+b=c,d@e.f_g", "arn:aws:iam::123456789012:role/team/a+b=c,d@e.f_g"),
        ("arn:aws:iam::123456789012:role", "r", "arn:aws:iam::123456789012:role/r"),
        ("arn:aws-cn:iam::123456789012:role/team", "r", "arn:aws-cn:iam::123456789012:role/team/r"),
        (AWS_BASE, "arn:aws:iam::999999999999:role/other", "arn:aws:iam::999999999999:role/other"),
        (AWS_BASE, "ARN:aws-us-gov:iam::999999999999:role/p/r", "ARN:aws-us-gov:iam::999999999999:role/p/r"),
    ] {
        let arn = aws_base(base).unwrap().arn_for(role).unwrap();

        assert_eq!((arn.as_str(), arn.style()), (expected, ArnStyle::Aws));
    }
    let role = arn("arn:aws-iso-b:iam::123456789012:role/team/foo");
    assert_eq!((role.account(), role.name()), ("123456789012", "team/foo"));
    assert_eq!(aws_base(AWS_BASE).unwrap().account(), "123456789012");
}

#[test]
fn accepts_the_base_arns_that_kube2iam_accepts() {
    // iam_test.go and cmd of kube2iam.
    for text in [
        "arn:aws:iam::123456789012:role/path",
        "arn:aws:iam::123456789012:role/path/",
        "arn:aws:iam::123456789012:role/path/sub-path",
        "arn:aws:iam::123456789012:role/path/sub_path",
        "arn:aws:iam::123456789012:role/subdomain.domain",
        "arn:aws:iam::123456789012:role",
        "arn:aws:iam::123456789012:role/",
        "arn:aws:iam::123456789012:role-part",
        "arn:aws-cn:iam::123456789012:role/",
        "arn:aws-us-gov:iam::123456789012:role/",
    ] {
        let base = aws_base(text).unwrap();

        assert_eq!(base.as_str().trim_end_matches('/'), text.trim_end_matches('/'));
        assert!(base.as_str().ends_with('/') && !base.as_str().ends_with("//"), "{base}");
    }
    for text in [
        "arn:aws:iam::123456789012::role/path",
        "arn:aws:iam:us-east-1:123456789012:role/path",
        "arn:aws:s3::123456789012:role/path",
        "arn:aws:iam::123456789012:role/$",
        "arn:aws:iam::12345-6789012:role/",
        "arn:aws:iam::abcdef:role/",
        "arn:aws:iam:::role",
        "arn:aws:iam::1:role/",
        "arn:aws:iam::1234567890123:role/",
        "arn::iam::123456789012:role/",
        "arn:aws-:iam::123456789012:role/",
        "arn:awsx:iam::123456789012:role/",
        "arn:aws:x:iam::123456789012:role/",
        "ARN:aws:iam::123456789012:role/",
        "",
        "not-an-arn",
        "arn:aws:iam::123456789012:user/my-user",
        BASE,
    ] {
        assert_eq!(aws_base(text), Err(ValueError::NotIamBaseArn), "{text}");
    }
}

#[test]
fn refuses_what_is_no_iam_role_arn_and_says_why() {
    let legal = "letters, digits and any of +=,.@_-/";
    for (text, reason) in [
        ("arn:aws:iam::123456789012:user/me", ValueError::NotIamArn),
        ("arn:aws:iam::1:role/foo", ValueError::NotIamArn),
        ("arn:aws:iam::12345678901a:role/foo", ValueError::NotIamArn),
        ("arn:AWS:iam::123456789012:role/foo", ValueError::NotIamArn),
        ("arn:aws:IAM::123456789012:role/foo", ValueError::NotIamArn),
        ("arn:gcp:iam::123456789012:role/foo", ValueError::NotIamArn),
        ("arn:aws:sts::123456789012:assumed-role/foo/s", ValueError::NotIamArn),
        ("arn:aws:iam::123456789012:role/", ValueError::Segment),
        ("arn:aws:iam::123456789012:role//foo", ValueError::Segment),
        ("arn:aws:iam::123456789012:role/../foo", ValueError::Segment),
        ("arn:aws:iam::123456789012:role/a b", ValueError::Character { found: ' ', legal }),
        ("arn:aws:iam::123456789012:role/a%2Fb", ValueError::Character { found: '%', legal }),
        ("arn:aws:iam::123456789012:role/a:role/b", ValueError::Character { found: ':', legal }),
        ("arn:aws:iam::123456789012:role/ü", ValueError::Character { found: 'ü', legal }),
    ] {
        assert_eq!(RoleArn::parse(text), Err(reason), "{text}");
    }
    let long = |length: usize| format!("{AWS_BASE}{}", "x".repeat(length - AWS_BASE.len()));
    assert!(RoleArn::parse(&long(512)).is_ok());
    assert_eq!(RoleArn::parse(&long(513)), Err(ValueError::Length { found: 513, min: 1, max: 512 }));
}

#[test]
fn a_base_of_one_cloud_never_makes_or_names_a_role_of_another() {
    let (acs, aws) = (BaseArn::parse(BASE).unwrap(), aws_base(AWS_BASE).unwrap());
    let (acs_role, aws_role) = (format!("{BASE}foo"), format!("{AWS_BASE}foo"));

    for (base, foreign, own) in [(&acs, &aws_role, &acs_role), (&aws, &acs_role, &aws_role)] {
        let refused = base.arn_for(foreign).unwrap_err();
        assert!(matches!(refused, ValueError::Character { found: ':', .. }), "{refused}");
        assert_eq!(base.relative_name(&arn(foreign)), None);
        assert_eq!(base.arn_for(own).unwrap().as_str(), own);
        assert_eq!(base.relative_name(&arn(own)), Some("foo"));
    }
    // The same account number in another partition is another account.
    assert_eq!(aws.relative_name(&arn("arn:aws-cn:iam::123456789012:role/foo")), None);
    assert!(!is_arn(&aws_role) && ArnStyle::Aws.is_arn("Arn:aws") && !ArnStyle::Aws.is_arn("acs:ram"));
}

#[test]
fn each_cloud_has_its_own_alphabet_of_session_names_and_policies() {
    let (acs, aws) = (&SessionRules::ACS, &SessionRules::AWS);
    for (text, on_acs, on_aws) in
        [("a.b@c_d-e", true, true), ("a+b=c,d", false, true), ("a b", false, false), ("a:b", false, false)]
    {
        let parsed = [SessionName::parse_in(acs, text).is_ok(), SessionName::parse_in(aws, text).is_ok()];
        assert_eq!(parsed, [on_acs, on_aws], "{text}");
        assert_eq!(SessionName::parse(text).is_ok(), on_acs, "{text}");
    }
    for length in [1, 65] {
        assert!(SessionName::parse_in(aws, &"a".repeat(length)).is_err());
    }
    for (text, on_aws) in
        [("{\"a\": \"ÿ\"}\n", true), ("{\"a\": \"Ā\"}", false), (r#"{"a": "\u0100"}"#, true)]
    {
        assert!(SessionPolicy::parse(text).is_ok(), "{text}");
        assert_eq!(SessionPolicy::parse_in(aws, text).is_ok(), on_aws, "{text}");
    }
}

#[test]
fn a_tags_value_is_taken_as_it_is_or_not_at_all() {
    for text in ["a", "shop", "my-cluster.k8s/eu west:1=a+b@c_d", "0a1b2c3d-0000", &*"a".repeat(256)] {
        assert_eq!(TagValue::parse(text).unwrap().as_str(), text);
    }
    let legal = "letters, digits, blanks and any of _.:/=+@-";
    for (text, reason) in [
        ("", ValueError::Length { found: 0, min: 1, max: 256 }),
        (&*"a".repeat(257), ValueError::Length { found: 257, min: 1, max: 256 }),
        ("a,b", ValueError::Character { found: ',', legal }),
        ("a\tb", ValueError::Character { found: '\t', legal }),
        ("café", ValueError::Character { found: 'é', legal }),
    ] {
        assert_eq!(TagValue::parse(text), Err(reason), "{text}");
    }
}

#[test]
fn the_bound_of_tags_holds_for_the_longest() {
    let keys = TagKeys::EKS;
    let keys = [keys.cluster, keys.namespace, keys.service_account, keys.pod_name, keys.pod_uid];
    let longest = TagValue::parse(&"a".repeat(256)).unwrap();
    let tags = keys.map(|key| Tag { key, value: longest.clone() });

    // The cluster's name belongs to all sessions.
    let own: usize = tags[1..].iter().map(|tag| tag.value.as_str().len()).sum();

    assert!(size_of_val(&tags) + own < TAGS_MAX_BYTES && TAGS_MAX_BYTES < 1536, "{TAGS_MAX_BYTES}");
    // What STS and IAM accept as keys: 1–128 characters, none of AWS's own, distinct without regard to case.
    let distinct: HashSet<_> = keys.map(str::to_ascii_lowercase).into();
    assert_eq!(distinct.len(), keys.len());
    assert!(keys.iter().all(|key| (1..=128).contains(&key.len()) && !key.starts_with("aws:")));
}

#[test]
fn a_chained_session_is_limited_where_the_cloud_limits_it_and_no_other() {
    let (hour, longer) = (Duration::from_hours(1), Duration::from_hours(2));

    assert_eq!(SessionRules::AWS.limit(longer, true), Some(hour));
    for (rules, wanted, is_chained) in [
        (SessionRules::AWS, longer, false),
        (SessionRules::AWS, hour, true),
        (SessionRules::ACS, MAX_DURATION, true),
    ] {
        assert_eq!(rules.limit(wanted, is_chained), None, "{rules:?} {wanted:?} {is_chained}");
    }
}

#[test]
fn bounds_lengths_as_sts_does() {
    assert!(SessionName::parse("ab").is_ok() && SessionName::parse(&"a".repeat(64)).is_ok());
    assert!(SessionName::parse(&"a".repeat(65)).is_err());
    assert!(ExternalId::parse("ab").is_ok() && ExternalId::parse(&"a".repeat(1224)).is_ok());
    assert!(ExternalId::parse("a").is_err() && ExternalId::parse(&"a".repeat(1225)).is_err());
    let policy = |length: usize| format!("{{\"a\":\"{}\"}}", "ü".repeat(length - 8));
    assert!(SessionPolicy::parse(&policy(2048)).is_ok() && SessionPolicy::parse(&policy(2049)).is_err());
}

#[test]
fn reads_durations_between_15_minutes_and_12_hours() {
    let cases = [
        ("15m", Some(900)),
        ("900", Some(900)),
        ("1h30m", Some(5400)),
        ("12h0m0s", Some(43_200)),
        ("1.5h", Some(5400)),
        ("899", None),
        ("43201", None),
        ("14m59s", None),
        ("15M", None),
        ("-1h", None),
        ("", None),
        ("99999999999999999999", None),
    ];

    for (text, seconds) in cases {
        assert_eq!(parse_duration(text).ok(), seconds.map(Duration::from_secs), "{text}");
    }
}

#[test]
fn session_names_are_made_fit_and_stay_distinct() {
    let long = "n".repeat(63);

    let kept = SessionName::fit(&format!("{}.{}", "n".repeat(31), "s".repeat(32)));
    let cut = SessionName::fit(&format!("{long}.first"));
    let cut_other = SessionName::fit(&format!("{long}.second"));
    let replaced = SessionName::fit("web.a:b");

    assert_eq!(kept.as_str(), format!("{}.{}", "n".repeat(31), "s".repeat(32)));
    assert_eq!(cut.as_str().len(), 64);
    assert_ne!(cut, cut_other);
    assert_eq!(cut.as_str()[..56], format!("{}-", "n".repeat(55)));
    assert!(replaced.as_str().starts_with("web.a-b-"), "{replaced}");
    assert_ne!(replaced, SessionName::fit("web.a/b"));
}

fn session_by(grant: Grant) -> RoleSession {
    RoleSession {
        role: arn("acs:ram::123456789012:role/app"),
        grant,
        policy: None,
        session_name: SessionName::parse("shop.web").unwrap(),
        duration: MIN_DURATION,
        tags: [].into(),
        source_identity: None,
    }
}

fn account(namespace: &str, name: &str) -> ServiceAccount {
    ServiceAccount { namespace: namespace.into(), name: name.into() }
}

#[test]
fn a_session_by_a_service_account_is_never_one_by_the_agents_own_identity() {
    let own = Grant::AssumeRole { external_id: Some(ExternalId::parse("id").unwrap()) };
    let by_account = Grant::ServiceAccount(account("shop", "web"));

    assert_eq!(own.external_id().map(ExternalId::as_str), Some("id"));
    assert_eq!((Grant::ASSUME_ROLE.external_id(), by_account.external_id()), (None, None));
    assert_ne!(session_by(Grant::ASSUME_ROLE), session_by(by_account));
    assert_eq!(account("shop", "web").subject(), "system:serviceaccount:shop:web");
}

proptest! {
    #[test]
    fn two_service_accounts_never_share_a_session(first in "[a-z-]{1,3}", second in "[a-z.-]{1,3}", third in "[a-z-]{1,3}", fourth in "[a-z.-]{1,3}") {
        let (one, other) = (account(&first, &second), account(&third, &fourth));
        let is_same = (&first, &second) == (&third, &fourth);

        let keys = [&one, &other].map(|account| session_by(Grant::ServiceAccount(account.clone())));

        prop_assert_eq!(keys[0] == keys[1], is_same);
        prop_assert_eq!(HashSet::from(keys).len() == 1, is_same);
        // No namespace and no name holds a colon.
        prop_assert_eq!(one.subject() == other.subject(), is_same);
    }

    #[test]
    fn any_text_makes_a_legal_session_name(text in any::<String>()) {
        let (name, identity) = (SessionName::fit(&text), SourceIdentity::fit(&text));

        prop_assert!(SessionName::parse(identity.as_str()).is_ok(), "{}", identity.as_str());
        // What fits stays as it is. What does not is marked by what no name in Kubernetes has.
        let fits = SessionName::parse(&text).is_ok();
        prop_assert_eq!(fits, identity.as_str() == text);
        prop_assert!(fits || identity.as_str().rsplit_once('_').is_some_and(|(_, hash)| hash.len() == 32));
        prop_assert_eq!(SessionName::parse(name.as_str()), Ok(name));
    }

    #[test]
    fn an_arn_comes_apart_as_it_was_put_together(account in "[0-9]{1,16}", name in "[A-Za-z0-9_-]{1,9}(/[a-z._-]{3,9})?") {
        let arn = RoleArn::parse(&format!("acs:ram::{account}:role/{name}"));

        prop_assume!(arn.is_ok());
        let arn = arn.unwrap();
        prop_assert_eq!((arn.account(), arn.name()), (&*account, &*name));
    }

    #[test]
    fn parsing_never_panics(text in any::<String>()) {
        let _: [bool; 6] = [
            TagValue::parse(&text).is_ok(),
            RoleArn::parse(&text).is_ok(),
            BaseArn::parse(&text).is_ok(),
            ExternalId::parse(&text).is_ok(),
            SessionPolicy::parse(&text).is_ok(),
            parse_duration(&text).is_ok(),
        ];
    }

    #[test]
    fn an_arn_of_aws_comes_apart_as_it_was_put_together(account in "[0-9]{12}", partition in "aws(-[a-z]{1,4}){0,2}", name in "[A-Za-z0-9+=,@_-]{1,9}(/[a-z._-]{3,9})?") {
        let arn = RoleArn::parse(&format!("arn:{partition}:iam::{account}:role/{name}"));

        prop_assume!(arn.is_ok());
        let arn = arn.unwrap();
        prop_assert_eq!((arn.account(), arn.name(), arn.style()), (&*account, &*name, ArnStyle::Aws));
    }

    #[test]
    fn a_name_never_leaves_the_base_on_aws(name in any::<String>(), tail in "[ -~]{0,20}") {
        for name in [&name, &tail] {
            if let Ok(arn) = aws_base("arn:aws:iam::123456789012:role/team").unwrap().arn_for(name)
                && !ArnStyle::Aws.is_arn(name)
            {
                prop_assert_eq!(arn.as_str(), format!("arn:aws:iam::123456789012:role/team/{name}"));
            }
        }
    }

    #[test]
    fn a_name_never_leaves_the_base(name in any::<String>()) {
        let base = BaseArn::parse("acs:ram::123456789012:role/team").unwrap();

        if let Ok(arn) = base.arn_for(&name) && !is_arn(&name) {
            prop_assert_eq!(arn.as_str(), format!("acs:ram::123456789012:role/team/{name}"));
        }
    }
}
