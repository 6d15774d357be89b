use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    testing::{ACCOUNT, entry, role, user},
    *,
};
use crate::identity::User;

fn index_of(entries: &[Entry]) -> Arc<Index> {
    Arc::new(Index::new(entries, &[], Arc::default()).0)
}

fn admin(username: &str) -> Arc<Index> {
    index_of(&[entry(&format!("acs:ram::{ACCOUNT}:role/admin"), username, &[])])
}

fn is(username: &str) -> Mapped {
    Mapped::User(User { username: username.into(), groups: Vec::new() })
}

#[test]
fn the_first_backend_that_names_an_identity_decides() {
    let mappings = Mappings::new(2);
    mappings.replace(0, index_of(&[]));
    mappings.replace(1, admin("second"));
    assert_eq!(mappings.map(&role("admin", "s")), is("second"));

    mappings.replace(0, admin("first"));

    assert_eq!(mappings.map(&role("admin", "s")), is("first"));
    assert_eq!(mappings.map(&user("admin")), Mapped::Nobody);
}

#[test]
fn a_conflict_is_not_passed_on_to_the_next_backend() {
    let admin_arn = format!("acs:ram::{ACCOUNT}:role/admin");
    let mappings = Mappings::new(2);
    mappings.replace(0, index_of(&[entry(&admin_arn, "a", &[]), entry(&admin_arn, "b", &[])]));
    mappings.replace(1, admin("second"));

    assert!(matches!(mappings.map(&role("admin", "s")), Mapped::Conflict(_)));
}

/// The later backend may give an identity more than the earlier one would.
#[test]
fn a_backend_that_was_not_read_yet_is_not_skipped() {
    let mappings = Mappings::new(2);
    mappings.replace(1, admin("second"));
    assert_eq!(mappings.map(&role("admin", "s")), Mapped::Nobody);
    assert!(!mappings.is_loaded());

    mappings.replace(0, index_of(&[]));

    assert_eq!(mappings.map(&role("admin", "s")), is("second"));
    assert!(mappings.is_loaded());
}

#[test]
fn a_backend_that_was_read_answers_while_a_later_one_was_not() {
    let mappings = Mappings::new(2);
    mappings.replace(0, admin("first"));

    assert_eq!(mappings.map(&role("admin", "s")), is("first"));
    assert_eq!(mappings.map(&role("dev", "s")), Mapped::Nobody);
    assert!(!mappings.is_loaded());
}

/// ack-ram-authenticator keeps the wildcard until some other mapping is deleted.
#[test]
fn a_pattern_that_becomes_exact_takes_the_others_access_away() {
    let mappings = Mappings::new(1);
    let arn = |name: &str| format!("acs:ram::{ACCOUNT}:role/{name}");
    mappings.replace(0, index_of(&[entry(&arn("*"), "any", &["ops"])]));
    assert!(matches!(mappings.map(&role("dev", "s")), Mapped::User(_)));

    mappings.replace(0, index_of(&[entry(&arn("admin"), "any", &["ops"])]));

    assert_eq!(mappings.map(&role("dev", "s")), Mapped::Nobody);
    assert!(matches!(mappings.map(&role("admin", "s")), Mapped::User(_)));
}

/// A change of one object.
#[derive(Clone, Debug)]
enum Edit {
    Delete(u8),
    Put(u8, Entry),
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let arn = "(role|user)/[ab*?]{1,3}(/[ab*]{1,2})?".prop_map(|rest| format!("acs:ram::{ACCOUNT}:{rest}"));
    let username = prop_oneof![Just("x"), Just("y"), Just("p:{{AccountID}}"), Just("system:x"), Just("")];
    let groups = prop::collection::vec(prop_oneof![Just("g".to_owned()), Just("h".to_owned())], 0..3);
    let id = prop_oneof![3 => Just(None), 1 => Just(Some("id-of-role-ab".to_owned()))];
    (arn, username, groups, id).prop_map(|(arn, username, groups, user_id)| Entry {
        label: "o".into(),
        arn,
        username: username.to_owned(),
        groups,
        user_id,
        fault: None,
    })
}

fn any_edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        1 => (0_u8..6).prop_map(Edit::Delete),
        3 => (0_u8..6, any_entry()).prop_map(|(name, entry)| Edit::Put(name, entry)),
    ]
}

/// A glob by its definition, segment for segment.
fn globs(pattern: &[u8], subject: &[u8]) -> bool {
    match (pattern.split_first(), subject.split_first()) {
        (None, rest) => rest.is_none(),
        (Some((b'*', after)), rest) => {
            globs(after, subject) || rest.is_some_and(|(byte, left)| *byte != b'/' && globs(pattern, left))
        }
        (Some((token, after)), Some((byte, left))) => {
            (token == byte || *token == b'?' && *byte != b'/') && globs(after, left)
        }
        (Some(_), None) => false,
    }
}

/// The rules as they are written in the documents, over all objects, with nothing prepared.
fn by_the_rules(objects: &BTreeMap<u8, Entry>, identity: &Identity) -> Mapped {
    let arn = identity.canonical_arn.to_lowercase();
    let matching: Vec<&Entry> = objects
        .values()
        .filter(|entry| !entry.username.is_empty() && !entry.username.starts_with("system:"))
        .filter(|entry| entry.user_id.as_deref().is_none_or(|id| id == &*identity.user_id))
        .filter(|entry| globs(entry.arn.as_bytes(), arn.as_bytes()))
        .collect();
    // An exact ARN is as long as can be, and nothing else has its whole length before a wildcard.
    let length = |entry: &Entry| entry.arn.find(['*', '?']).unwrap_or(usize::MAX);
    let Some(longest) = matching.iter().map(|entry| length(entry)).max() else { return Mapped::Nobody };
    let target = |entry: &Entry| {
        let mut groups = entry.groups.clone();
        groups.sort_unstable();
        groups.dedup();
        (entry.username.replace("{{AccountID}}", ACCOUNT), groups)
    };
    let mut targets: Vec<_> =
        matching.into_iter().filter(|entry| length(entry) == longest).map(target).collect();
    targets.sort_unstable();
    targets.dedup();
    match targets.as_slice() {
        [(username, groups)] => Mapped::User(User {
            username: username.as_str().into(),
            groups: groups.iter().map(|group| group.as_str().into()).collect(),
        }),
        _ => Mapped::Conflict("".into()),
    }
}

/// Without the reason of a conflict and the order of groups.
fn plain(mapped: Mapped) -> Mapped {
    match mapped {
        Mapped::Conflict(_) => Mapped::Conflict("".into()),
        Mapped::Nobody => Mapped::Nobody,
        Mapped::User(mut user) => {
            user.groups.sort_unstable();
            Mapped::User(user)
        }
    }
}

proptest! {
    #[test]
    fn equals_the_rules_after_any_sequence_of_edits(edits in prop::collection::vec(any_edit(), 1..20)) {
        let mappings = Mappings::new(1);
        let mut objects = BTreeMap::new();
        for edit in edits {
            match edit {
                Edit::Delete(name) => drop(objects.remove(&name)),
                Edit::Put(name, entry) => drop(objects.insert(name, entry)),
            }
            let entries: Vec<Entry> = objects.values().cloned().collect();
            mappings.replace(0, index_of(&entries));
            for name in ["a", "ab", "AB", "aba", "bb/a", "ab/b", "c"] {
                for identity in [role(name, "s"), user(name)] {
                    let mapped = plain(mappings.map(&identity));

                    prop_assert_eq!(mapped, by_the_rules(&objects, &identity), "{}", identity.canonical_arn);
                }
            }
        }
    }

    /// Two mappings that can be in conflict report it, and no others do.
    #[test]
    fn who_can_be_in_conflict_says_so(one in any_entry(), other in any_entry()) {
        let entries = [one, other];
        let (index, reports) = Index::new(&entries, &[], Arc::default());

        let names = ["a", "b", "ab", "ba", "aa", "aba", "abb", "bab", "a/a", "ab/b", "b/ba", "a/ab", "aaa/ba"];
        let identities = names.iter().flat_map(|name| [role(name, "s"), user(name)]);
        let is_met = identities
            .map(|identity| index.decide(&identity).mapped)
            .any(|mapped| matches!(mapped, Mapped::Conflict(_)));

        let is_reported = reports.iter().any(|report| matches!(report.state, State::Conflict(_)));
        prop_assert!(!is_met || is_reported);
        let both = reports.iter().filter(|report| matches!(report.state, State::Conflict(_))).count();
        prop_assert!(both == 0 || both == 2);
    }
}
