//! Constrained impersonation of the own node (KEP-5284): the overlay `service-accounts`.

use std::fs;

use serde_json::{Value, json};

use super::{
    ADMIN, AGENT, API, Caller, Cluster, KUBELET, NODE, NODE_NAME, OTHER_NODE, STS, agent_on, eventually,
    message, token_of,
};

fn agent(cluster: &Cluster) -> Caller {
    Caller::new(&cluster.token_on(NODE)).impersonating(NODE)
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_agent_gets_tokens_of_its_nodes_pods_by_exactly_these_rules() {
    let cluster = Cluster::new("service-accounts");
    let own = cluster.token_on(NODE);
    let agent = Caller::new(&own).impersonating(NODE);
    let user = cluster.user(&own);
    assert_eq!(user["username"], AGENT);
    assert_eq!(user["extra"][NODE_NAME], json!([NODE]));
    assert_eq!(user["extra"]["authentication.kubernetes.io/pod-name"], json!([agent_on(NODE)]));
    cluster.await_granted(&agent, &cluster.request("shop", "cart-0"));

    let answer = cluster.ask(&agent, &cluster.request("shop", "web-0"));

    assert_eq!((answer.status, answer.warnings.len()), (201, 0), "{answer:?}");
    let claims = cluster.claims(&answer);
    let uid = |path: &str| cluster.plane.get(path).body["metadata"]["uid"].clone();
    assert_eq!(claims["iss"], API);
    assert_eq!(claims["sub"], "system:serviceaccount:shop:web");
    assert_eq!(claims["aud"], json!([STS]));
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 600);
    assert_eq!(claims["nbf"], claims["iat"]);
    let bound = json!({
        "namespace": "shop",
        "node": { "name": NODE, "uid": uid(&format!("/api/v1/nodes/{NODE}")) },
        "pod": { "name": "web-0", "uid": uid("/api/v1/namespaces/shop/pods/web-0") },
        "serviceaccount": { "name": "web", "uid": uid("/api/v1/namespaces/shop/serviceaccounts/web") },
    });
    assert_eq!(claims["kubernetes.io"], bound);
    let at_the_api_server = cluster.plane.request(
        token_of(&answer),
        "GET",
        "/api/v1/namespaces",
        "application/json",
        &Value::Null,
    );
    assert_eq!(at_the_api_server.status, 401, "a token for STS opens nothing else: {at_the_api_server:?}");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_agent_reads_the_service_accounts_of_its_nodes_pods() {
    let cluster = Cluster::new("service-accounts");
    let agent = agent(&cluster);
    let get = |path: &str| cluster.plane.send(&agent.0, "GET", path, &Value::Null);
    let account =
        |namespace: &str, name: &str| get(&format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}"));

    eventually("a ServiceAccount", || account("shop", "cart").status == 200);

    assert_eq!(account("shop", "web").body["metadata"]["annotations"]["ram.aliyuncs.com/role"], "web");
    for (namespace, name) in [("shop", "far"), ("empty", "lonely"), ("kube-system", "controller")] {
        let refused = account(namespace, name);
        assert_eq!(refused.status, 403, "{name}: {refused:?}");
        assert!(message(&refused).contains("no relationship found"), "{refused:?}");
    }
    // As its node it does nothing else, and a node could.
    for path in [
        "/api/v1/namespaces/shop/serviceaccounts",
        "/api/v1/pods?fieldSelector=spec.nodeName=sandbox-node",
        "/api/v1/nodes/sandbox-node",
        "/api/v1/namespaces/shop/configmaps/kube-root-ca.crt",
        "/api/v1/namespaces/shop/secrets/any",
    ] {
        let refused = get(path);
        assert_eq!(refused.status, 403, "{path}: {refused:?}");
        assert!(message(&refused).contains("impersonate"), "{path}: {refused:?}");
    }
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn tokens_of_other_pods_bindings_and_audiences_are_refused() {
    let cluster = Cluster::new("service-accounts");
    let agent = agent(&cluster);
    let own = cluster.request("shop", "web-0");
    cluster.await_granted(&agent, &cluster.request("shop", "cart-0"));
    let uid_of_node = cluster.plane.get(&format!("/api/v1/nodes/{NODE}")).body["metadata"]["uid"].clone();
    let node =
        |name: &str, uid: Value| json!({ "apiVersion": "v1", "kind": "Node", "name": name, "uid": uid });
    let uid = json!("0a1b2c3d-0000-4000-8000-000000000001");
    let audience = "not found in pod spec volume";
    let pod = "not bound to a pod";

    let refused = [
        // Another node's pods: the ServiceAccount has none here; or it has, and the other pod is named.
        (cluster.request("shop", "far-0"), 403, "no relationship found"),
        (cluster.request("kube-system", "controller-0"), 403, "no relationship found"),
        (own.clone().of("empty", "lonely"), 403, "no relationship found"),
        (cluster.request("shop", "web-1"), 403, "scheduled on a different node"),
        (own.clone().bound("uid", uid), 403, "does not match the UID in record"),
        (own.clone().bound("uid", "".into()), 403, "without a uid"),
        (own.clone().bound("name", "web-9".into()), 404, "not found"),
        (own.clone().with("boundObjectRef", Value::Null), 403, pod),
        (own.clone().with("boundObjectRef", node(NODE, uid_of_node)), 403, pod),
        (own.clone().bound("kind", "Secret".into()), 403, pod),
        (cluster.forgery(), 403, pod),
        // Another pod of this node, which has another ServiceAccount.
        (own.clone().of("shop", "cart"), 400, "different serviceaccount name"),
        (own.clone().with("audiences", json!([STS, API])), 403, "0 or 1 audiences"),
        (own.clone().with("audiences", json!([API])), 403, audience),
        (own.clone().with("audiences", json!(["sts.amazonaws.com"])), 403, audience),
        (cluster.request("shop", "mute-0").with("audiences", json!([])), 403, audience),
        (own.clone().with("expirationSeconds", 599.into()), 422, "expirationSeconds"),
    ];

    for (request, status, reason) in &refused {
        cluster.assert_refused(&agent, request, *status, reason);
    }
    assert_eq!(cluster.ask(&agent, &own).status, 201, "the twin");
    // NodeRestriction allows a node the audiences in the pod's volumes, and the API server's is in most. The
    // kubelet's certificate gives root on the node the same.
    let kubelets = cluster.ask(&agent, &own.with("audiences", json!([])));
    assert_eq!(cluster.claims(&kubelets)["aud"], json!([API]));
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn nobody_else_acts_as_the_node_and_the_agent_as_nobody_else() {
    let cluster = Cluster::new("service-accounts");
    let token = cluster.token_on(NODE);
    let (agent, own) = (Caller::new(&token), cluster.request("shop", "web-0"));
    cluster.await_granted(&agent.clone().impersonating(NODE), &cluster.request("shop", "cart-0"));
    let elsewhere = Caller::new(&cluster.token_on(OTHER_NODE));
    let unbound = Caller::new(&cluster.plane.token("kube2ram", None));
    let of_a_pod = cluster.ask(&Caller::new(ADMIN), &own.clone().with("audiences", json!([API])));
    assert_eq!(cluster.user(token_of(&of_a_pod))["extra"][NODE_NAME], json!([NODE]));
    let as_node = || agent.clone().impersonating(NODE);
    let impersonates = "cannot impersonate";

    let refused = [
        // Another node's agent, which gets the same for its own node.
        (elsewhere.clone().impersonating(NODE), impersonates),
        (unbound.impersonating(NODE), impersonates),
        // A pod of this node.
        (Caller::new(token_of(&of_a_pod)).impersonating(NODE), impersonates),
        (agent.clone(), "cannot create"),
        (agent.clone().impersonating(OTHER_NODE), impersonates),
        (agent.clone().with("Impersonate-User", "admin"), impersonates),
        (agent.clone().with("Impersonate-User", "system:serviceaccount:shop:web"), impersonates),
        // What would make the user more than the node's.
        (as_node().with("Impersonate-Group", "system:masters"), impersonates),
        (as_node().with("Impersonate-Group", "system:nodes"), impersonates),
        (as_node().with("Impersonate-Uid", "1"), impersonates),
        (as_node().with("Impersonate-Extra-Scopes", "all"), impersonates),
    ];

    for (caller, reason) in &refused {
        cluster.assert_refused(caller, &own, 403, reason);
    }
    assert_eq!(cluster.ask(&as_node(), &own).status, 201, "the twin");
    let theirs = elsewhere.impersonating(OTHER_NODE);
    assert_eq!(cluster.ask(&theirs, &cluster.request("shop", "web-1")).status, 201, "the other twin");
    cluster.assert_refused(&theirs, &own, 403, "scheduled on a different node");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn without_each_of_the_rules_there_is_no_token_and_the_error_names_it() {
    let cluster = Cluster::new("service-accounts");
    let (agent, own) = (agent(&cluster), cluster.request("shop", "web-0"));
    let account = || {
        let path = "/api/v1/namespaces/shop/serviceaccounts/web";
        cluster.plane.send(&agent.0, "GET", path, &Value::Null)
    };
    cluster.await_granted(&agent, &own);
    eventually("the ServiceAccount", || account().status == 200);

    let audience = "not authorized to request tokens for this audience";
    for (role, resource, reason) in [
        ("kube2ram-node-tokens", "nodes", "cannot impersonate:associated-node"),
        ("kube2ram-node-tokens", "serviceaccounts/token", "cannot impersonate-on:associated-node:create"),
        ("kube2ram-audience", STS, audience),
    ] {
        without(&cluster, role, resource);
        // The API server remembers an impersonation for 10 s.
        cluster.await_refused(&agent, &own, reason);
        cluster.give_back(&format!("ClusterRole /{role}"));
        cluster.await_granted(&agent, &own);
    }
    for (name, reason) in [("kube2ram-node-tokens", "cannot impersonate"), ("kube2ram-audience", audience)] {
        let name = format!("ClusterRoleBinding /{name}");
        cluster.remove(&name);
        cluster.await_refused(&agent, &own, reason);
        cluster.give_back(&name);
        cluster.await_granted(&agent, &own);
    }
    without(&cluster, "kube2ram-node-tokens", "serviceaccounts");
    eventually("the error names it", || {
        let answer = account();
        answer.status == 403 && message(&answer).contains("cannot impersonate-on:associated-node:get")
    });
    assert_eq!(cluster.ask(&agent, &own).status, 201, "tokens do not need it");
}

/// Applies a ClusterRole of the manifests without the rule of this resource.
fn without(cluster: &Cluster, role: &str, resource: &str) {
    let mut role = cluster.objects[&format!("ClusterRole /{role}")].clone();
    let rules = role["rules"].as_array_mut().unwrap();
    let before = rules.len();
    rules.retain(|rule| rule["resources"] != json!([resource]));
    assert_eq!(rules.len() + 1, before, "{resource}");
    cluster.add(&role);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_api_server_without_the_feature_refuses() {
    let gate = "--feature-gates=ConstrainedImpersonation=false".to_owned();
    let cluster = Cluster::with_flags("service-accounts", &[gate]);
    let (agent, own) = (agent(&cluster), cluster.request("shop", "web-0"));
    let is_granted = || {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": AGENT,
                "resourceAttributes": {
                    "verb": "impersonate:associated-node", "group": "authentication.k8s.io",
                    "resource": "nodes", "name": "*",
                },
            },
        });
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        cluster.plane.post(path, &review).body["status"]["allowed"] == true
    };
    eventually("the right", is_granted);
    // What the agent would act as may: the kubelet's own request.
    cluster.await_granted(&Caller::new(KUBELET), &own);

    let answer = cluster.ask(&agent, &own);

    assert_eq!(answer.status, 403, "{answer:?}");
    assert!(message(&answer).contains(r#"cannot impersonate resource "users""#), "{answer:?}");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn the_audit_log_of_the_api_server_names_the_agent_its_node_and_the_token() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [policy, log] = ["policy.yaml", "audit.log"].map(|name| directory.path().join(name));
    let of_tokens = json!([{ "group": "", "resources": ["serviceaccounts/token"] }]);
    let rules = json!([{ "level": "Metadata", "resources": of_tokens }]);
    let text = json!({ "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules }).to_string();
    fs::write(&policy, text).unwrap();
    let flags =
        [format!("--audit-policy-file={}", policy.display()), format!("--audit-log-path={}", log.display())];
    let cluster = Cluster::with_flags("service-accounts", &flags);

    let answer = cluster.await_granted(&agent(&cluster), &cluster.request("shop", "web-0"));

    let id = format!("JTI={}", cluster.claims(&answer)["jti"].as_str().unwrap());
    let mut record = Value::Null;
    eventually("its record", || {
        let log = fs::read_to_string(&log).unwrap();
        let mut records = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let is_it = |record: &Value| {
            record["annotations"]["authentication.kubernetes.io/issued-credential-id"] == id.as_str()
        };
        record = records.find(is_it).unwrap_or_default();
        !record.is_null()
    });
    assert_eq!(record["user"]["username"], AGENT);
    assert_eq!(record["user"]["extra"][NODE_NAME], json!([NODE]));
    assert_eq!(record["impersonatedUser"]["username"], format!("system:node:{NODE}"));
    let metadata = &record["authenticationMetadata"];
    assert_eq!(metadata["impersonationConstraint"], "impersonate:associated-node");
    let object = &record["objectRef"];
    assert_eq!((&object["namespace"], &object["name"]), (&"shop".into(), &"web".into()));
    assert!(!fs::read_to_string(&log).unwrap().contains(token_of(&answer)), "the token is in the log");
}
