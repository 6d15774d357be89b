//! What root on a node gets. Each request of a list is made under each scheme, once with the token of the
//! node's agent, and once with the kubelet's credentials. docs/service-accounts.md has the table.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{Caller, Cluster, KUBELET, NODE, Request, agent_on, eventually, kustomized, objects};

const ATTEMPTS: [&str; 7] = [
    "for STS, of a pod here",
    "for STS, of a pod here whose namespace has not opted in",
    "for STS, of a pod of another node",
    "for STS, of a pod of another node whose namespace has not opted in",
    "for the API server, of a pod here",
    "for the API server, of a pod of another node",
    "of the agent, that names another node",
];
const NONE: [bool; ATTEMPTS.len()] = [false; ATTEMPTS.len()];
/// What the kubelet mounts into the pods that it runs.
const KUBELETS: [bool; ATTEMPTS.len()] = [false, false, false, false, true, false, false];

fn attempts(cluster: &Cluster) -> [Request; ATTEMPTS.len()] {
    let for_the_api_server = |pod: Request| pod.with("audiences", json!([]));
    [
        cluster.request("shop", "web-0"),
        cluster.request("quiet", "batch-0"),
        cluster.request("shop", "far-0"),
        cluster.request("quiet", "away-0"),
        for_the_api_server(cluster.request("shop", "web-0")),
        for_the_api_server(cluster.request("kube-system", "controller-0")),
        cluster.forgery(),
    ]
}

/// The row of a scheme: what the agent's token gets, and what the kubelet's credentials get, once rights and
/// policies are active.
fn assert_row(
    cluster: &Cluster,
    scheme: &str,
    agents: [bool; ATTEMPTS.len()],
    kubelets: [bool; ATTEMPTS.len()],
) {
    let token = cluster.token_on(NODE);
    let agent = [Caller::new(&token), Caller::new(&token).impersonating(NODE)];
    let kubelet = [Caller::new(KUBELET)];
    let attempts = attempts(cluster);
    let gets = |callers: &[Caller]| {
        let is_granted =
            |request: &Request| callers.iter().any(|caller| cluster.ask(caller, request).status == 201);
        attempts.each_ref().map(is_granted)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = (gets(&agent), gets(&kubelet));
        if found == (agents, kubelets) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{scheme}: {found:?} in place of {agents:?}, {kubelets:?} of {ATTEMPTS:#?}"
        );
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn root_on_a_node_gets_what_the_table_has() {
    // Constrained impersonation: what the kubelet gets, and one more audience.
    let cluster = Cluster::new("service-accounts");
    let of_pods_here = [true, true, false, false, true, false, false];
    assert_row(&cluster, "tokenRequests: node", of_pods_here, of_pods_here);

    // The agent has no right at all.
    cluster.remove("ClusterRoleBinding /kube2ram-node-tokens");
    cluster.remove("ClusterRoleBinding /kube2ram-audience");
    assert_row(&cluster, "credentialsFrom: node", NONE, KUBELETS);

    // Never shipped: the right alone.
    let policies = objects(&kustomized(Some("service-accounts-by-policy")));
    for name in ["ClusterRole /kube2ram-token-requests", "ClusterRoleBinding /kube2ram-token-requests"] {
        cluster.add(&policies[name]);
    }
    assert_row(&cluster, "the right alone", [true; ATTEMPTS.len()], KUBELETS);

    // Nor this: with one of its policies.
    for name in [
        "ValidatingAdmissionPolicy /kube2ram-token-pods",
        "ValidatingAdmissionPolicy /kube2ram-token-requests",
        "ValidatingAdmissionPolicyBinding /kube2ram-token-requests",
    ] {
        cluster.add(&policies[name]);
    }
    let opted_in = [true, false, true, false, false, false, false];
    assert_row(&cluster, "the first policy", opted_in, KUBELETS);

    cluster.add(&policies["ValidatingAdmissionPolicyBinding /kube2ram-token-pods"]);
    let opted_in_here = [true, false, false, false, false, false, false];
    assert_row(&cluster, "tokenRequests: agent", opted_in_here, KUBELETS);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn an_agents_token_ends_with_its_pod() {
    for variant in ["service-accounts", "service-accounts-by-policy"] {
        let cluster = Cluster::new(variant);
        let token = cluster.token_on(NODE);
        let agent = match variant {
            "service-accounts" => Caller::new(&token).impersonating(NODE),
            _ => Caller::new(&token),
        };
        let own = cluster.request("shop", "web-0");
        let minted = cluster.await_granted(&agent, &own);

        let path = format!("/api/v1/namespaces/kube-system/pods/{}", agent_on(NODE));
        assert_eq!(cluster.plane.delete(&path).status, 200);

        // The API server remembers a token for 10 s.
        eventually("its token is refused", || cluster.ask(&agent, &own).status == 401);
        // STS sees the signature and the lifetime only, so it accepts what was issued before.
        let claims = cluster.claims(&minted);
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 600);
    }
}
