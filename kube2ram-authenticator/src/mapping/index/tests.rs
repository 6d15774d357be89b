use super::*;
use crate::mapping::testing::{ACCOUNT, entry, role, user};

fn arn(rest: &str) -> String {
    format!("acs:ram::{ACCOUNT}:{rest}")
}

fn index(entries: &[Entry]) -> Index {
    Index::new(entries, &[], Arc::default()).0
}

fn states(entries: &[Entry]) -> Vec<State> {
    Index::new(entries, &[], Arc::default()).1.into_iter().map(|report| report.state).collect()
}

fn username(index: &Index, identity: &Identity) -> Option<String> {
    match index.decide(identity).mapped {
        Mapped::User(user) => Some(user.username.into()),
        Mapped::Conflict(_) | Mapped::Nobody => None,
    }
}

fn is_conflict(index: &Index, identity: &Identity) -> bool {
    matches!(index.decide(identity).mapped, Mapped::Conflict(_))
}

fn mapped() -> State {
    State::Mapped { warnings: Vec::new() }
}

#[test]
fn a_session_is_mapped_as_its_role_in_any_case() {
    let index =
        index(&[entry(&arn("role/Admin"), "admin", &["view"]), entry(&arn("user/Alice"), "alice", &[])]);

    let decision = index.decide(&role("ADMIN", "s"));

    let expected = User { username: "admin".into(), groups: vec!["view".into()] };
    assert_eq!(decision, Decision { mapped: Mapped::User(expected), by: vec![arn("role/Admin").into()] });
    assert_eq!(username(&index, &user("alice")).as_deref(), Some("alice"));
    assert_eq!(index.decide(&user("admin")).mapped, Mapped::Nobody, "a user of the role's name");
    assert_eq!(index.decide(&role("alice", "s")).mapped, Mapped::Nobody);
}

#[test]
fn an_exact_mapping_goes_before_a_pattern_and_a_longer_prefix_before_a_shorter_one() {
    let index = index(&[
        entry(&arn("role/*"), "any", &[]),
        entry(&arn("role/dev-*"), "dev", &[]),
        entry(&arn("role/dev-db-?"), "db", &[]),
        entry(&arn("role/dev-db-1"), "one", &[]),
    ]);

    for (name, expected) in
        [("dev-db-1", "one"), ("dev-db-2", "db"), ("dev-db-22", "dev"), ("dev-x", "dev"), ("ops", "any")]
    {
        assert_eq!(username(&index, &role(name, "s")).as_deref(), Some(expected), "{name}");
    }
    assert_eq!(index.decide(&role("dev-/x", "s")).mapped, Mapped::Nobody, "no pattern goes across a slash");
}

/// ack-ram-authenticator searches for an unanchored regular expression instead.
#[test]
fn a_pattern_gives_its_groups_to_what_it_matches_as_a_whole_only() {
    let index =
        index(&[entry(&arn("role/admin*"), "admin", &["ops"]), entry(&arn("role/*-dba"), "dba", &["db"])]);

    for name in ["admin", "admin-x", "x-dba"] {
        assert!(username(&index, &role(name, "s")).is_some(), "{name}");
    }
    for name in ["admi", "xadmin", "admin/x", "admi/anything", "x-dba-y", "x.dba"] {
        assert_eq!(index.decide(&role(name, "s")).mapped, Mapped::Nobody, "{name}");
    }
}

#[test]
fn two_mappings_of_one_arn_that_differ_map_nobody_and_both_say_so() {
    let entries = [
        Entry { label: "one".into(), ..entry(&arn("role/admin"), "admin", &["view"]) },
        Entry { label: "other".into(), ..entry(&arn("role/ADMIN"), "admin", &["edit"]) },
        Entry { label: "third".into(), ..entry(&arn("role/dev"), "dev", &[]) },
        Entry { label: "again".into(), ..entry(&arn("role/dev"), "dev", &[]) },
    ];

    let index = index(&entries);

    let decision = index.decide(&role("admin", "s"));
    assert_eq!(decision.mapped, Mapped::Conflict("one and other give different users".into()));
    assert_eq!(decision.by, ["one", "other"].map(Box::<str>::from));
    assert_eq!(username(&index, &role("dev", "s")).as_deref(), Some("dev"), "the same twice is no conflict");
    assert_eq!(
        states(&entries),
        [State::Conflict("other".into()), State::Conflict("one".into()), mapped(), mapped()]
    );
}

#[test]
fn patterns_that_come_first_at_once_map_nobody_where_both_match() {
    let entries = [
        Entry { label: "one".into(), ..entry(&arn("role/a*-x"), "one", &[]) },
        Entry { label: "other".into(), ..entry(&arn("role/a?b*"), "other", &[]) },
        Entry { label: "apart".into(), ..entry(&arn("role/a?"), "apart", &[]) },
        Entry { label: "shorter".into(), ..entry(&arn("role/*"), "shorter", &[]) },
    ];

    let index = index(&entries);

    assert!(is_conflict(&index, &role("a-b-x", "s")));
    assert_eq!(username(&index, &role("a-c-x", "s")).as_deref(), Some("one"));
    assert_eq!(username(&index, &role("a-b", "s")).as_deref(), Some("other"));
    assert_eq!(username(&index, &role("ac", "s")).as_deref(), Some("apart"));
    assert_eq!(
        states(&entries),
        [State::Conflict("other".into()), State::Conflict("one".into()), mapped(), mapped()]
    );
}

#[test]
fn an_exact_mapping_hides_a_conflict_of_patterns() {
    let index = index(&[
        entry(&arn("role/a*"), "one", &[]),
        entry(&arn("role/a?"), "other", &[]),
        entry(&arn("role/ab"), "exact", &[]),
    ]);

    assert!(is_conflict(&index, &role("ac", "s")));
    assert_eq!(username(&index, &role("ab", "s")).as_deref(), Some("exact"));
}

#[test]
fn a_user_created_again_under_the_same_name_is_another_one() {
    let strict =
        Entry { user_id: Some("id-of-user-alice".into()), ..entry(&arn("user/alice"), "alice", &[]) };
    let index = index(&[strict]);
    let again = Identity { user_id: "another".into(), ..user("alice") };

    assert_eq!(username(&index, &user("alice")).as_deref(), Some("alice"));
    assert_eq!(index.decide(&again).mapped, Mapped::Nobody);
}

#[test]
fn mappings_of_one_arn_with_different_ids_are_no_conflict() {
    let with =
        |id: &str, username| Entry { user_id: Some(id.into()), ..entry(&arn("user/alice"), username, &[]) };
    let entries = [with("1", "first"), with("2", "second")];
    let is_second = Identity { user_id: "2".into(), ..user("alice") };

    assert_eq!(username(&index(&entries), &is_second).as_deref(), Some("second"));
    assert_eq!(states(&entries), [mapped(), mapped()]);
    let [first, second] = entries;
    let without = [first, second, entry(&arn("user/alice"), "any", &[])];
    assert!(is_conflict(&index(&without), &is_second), "one without an id is for both");
}

#[test]
fn an_accounts_users_are_themselves_without_groups_where_nothing_else_names_them() {
    let accounts = [
        Account { label: "mapAccounts[0]".into(), id: ACCOUNT.into() },
        Account { label: "mapAccounts[1]".into(), id: "x".into() },
    ];
    let entries = [entry(&arn("role/admin"), "admin", &[])];
    let (index, reports) = Index::new(&entries, &accounts, Arc::default());

    let user = |username: String| Mapped::User(User { username: username.into(), groups: Vec::new() });
    assert_eq!(index.decide(&role("Dev", "s")).mapped, user(arn("role/Dev")), "in STS's case");
    assert_eq!(username(&index, &role("admin", "s")).as_deref(), Some("admin"));
    let stranger = Identity { account_id: "210987654321".into(), ..role("Dev", "s") };
    assert_eq!(index.decide(&stranger).mapped, Mapped::Nobody);
    assert_eq!(reports.iter().filter(|report| matches!(report.state, State::Refused(_))).count(), 1);
}

#[test]
fn an_account_maps_nobody_whom_an_id_refuses_and_nobody_where_ids_are_required() {
    let accounts = [Account { label: "a".into(), id: ACCOUNT.into() }];
    let of_another = Entry { user_id: Some("another".into()), ..entry(&arn("user/Alice"), "alice", &[]) };
    let entries = [of_another.clone(), Entry { arn: arn("user/b*"), ..of_another }];
    let (index, _) = Index::new(&entries, &accounts, Arc::default());

    assert_eq!(index.decide(&user("alice")).mapped, Mapped::Nobody);
    for allowed in ["bob", "carol"] {
        assert!(username(&index, &user(allowed)).is_some(), "{allowed}");
    }
    let strict = Restrictions { needs_user_id: true, ..Restrictions::default() };
    let (index, reports) = Index::new(&entries, &accounts, Arc::new(strict));
    assert_eq!(index.decide(&user("carol")).mapped, Mapped::Nobody);
    assert_eq!(reports[2].state, State::Refused(EntryError::UserId));
}

#[test]
fn a_reserved_prefix_holds_for_mapped_accounts_too() {
    let accounts = [Account { label: "a".into(), id: ACCOUNT.into() }];
    let strict = Restrictions { reserved_usernames: vec!["acs:".into()], ..Restrictions::default() };

    let (index, _) = Index::new(&[], &accounts, Arc::new(strict));

    assert!(is_conflict(&index, &role("dev", "s")));
}

#[test]
fn a_refused_entry_maps_nobody_and_keeps_no_other_from_it() {
    let entries =
        [entry(&arn("role/admin"), "system:admin", &[]), entry(&arn("role/dev"), "dev", &["system:masters"])];

    let (index, reports) = Index::new(&entries, &[], Arc::default());

    assert_eq!(index.decide(&role("admin", "s")).mapped, Mapped::Nobody);
    assert!(username(&index, &role("dev", "s")).is_some());
    assert!(matches!(&reports[0].state, State::Refused(EntryError::UsernameReserved { .. })));
    assert_eq!(reports[0].canonical, None);
    assert_eq!(reports[1].canonical.as_deref(), Some(&*arn("role/dev")));
    assert!(matches!(&reports[1].state, State::Mapped { warnings } if warnings.len() == 1));
    assert_eq!(index.len(), 1);
}

#[test]
fn an_arn_that_is_not_ascii_is_nobodys() {
    let index = index(&[entry(&arn("role/*"), "any", &[]), entry(&arn("role/k"), "k", &[])]);

    assert_eq!(index.decide(&role("\u{212a}", "s")).mapped, Mapped::Nobody, "the Kelvin sign is no k");
    assert_eq!(username(&index, &role("K", "s")).as_deref(), Some("k"));
}

#[test]
fn all_mappings_that_name_an_identity_can_be_shown() {
    let index = index(&[
        entry(&arn("role/*"), "any", &[]),
        entry(&arn("role/admin"), "admin", &[]),
        entry(&arn("role/x"), "x", &[]),
    ]);

    let candidates = index.candidates(&role("Admin", "s"));

    let labels: Vec<&str> = candidates.iter().map(|(label, _)| &**label).collect();
    assert_eq!(labels, [arn("role/*"), arn("role/admin")]);
}

#[test]
fn the_number_of_mappings_is_bounded() {
    let entries: Vec<Entry> =
        (0..=MAPPINGS_MAX).map(|n| entry(&arn(&format!("role/{n}")), "u", &[])).collect();

    let (index, reports) = Index::new(&entries, &[], Arc::default());

    assert_eq!(index.len(), MAPPINGS_MAX);
    assert!(matches!(reports[MAPPINGS_MAX].state, State::Refused(_)));
    assert_eq!(index.decide(&role(&MAPPINGS_MAX.to_string(), "s")).mapped, Mapped::Nobody);
    assert!(username(&index, &role("0", "s")).is_some(), "the allowed twin");
}

/// Without a bound this would take minutes.
#[test]
fn patterns_that_all_begin_alike_are_indexed_in_time() {
    let star = "*a".repeat(100);
    let entries: Vec<Entry> =
        (0..5_000).map(|n| entry(&arn(&format!("role/{star}{n}")), &format!("u{n}"), &[])).collect();

    let index = index(&entries);

    let name = format!("{}7", "a".repeat(100));
    assert_eq!(username(&index, &role(&name, "s")).as_deref(), Some("u7"));
}
