//! The agent's own right and the two policies that confine it: the overlay `service-accounts-by-policy`.

use serde_json::{Value, json};

use super::{
    ADMIN, API, Caller, Cluster, KUBELET, NODE, NODE_NAME, OPT_IN, OTHER_NODE, STS, agent_on, eventually,
    message, token_of,
};

const REQUESTS: &str = "ValidatingAdmissionPolicyBinding /kube2ram-token-requests";
const PODS: &str = "ValidatingAdmissionPolicyBinding /kube2ram-token-pods";

/// What the policies say, in a few of their words.
const AUDIENCE: &str = "tokens for STS only";
const BINDING: &str = "bound to a pod by its name and UID";
const LIFETIME: &str = "3600 s at most";
const NOT_ITS_OWN: &str = "its own ServiceAccount";
const OPTED_IN: &str = "kubectl label namespace <namespace> kube2ram/service-account-tokens=true";
const OTHER_UID: &str = "the pod has another UID";
const ITS_NODE: &str = "pods of the node only";

/// The UID of no pod.
const ANOTHER: &str = "0a1b2c3d-0000-4000-8000-000000000001";

/// The overlay's cluster, and the agent of this node when right and policies are active.
fn confined() -> (Cluster, Caller) {
    let cluster = Cluster::new("service-accounts-by-policy");
    let agent = Caller::new(&cluster.token_on(NODE));
    let own = cluster.request("shop", "cart-0");
    cluster.await_granted(&agent, &own);
    cluster.await_refused(&agent, &own.clone().with("audiences", json!([API])), AUDIENCE);
    // The second policy knows this pod, so it knows all.
    cluster.await_refused(&agent, &own.bound("uid", ANOTHER.into()), OTHER_UID);
    (cluster, agent)
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_agent_gets_tokens_for_sts_of_its_nodes_pods_where_they_opted_in() {
    let (cluster, agent) = confined();
    let elsewhere = Caller::new(&cluster.token_on(OTHER_NODE));

    let answer = cluster.ask(&agent, &cluster.request("shop", "web-0"));

    assert_eq!((answer.status, answer.warnings.len()), (201, 0), "{answer:?}");
    let claims = cluster.claims(&answer);
    assert_eq!((&claims["sub"], &claims["aud"]), (&"system:serviceaccount:shop:web".into(), &json!([STS])));
    assert_eq!(claims["kubernetes.io"]["pod"]["name"], "web-0");
    assert_eq!(claims["kubernetes.io"]["node"]["name"], NODE);
    assert_eq!(cluster.ask(&elsewhere, &cluster.request("shop", "web-1")).status, 201, "each its own");
    cluster.assert_refused(&elsewhere, &cluster.request("shop", "web-0"), 403, ITS_NODE);
    // It reads ServiceAccounts by its own right, one at a time.
    let get = |path: &str| cluster.plane.send(&agent.0, "GET", path, &Value::Null);
    assert_eq!(get("/api/v1/namespaces/shop/serviceaccounts/web").status, 200);
    assert_eq!(get("/api/v1/namespaces/shop/serviceaccounts").status, 403);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn all_other_tokens_are_refused_and_the_error_names_the_next_step() {
    let (cluster, agent) = confined();
    let own = cluster.request("shop", "web-0");
    let node = json!({ "apiVersion": "v1", "kind": "Node", "name": NODE });
    let absent = own.clone().bound("name", "web-9".into());

    let refused = [
        (own.clone().with("audiences", json!([STS, API])), 403, AUDIENCE),
        (own.clone().with("audiences", json!([API])), 403, AUDIENCE),
        // The API server's, by default.
        (own.clone().with("audiences", json!([])), 403, AUDIENCE),
        (own.clone().with("audiences", json!(["sts.amazonaws.com"])), 403, AUDIENCE),
        (own.clone().with("boundObjectRef", Value::Null), 403, BINDING),
        (own.clone().with("boundObjectRef", node), 403, BINDING),
        (own.clone().bound("kind", "Secret".into()), 403, BINDING),
        (absent.clone().bound("uid", "".into()), 403, BINDING),
        (own.clone().with("expirationSeconds", 3601.into()), 403, LIFETIME),
        (cluster.request("kube-system", &agent_on(NODE)), 403, NOT_ITS_OWN),
        (cluster.request("quiet", "batch-0"), 403, OPTED_IN),
        (cluster.request("shop", "web-1"), 403, ITS_NODE),
        (cluster.request("shop", "far-0"), 403, ITS_NODE),
        (own.clone().bound("uid", ANOTHER.into()), 403, OTHER_UID),
        // No pod is there that the second policy could judge.
        (own.clone().of("empty", "lonely"), 422, "no params found"),
        // The API server's own checks.
        (absent, 404, "not found"),
        (own.clone().of("shop", "cart"), 400, "different serviceaccount name"),
    ];

    for (request, status, reason) in &refused {
        cluster.assert_refused(&agent, request, *status, reason);
    }
    // Its token names no node.
    let unbound = Caller::new(&cluster.plane.token("kube2ram", None));
    cluster.assert_refused(&unbound, &own, 403, ITS_NODE);
    let labels = |value: &str| json!({ "metadata": { "labels": { OPT_IN: value } } });
    let quiet = "/api/v1/namespaces/quiet";
    assert_eq!(cluster.plane.patch(ADMIN, quiet, &labels("false")).status, 200);
    cluster.assert_refused(&agent, &cluster.request("quiet", "batch-0"), 403, OPTED_IN);
    assert_eq!(cluster.plane.patch(ADMIN, quiet, &labels("true")).status, 200);
    cluster.await_granted(&agent, &cluster.request("quiet", "batch-0"));
    assert_eq!(cluster.ask(&agent, &own.with("expirationSeconds", 3600.into())).status, 201, "the twin");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn agents_alone_are_confined_by_whatever_name_kustomize_gives_them() {
    let (cluster, _) = confined();
    let of_the_api_server = cluster.request("shop", "web-0").with("audiences", json!([]));

    // What the kubelet mounts, and what administrators and other controllers request.
    for token in [KUBELET, ADMIN] {
        let answer = cluster.ask(&Caller::new(token), &of_the_api_server);
        assert_eq!(answer.status, 201, "{token}: {answer:?}");
    }

    for (account, is_agent) in [("team-kube2ram", true), ("kube2ram-b", true), ("another", false)] {
        cluster.add_account("kube-system", account);
        let mut binding = cluster.objects["ClusterRoleBinding /kube2ram-token-requests"].clone();
        binding["metadata"]["name"] = account.into();
        binding["subjects"][0]["name"] = account.into();
        cluster.add(&binding);
        let caller = Caller::new(&cluster.plane.token(account, None));
        if is_agent {
            cluster.await_refused(&caller, &of_the_api_server, "ValidatingAdmissionPolicy");
        } else {
            cluster.await_granted(&caller, &of_the_api_server);
        }
    }
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn either_policy_alone_leaves_a_hole() {
    let (cluster, agent) = confined();
    let forgery = cluster.forgery();
    let (own, theirs) = (cluster.request("shop", "web-0"), cluster.request("shop", "web-1"));
    cluster.assert_refused(&agent, &forgery, 403, AUDIENCE);
    cluster.assert_refused(&agent, &forgery.clone().with("audiences", json!([STS])), 403, BINDING);

    // Without the first, the agent names its own node: any, and the second believes it.
    cluster.remove(REQUESTS);
    let forged = cluster.await_granted(&agent, &forgery);
    let forged = token_of(&forged);
    assert_eq!(cluster.user(forged)["extra"][NODE_NAME], json!([OTHER_NODE]));
    assert_eq!(cluster.ask(&Caller::new(forged), &theirs).status, 201, "the hole");
    cluster.assert_refused(&agent, &theirs, 403, ITS_NODE);
    let of_the_api_server = cluster.ask(&agent, &own.clone().with("audiences", json!([API])));
    assert_eq!(of_the_api_server.status, 201, "another: {of_the_api_server:?}");

    // With it again, no more are forged; those that were are lies until they end.
    cluster.give_back(REQUESTS);
    cluster.await_refused(&agent, &forgery, AUDIENCE);
    assert_eq!(cluster.ask(&Caller::new(forged), &theirs).status, 201, "why policies come before the right");

    // Without the second, every node gets tokens of all pods where they opted in, for STS.
    cluster.remove(PODS);
    cluster.await_granted(&agent, &theirs);
    assert_eq!(cluster.ask(&agent, &cluster.request("shop", "far-0")).status, 201);
    for (request, reason) in [
        (forgery, AUDIENCE),
        (own.with("audiences", json!([API])), AUDIENCE),
        (cluster.request("quiet", "away-0"), OPTED_IN),
    ] {
        cluster.assert_refused(&agent, &request, 403, reason);
    }

    cluster.give_back(PODS);
    cluster.await_refused(&agent, &theirs, ITS_NODE);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn without_the_right_the_error_names_it() {
    let (cluster, agent) = confined();
    let own = cluster.request("shop", "web-0");

    for name in ["ClusterRole /kube2ram-token-requests", "ClusterRoleBinding /kube2ram-token-requests"] {
        cluster.remove(name);
        cluster.await_refused(&agent, &own, r#"cannot create resource "serviceaccounts/token""#);
        cluster.give_back(name);
        cluster.await_granted(&agent, &own);
    }
    let path = "/api/v1/namespaces/shop/serviceaccounts/web";
    let mut role = cluster.objects["ClusterRole /kube2ram"].clone();
    let rules = role["rules"].as_array_mut().unwrap();
    rules.retain(|rule| rule["resources"] != json!(["serviceaccounts"]));
    cluster.add(&role);
    eventually("the error names it", || {
        let answer = cluster.plane.send(&agent.0, "GET", path, &Value::Null);
        answer.status == 403 && message(&answer).contains(r#"cannot get resource "serviceaccounts""#)
    });
}
