//! The admission policies: who may write allow-lists, and what an agent may change of nodes.

use kube2ram_sandbox::{Sandbox, control_plane::ControlPlane as Processes};
use serde_json::{Value, json};

use super::{
    super::{node::eventually, support::kustomized},
    apply_all,
    cluster::Cluster,
    control_plane::{ADMIN, ControlPlane},
};

const TENANT: &str = Processes::TENANT;
const ALLOW_LIST: &str = "ram.aliyuncs.com/allowed-roles";

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn the_agents_token_changes_nothing_of_nodes_but_its_own_taint() {
    let cluster = Cluster::new("rbac-nodes", kustomized(Some("startup-taint")));
    let (plane, token) = (&cluster.plane, cluster.bound_token());
    let own = format!("/api/v1/nodes/{}", Sandbox::NODE);
    let keep = json!({ "key": "keep", "effect": "NoSchedule" });
    let denied = |token: &str, path: &str, change: Value| {
        let answer = plane.patch(token, path, &change);
        assert!(answer.status == 403 || answer.status == 422, "{path} {change}: {answer:?}");
        answer.body["message"].as_str().unwrap().to_owned()
    };
    // A policy is active a little after it was applied; until then the label may get written, and what it
    // already is is no change.
    let mut attempt = 0;
    eventually("the policy", || {
        attempt += 1;
        let change = json!({ "metadata": { "labels": { "probe": attempt.to_string() } } });
        plane.patch(&token, &own, &change).status != 200
    });

    let unbound = plane.token("kube2ram", None);
    let taints = |list: Value| json!({ "spec": { "taints": list } });
    assert!(denied(&token, "/api/v1/nodes/other-node", taints(json!([keep]))).contains("its own node"));
    assert!(denied(&unbound, &own, taints(json!([keep]))).contains("its own node"));
    assert!(
        denied(&token, &own, json!({ "metadata": { "labels": { "a": "b" } } })).contains("but its taints")
    );
    assert!(
        denied(&token, &own, json!({ "metadata": { "annotations": { "a": "b" } } }))
            .contains("but its taints")
    );
    assert!(denied(&token, &own, json!({ "spec": { "unschedulable": true } })).contains("but its taints"));
    let another = json!([keep, { "key": "mine", "effect": "NoExecute" }]);
    assert!(denied(&token, &own, taints(another)).contains("add no taint"));
    assert_eq!(plane.patch(&token, &own, &taints(json!([keep]))).status, 200, "the twin");
    assert_eq!(cluster.taints(Sandbox::NODE), ["keep"]);
    let anybody = json!({ "metadata": { "labels": { "a": "b" } } });
    assert_eq!(
        plane.patch(ADMIN, "/api/v1/nodes/other-node", &anybody).status,
        200,
        "others are not its business"
    );
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn allow_lists_are_changed_by_those_who_may() {
    let plane = ControlPlane::start();
    apply_all(&plane, &kustomized(Some("namespace-restrictions")), "namespace-restrictions");
    let bind = |role: &str| {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": format!("tenant-{role}") },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "tenant" }],
        });
        assert_eq!(plane.apply(&binding).status, 201);
    };
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": "namespaces" },
        "rules": [{
            "apiGroups": [""],
            "resources": ["namespaces", "namespaces/finalize", "namespaces/status"],
            "verbs": ["create", "get", "patch", "update"],
        }],
    });
    assert_eq!(plane.apply(&role).status, 201);
    bind("namespaces");
    let change = |value: &str| json!({ "metadata": { "annotations": { ALLOW_LIST: value } } });
    let annotate = |value: &str| plane.patch(TENANT, "/api/v1/namespaces/default", &change(value));
    // What writes an annotation, too.
    let by_way_of_status =
        |value: &str| plane.patch(TENANT, "/api/v1/namespaces/default/status", &change(value));
    let by_way_of_finalize = |value: &str| {
        let mut whole = plane.get("/api/v1/namespaces/default").body;
        whole["metadata"]["annotations"][ALLOW_LIST] = json!(value);
        plane.request(TENANT, "PUT", "/api/v1/namespaces/default/finalize", "application/json", &whole)
    };

    // Both the role and the policy are active a little after they were applied; until then the annotation may
    // get written, and what it is already is no change.
    let mut attempt = 0;
    eventually("the policy", || {
        attempt += 1;
        let answer = annotate(&format!(r#"["{attempt}-*"]"#));
        answer.status == 403 && answer.body["message"].to_string().contains("allow-ram-roles")
    });
    for answer in [by_way_of_status(r#"["s-*"]"#), by_way_of_finalize(r#"["f-*"]"#)] {
        assert_eq!(answer.status, 403, "{answer:?}");
        assert!(answer.body["message"].as_str().unwrap().contains("allow-ram-roles"), "{answer:?}");
    }
    // The usual keys of all clouds.
    let on_aws =
        json!({ "metadata": { "annotations": { "iam.amazonaws.com/allowed-roles": r#"["a-*"]"# } } });
    let answer = plane.patch(TENANT, "/api/v1/namespaces/default", &on_aws);
    assert_eq!(answer.status, 403, "{answer:?}");
    assert!(answer.body["message"].as_str().unwrap().contains("allow-ram-roles"), "{answer:?}");
    let label = json!({ "metadata": { "labels": { "team": "a" } } });
    assert_eq!(
        plane.patch(TENANT, "/api/v1/namespaces/default", &label).status,
        200,
        "else they may do what they may"
    );
    let made = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "mine", "annotations": { ALLOW_LIST: r#"["*"]"# } },
    });
    let created = plane.request(TENANT, "POST", "/api/v1/namespaces", "application/json", &made);
    assert_eq!(created.status, 403, "{created:?}");
    assert!(created.body["message"].as_str().unwrap().contains("allow-ram-roles"), "{created:?}");

    bind("kube2ram-allow-lists");
    eventually("the right", || annotate(r#"["a-*"]"#).status == 200);
    // That is, they are ways.
    for (answer, value) in
        [(by_way_of_status(r#"["s-*"]"#), r#"["s-*"]"#), (by_way_of_finalize(r#"["f-*"]"#), r#"["f-*"]"#)]
    {
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.body["metadata"]["annotations"][ALLOW_LIST], value);
    }
    assert_eq!(plane.request(TENANT, "POST", "/api/v1/namespaces", "application/json", &made).status, 201);
}
