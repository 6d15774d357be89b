//! What is left of lists, watches and single objects.

use serde_json::{Value, json};

use super::*;
use crate::kubernetes::object::CUT;

const LIMIT: usize = 100;

fn keys() -> Keys {
    Arc::from([(Box::<str>::from("role"), LIMIT), (Box::from("policy"), 4 * LIMIT)])
}

fn text_of(shape: Shape, text: &str, size: usize) -> Result<Bytes, BoxError> {
    let body = StreamBody::new(stream::iter(
        text.as_bytes()
            .chunks(size)
            .map(|piece| Ok::<_, BoxError>(Frame::data(Bytes::copy_from_slice(piece))))
            .collect::<Vec<_>>(),
    ));
    Ok(projected(body, shape, keys()).collect().now_or_never().unwrap()?.to_bytes())
}

fn project_in_pieces(text: &str, size: usize) -> Result<Value, BoxError> {
    Ok(serde_json::from_slice(&text_of(Shape::List, text, size)?)?)
}

fn project(value: &Value) -> Value {
    project_in_pieces(&value.to_string(), usize::MAX).unwrap()
}

fn list(items: &[Value]) -> Value {
    json!({"metadata": {"resourceVersion": "7"}, "items": items})
}

fn pod(name: &str, annotations: Value) -> Value {
    json!({"metadata": {"name": name, "annotations": annotations}, "spec": {}})
}

/// What an item becomes that cannot be read.
fn malformed(metadata: Value) -> Value {
    json!({"metadata": metadata, "spec": []})
}

/// The annotation `role` of the only item.
fn role(list: &Value) -> &str {
    list["items"][0]["metadata"]["annotations"]["role"].as_str().unwrap()
}

fn pods() -> (Value, Value) {
    let full = json!({
        "kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7", "continue": "x"},
        "items": [{
            "metadata": {"name": "a", "namespace": "n", "uid": "u", "creationTimestamp": "2025-12-01T00:00:00Z",
                "deletionTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "3",
                "annotations": {"role": "r\u{00e9}\n", "other": "x"}, "managedFields": [{"fieldsV1": {"f:x": {}}}], "labels": {"name": "l"}},
            "spec": {"nodeName": "m", "hostNetwork": true, "serviceAccountName": "s", "containers": [{"name": "c", "env": [{"name": "metadata", "value": "secret"}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{}],
                "containerStatuses": [{"name": "c", "state": {"running": {"startedAt": "t"}}}, {"state": {"waiting": {"message": "m"}}}]},
        }, {"metadata": {"name": "b", "annotations": {}}, "spec": {}}],
    });
    let kept = json!({
        "kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7", "continue": "x"},
        "items": [{
            "metadata": {"name": "a", "namespace": "n", "uid": "u", "creationTimestamp": "2025-12-01T00:00:00Z",
                "deletionTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "3", "annotations": {"role": "r\u{00e9}\n"}},
            "spec": {"nodeName": "m", "hostNetwork": true, "serviceAccountName": "s"},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"state": {"running": {}}}, {"state": {}}]},
        }, {"metadata": {"name": "b", "annotations": {}}, "spec": {}}],
    });
    (full, kept)
}

#[test]
fn keeps_what_is_used_and_the_annotations_that_are_named_in_whatever_pieces_it_comes() {
    let (full, kept) = pods();
    let text = full.to_string();

    for size in 1..200 {
        assert_eq!(project_in_pieces(&text, size).unwrap(), kept, "in pieces of {size} bytes");
    }
    assert_eq!(project(&full), kept);
    assert_eq!(
        project_in_pieces(&format!("{text}\n"), 64).unwrap(),
        kept,
        "the API server ends with a new line"
    );
    let pretty = serde_json::to_string_pretty(&full).unwrap();
    assert_eq!(project_in_pieces(&pretty, 64).unwrap(), kept);
}

#[test]
fn what_is_no_list_stays_as_it_is() {
    for value in [
        json!({"kind": "Node", "metadata": {"name": "n", "labels": {"a": "b"}}, "spec": {"taints": [{"key": "k"}]}}),
        json!([1, "a"]),
        json!("x"),
    ] {
        assert_eq!(project(&value), value);
    }
}

#[test]
fn keeps_of_each_event_of_a_watch_what_is_used() {
    let object = |full: &Value| full["items"][0].clone();
    let (full, kept) = pods();
    let error = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410,
        "reason": "Expired", "message": "too old", "details": {"name": "x"}});
    let bookmark = json!({"kind": "Pod", "apiVersion": "v1", "spec": {"containers": null}, "status": {},
        "metadata": {"resourceVersion": "9", "creationTimestamp": null}});
    let events = [
        json!({"type": "ADDED", "object": object(&full)}),
        json!({"type": "BOOKMARK", "object": bookmark}),
        json!({"type": "ERROR", "object": error}),
    ];
    let expected = [
        json!({"type": "ADDED", "object": object(&kept)}),
        json!({"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1", "spec": {}, "status": {},
            "metadata": {"resourceVersion": "9", "creationTimestamp": null}}}),
        json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "spec": [],
            "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}}),
    ];
    let text: String = events.iter().map(|event| format!("{event}\n")).collect();

    for size in [1, 2, 3, 7, 64, usize::MAX] {
        let projected = text_of(Shape::Watch, &text, size).unwrap();
        let lines = std::str::from_utf8(&projected).unwrap().lines();
        let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines, expected, "in pieces of {size} bytes");
    }
    assert!(text_of(Shape::Watch, "", 64).unwrap().is_empty(), "a watch without events");
    assert!(text_of(Shape::Watch, &text[..text.len() - 2], 64).is_err(), "it broke off");
}

#[test]
fn keeps_of_a_single_object_the_annotations_that_are_named_and_nothing_else() {
    let of_object = |text: &str, size| -> Value {
        serde_json::from_slice(&text_of(Shape::Object, text, size).unwrap()).unwrap()
    };
    let full = json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "items": [{"metadata": {"name": "x"}}],
        "metadata": {"name": "a", "labels": {"role": "l"}, "managedFields": [{"fieldsV1": {"f:metadata": {}}}],
            "annotations": {"role": "r", "other": "x", "kubectl.kubernetes.io/last-applied-configuration": "{}"}},
        "secrets": [{"name": "s"}],
    });
    let kept = json!({"metadata": {"annotations": {"role": "r"}}});
    let text = full.to_string();

    for size in [1, 7, 64, usize::MAX] {
        assert_eq!(of_object(&text, size), kept, "in pieces of {size} bytes");
    }
    for (odd, kept) in [
        (
            json!({"metadata": {"annotations": {"role": {"a": [1]}}}}),
            json!({"metadata": {"annotations": {"role": ""}}}),
        ),
        (json!({"metadata": {}}), json!({"metadata": {}})),
        (json!({"kind": "Status"}), json!({})),
    ] {
        assert_eq!(of_object(&odd.to_string(), 64), kept);
    }
}

/// A value that should be a string and is none must not prevent the others from being read.
#[test]
fn what_should_be_a_text_and_is_none_is_replaced() {
    let items = |name: Value, role: Value| {
        let odd = json!({"metadata": {"name": name, "annotations": {"role": role}}, "spec": {}});
        list(&[odd, pod("next", json!({}))])
    };

    for odd in [json!(1), json!({"a": [1]}), json!([{"a": 1}]), json!(true), json!(null)] {
        assert_eq!(project(&items(odd.clone(), odd)), items(Value::Null, json!("")));
    }
}

#[test]
fn what_should_be_an_object_and_is_none_makes_its_item_malformed_and_no_other() {
    let next = pod("next", json!({"role": "r"}));
    for odd in [json!(1), json!("text"), json!([{"metadata": {}}]), json!(true)] {
        for (item, kept) in [
            (odd.clone(), malformed(json!({}))),
            (json!({"metadata": odd, "spec": {}}), malformed(json!({}))),
            (
                json!({"metadata": {"annotations": odd, "name": "a"}, "spec": {}}),
                malformed(json!({"annotations": {}, "name": "a"})),
            ),
        ] {
            assert_eq!(project(&list(&[item.clone(), next.clone()])), list(&[kept, next.clone()]), "{item}");
        }
        let text = format!(r#"{{"items":[{{"spec":{{}},"metadata":{odd}}},{next}]}}"#);
        let kept = json!({"items": [{"spec": {}, "metadata": {}, "status": []}, next]});
        assert_eq!(project_in_pieces(&text, 64).unwrap(), kept, "whatever comes first");
    }
    for (item, kept) in [
        (json!(null), malformed(json!({}))),
        (json!({}), malformed(json!({}))),
        (json!({"metadata": {"name": "a"}}), malformed(json!({"name": "a"}))),
        (
            json!({"metadata": {"annotations": null}, "spec": {}}),
            json!({"metadata": {"annotations": {}}, "spec": {}}),
        ),
        (json!({"metadata": {}, "spec": [1]}), malformed(json!({}))),
        (
            json!({"metadata": {"creationTimestamp": "yesterday"}, "spec": {"nodeName": {"a": 1}}}),
            json!({"metadata": {"creationTimestamp": null}, "spec": {"nodeName": []}}),
        ),
    ] {
        assert_eq!(project(&list(&[item.clone(), next.clone()])), list(&[kept, next.clone()]), "{item}");
    }
}

#[test]
fn a_key_that_an_item_has_twice_counts_once() {
    let text =
        r#"{"items":[{"metadata":{"name":"a"},"metadata":{"name":"b"},"spec":{},"spec":{"nodeName":"m"}}]}"#;

    assert_eq!(
        project_in_pieces(text, 64).unwrap(),
        json!({"items": [{"metadata": {"name": "a"}, "spec": {}}]})
    );
}

#[test]
fn keeps_of_each_annotation_as_much_as_its_longest_value_has_and_marks_what_is_longer() {
    let kept = |key: &str, value: String| {
        let items = project(&list(&[pod("a", json!({ key: value }))]));
        items["items"][0]["metadata"]["annotations"][key].as_str().map(str::to_owned)
    };

    for (key, limit) in [("role", LIMIT), ("policy", 4 * LIMIT)] {
        assert_eq!(kept(key, "x".repeat(limit)), Some("x".repeat(limit)));
        assert_eq!(kept(key, "x".repeat(limit + 1)), Some("x".repeat(limit) + "…"));
        assert_eq!(kept(key, "\u{00fc}".repeat(50_000)), Some("\u{00fc}".repeat(limit / 2) + "…"));
    }
    assert_eq!(kept("role", "a\tb\r\nc".into()).as_deref(), Some("a\tb\r\nc"));
    assert_eq!(kept("role", "reader\u{b}".into()).as_deref(), Some("reader…"), "never a valid value");
    assert_eq!(kept("other", "x".into()), None);
}

#[test]
fn a_text_without_end_is_not_read_to_its_end_and_is_too_long_for_every_annotation() {
    for text in ["<".repeat(256 * 1024), "\u{1}\\\"".repeat(256 * 1024)] {
        let mut long = pod("a", json!({"role": text, "other": text, "policy": "p"}));
        long["spec"] = json!({"nodeName": "m", "containers": [{"env": [{"name": text, text: "x"}]}]});
        let next = pod("next", json!({"role": "r"}));
        // As Go writes it.
        let list = list(&[long, next.clone()]).to_string().replace('<', "\\u003c");

        for size in [1000, 64 * 1024, usize::MAX] {
            let mut projected = project_in_pieces(&list, size).unwrap();
            let role = role(&projected).to_owned();
            assert!((LIMIT + 1..LIMIT + 4).contains(&role.len()) && role.ends_with(CUT), "{role}");
            projected["items"][0]["metadata"]["annotations"]["role"] = "".into();
            assert_eq!(projected["items"][0]["metadata"]["annotations"], json!({"role": "", "policy": "p"}));
            assert_eq!(projected["items"][0]["spec"], json!({"nodeName": "m"}));
            assert_eq!(projected["items"][1], next);
        }
    }
}

#[test]
fn a_text_without_end_takes_no_more_memory_than_its_bound() {
    let mut text = Text::new(Shape::List, keys());
    let piece = [b'a'; 16 * 1024];
    let begun = text.project(br#"{"items":[{"metadata":{"annotations":{"role":""#, false).unwrap();
    assert!(!begun.is_empty());
    let mut projected = begun.to_vec();

    for _ in 0..1000 {
        projected.extend_from_slice(&text.project(&piece, false).unwrap());
        assert!(text.rest.capacity() <= 4 * TEXT_LIMIT_BYTES, "{}", text.rest.capacity());
    }
    projected.extend_from_slice(&text.project(br#""}}}]}"#, true).unwrap());
    assert!(std::str::from_utf8(&projected).unwrap().contains(CUT));
    assert!(projected.len() < 2 * TEXT_LIMIT_BYTES, "{}", projected.len());
}

#[test]
fn endless_numbers_and_broken_texts_are_refused() {
    let endless = format!("{{\"items\":[{{\"spec\":{{\"x\":{}", "1".repeat(4 * TEXT_LIMIT_BYTES));
    let error = project_in_pieces(&endless, 64 * 1024).unwrap_err();
    assert_eq!(error.to_string(), "a number in the API server's answer is too long");
    let (full, _) = pods();
    let text = full.to_string();
    assert!(project_in_pieces(&text, 64).is_ok());
    assert!(project_in_pieces(&text[..text.len() - 1], 64).is_err(), "it broke off");
    assert!(project_in_pieces(&text.replace("\"spec\":", "\"spec\""), 64).is_err());
    assert!(project_in_pieces("", 64).is_err());
}

#[test]
fn annotations_of_namespaces_are_not_kept_of_pods() {
    let projection = Projection::new([("role".into(), LIMIT)], [("allowed".into(), 64 * 1024)]);
    let of = |uri: &'static str| {
        let (shape, keys) = projection.of_answer(&Uri::from_static(uri));
        let keys: Vec<String> = keys.iter().map(|(key, _)| key.to_string()).collect();
        (shape, keys)
    };
    let of_pods = ["role", "kubernetes.io/config.mirror", "kubernetes.io/config.hash"].map(String::from);

    assert_eq!(of("/api/v1/pods?fieldSelector=a"), (Shape::List, of_pods.to_vec()));
    assert_eq!(of("/api/v1/namespaces/namespaces/pods?limit=1"), (Shape::List, of_pods.to_vec()));
    assert_eq!(of("/api/v1/pods?watch=true"), (Shape::Watch, of_pods.to_vec()));
    assert_eq!(of("/api/v1/namespaces?limit=500"), (Shape::List, vec!["allowed".into()]));
    assert_eq!(of("/api/v1/namespaces?watch=true"), (Shape::Watch, vec!["allowed".into()]));
}
