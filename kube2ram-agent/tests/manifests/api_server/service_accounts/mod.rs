//! Tokens of pods' ServiceAccounts on a real API server, with the rights of each mode of the manifests: what
//! an agent gets, what it is refused, what root on a node gets, and what pods get from an agent that runs.

mod agent;
mod as_node;
mod by_namespace;
mod by_policy;
mod root;

use kube2ram_sandbox::{Sandbox, control_plane::ControlPlane as Processes, jwks, standin::Authority};
use serde_json::{Value, json};

use super::{
    super::{
        node::eventually,
        support::{Objects, kustomized, objects},
    },
    apply_all,
    control_plane::{ADMIN, Answer, ControlPlane, path_of},
    pod_of,
};

/// The audience of STS, as the manifests have it.
const STS: &str = "sts.aliyuncs.com";
/// The API server's own audience, which is its issuer.
const API: &str = "https://kubernetes.default.svc";
const KUBELET: &str = Processes::KUBELET;
const NODE: &str = Sandbox::NODE;
const OTHER_NODE: &str = "other-node";
const AGENT: &str = "system:serviceaccount:kube-system:kube2ram";
const OPT_IN: &str = "kube2ram/service-account-tokens";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Namespace, name, ServiceAccount and node. The API server's cache gets them in this order, so it has all
/// of them when a token of the last one is granted.
const PODS: [(&str, &str, &str, &str); 8] = [
    ("shop", "web-1", "web", OTHER_NODE),
    ("shop", "far-0", "far", OTHER_NODE),
    ("quiet", "away-0", "away", OTHER_NODE),
    ("kube-system", "controller-0", "controller", OTHER_NODE),
    ("quiet", "batch-0", "batch", NODE),
    ("shop", "mute-0", "mute", NODE),
    ("shop", "web-0", "web", NODE),
    ("shop", "cart-0", "cart", NODE),
];

/// Two nodes with an agent and pods on each. Of the namespaces, `shop` and `empty` have opted in.
struct Cluster {
    plane: ControlPlane,
    objects: Objects,
}

/// Who sends a request: a token, and whom it impersonates.
#[derive(Clone)]
struct Caller(Vec<(&'static str, String)>);

/// A TokenRequest.
#[derive(Clone)]
struct Request {
    namespace: String,
    account: String,
    spec: Value,
}

impl Cluster {
    /// With the manifests of an overlay.
    fn new(variant: &str) -> Self {
        Self::with_flags(variant, &[])
    }

    /// The same, with more flags of the API server.
    fn with_flags(variant: &str, flags: &[String]) -> Self {
        let plane = ControlPlane::with_flags(Authority::new().unwrap(), flags);
        Self::on(plane, variant, &kustomized(Some(variant)))
    }

    /// The same on an API server that runs, with an overlay as an operator has adapted it.
    fn on(plane: ControlPlane, variant: &str, yaml: &str) -> Self {
        apply_all(&plane, yaml, variant);
        let cluster = Self { plane, objects: objects(yaml) };
        for node in [NODE, OTHER_NODE] {
            cluster.add(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node } }));
            let mut agent = pod_of(&cluster.objects["DaemonSet kube-system/kube2ram"]).unwrap();
            agent["metadata"]["name"] = agent_on(node).into();
            agent["spec"]["nodeName"] = node.into();
            cluster.add(&agent);
        }
        for (namespace, labels) in
            [("shop", json!({ OPT_IN: "true" })), ("empty", json!({ OPT_IN: "true" })), ("quiet", json!({}))]
        {
            let metadata = json!({ "name": namespace, "labels": labels });
            cluster.add(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }));
        }
        cluster.add_account("empty", "lonely");
        for (namespace, name, account, node) in PODS {
            cluster.add_account(namespace, account);
            cluster.add_pod(namespace, name, account, node);
        }
        cluster
    }

    /// Applies what may be there already.
    fn add(&self, object: &Value) {
        let answer = self.plane.apply(object);
        assert!([200, 201].contains(&answer.status), "{}: {answer:?}", path_of(object));
    }

    fn add_account(&self, namespace: &str, name: &str) {
        // Of either cloud.
        let annotations = json!({ "ram.aliyuncs.com/role": name, "iam.amazonaws.com/role": name });
        let metadata = json!({ "name": name, "namespace": namespace, "annotations": annotations });
        self.add(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata }));
    }

    /// `mute` is without a token of the API server in its volumes.
    fn add_pod(&self, namespace: &str, name: &str, account: &str, node: &str) {
        self.add(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "serviceAccountName": account, "nodeName": node,
                "automountServiceAccountToken": account != "mute",
                "containers": [{ "name": "app", "image": "app:1" }],
            },
        }));
    }

    fn pod(&self, namespace: &str, name: &str) -> Value {
        let answer = self.plane.get(&format!("/api/v1/namespaces/{namespace}/pods/{name}"));
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    /// The token that the kubelet of a node mounts into its agent.
    fn token_on(&self, node: &str) -> String {
        self.plane.token("kube2ram", Some(&self.pod("kube-system", &agent_on(node))))
    }

    /// The request for a pod's token, as the agent makes it.
    fn request(&self, namespace: &str, pod: &str) -> Request {
        let pod = self.pod(namespace, pod);
        let metadata = &pod["metadata"];
        Request {
            namespace: namespace.to_owned(),
            account: pod["spec"]["serviceAccountName"].as_str().unwrap().to_owned(),
            spec: json!({
                "audiences": [STS],
                "expirationSeconds": 600,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"],
                },
            }),
        }
    }

    /// A token of the agent's own ServiceAccount that names another node (kubernetes/kubernetes#121723).
    fn forgery(&self) -> Request {
        let node = self.plane.get(&format!("/api/v1/nodes/{OTHER_NODE}")).body;
        let uid = &node["metadata"]["uid"];
        Request {
            namespace: "kube-system".to_owned(),
            account: "kube2ram".to_owned(),
            spec: json!({
                "audiences": [API],
                "expirationSeconds": 600,
                "boundObjectRef": { "apiVersion": "v1", "kind": "Node", "name": OTHER_NODE, "uid": uid },
            }),
        }
    }

    fn ask(&self, caller: &Caller, request: &Request) -> Answer {
        let Request { namespace, account, spec } = request;
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let body = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
        self.plane.send(&caller.0, "POST", &path, &body)
    }

    /// Rights, policies and pods are active a little after they were applied.
    fn await_granted(&self, caller: &Caller, request: &Request) -> Answer {
        let mut last = None;
        eventually("a token", || {
            let answer = self.ask(caller, request);
            let is_granted = answer.status == 201;
            last = Some(answer);
            is_granted
        });
        last.unwrap()
    }

    fn await_refused(&self, caller: &Caller, request: &Request, reason: &str) {
        eventually(reason, || {
            let answer = self.ask(caller, request);
            answer.status == 403 && message(&answer).contains(reason)
        });
    }

    fn assert_refused(&self, caller: &Caller, request: &Request, status: u16, reason: &str) {
        let answer = self.ask(caller, request);
        assert!(
            answer.status == status && message(&answer).contains(reason),
            "{status} {reason}: {} {}/{}: {answer:?}",
            request.spec,
            request.namespace,
            request.account
        );
    }

    /// The claims of the token in an answer, which the API server's published keys vouch for.
    fn claims(&self, answer: &Answer) -> Value {
        let keys = self.plane.get("/openid/v1/jwks");
        assert_eq!(keys.status, 200, "{keys:?}");
        jwks::verified_claims(token_of(answer), &keys.body).unwrap()
    }

    /// As which user, with which extras, the API server knows a token.
    fn user(&self, token: &str) -> Value {
        let review = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview" });
        let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        let answer = self.plane.request(token, "POST", path, "application/json", &review);
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.body["status"]["userInfo"].clone()
    }

    fn remove(&self, name: &str) {
        let answer = self.plane.delete(&path_of(&self.objects[name]));
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
    }

    fn give_back(&self, name: &str) {
        self.add(&self.objects[name]);
    }
}

impl Caller {
    fn new(token: &str) -> Self {
        let content = ("Content-Type", "application/json".to_owned());
        Self(vec![("Authorization", format!("Bearer {token}")), content])
    }

    fn with(mut self, header: &'static str, value: &str) -> Self {
        self.0.push((header, value.to_owned()));
        self
    }

    /// As the agent acts as its node.
    fn impersonating(self, node: &str) -> Self {
        self.with("Impersonate-User", &format!("system:node:{node}"))
    }
}

impl Request {
    fn with(mut self, field: &str, value: Value) -> Self {
        self.spec[field] = value;
        self
    }

    fn bound(mut self, field: &str, value: Value) -> Self {
        self.spec["boundObjectRef"][field] = value;
        self
    }

    fn of(self, namespace: &str, account: &str) -> Self {
        Self { namespace: namespace.to_owned(), account: account.to_owned(), ..self }
    }
}

fn agent_on(node: &str) -> String {
    format!("kube2ram-on-{node}")
}

/// Why a request was refused.
fn message(answer: &Answer) -> &str {
    answer.body["message"].as_str().unwrap_or_default()
}

fn token_of(answer: &Answer) -> &str {
    answer.body["status"]["token"].as_str().unwrap_or_else(|| panic!("{answer:?}"))
}
