//! A cluster of one node: a real API server with the manifests applied, and the sandbox's node with pods that
//! it knows. Used by `admission` and `rights`.

use kube2ram_sandbox::{Sandbox, node::PodSpec, standin::Authority};
use serde_json::{Value, json};

use super::{
    super::{
        node::{Agent, Node, PODS},
        support::{objects, template},
    },
    add_default_account, apply_all,
    control_plane::{ADMIN, ControlPlane, path_of},
    pod_of,
};

pub(super) const TAINT: &str = "kube2ram/agent-not-ready";

/// Gives a node the start-up taint and another, in the place of what it has: the API server itself puts
/// `not-ready` on each that is created.
pub(super) fn taint(plane: &ControlPlane, node: &str) {
    let taints = json!([{ "key": TAINT, "effect": "NoSchedule" }, { "key": "keep", "effect": "NoSchedule" }]);
    let path = format!("/api/v1/nodes/{node}");
    assert_eq!(plane.patch(ADMIN, &path, &json!({ "spec": { "taints": taints } })).status, 200);
}

/// A cluster of one node, with the manifests applied, and pods that the API server knows.
pub(super) struct Cluster {
    pub(super) node: Node,
    pub(super) plane: ControlPlane,
    yaml: String,
}

impl Cluster {
    pub(super) fn new(name: &str, yaml: String) -> Self {
        let authority = Authority::new().unwrap();
        // First: the API server is to be in the node's network namespace.
        let node = Node::without_cluster(name, &authority);
        let plane = ControlPlane::of(authority);
        apply_all(&plane, &yaml, name);
        for namespace in ["default", "kube-system"] {
            add_default_account(&plane, namespace);
        }
        let allowed =
            json!({ "metadata": { "annotations": { "ram.aliyuncs.com/allowed-roles": r#"["*-role"]"# } } });
        assert_eq!(plane.patch(ADMIN, "/api/v1/namespaces/default", &allowed).status, 200);
        for node in [Sandbox::NODE, "other-node"] {
            let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node } });
            assert_eq!(plane.post("/api/v1/nodes", &object).status, 201);
            taint(&plane, node);
        }
        let mut cluster = Self { node, plane, yaml };
        for pod in PODS {
            cluster.add(pod, &json!({ "ram.aliyuncs.com/role": format!("{pod}-role") }));
        }
        cluster
    }

    /// A pod, first in the API server, whose UID is its cgroup's.
    pub(super) fn add(&mut self, name: &str, annotations: &Value) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "default", "annotations": annotations },
            "spec": {
                "nodeName": Sandbox::NODE, "hostNetwork": name == "daemon",
                "tolerations": [{ "operator": "Exists" }], "containers": [{ "name": "app", "image": "app:1" }],
            },
        });
        let created = self.plane.post("/api/v1/namespaces/default/pods", &pod);
        assert_eq!(created.status, 201, "{created:?}");
        let status = json!({ "status": { "phase": "Running" } });
        let path = format!("/api/v1/namespaces/default/pods/{name}/status");
        assert_eq!(self.plane.patch(ADMIN, &path, &status).status, 200);
        let mut spec = PodSpec::new(name);
        spec.uid = created.body["metadata"]["uid"].as_str().unwrap().to_owned();
        self.node.add(name, spec);
    }

    /// Starts the agent as its service account, with a token that is bound to its pod on this node.
    pub(super) fn start(&mut self) -> Result<Agent, String> {
        let mut agent = self.spawn()?;
        agent.await_ready()?;
        Ok(agent)
    }

    /// The same, but does not wait until it is ready.
    pub(super) fn spawn(&mut self) -> Result<Agent, String> {
        let token = self.bound_token();
        let authority = self.plane.authority.pem().to_owned();
        self.node.join(self.plane.address(), &token, &authority);
        let template = template(&objects(&self.yaml)).clone();
        self.node.spawn(&template)
    }

    pub(super) fn bound_token(&self) -> String {
        let daemon_set = objects(&self.yaml)["DaemonSet kube-system/kube2ram"].clone();
        let mut pod = pod_of(&daemon_set).unwrap();
        pod["spec"]["nodeName"] = Sandbox::NODE.into();
        let path = path_of(&pod);
        if self.plane.get(&path).status == 404 {
            let created = self.plane.post("/api/v1/namespaces/kube-system/pods", &pod);
            assert_eq!(created.status, 201, "{created:?}");
        }
        self.plane.token("kube2ram", Some(&self.plane.get(&path).body))
    }

    pub(super) fn events(&self) -> Vec<Value> {
        let answer = self.plane.get("/apis/events.k8s.io/v1/events");
        let mut events = answer.body["items"].as_array().unwrap().clone();
        // The API server itself writes some, whenever it repairs the addresses of Services.
        events.retain(|event| event["reportingController"] == "kube2ram");
        events
    }

    pub(super) fn taints(&self, node: &str) -> Vec<String> {
        let node = self.plane.get(&format!("/api/v1/nodes/{node}")).body;
        let taints = node["spec"]["taints"].as_array().into_iter().flatten();
        taints.map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    }

    /// The manifest's ClusterRole without one verb.
    pub(super) fn take_away(&self, resource: &str, verb: &str) {
        let mut role = objects(&self.yaml)["ClusterRole /kube2ram"].clone();
        let rules = role["rules"].as_array_mut().unwrap();
        let rule = rules.iter_mut().find(|rule| rule["resources"] == json!([resource])).unwrap();
        let verbs = rule["verbs"].as_array_mut().unwrap();
        let before = verbs.len();
        verbs.retain(|known| known != verb);
        assert_eq!(verbs.len() + 1, before, "{verb} {resource} is not granted");
        if verbs.is_empty() {
            rules.retain(|rule| rule["resources"] != json!([resource]));
        }
        assert_eq!(self.plane.apply(&role).status, 200);
    }

    pub(super) fn give_back(&self) {
        assert_eq!(self.plane.apply(&objects(&self.yaml)["ClusterRole /kube2ram"]).status, 200);
    }
}
