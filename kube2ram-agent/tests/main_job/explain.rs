//! `kube2ram explain` for pods of every kind: each gets a clear answer, and it is the one that the pod gets.

use kube2ram_sandbox::{
    node::PodSpec,
    standin::{Accounts, PodManifest, Role},
};
use serde_json::{Value, json};

use crate::support::{LIST, Lab, ROLE, eventually};

fn explained(lab: &mut Lab, pod: &str) -> (i32, String, Value) {
    let (code, why) = lab.document(&["explain", pod]);
    (code.unwrap(), why["verdict"].as_str().unwrap().to_owned(), why)
}

/// The status of the answer that the last step names.
fn answer(why: &Value) -> String {
    let steps = why["steps"].as_array().unwrap();
    steps.last().unwrap()["facts"]["status"].as_str().unwrap_or_default().to_owned()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_explained_is_what_the_pod_gets() {
    let pods = [
        PodSpec::new("orders").role("orders-role"),
        PodSpec::new("arn").role(&Accounts::role_arn("arn-role")),
        PodSpec::new("plain"),
        PodSpec::new("typo").role("two words"),
        PodSpec::new("stranger").role("stranger-role"),
        PodSpec::new("missing").role("missing-role"),
        PodSpec::new("daemon").host_network(),
        PodSpec::new("own").role("own-role").host_network(),
        PodSpec::new("static").role("static-role").static_pod(),
    ];
    let mut lab = Lab::with_agent("explain", &pods, &[]);
    lab.accounts().add_role(Accounts::role_arn("arn-role"), Role::default());
    lab.accounts()
        .add_role(Accounts::role_arn("stranger-role"), Role { trusts_node: false, ..Role::default() });
    lab.accounts().remove_role(&Accounts::role_arn("missing-role"));

    for (pod, role, verdict, code, words) in [
        ("orders", "orders-role", "granted", 0, "(--auto-discover-base-arn) makes it"),
        ("arn", "arn-role", "granted", 0, "is the ARN acs:ram::"),
        ("plain", "any", "no_role", 1, "annotate the pod itself with ram.aliyuncs.com/role"),
        ("typo", "two", "denied", 1, "correct ram.aliyuncs.com/role"),
        ("stranger", "stranger-role", "denied", 1, "NoPermission"),
        ("missing", "missing-role", "denied", 1, "create the role, or correct the pod's annotation"),
        ("own", "own-role", "granted", 0, "the host listener, because it shares the node's network"),
        ("static", "static-role", "granted", 0, "its config hash, as a static pod's is"),
    ] {
        let heard = lab.ask(pod, &format!("{LIST}{role}"));

        let (exit, found, why) = explained(&mut lab, &format!("default/{pod}"));

        assert_eq!((found.as_str(), exit), (verdict, code), "{pod}: {why:#}");
        assert_eq!(answer(&why), heard.status.to_string(), "{pod}: {why:#}");
        assert!(why.to_string().contains(words), "{pod}: no {words:?} in {why:#}");
        assert_eq!(why["remedy"].is_null(), code == 0, "{pod}: {why:#}");
        if code != 0 {
            let message = &why["steps"].as_array().unwrap().last().unwrap()["facts"]["message"];
            assert_eq!(heard.body.trim(), message.as_str().unwrap(), "{pod}");
        }
    }
    // What a pod is known by: its own listener, or the task that connects to the host's.
    for (pod, recognised_by) in [("orders", "listener"), ("own", "task")] {
        let (_, _, why) = explained(&mut lab, &format!("default/{pod}"));
        let identity = &why["steps"][1];
        assert_eq!(identity["stage"], "identity");
        assert_eq!(identity["facts"]["recognised_by"], recognised_by, "{why:#}");
        assert_eq!(identity["facts"]["listener"].is_string(), recognised_by == "listener", "{why:#}");
        let says = identity["says"].as_str().unwrap();
        let is_said = says.contains("is recognised by its in-pod listener, 127.0.0.1:225");
        assert_eq!(is_said, recognised_by == "listener", "{says}");
    }
    let (exit, verdict, why) = explained(&mut lab, "default/daemon");
    assert_eq!((exit, verdict.as_str()), (0, "node_role"), "{why:#}");
    assert_eq!(lab.ask("daemon", LIST).body, Accounts::NODE_ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_annotation_where_it_has_no_effect_is_named_and_on_a_namespace_by_an_event_too() {
    for (flags, is_seen) in [(&["--namespace-restrictions"][..], true), (&[], false)] {
        let mut lab = Lab::new("explain-misplaced", &[PodSpec::new("plain")]);
        lab.api().apply_namespace("default", &[(ROLE, "orders-role")]).unwrap();
        lab.start(flags);

        assert_eq!(lab.ask("plain", LIST).status, 404);
        let (exit, verdict, why) = explained(&mut lab, "default/plain");

        assert_eq!((exit, verdict.as_str()), (1, "no_role"), "{why:#}");
        let remedy = why["remedy"].as_str().unwrap();
        assert!(remedy.contains("spec.template.metadata.annotations"), "{remedy}");
        assert!(
            remedy.contains("on its service account (default), its namespace or its Deployment"),
            "{remedy}"
        );
        let named = "namespace default has the annotation ram.aliyuncs.com/role, which has no effect there";
        assert_eq!(remedy.contains(named), is_seen, "{remedy}");
        if is_seen {
            eventually(1, || lab.api().events().len());
            assert_eq!(lab.api().events()[0]["reason"], "MisplacedAnnotation");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_default_role_is_shown_with_its_flag_and_is_not_fetched_before_it_is_asked_for() {
    let flags = ["--default-role=default-role", "--namespace-restrictions"];
    let mut lab = Lab::with_agent("explain-default", &[PodSpec::new("plain")], &flags);
    lab.accounts().add_role(Accounts::role_arn("default-role"), Role::default());

    let (code, verdict, why) = explained(&mut lab, "default/plain");

    assert_eq!((code, verdict.as_str()), (0, "pending"), "{why:#}");
    assert!(
        why.to_string().contains("the default role (--default-role)")
            && why.to_string().contains("default_role")
    );
    assert_eq!(lab.credentials("plain", "default-role"), "default-role");
    assert_eq!(explained(&mut lab, "default/plain").1, "granted");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_that_are_not_here_or_about_to_go_have_a_clear_answer() {
    let mut lab = Lab::with_agent("explain-elsewhere", &[PodSpec::new("orders").role("orders-role")], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let manifest = |name: &str, node: &str| {
        let uid = format!("00000000-0000-4000-8000-{:012x}", name.len());
        let (name, namespace, node) = (name.to_owned(), "default".to_owned(), node.to_owned());
        let service_account = "default".to_owned();
        PodManifest { name, namespace, node, uid, service_account, ..PodManifest::default() }.to_json()
    };
    let mut ended = manifest("ended", "other-node");
    ended["status"]["phase"] = "Succeeded".into();
    for object in [manifest("far", "other-node"), manifest("nowhere", ""), ended] {
        lab.api().apply(object).unwrap();
    }

    for (pod, words) in [
        ("absent", "there is no such pod in the cluster"),
        ("far", "the pod is on node other-node, not on this one (sandbox-node)"),
        ("nowhere", "the pod is not scheduled to a node yet"),
        ("ended", "the pod has ended (Succeeded)"),
    ] {
        let (code, verdict, why) = explained(&mut lab, &format!("default/{pod}"));
        assert_eq!((code, verdict.as_str()), (66, "unknown"), "{pod}: {why:#}");
        assert!(why["summary"].as_str().unwrap().contains(words), "{pod}: {why:#}");
        assert!(why["remedy"].is_string(), "{pod}: {why:#}");
    }

    let spec = lab.pod("orders").unwrap().pod().spec().clone();
    let mut going = manifest("orders", "sandbox-node");
    going["metadata"]["uid"] = spec.uid.clone().into();
    going["metadata"]["annotations"] = json!({ ROLE: "orders-role" });
    going["metadata"]["deletionTimestamp"] = "2026-11-21T00:00:00Z".into();
    lab.api().apply(going).unwrap();
    let presence = |lab: &mut Lab| {
        explained(lab, "default/orders").2["steps"][0]["facts"]["presence"].as_str().map(str::to_owned)
    };
    eventually(Some("terminating".to_owned()), || presence(&mut lab));
    assert_eq!(explained(&mut lab, "default/orders").1, "granted");
    lab.api().delete_pod("default", "orders");
    eventually(Some("departed".to_owned()), || presence(&mut lab));
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "as it says");
    lab.remove_pod("orders").unwrap();
    eventually(66, || explained(&mut lab, "default/orders").0);
}
