use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    identity::{Map as _, Mapped},
    mapping::{
        EntryError, Index, Mappings, State,
        testing::{ACCOUNT, role},
    },
};

fn object(name: &str, spec: Value, status: Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "ramauthenticator.k8s.alibabacloud/v1alpha1", "kind": "RAMIdentityMapping",
        "metadata": { "name": name, "generation": 3 }, "spec": spec, "status": status,
    }))
    .unwrap()
}

fn arn(name: &str) -> String {
    format!("acs:ram::{ACCOUNT}:role/{name}")
}

fn admin(name: &str, username: &str) -> DynamicObject {
    object(name, json!({ "arn": arn("Admin"), "username": username, "groups": ["ops"] }), Value::Null)
}

fn listed(objects: Vec<DynamicObject>) -> Objects {
    let mut known = Objects::default();
    assert!(!known.take(Event::Init));
    assert!(objects.into_iter().all(|object| !known.take(Event::InitApply(object))));
    assert!(known.take(Event::InitDone));
    known
}

/// Makes the index, as the parent does, and returns it with the names of the objects to patch.
fn publish(objects: &mut Objects) -> (Arc<Index>, Vec<Box<str>>) {
    let (index, reports) = Index::new(&objects.entries(), &[], Arc::default());
    (Arc::new(index), objects.report(reports))
}

fn username(index: &Index, name: &str) -> Option<String> {
    match index.decide(&role(name, "s")).mapped {
        Mapped::User(user) => Some(user.username.into()),
        Mapped::Conflict(_) | Mapped::Nobody => None,
    }
}

const NOW: &str = "2026-01-02T03:04:05Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

#[test]
fn the_resource_is_ack_ram_authenticators() {
    let ApiResource { group, version, api_version, kind, plural } = resource();

    assert_eq!(group, "ramauthenticator.k8s.alibabacloud");
    assert_eq!((&*version, &*api_version), ("v1alpha1", "ramauthenticator.k8s.alibabacloud/v1alpha1"));
    assert_eq!((&*kind, &*plural), ("RAMIdentityMapping", "ramidentitymappings"));
}

#[test]
fn an_object_without_a_status_maps_its_role() {
    let mut objects = listed(vec![admin("a", "admin")]);

    let (index, patched) = publish(&mut objects);

    assert_eq!(username(&index, "ADMIN").as_deref(), Some("admin"));
    assert_eq!(patched, [Box::<str>::from("a")]);
}

/// ack-ram-authenticator looks identities up by what the status says.
#[test]
fn who_writes_a_status_maps_nobody() {
    let status = json!({
        "canonicalARN": arn("victim").to_lowercase(),
        "conditions": [{ "type": "Ready", "status": "True" }],
    });
    let spec = json!({ "arn": arn("Admin"), "username": "admin", "groups": ["system:masters"] });
    let mut objects = listed(vec![object("a", spec, status)]);

    let (index, patched) = publish(&mut objects);

    assert_eq!(username(&index, "victim"), None);
    assert_eq!(username(&index, "admin").as_deref(), Some("admin"));
    assert_eq!(patched.len(), 1, "and the status is corrected");
}

#[test]
fn a_status_says_what_became_of_the_object() {
    let mut objects = listed(vec![
        admin("a", "one"),
        admin("b", "other"),
        object("c", json!({ "arn": "nonsense", "username": "x" }), Value::Null),
        object("d", json!({ "arn": arn("Dev"), "username": "x", "groups": ["system:masters"] }), Value::Null),
    ]);
    let (_, patched) = publish(&mut objects);
    assert_eq!(patched.len(), 4);

    let patch = |name| objects.patch(name, now()).unwrap()["status"].clone();
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "observedGeneration": 3, "lastTransitionTime": NOW,
        })
    };
    let conflict = "b maps some of the same identities to another user: they are mapped to nobody";
    assert_eq!(
        patch("a"),
        json!({
            "canonicalARN": arn("admin"),
            "conditions": [
                condition("Conflict", "True", "Conflict", conflict), condition("Ready", "False", "Conflict", conflict),
            ],
        })
    );
    let refused = patch("c");
    assert_eq!(refused["canonicalARN"], Value::Null);
    assert_eq!(refused["conditions"][0], condition("Conflict", "False", "NoConflict", ""));
    assert_eq!(refused["conditions"][1]["reason"], "Refused");
    assert!(refused["conditions"][1]["message"].as_str().unwrap().contains("nonsense"));
    assert_eq!(
        patch("d")["conditions"][1],
        condition(
            "Ready",
            "True",
            "Mapped",
            "the group system:masters may do everything, whatever RBAC grants"
        )
    );
}

#[test]
fn a_status_that_says_so_already_is_left_and_one_that_does_not_keeps_its_time() {
    let mut objects = listed(vec![admin("a", "admin")]);
    let (_, patched) = publish(&mut objects);
    assert_eq!(patched.len(), 1);
    let status = objects.patch("a", now()).unwrap()["status"].clone();
    let spec = json!({ "arn": arn("Admin"), "username": "admin", "groups": ["ops"] });

    assert!(!objects.take(Event::Apply(object("a", spec.clone(), status.clone()))), "no mapping has changed");
    assert!(publish(&mut objects).1.is_empty(), "it says so");

    let later: Timestamp = "2026-02-01T00:00:00Z".parse().unwrap();
    let mut older = status.clone();
    older["conditions"][1]["observedGeneration"] = 2.into();
    assert!(!objects.take(Event::Apply(object("a", spec.clone(), older))));
    assert_eq!(publish(&mut objects).1.len(), 1);
    assert_eq!(objects.patch("a", later).unwrap()["status"], status, "the same since the same time");

    let mut other = status;
    other["conditions"][1]["status"] = "False".into();
    assert!(!objects.take(Event::Apply(object("a", spec, other))));
    assert_eq!(publish(&mut objects).1.len(), 1);
    let patch = objects.patch("a", later).unwrap();
    assert_eq!(patch["status"]["conditions"][1]["lastTransitionTime"], "2026-02-01T00:00:00Z");
    assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], NOW);
}

#[test]
fn what_is_not_of_the_schema_is_refused_and_keeps_no_other_from_it() {
    let long = "x".repeat(17 * 1024);
    for spec in [
        Value::Null,
        json!([]),
        json!({ "arn": 1, "username": "x" }),
        json!({ "arn": arn("a"), "username": "x", "groups": "g" }),
        json!({ "arn": arn("a"), "username": "x", "groups": [1] }),
        json!({ "arn": arn("a"), "username": "x", "groups": [long] }),
        json!({ "arn": arn("a"), "username": null }),
        json!({ "arn": arn("a"), "username": "x", "userID": {} }),
    ] {
        let objects = [object("a", spec.clone(), json!("nonsense")), admin("b", "admin")];
        let objects = listed(objects.into());

        let (index, reports) = Index::new(&objects.entries(), &[], Arc::default());

        assert!(matches!(reports[0].state, State::Refused(_)), "{spec}");
        assert_eq!(username(&index, "admin").as_deref(), Some("admin"), "{spec}");
        assert_eq!(username(&index, "a"), None, "{spec}");
    }
}

#[test]
fn a_spec_may_name_the_only_id_that_counts() {
    let spec = |id: &str| json!({ "arn": arn("admin"), "username": "admin", "userID": id });
    let mut right = listed(vec![object("a", spec("id-of-role-admin"), Value::Null)]);
    let mut wrong = listed(vec![object("a", spec("another"), Value::Null)]);

    assert!(username(&publish(&mut right).0, "admin").is_some());
    assert_eq!(username(&publish(&mut wrong).0, "admin"), None);
}

/// A template that renders nothing must not make a mapping for everybody of the name.
#[test]
fn an_id_that_cannot_be_read_as_written_maps_nobody_and_says_so() {
    for id in [json!(""), json!(null), json!(" "), json!(2), json!("2:session"), json!("x".repeat(129))] {
        let spec = json!({ "arn": arn("admin"), "username": "admin", "userID": id });
        let mut objects = listed(vec![object("a", spec, Value::Null)]);

        let (index, patched) = publish(&mut objects);

        assert_eq!(username(&index, "admin"), None, "{id}");
        assert_eq!(patched.len(), 1);
        let ready = objects.patch("a", now()).unwrap()["status"]["conditions"][1].clone();
        assert_eq!((&ready["status"], &ready["reason"]), (&json!("False"), &json!("Refused")), "{id}");
        assert!(ready["message"].as_str().unwrap().contains("userID"), "{ready}");
    }
}

#[test]
fn a_field_that_does_not_exist_maps_nobody() {
    for field in ["userId", "userid", "group", "x\u{e4}"] {
        let spec = json!({ "arn": arn("admin"), "username": "admin", field: "id-of-role-admin" });

        let (index, _) = publish(&mut listed(vec![object("a", spec, Value::Null)]));

        assert_eq!(username(&index, "admin"), None, "{field}");
    }
}

/// The API server drops fields that the custom resource definition does not have.
#[test]
fn an_id_that_the_cluster_has_dropped_maps_nobody() {
    let applied = |written: &str, spec: Value| {
        let mut object = object("a", spec, Value::Null);
        let annotation = (LAST_APPLIED.to_owned(), written.to_owned());
        object.metadata.annotations = Some([annotation].into());
        username(&publish(&mut listed(vec![object])).0, "admin")
    };
    let dropped = json!({ "arn": arn("admin"), "username": "admin" });
    let kept = json!({ "arn": arn("admin"), "username": "admin", "userID": "id-of-role-admin" });
    let with_id = json!({ "spec": kept }).to_string();

    assert_eq!(applied(&with_id, dropped.clone()), None);
    assert_eq!(applied(&with_id.replace("userID", "userid"), dropped.clone()), None);
    assert!(applied(&with_id, kept).is_some(), "the allowed twin");
    let without_id = json!({ "spec": dropped }).to_string();
    for written in [&*without_id, "", "{", "[]", "{\"spec\": 1}"] {
        assert!(applied(written, dropped.clone()).is_some(), "{written}");
    }
}

#[test]
fn a_deleted_object_maps_nobody_also_if_the_watch_was_away() {
    let mut objects = listed(vec![admin("a", "admin"), admin("b", "admin")]);
    assert!(objects.take(Event::Delete(admin("a", "admin"))));
    assert!(username(&publish(&mut objects).0, "admin").is_some(), "of b");

    assert!(!objects.take(Event::Init));
    assert!(username(&publish(&mut objects).0, "admin").is_some(), "until the list is complete");
    assert!(objects.take(Event::InitDone));

    assert_eq!(username(&publish(&mut objects).0, "admin"), None);
    assert_eq!(objects.patch("b", now()), None);
}

#[test]
fn nothing_is_used_before_the_first_list_is_complete() {
    let mut objects = Objects::default();

    assert!(!objects.take(Event::Apply(admin("a", "admin"))));
    assert!(!objects.take(Event::Delete(admin("a", "admin"))));
}

/// A change as the watch shows it.
#[derive(Clone, Debug)]
enum Change {
    Delete(u8),
    Put(u8, String, bool),
    Relist,
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => (0_u8..4).prop_map(Change::Delete),
        6 => (0_u8..4, "[ab*?]{1,2}", any::<bool>()).prop_map(|(n, role, other)| Change::Put(n, role, other)),
        1 => Just(Change::Relist),
    ]
}

fn object_of(n: u8, role: &str, is_other: bool) -> DynamicObject {
    let username = if is_other { "y" } else { "x" };
    object(&n.to_string(), json!({ "arn": arn(role), "username": username }), Value::Null)
}

proptest! {
    /// Whatever was before, what counts is what there is: no earlier version of an object has any effect.
    #[test]
    fn after_any_sequence_of_changes_it_is_as_if_listed_again(changes in prop::collection::vec(any_change(), 1..25)) {
        let mappings = Mappings::new(1);
        let mut watched = listed(Vec::new());
        let mut cluster: BTreeMap<u8, (String, bool)> = BTreeMap::new();
        let all = |cluster: &BTreeMap<u8, (String, bool)>| -> Vec<DynamicObject> {
            cluster.iter().map(|(n, (role, is_other))| object_of(*n, role, *is_other)).collect()
        };
        for change in changes {
            match change {
                Change::Delete(n) => {
                    if let Some((role, is_other)) = cluster.remove(&n) {
                        prop_assert!(watched.take(Event::Delete(object_of(n, &role, is_other))));
                    }
                }
                Change::Put(n, role, is_other) => {
                    let is_news = watched.take(Event::Apply(object_of(n, &role, is_other)));
                    prop_assert_eq!(is_news, cluster.get(&n) != Some(&(role.clone(), is_other)));
                    drop(cluster.insert(n, (role, is_other)));
                }
                Change::Relist => {
                    prop_assert!(!watched.take(Event::Init));
                    for object in all(&cluster) {
                        prop_assert!(!watched.take(Event::InitApply(object)));
                    }
                    prop_assert!(watched.take(Event::InitDone));
                }
            }
            let (index, _) = publish(&mut watched);
            mappings.replace(0, index);
            let (fresh, _) = publish(&mut listed(all(&cluster)));
            for name in ["a", "b", "ab", "ba", "aa"] {
                let identity = role(name, "s");

                prop_assert_eq!(mappings.map(&identity), fresh.decide(&identity).mapped);
            }
        }
    }

    #[test]
    fn never_panics_on_a_status(text in any::<String>(), n in any::<i64>()) {
        let conditions = json!([{ "type": "Ready", "status": text, "lastTransitionTime": text, "observedGeneration": n }]);
        for status in [json!(text), json!({ "conditions": text }), json!({ "conditions": conditions, "canonicalARN": n })] {
            let mut objects = listed(vec![object("a", json!({ "arn": arn("a"), "username": "x" }), status)]);

            prop_assert_eq!(publish(&mut objects).1.len(), 1);
        }
    }
}

#[test]
fn an_error_in_a_status_is_short() {
    let spec = json!({ "arn": format!("acs:ram::1:role/{}", "\u{1}".repeat(480)), "username": "x" });
    let mut objects = listed(vec![object("a", spec, Value::Null)]);

    let (_, reports) = Index::new(&objects.entries(), &[], Arc::default());
    assert!(matches!(&reports[0].state, State::Refused(EntryError::Arn(_))));
    objects.report(reports);

    let patch = objects.patch("a", now()).unwrap();
    assert!(patch["status"]["conditions"][1]["message"].as_str().unwrap().len() <= 1024);
}
