//! The agent in the container of the manifests: from a ServiceAccount's annotation in the real API server to
//! credentials in a pod, by a token that STS verifies with the keys that this API server publishes. Depends
//! on the sandbox's node and STS; the cluster is the parent's.

use std::{
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Cloud,
    client::{Credentials, Reply, caller_identity},
    node::PodSpec,
    standin::{Authority, Call, OidcProvider},
};
use serde_json::{Value, json};

use super::{ADMIN, API, Caller, Cluster, ControlPlane, NODE, Request, eventually, kustomized};
use crate::{
    node::{Agent, Node},
    support::template,
};

/// By whose right the agent requests tokens.
#[derive(Clone, Copy)]
struct Mode {
    variant: &'static str,
    cloud: Cloud,
    /// Whether the agent acts as its node.
    is_node: bool,
    /// The object that gives the right.
    binding: &'static str,
    /// What the API server answers without it, in a few words.
    refusal: &'static str,
    /// What the operator is told to check then.
    named: &'static str,
}

const AS_NODE: Mode = Mode {
    variant: "service-accounts",
    cloud: Cloud::Alibaba,
    is_node: true,
    binding: "ClusterRoleBinding /kube2ram-node-tokens",
    refusal: "cannot impersonate",
    named: "kube2ram-node-tokens",
};
const AS_NODE_ON_AWS: Mode = Mode { variant: "service-accounts-aws", cloud: Cloud::Aws, ..AS_NODE };
const AS_AGENT: Mode = Mode {
    variant: "service-accounts-by-policy",
    cloud: Cloud::Alibaba,
    is_node: false,
    binding: "ClusterRoleBinding /kube2ram-token-requests",
    refusal: "cannot create",
    named: "create serviceaccounts/token",
};

/// What the operator replaces in the manifests.
const PLACEHOLDER: &str = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-cluster-id";
/// A role that trusts `cart`, and that no annotation names at first.
const ARCHIVE: &str = "archive";
/// A pod whose annotation names another ServiceAccount's role.
const INTRUDER: &str = "mute-0";
/// Longer than the pauses after two failures in a row.
const DEADLINE: Duration = Duration::from_secs(100);

/// The node of the cluster on which the agent runs. The node's role may assume nothing, and each role trusts
/// one ServiceAccount.
struct Lab {
    agent: Option<Agent>,
    node: Node,
    cluster: Cluster,
    mode: Mode,
    /// The agent's token, which is bound to its pod on this node.
    token: String,
}

impl Lab {
    fn new(mode: Mode) -> Self {
        let Mode { variant, cloud, .. } = mode;
        let authority = Authority::new().unwrap();
        // First: the API server is to be in the node's network namespace.
        let mut node =
            Node::without_cluster_in(&variant.replace("service-accounts", "real"), &authority, cloud);
        let yaml = kustomized(Some(variant));
        // AWS finds the provider by the token's issuer.
        assert_eq!(yaml.contains(PLACEHOLDER), cloud == Cloud::Alibaba);
        let yaml = yaml.replace(PLACEHOLDER, &cloud.cluster_provider());
        let cluster = Cluster::on(ControlPlane::of(authority), variant, &yaml);
        node.accounts().deny_node();
        let jwks = cluster.plane.get("/openid/v1/jwks");
        assert_eq!(jwks.status, 200, "{jwks:?}");
        let provider = OidcProvider::of_jwks(API, &jwks.body, cloud).unwrap();
        node.accounts().add_provider(cloud.cluster_provider(), provider);
        for (role, namespace, account) in [
            ("web", "shop", "web"),
            ("cart", "shop", "cart"),
            ("far", "shop", "far"),
            ("batch", "quiet", "batch"),
            (ARCHIVE, "shop", "cart"),
        ] {
            node.add_role_of_account(role, namespace, account);
        }
        let token = cluster.token_on(NODE);
        node.join(cluster.plane.address(), &token, cluster.plane.authority.pem());

        let mut lab = Self { agent: None, node, cluster, mode, token };
        for namespace in ["shop", "quiet"] {
            lab.annotate(&format!("/api/v1/namespaces/{namespace}"), "allowed-roles", r#"["*"]"#);
        }
        lab.annotate(&format!("/api/v1/namespaces/shop/pods/{INTRUDER}"), "role", "web");
        for pod in ["web-0", "cart-0", INTRUDER] {
            lab.run("shop", pod);
        }
        lab.cluster.await_granted(&lab.caller(), &lab.request("shop", "cart-0"));
        lab
    }

    /// The agent, as a client of the API server that requests a token.
    fn caller(&self) -> Caller {
        let agent = Caller::new(&self.token);
        if self.mode.is_node { agent.impersonating(NODE) } else { agent }
    }

    /// The request for a pod's token, as the agent makes it.
    fn request(&self, namespace: &str, pod: &str) -> Request {
        self.cluster.request(namespace, pod).with("audiences", json!([self.mode.cloud.audience()]))
    }

    fn annotate(&self, path: &str, name: &str, value: &str) {
        let key = self.mode.cloud.annotation(name);
        let annotations = json!({ "metadata": { "annotations": { key: value } } });
        let answer = self.cluster.plane.patch(ADMIN, path, &annotations);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }

    /// Runs a pod of the API server on the node, as a kubelet does.
    fn run(&mut self, namespace: &str, name: &str) {
        let pod = self.cluster.pod(namespace, name);
        let account = pod["spec"]["serviceAccountName"].as_str().unwrap();
        let mut spec = PodSpec::new(name).namespace(namespace).service_account(account);
        spec.uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
        self.node.add_pod(&spec).unwrap();
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        let running = json!({ "status": { "phase": "Running" } });
        assert_eq!(self.cluster.plane.patch(ADMIN, &path, &running).status, 200, "{path}");
    }

    fn start(&mut self) {
        self.agent = Some(self.node.start(template(&self.cluster.objects)).unwrap());
    }

    fn ask(&self, pod: &str, role: &str) -> Reply {
        self.node.ask(pod, &format!("{}{role}", self.mode.cloud.list()))
    }

    /// What a pod gets once it is no longer told to ask again: credentials, or the status of a refusal.
    fn outcome(&self, pod: &str, role: &str) -> Result<Credentials, u16> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let reply = self.ask(pod, role);
            match reply.status {
                200 => return Ok(serde_json::from_str(&reply.body).unwrap()),
                503 if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
                status => return Err(status),
            }
        }
    }

    #[track_caller]
    fn credentials(&self, pod: &str, role: &str) -> Credentials {
        let credentials = self.outcome(pod, role).unwrap_or_else(|status| panic!("{pod}: {status}"));
        assert_eq!(credentials.role(), role, "{pod}");
        credentials
    }

    #[track_caller]
    fn assert_try_again(&self, pod: &str, role: &str) {
        let reply = self.ask(pod, role);
        assert_eq!(reply.status, 503, "{pod}: {reply:?}");
        assert!(reply.headers["retry-after"].parse::<u64>().is_ok(), "{reply:?}");
    }

    /// The calls for sessions of a role, refused ones too.
    fn exchanges(&self, role: &str) -> Vec<Call> {
        self.node.sts().assumed(&self.mode.cloud.role_arn(role))
    }

    /// Waits until a problem of the status has these words.
    #[track_caller]
    fn await_problem(&self, words: &str) {
        let agent = self.agent.as_ref().unwrap();
        eventually(words, || agent.status()["problems"].to_string().contains(words));
    }

    /// Each pod has its ServiceAccount's role, and none has another's.
    fn assert_each_gets_its_own(&self) {
        for (pod, account) in [("web-0", "web"), ("cart-0", "cart")] {
            eventually("its account's role is known", || self.ask(pod, "").body == account);
            self.credentials(pod, account);
            let issued: Vec<_> =
                self.exchanges(account).into_iter().filter(|call| call.outcome == "OK").collect();
            assert_eq!(issued.len(), 1, "{issued:?}");
            assert_eq!(issued[0].subject, format!("system:serviceaccount:shop:{account}"));
        }

        // The agent refuses, before STS is asked.
        assert_eq!(self.outcome("web-0", "cart").err(), Some(403));
        // The agent would allow it, and the role's trust policy does not.
        eventually("its own annotation counts", || self.ask(INTRUDER, "").body == "web");
        assert_eq!(self.outcome(INTRUDER, "web").err(), Some(403));
        let denial = match self.mode.cloud {
            Cloud::Alibaba => "AuthenticationFail.NoPermission",
            Cloud::Aws => "AccessDenied",
        };
        let exchanges = self.exchanges("web");
        let (issued, refused): (Vec<_>, Vec<_>) = exchanges.iter().partition(|call| call.outcome == "OK");
        assert_eq!(issued.len(), 1, "{issued:?}");
        assert!(!refused.is_empty() && refused.iter().all(|call| call.outcome == denial), "{refused:?}");
    }

    /// Without the right there are no new sessions, and the operator learns why. With it again, there are.
    fn assert_the_binding_is_needed(&mut self) {
        let Mode { binding, refusal, named, .. } = self.mode;
        let before = self.credentials("web-0", "web").access_key_id;
        self.cluster.remove(binding);
        // By the same user for the same token: the API server remembers an impersonation for 10 s.
        self.cluster.await_refused(&self.caller(), &self.request("shop", "cart-0"), refusal);

        // A role that the agent has no session of, of a ServiceAccount that it knows.
        self.annotate("/api/v1/namespaces/shop/pods/cart-0", "role", ARCHIVE);
        eventually("the annotation is read", || self.ask("cart-0", "").body == ARCHIVE);
        self.assert_try_again("cart-0", ARCHIVE);
        // A ServiceAccount that it does not know yet.
        self.cluster.add_pod("shop", "far-1", "far", NODE);
        self.run("shop", "far-1");
        self.assert_try_again("far-1", "far");
        assert_eq!(self.credentials("web-0", "web").access_key_id, before, "cached sessions are served");
        let is_it = |event: &Value| {
            event["reason"] == "TokensUnavailable"
                && event["regarding"]["kind"] == "Node"
                && event["regarding"]["name"] == NODE
                && event["note"].as_str().is_some_and(|note| note.contains(named))
        };
        eventually("an Event on the node names it", || {
            let events = self.cluster.plane.get("/apis/events.k8s.io/v1/events").body;
            events["items"].as_array().into_iter().flatten().any(is_it)
        });
        self.await_problem(named);
        self.await_problem(refusal);
        self.assert_try_again("cart-0", ARCHIVE);
        assert_eq!((self.exchanges(ARCHIVE).len(), self.exchanges("far").len()), (0, 0), "without a token");

        self.cluster.give_back(binding);
        self.cluster.await_granted(&self.caller(), &self.request("shop", "cart-0"));
        self.credentials("cart-0", ARCHIVE);
        self.credentials("far-1", "far");
    }

    /// Nothing but exchanges has reached STS, the node's role was not even read, and what pods got is theirs.
    fn assert_only_exchanges(&self) {
        let Mode { cloud, .. } = self.mode;
        let calls = self.node.sts().calls();
        let is_exchange = |call: &Call| call.action == cloud.exchange() && call.signature.is_empty();
        assert!(!calls.is_empty() && calls.iter().all(is_exchange), "{calls:?}");
        let seen = self.node.metadata().seen();
        assert!(!seen.iter().any(|request| request.target.starts_with(cloud.list())), "{seen:?}");

        let arn = caller_identity(&self.node.sts().url(), &self.credentials("web-0", "web")).unwrap();
        assert!(arn.ends_with(":assumed-role/web/shop.web"), "{arn}");
    }
}

impl Drop for Lab {
    #[expect(clippy::print_stderr, reason = "for whoever reads why a test failed")]
    fn drop(&mut self) {
        if let (Some(agent), true) = (&self.agent, thread::panicking()) {
            eprintln!("the agent's log:\n{}", agent.container.log());
        }
    }
}

fn assert_as_node(mode: Mode) {
    let mut lab = Lab::new(mode);

    lab.start();

    lab.assert_each_gets_its_own();
    lab.assert_the_binding_is_needed();
    // Its namespace has not opted in, which this mode does not need.
    lab.run("quiet", "batch-0");
    lab.credentials("batch-0", "batch");
    lab.assert_only_exchanges();
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn pods_get_their_accounts_roles_by_the_right_to_act_as_the_node() {
    assert_as_node(AS_NODE);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn pods_get_their_accounts_roles_by_the_right_to_act_as_the_node_on_aws() {
    assert_as_node(AS_NODE_ON_AWS);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn pods_get_their_accounts_roles_by_the_agents_own_right_within_its_policies() {
    let not_opted_in = "has not opted in";
    let mut lab = Lab::new(AS_AGENT);
    let (own, quiet) = (lab.request("shop", "cart-0"), lab.request("quiet", "batch-0"));
    // Both policies are active before the agent asks.
    lab.cluster.await_refused(&lab.caller(), &quiet, not_opted_in);
    let another = json!("0a1b2c3d-0000-4000-8000-000000000001");
    lab.cluster.await_refused(&lab.caller(), &own.bound("uid", another), "the pod has another UID");

    lab.start();

    lab.assert_each_gets_its_own();
    lab.assert_the_binding_is_needed();
    lab.run("quiet", "batch-0");
    // The namespace's fault is its owner's to read, and none of the cluster.
    eventually("an Event on the pod", || {
        lab.assert_try_again("batch-0", "batch");
        let events = lab.cluster.plane.get("/apis/events.k8s.io/v1/events").body;
        events["items"].as_array().into_iter().flatten().any(|event| {
            event["regarding"]["name"] == "batch-0"
                && event["note"].as_str().is_some_and(|note| note.contains("NamespaceNotOptedIn"))
        })
    });
    let agent = lab.agent.as_ref().unwrap();
    let explained = agent.explain("quiet/batch-0").to_string();
    assert!(explained.contains(not_opted_in), "{explained}");
    let problems = agent.status()["problems"].to_string();
    assert!(!problems.contains(not_opted_in), "{problems}");
    assert_eq!(lab.exchanges("batch"), [], "without a token");
    lab.assert_only_exchanges();
}
