//! The wire as kube's `watcher` reads it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

use super::*;
use crate::client;

fn server() -> ApiServer {
    ApiServer::start(Bind::loopback()).unwrap()
}

fn pod(name: &str, node: &str) -> Value {
    PodManifest {
        name: name.into(),
        namespace: "shop".into(),
        node: node.into(),
        uid: name.into(),
        ..Default::default()
    }
    .to_json()
}

fn get(server: &ApiServer, target: &str) -> Value {
    let reply = client::Request::get(server.url() + target).send().unwrap();
    assert_eq!(reply.status, 200, "{}", reply.body);
    serde_json::from_str(&reply.body).unwrap()
}

/// Opens a watch and gives its lines: `None` at the end.
fn watch(server: &ApiServer, target: &str) -> impl FnMut() -> Option<Value> + use<> {
    let mut stream = TcpStream::connect(server.url().trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    move || {
        loop {
            let line = lines.next()?.ok()?;
            if line == "0" {
                return None;
            }
            if line.starts_with('{') {
                return Some(serde_json::from_str(&line).unwrap());
            }
        }
    }
}

#[test]
fn lists_the_pods_of_one_node() {
    let server = server();
    server.apply(pod("here", "node-1")).unwrap();
    server.apply(pod("there", "node-2")).unwrap();

    let list = get(&server, "/api/v1/pods?&fieldSelector=spec.nodeName%3Dnode-1&limit=500");

    assert_eq!(list["kind"], "PodList");
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    assert_eq!(list["items"][0]["metadata"]["name"], "here");
    assert_eq!(list["metadata"]["resourceVersion"], "102");
}

#[test]
fn watch_reports_additions_changes_and_deletions_in_order() {
    let server = server();
    let mut next =
        watch(&server, "/api/v1/pods?watch=true&resourceVersion=100&fieldSelector=spec.nodeName%3Dnode-1");

    server.apply(pod("a", "node-1")).unwrap();
    server.apply(pod("elsewhere", "node-2")).unwrap();
    server.apply(pod("a", "node-1")).unwrap();
    server.delete_pod("shop", "a");

    let verbs = [next().unwrap(), next().unwrap(), next().unwrap()].map(|event| event["type"].clone());
    assert_eq!(verbs, ["ADDED", "MODIFIED", "DELETED"]);
}

#[test]
fn held_watch_gets_nothing_until_released_while_a_list_shows_it() {
    let server = server();
    let mut next = watch(&server, "/api/v1/pods?watch=true&resourceVersion=100");

    server.hold_watches();
    server.apply(pod("late", "node-1")).unwrap();
    server.apply_namespace("marker", &[]).unwrap();
    let listed = get(&server, "/api/v1/pods")["items"].as_array().unwrap().len();
    let (held, _) =
        server.server.handler.store.since(&Selector::parse(Kind::Pod, "", "", false).unwrap(), 100).unwrap();
    server.release_watches();

    assert_eq!(listed, 1);
    assert!(held.is_empty());
    assert_eq!(next().unwrap()["object"]["metadata"]["name"], "late");
}

#[test]
fn expiry_ends_an_open_watch_with_410_and_a_new_list_can_be_watched() {
    let server = server();
    let mut next = watch(&server, "/api/v1/pods?watch=true&resourceVersion=100");

    server.expire();
    let error = next().unwrap();

    assert_eq!((&error["type"], &error["object"]["code"]), (&"ERROR".into(), &410.into()));
    assert!(next().is_none());
    let version = get(&server, "/api/v1/pods")["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut next = watch(&server, &format!("/api/v1/pods?watch=true&resourceVersion={version}"));
    server.apply(pod("new", "node-1")).unwrap();
    assert_eq!(next().unwrap()["type"], "ADDED");
}

#[test]
fn watch_ends_after_the_asked_time() {
    let server = server();

    let mut next = watch(&server, "/api/v1/pods?watch=true&resourceVersion=100&timeoutSeconds=0");

    assert!(next().is_none());
}

#[test]
fn a_watch_has_one_bookmark_before_its_end_however_rare_they_are() {
    let server = server();

    let mut next = watch(
        &server,
        "/api/v1/pods?watch=true&resourceVersion=100&timeoutSeconds=3&allowWatchBookmarks=true",
    );

    assert_eq!(next().unwrap()["type"], "BOOKMARK");
    assert!(next().is_none());
}

#[test]
fn streaming_list_ends_with_its_bookmark() {
    let server = server();
    server.apply(pod("a", "node-1")).unwrap();

    let mut next = watch(
        &server,
        "/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true",
    );

    assert_eq!(next().unwrap()["type"], "ADDED");
    let bookmark = next().unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
}

#[test]
fn namespaces_come_as_metadata_only_when_asked() {
    let server = server();
    server.apply_namespace("shop", &[("ram.aliyuncs.com/allowed-roles", "[\"a\"]")]).unwrap();
    let request = client::Request::get(server.url() + "/api/v1/namespaces")
        .header("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1");

    let list: Value = serde_json::from_str(&request.send().unwrap().body).unwrap();

    assert_eq!(list["kind"], "PartialObjectMetadataList");
    assert_eq!(list["items"][0]["kind"], "PartialObjectMetadata");
    assert_eq!(list["items"][0]["metadata"]["annotations"]["ram.aliyuncs.com/allowed-roles"], "[\"a\"]");
    assert!(list["items"][0].get("status").is_none());
    assert!(get(&server, "/api/v1/namespaces")["items"][0].get("status").is_some());
}

#[test]
fn goes_away_with_its_watches_and_comes_back_at_the_same_address() {
    let server = server();
    let mut next = watch(&server, "/api/v1/pods?watch=true&resourceVersion=100");
    server.apply(pod("a", "node-1")).unwrap();
    assert!(next().is_some());

    server.down();

    assert!(next().is_none());
    assert!(client::Request::get(server.url() + "/version").send().is_err());
    server.up().unwrap();
    assert_eq!(get(&server, "/version")["major"], "1");
}

#[test]
fn keeps_events_and_what_is_patched_of_them() {
    let server = server();
    let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
    let send = |method: &str, path: &str, body: Value| {
        let mut request = client::Request::get(server.url() + path);
        request.method = method.into();
        request.body = body.to_string().into_bytes();
        request.send().unwrap().status
    };
    let event = json!({"metadata": {"name": "e1"}, "reason": "RoleDenied"});
    let series = |count: u32| json!({"series": {"count": count, "lastObservedTime": "2026-11-21T00:00:00Z"}});

    assert_eq!([send("POST", path, event.clone()), send("POST", path, event)], [201, 409]);
    assert_eq!(send("PATCH", &format!("{path}/e1"), series(2)), 200);
    assert_eq!(send("PATCH", &format!("{path}/e1"), series(1)), 422, "a series begins with the second");
    assert_eq!(send("PATCH", &format!("{path}/e1"), json!({"note": "other"})), 422);
    assert_eq!(send("PATCH", &format!("{path}/e2"), series(2)), 404);
    server.forbid_events(true);
    assert_eq!(send("POST", path, json!({"metadata": {"name": "e3"}})), 403);

    let events = server.events();
    assert_eq!(
        (events.len(), &events[0]["reason"], &events[0]["series"]["count"]),
        (1, &"RoleDenied".into(), &2.into())
    );
}
