//! Roles that owners of namespaces write: the overlay `service-accounts-by-namespace`, and its example.

use std::fs;

use serde_json::{Value, json};

use super::{
    super::super::support::deploy, ADMIN, API, Caller, Cluster, NODE, OPT_IN, OTHER_NODE, STS, apply_all,
};

const NO_RIGHT: &str = r#"cannot create resource "serviceaccounts/token""#;

/// With the example applied, and pods of the ServiceAccount that it names and of another one.
fn with_the_example() -> (Cluster, Caller) {
    let cluster = Cluster::new("service-accounts-by-namespace");
    let example = fs::read_to_string(deploy().join("examples/service-account.yaml")).unwrap();
    apply_all(&cluster.plane, &example, "the example");
    // Here the Role is what opts in.
    let label = json!({ "metadata": { "labels": { OPT_IN: Value::Null } } });
    assert_eq!(cluster.plane.patch(ADMIN, "/api/v1/namespaces/checkout", &label).status, 200);
    cluster.add_account("checkout", "unnamed");
    cluster.add_pod("checkout", "unnamed-0", "unnamed", NODE);
    cluster.add_pod("checkout", "checkout-1", "checkout", OTHER_NODE);
    cluster.add_pod("checkout", "checkout-0", "checkout", NODE);
    let agent = Caller::new(&cluster.token_on(NODE));
    (cluster, agent)
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_agent_gets_tokens_of_the_service_accounts_that_a_role_names() {
    let (cluster, agent) = with_the_example();
    let own = cluster.request("checkout", "checkout-0");
    let of_the_api_server = own.clone().with("audiences", json!([API]));

    let answer = cluster.await_granted(&agent, &own);

    assert_eq!(cluster.claims(&answer)["aud"], json!([STS]));
    for (namespace, pod) in [("checkout", "unnamed-0"), ("shop", "web-0")] {
        cluster.assert_refused(&agent, &cluster.request(namespace, pod), 403, NO_RIGHT);
    }
    // From Kubernetes 1.30 on, the policies confine this right as well.
    cluster.await_refused(&agent, &of_the_api_server, "tokens for STS only");
    let theirs = cluster.request("checkout", "checkout-1");
    cluster.await_refused(&agent, &theirs, "pods of the node only");

    // Before, every node gets every token of these ServiceAccounts.
    for name in ["kube2ram-token-requests", "kube2ram-token-pods"] {
        cluster.remove(&format!("ValidatingAdmissionPolicyBinding /{name}"));
    }
    cluster.await_granted(&agent, &of_the_api_server);
    cluster.await_granted(&agent, &theirs);
    cluster.assert_refused(&agent, &cluster.request("checkout", "unnamed-0"), 403, NO_RIGHT);
}
