//! Row numbers are those of docs/predecessors.md.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::role::{AnnotationKeys, Attribution, CredentialsFrom};
use kube2ram_cloud::{
    alibaba, aws,
    dialect::Dialect,
    role::{Grant, SessionName},
};

const BASE: &str = "acs:ram::123456789012:role/";
const NEITHER: Option<Option<&str>> = None;

fn roles(dialect: &'static Dialect, base: Option<&str>, default_role: Option<&str>) -> Roles {
    let keys = ["role", "external-id", "policy", "duration", "session-name"].map(Box::from);
    let [role, external_id, policy, duration, session_name] = keys;
    let keys = AnnotationKeys { role, account_role: None, external_id, policy, duration, session_name };
    let base = base.map(|base| BaseArn::parse_in(dialect.arns, base).unwrap());
    let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
    let from = CredentialsFrom::Node;
    Roles::try_new(dialect, keys, base, default_role, duration, attribution, from).unwrap()
}

fn policy(restrictions: Option<PatternFormat>, base: Option<&str>, default_role: Option<&str>) -> Policy {
    Policy::new(restrictions, &roles(&alibaba::DIALECT, base, default_role))
}

/// `role` is an ARN, or a name below [`BASE`].
fn session(role: &str) -> RoleSession {
    RoleSession {
        role: BaseArn::parse(BASE).unwrap().arn_for(role).unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("web.shop").unwrap(),
        duration: Duration::from_secs(3600),
        tags: [].into(),
        source_identity: None,
    }
}

/// Whether a namespace with this allow-list may have `role`.
fn allows(format: PatternFormat, list: &str, role: &str) -> bool {
    policy(Some(format), Some(BASE), None).permit(session(role), Some(Some(list)), None).is_ok()
}

#[test]
fn restrictions_follow_the_predecessors_tests_rows_3_1_to_3_25() {
    use PatternFormat::{Glob, Regexp};
    let full_default = Some("acs:ram::123456789012:role/default-role");
    let full = r#"["acs:ram::123456789012:role/explicit-role"]"#;
    let full_glob = r#"["acs:ram::123456789012:role/path/*-role"]"#;
    let full_regexp = r#"["acs:ram::123456789012:role/path/.*-role"]"#;
    let two = r#"["explicit-role", "explicit-role2"]"#;
    let two_reversed = r#"["explicit-role2", "explicit-role"]"#;
    let cases = [
        ("3.1", None, None, None, "explicit-role", true),
        ("3.2", Some(Glob), Some("default-role"), None, "default-role", true),
        ("3.3", Some(Glob), full_default, None, "default-role", true),
        ("3.4", Some(Glob), full_default, Some(r#"["explicit-role"]"#), "explicit-role", true),
        ("3.5", Some(Glob), full_default, Some(r#"["path/*"]"#), "path/explicit-role", true),
        ("3.6", Some(Glob), full_default, Some(full), "explicit-role", true),
        ("3.7", Some(Glob), full_default, Some(full_glob), "path/explicit-role", true),
        ("3.8", Some(Glob), full_default, Some(full), "test-role", false),
        ("3.9", Some(Glob), None, Some(""), "explicit-role", false),
        ("3.10", Some(Glob), None, Some(two), "test-role", false),
        ("3.11", Some(Glob), None, Some(two), "explicit-role", true),
        ("3.12", Some(Glob), None, Some(two_reversed), "explicit-role", true),
        ("3.13", Some(Glob), None, Some(r#"["glob-*", "explicit-role"]"#), "glob-role", true),
        ("3.14", Some(Glob), None, Some(r#"["explicit-role", "glob-*"]"#), "glob-role", true),
        ("3.15", Some(Regexp), Some("default-role"), None, "default-role", true),
        ("3.16", Some(Regexp), full_default, None, "default-role", true),
        ("3.17", Some(Regexp), full_default, Some(r#"["explicit-role"]"#), "explicit-role", true),
        ("3.18", Some(Regexp), full_default, Some(r#"["path/.*"]"#), "path/explicit-role", true),
        ("3.19", Some(Regexp), full_default, Some(full), "explicit-role", true),
        ("3.20", Some(Regexp), full_default, Some(full_regexp), "path/explicit-role", true),
        ("3.21", Some(Regexp), full_default, Some(full), "test-role", false),
        ("3.22", Some(Regexp), None, Some(""), "explicit-role", false),
        ("3.23", Some(Regexp), None, Some(two), "test-role", false),
        ("3.24a", Some(Regexp), None, Some(two), "explicit-role", true),
        ("3.24b", Some(Regexp), None, Some(two_reversed), "explicit-role", true),
        ("3.25a", Some(Regexp), None, Some(r#"["glob-.*", "explicit-role"]"#), "glob-role", true),
        ("3.25b", Some(Regexp), None, Some(r#"["explicit-role", "glob-.*"]"#), "glob-role", true),
    ];

    for (row, restrictions, default_role, list, role, allowed) in cases {
        let policy = policy(restrictions, Some(BASE), default_role);

        let permit = policy.permit(session(role), list.map(Some), None);

        assert_eq!(permit.is_ok(), allowed, "row {row}: {permit:?}");
    }
}

#[test]
fn globs_cover_names_below_the_base_rows_3_26_to_3_32() {
    let foreign = "acs:ram::999999999999:role/x";
    let cases = [
        ("3.27", r#"["*"]"#, "x/y", true),
        ("3.28", r#"["*"]"#, foreign, false),
        ("3.29", r#"["acs:ram::*:role/shared-*"]"#, "acs:ram::999999999999:role/shared-x", true),
        ("3.29 twin", r#"["acs:ram::*:role/shared-*"]"#, foreign, false),
        ("3.30", r#"["path/*"]"#, "path", false),
        ("3.30", r#"["path/*"]"#, "path/a", true),
        ("3.30", r#"["path/*"]"#, "mypath/a", false),
        ("3.31", r#"["App-*"]"#, "app-1", false),
        ("3.31", r#"["app-?"]"#, "app-1", false),
        ("3.31", r#"["app-[12]"]"#, "app-1", false),
        ("3.31 twin", r#"["app-*"]"#, "app-1", true),
        ("3.32", r#"[""]"#, "x", false),
    ];

    for (row, list, role, allowed) in cases {
        assert_eq!(allows(PatternFormat::Glob, list, role), allowed, "row {row}: {list} {role}");
    }
    // No RoleArn ends in a slash. The list itself would allow it, as in the predecessors.
    let list = AllowList::parse(r#"["path/*"]"#, PatternFormat::Glob, ArnStyle::Acs);
    assert!(list.allows("acs:ram::123456789012:role/path/", Some(BASE)), "row 3.30");
}

#[test]
fn regexps_match_as_a_whole_below_the_base_rows_3_33_to_3_40() {
    let foreign = "acs:ram::999999999999:role/ops";
    let cases = [
        ("3.33", r#"["dev"]"#, "dev-anything", false),
        ("3.33 twin", r#"["dev"]"#, "dev", true),
        ("3.34", r#"["dev"]"#, "xdev", false),
        ("3.35", r#"["dev$"]"#, "dev-anything", false),
        ("3.35 twin", r#"["dev$"]"#, "dev", true),
        ("3.36", r#"["^dev$"]"#, "dev", false),
        ("3.36", r#"["^acs:ram::123456789012:role/dev$"]"#, "dev", false),
        ("3.37", r#"["dev|ops"]"#, foreign, false),
        ("3.37", r#"["dev|ops"]"#, "dev", true),
        ("3.37", r#"["dev|ops"]"#, "ops", true),
        ("3.37", r#"["dev|ops"]"#, "dev-ops", false),
        ("3.38", r#"[""]"#, "anything", false),
        ("3.39", r#"["a.b"]"#, "aXb", true),
        ("3.39b", r#"["(?i)DEV"]"#, "dev", true),
        ("3.39b twin", r#"["DEV"]"#, "dev", false),
        ("3.40", r#"["[", "x"]"#, "x", true),
        ("3.40 twin", r#"["[", "x"]"#, "y", false),
        ("own group closed", r#"["x)|(?:.*"]"#, "y", false),
        ("own group closed", r#"["x)|(?:.*"]"#, "x", false),
        ("comment", r#"["(?x)x #", "y"]"#, "x", false),
        ("comment twin", r#"["(?x)x #", "y"]"#, "y", true),
        ("comment across patterns", r#"["(?x)x #", "[\n)|.*|(]"]"#, foreign, false),
        (
            "ARN, alternation",
            r#"["acs:ram::999999999999:role/dev|acs:ram::999999999999:role/ops"]"#,
            foreign,
            true,
        ),
        ("ARN, anchored", r#"["acs:ram::999999999999:role/op"]"#, foreign, false),
    ];

    for (row, list, role, allowed) in cases {
        assert_eq!(allows(PatternFormat::Regexp, list, role), allowed, "row {row}: {list} {role}");
    }
}

#[test]
fn the_default_role_is_exempt_even_when_annotated_row_3_41() {
    for format in [PatternFormat::Glob, PatternFormat::Regexp] {
        let policy = policy(Some(format), Some(BASE), Some("worker"));

        for list in [None, Some(None), Some(Some("[]")), Some(Some("nonsense"))] {
            assert!(policy.permit(session("worker"), list, None).is_ok());
            assert!(policy.permit(session("other"), list, None).is_err());
        }
    }
}

#[test]
fn reads_lists_as_json_arrays_of_strings_only() {
    let malformed = |place| Some(format!("is not a JSON array of strings ({place})"));
    let cases = [
        ("", false, None),
        (" \n", false, None),
        ("null", false, None),
        ("[]", false, None),
        (r#"["my-role"]"#, true, None),
        (r#"["role-a","role-b","my-role"]"#, true, None),
        ("[\"my-role\"]\n", true, None),
        ("not valid json", false, malformed("line 1, column 2")),
        ("something maleformed here", false, malformed("line 1, column 1")),
        (r#""my-role""#, false, malformed("line 1, column 9")),
        (r#"{"my-role": 1}"#, false, malformed("line 1, column 0")),
        (r#"["my-role", 1]"#, false, malformed("line 1, column 13")),
        (r#"["my-role"] x"#, false, malformed("line 1, column 13")),
    ];

    for (list, allowed, fault) in cases {
        for format in [PatternFormat::Glob, PatternFormat::Regexp] {
            assert_eq!(allows(format, list, "my-role"), allowed, "{list}");
            assert_eq!(check_allow_list(list, format, ArnStyle::Acs).err(), fault, "{list}");
        }
    }
}

#[test]
fn reports_which_pattern_is_wrong() {
    let cases = [
        (PatternFormat::Glob, r#"["a", ""]"#, "has a pattern (number 2) that is empty"),
        (PatternFormat::Regexp, r#"["a", "["]"#, "has a pattern (number 2) that is not a regular expression"),
        (
            PatternFormat::Regexp,
            r#"["^a$"]"#,
            "has a pattern (number 1) that starts with ^, but patterns match as a whole anyway",
        ),
        (PatternFormat::Regexp, r#"["(a{1000}){1000}"]"#, "has too large regular expressions"),
    ];

    for (format, list, fault) in cases {
        assert_eq!(check_allow_list(list, format, ArnStyle::Acs), Err(fault.to_owned()));
    }
    assert_eq!(check_allow_list(r#"["[", "^a$"]"#, PatternFormat::Glob, ArnStyle::Acs), Ok(()));
}

#[test]
fn bounds_the_lists() {
    let list = |patterns: usize, pattern: &str| serde_json::to_string(&vec![pattern; patterns]).unwrap();
    let padded = |bytes: usize| format!(r#"["x"]{}"#, " ".repeat(bytes - 5));

    for (format, most) in [(PatternFormat::Glob, 1024), (PatternFormat::Regexp, 300)] {
        assert!(allows(format, &list(most, "x"), "x"));
        assert!(!allows(format, &list(1025, "x"), "x"));
        assert!(allows(format, &padded(65_536), "x"));
        assert!(!allows(format, &padded(65_537), "x"));
    }
    let names = |count, width| {
        let names: Vec<_> = (0..count).map(|number| format!("{number:0width$}")).collect();
        serde_json::to_string(&names).unwrap()
    };
    assert!(allows(PatternFormat::Regexp, &names(75, 10), "0000000074"));
    assert!(allows(PatternFormat::Regexp, &names(40, 20), "00000000000000000039"));
    assert!(!allows(PatternFormat::Regexp, &names(1000, 20), "00000000000000000499"));
    assert!(allows(PatternFormat::Regexp, r#"["x|a{100}"]"#, "x"));
    assert!(!allows(PatternFormat::Regexp, r#"["x|(a{1000}){1000}"]"#, "x"));
}

#[test]
fn patterns_are_arns_by_the_agents_own_cloud_and_no_other() {
    let own = "arn:aws:iam::123456789012:role/";
    let (name, foreign) = ("shared-x", "arn:aws:iam::999999999999:role/shared-x");
    for (list, format, role, allowed) in [
        (r#"["shared-*"]"#, PatternFormat::Glob, name, true),
        (r#"["shared-*"]"#, PatternFormat::Glob, foreign, false),
        (r#"["*"]"#, PatternFormat::Glob, foreign, false),
        (r#"["arn:aws:iam::*:role/shared-*"]"#, PatternFormat::Glob, foreign, true),
        (r#"["ARN:aws:iam::*:role/shared-*"]"#, PatternFormat::Glob, foreign, false),
        (r#"["acs:ram::*:role/*"]"#, PatternFormat::Glob, name, false),
        (r#"["acs:*"]"#, PatternFormat::Glob, foreign, false),
        (r#"["arn:aws:iam::[0-9]{12}:role/shared-.*"]"#, PatternFormat::Regexp, foreign, true),
        (r#"["arn:aws:iam::[0-9]{12}:role/shared"]"#, PatternFormat::Regexp, foreign, false),
        (r#"[".*"]"#, PatternFormat::Regexp, foreign, false),
        (r#"[".*"]"#, PatternFormat::Regexp, name, true),
    ] {
        let roles = roles(&aws::DIALECT, Some(own), None);
        let role = roles.base().unwrap().arn_for(role).unwrap();
        let session = RoleSession { role, ..session("any") };

        let permit = Policy::new(Some(format), &roles).permit(session, Some(Some(list)), None);

        assert_eq!(permit.is_ok(), allowed, "{list}: {permit:?}");
    }
}

#[test]
fn names_below_no_base_are_not_allowed() {
    let policy = policy(Some(PatternFormat::Glob), None, None);

    assert!(policy.permit(session("x"), Some(Some(r#"["*", "x"]"#)), None).is_err());
    assert!(policy.permit(session("x"), Some(Some(r#"["acs:ram::123456789012:role/x"]"#)), None).is_ok());
}

#[test]
fn denials_give_the_reason_to_logs_and_little_to_clients() {
    let policy = policy(Some(PatternFormat::Glob), Some(BASE), None);
    let forbids = "the pod's namespace does not allow the pod's role";
    let cases = [
        (NEITHER, None, "the pod's namespace is not known", "the pod's namespace is not known to the agent"),
        (Some(None), None, "the namespace does not allow acs:ram::123456789012:role/mine", forbids),
        (Some(Some("[]")), None, "the namespace does not allow acs:ram::123456789012:role/mine", forbids),
        (
            Some(Some("nonsense")),
            None,
            "the namespace's allow-list does not allow acs:ram::123456789012:role/mine: it is not a JSON array of strings \
             (line 1, column 2)",
            forbids,
        ),
        (
            Some(Some(r#"["*"]"#)),
            Some("a\nb"),
            "\"a\\nb\" was requested, but the pod's role is acs:ram::123456789012:role/mine",
            "the requested role is not the pod's role",
        ),
    ];

    for (list, requested, log, external) in cases {
        let denial = policy.permit(session("mine"), list, requested).unwrap_err();

        assert_eq!(denial.to_string(), log);
        assert_eq!(denial.external_message(), external);
    }
    assert!(policy.permit(session("mine"), Some(Some(r#"["*"]"#)), Some("mine")).is_ok());
}

#[test]
fn the_requested_role_is_the_pods_own_by_any_of_its_names_rows_4_6_to_4_10() {
    let with_path = "acs:ram::123456789012:role/team/";
    let cases = [
        ("4.6", BASE, "my-role", "my-role", true),
        ("4.7", BASE, "my-role", "acs:ram::123456789012:role/my-role", true),
        ("4.9", BASE, "my-role", "different-role", false),
        ("4.10", BASE, "my-role", "my-role/", true),
        ("two slashes", BASE, "my-role", "my-role//", false),
        ("case", BASE, "my-role", "My-Role", true),
        ("empty", BASE, "my-role", "", false),
        ("suffix", BASE, "my-role", "role", false),
        ("prefix", BASE, "my-role", "my", false),
        ("other account", BASE, "my-role", "acs:ram::999999999999:role/my-role", false),
        ("with path", BASE, "team/foo", "team/foo", true),
        ("last segment only", BASE, "team/foo", "foo", false),
        ("below the base", with_path, "team/foo", "foo", true),
        ("below the base, whole", with_path, "team/foo", "team/foo", true),
        ("4.5", BASE, "acs:ram::999999999999:role/cross-role", "acs:ram::999999999999:role/cross-role", true),
    ];

    for (row, base, role, requested, allowed) in cases {
        for restrictions in [None, Some(PatternFormat::Glob)] {
            let policy = policy(restrictions, Some(base), None);

            let permit = policy.permit(session(role), Some(Some(r#"["acs:*"]"#)), Some(requested));

            assert_eq!(permit.is_ok(), allowed, "row {row}: {permit:?}");
        }
    }
}

#[test]
fn the_nodes_role_is_not_for_pods_with_their_own_row_4_16() {
    let node_role = "kubernetesworkerrole-0a1b2c3d";
    let policy = policy(None, Some(BASE), Some(node_role));

    for requested in
        [node_role, "role-0a1b2c3d", "d", "acs:ram::123456789012:role/kubernetesworkerrole-0a1b2c3d"]
    {
        let denial = policy.permit(session("my-role"), Some(None), Some(requested)).unwrap_err();

        assert!(matches!(denial, Denial::OtherRole { .. }), "{requested}");
    }
    assert!(policy.permit(session("my-role"), Some(None), Some("my-role")).is_ok());
}

#[test]
fn a_hostile_request_is_cut_in_the_denial() {
    let denial =
        policy(None, Some(BASE), None).permit(session("x"), None, Some(&"ü".repeat(100_000))).unwrap_err();

    assert!(matches!(denial, Denial::OtherRole { requested, .. } if requested.chars().count() == 128));
}

proptest! {
    #[test]
    fn no_pattern_leaves_the_base_account_unless_it_is_an_arn(
        patterns in prop::collection::vec(prop_oneof![any::<String>(), r"[xa.*+?()|\[\]^$\\#:{}\n-]{0,12}", r"\(\?[imsx]+\)[a.*()|#\[\]\n]{0,9}"], 0..4),
        role in "[a-z]{1,6}",
    ) {
        prop_assume!(patterns.iter().all(|pattern| !pattern.to_ascii_lowercase().starts_with("acs:")));
        let list = serde_json::to_string(&patterns).unwrap();
        let foreign = format!("acs:ram::999999999999:role/{role}");

        for format in [PatternFormat::Glob, PatternFormat::Regexp] {
            prop_assert!(!allows(format, &list, &foreign));
        }
    }

    #[test]
    fn a_permit_is_for_the_pods_own_role_always(
        role in "(acs:ram::[0-9]{1,12}:role/)?[a-z]{1,3}(/[a-z]{1,3})?",
        default_role in prop::option::of("[a-z]{1,3}"),
        list in prop::option::of(prop::option::of("(\\[\"[a-z.*]{0,4}\"\\])?")),
        requested in prop::option::of("[a-z]{0,3}(/[a-z]{0,3})?"),
        restrictions in prop_oneof![Just(None), Just(Some(PatternFormat::Glob)), Just(Some(PatternFormat::Regexp))],
    ) {
        let policy = policy(restrictions, Some(BASE), default_role.as_deref());
        let session = session(&role);
        let list = list.as_ref().map(|list| list.as_deref());

        if let Ok(permit) = policy.permit(session.clone(), list, requested.as_deref()) {
            prop_assert_eq!(permit.session(), &session);
        }
    }

    #[test]
    fn what_the_list_route_returns_may_be_asked_for(
        role in "(acs:ram::(123456789012|9):role/)?(team/)?[a-z]{1,6}",
        base in prop::option::of("acs:ram::123456789012:role(/team)?"),
    ) {
        let roles = roles(&alibaba::DIALECT, base.as_deref(), None);
        let session = session(&role);

        let requested = roles.wire_name(&session.role).to_owned();

        prop_assert!(Policy::new(None, &roles).permit(session, None, Some(&requested)).is_ok());
    }

    #[test]
    fn reading_a_list_never_panics(text in prop_oneof![any::<String>(), r#"\["[^"\\]{0,20}"\]"#]) {
        for format in [PatternFormat::Glob, PatternFormat::Regexp] {
            let _checked = [ArnStyle::Acs, ArnStyle::Aws].map(|style| check_allow_list(&text, format, style));
        }
    }
}
