//! The agent's rights: enough, each needed, and no more.

use kube2ram_sandbox::Sandbox;
use serde_json::{Value, json};

use super::{
    super::{
        node::{LIST, eventually},
        support::{helm, kustomized, single_file, values},
    },
    apply_all,
    cluster::{Cluster, TAINT, taint},
    control_plane::{ADMIN, ControlPlane},
};

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn the_service_accounts_rights_are_enough() {
    let mut cluster = Cluster::new("rbac-enough", kustomized(Some("startup-taint")));
    cluster.add("greedy", &json!({ "ram.aliyuncs.com/role": "not-allowed" }));

    let agent = cluster.start().unwrap();

    assert_eq!((agent.ready().unwrap().as_str(), agent.live().unwrap().as_str()), ("ready", "live"));
    cluster.node.assert_served();
    // A pod and an allow-list that are told of by the watches.
    cluster.add("late", &json!({ "ram.aliyuncs.com/role": "late-role" }));
    assert_eq!(cluster.node.ask("late", LIST).body, "late-role");
    assert_eq!(cluster.node.ask("greedy", LIST).status, 403);
    eventually("an Event on the denied pod", || {
        cluster.events().iter().any(|event| event["regarding"]["name"] == "greedy")
    });
    // Every half a minute.
    eventually("it is counted", || {
        assert_eq!(cluster.node.ask("greedy", LIST).status, 403);
        cluster.events().iter().any(|event| event["series"]["count"].as_i64() >= Some(2))
    });
    let allowed = json!({ "metadata": { "annotations": { "ram.aliyuncs.com/allowed-roles": r#"["*"]"# } } });
    assert_eq!(cluster.plane.patch(ADMIN, "/api/v1/namespaces/default", &allowed).status, 200);
    eventually("the allow-list is read", || cluster.node.ask("greedy", LIST).status == 200);
    eventually("the taint is gone", || cluster.taints(Sandbox::NODE) == ["keep"]);
    assert_eq!(cluster.taints("other-node"), [TAINT, "keep"]);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn each_right_is_needed_and_what_fails_without_it_is_named() {
    let mut cluster = Cluster::new("rbac-needed", kustomized(Some("startup-taint")));
    cluster.add("greedy", &json!({ "ram.aliyuncs.com/role": "not/allowed" }));
    let unready = [("pods", "list"), ("namespaces", "list")];
    for (resource, verb) in unready {
        cluster.take_away(resource, verb);
        let mut agent = cluster.spawn().unwrap();
        eventually("it says what it may not do", || {
            let log = agent.container.log();
            log.contains("forbidden") && log.contains(resource)
        });
        assert!(agent.ready().unwrap_err().to_string().contains("pending"), "{verb} {resource}");
        agent.container.terminate().unwrap();
        cluster.give_back();
    }
    for (resource, verb) in [("pods", "watch"), ("namespaces", "watch")] {
        cluster.take_away(resource, verb);
        let mut agent = cluster.spawn().unwrap();
        eventually("it says what it may not do", || {
            let log = agent.container.log();
            log.contains("forbidden") && log.contains(resource)
        });
        agent.container.terminate().unwrap();
        cluster.give_back();
    }

    // Without these it serves.
    for (resource, verb) in [("events", "create"), ("events", "patch"), ("nodes", "patch"), ("nodes", "get")]
    {
        taint(&cluster.plane, Sandbox::NODE);
        cluster.take_away(resource, verb);
        let mut agent = cluster.start().unwrap();
        eventually("it says what it may not do", || {
            assert_eq!(cluster.node.ask("greedy", LIST).status, 403);
            let log = agent.container.log();
            log.lines().any(|line| line.contains("forbidden") && line.contains(resource))
        });
        match (resource, verb) {
            ("events", "create") => assert_eq!(cluster.events(), [Value::Null; 0]),
            ("events", _) => {
                let events = cluster.events();
                assert!(
                    !events.is_empty() && events.iter().all(|event| event["series"].is_null()),
                    "{events:?}"
                );
            }
            _ => assert_eq!(cluster.taints(Sandbox::NODE), [TAINT, "keep"]),
        }
        agent.container.terminate().unwrap();
        cluster.give_back();
    }

    // The twin.
    let _agent = cluster.start().unwrap();
    eventually("the taint is gone", || cluster.taints(Sandbox::NODE) == ["keep"]);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn without_restrictions_the_agent_serves_without_the_right_to_read_namespaces() {
    let values = format!("--values={}", values("startup-taint").display());
    let unrestricted = helm(&[&values, "--set=flags.namespace-restrictions=false"]).unwrap();
    let mut cluster = Cluster::new("rbac-unrestricted", unrestricted);

    let mut agent = cluster.start().unwrap();

    cluster.node.assert_served();
    let log = agent.container.log();
    assert!(!log.contains("forbidden"), "it does not even ask: {log}");
    // Put back, as autoscalers do.
    eventually("the taint is gone", || cluster.taints(Sandbox::NODE) == ["keep"]);
    taint(&cluster.plane, Sandbox::NODE);
    eventually("the taint is gone again", || cluster.taints(Sandbox::NODE) == ["keep"]);
    agent.container.terminate().unwrap();
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn what_is_not_granted_is_denied() {
    let plane = ControlPlane::start();
    apply_all(&plane, &single_file(), "kube2ram.yaml");
    let may = |verb: &str, group: &str, resource: &str| {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": "system:serviceaccount:kube-system:kube2ram",
                "groups": ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"],
                "resourceAttributes": { "verb": verb, "group": group, "resource": resource },
            },
        });
        plane.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review).body["status"]["allowed"]
            == true
    };
    let verbs =
        ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "impersonate"];
    let resources = [
        ("", "pods"),
        ("", "namespaces"),
        ("", "nodes"),
        ("", "secrets"),
        ("", "configmaps"),
        ("", "serviceaccounts"),
        ("", "serviceaccounts/token"),
        ("", "pods/exec"),
        ("", "events"),
        ("events.k8s.io", "events"),
        ("apps", "daemonsets"),
        ("rbac.authorization.k8s.io", "clusterroles"),
    ];

    let granted: Vec<_> = resources
        .iter()
        .flat_map(|(group, resource)| verbs.iter().map(move |verb| (*verb, *group, *resource)))
        .filter(|(verb, group, resource)| may(verb, group, resource))
        .collect();

    let expected = [
        ("list", "", "pods"),
        ("watch", "", "pods"),
        ("list", "", "namespaces"),
        ("watch", "", "namespaces"),
        ("create", "events.k8s.io", "events"),
        ("patch", "events.k8s.io", "events"),
    ];
    assert_eq!(granted, expected);
}
