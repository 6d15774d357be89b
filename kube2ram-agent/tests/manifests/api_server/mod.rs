//! Against a real API server (`cargo xtask test --api-server`): what it says of every manifest, that the agent's rights are enough, and that each is
//! needed.

mod control_plane;

use std::fs;

use kube2ram_sandbox::{Sandbox, node::PodSpec};
use serde_json::{Value, json};

use self::control_plane::{ADMIN, ControlPlane, path_of};
use super::{
    node::{Agent, LIST, Node, PODS, eventually},
    support::{VARIANTS, charted, deploy, kustomized, objects, parse, single_file, template},
};

const TENANT: &str = "tenant-token";
const TAINT: &str = "kube2ram/agent-not-ready";

fn apply_all(plane: &ControlPlane, yaml: &str, what: &str) {
    for object in parse(yaml) {
        let answer = plane.apply(&object);

        assert!([200, 201].contains(&answer.status), "{what}, {}: {answer:?}", path_of(&object));
        assert!(answer.warnings.is_empty(), "{what}, {}: {:?}", path_of(&object), answer.warnings);
    }
}

/// A Pod of a template, as its controller would create it.
fn pod_of(object: &Value) -> Option<Value> {
    let spec = &object["spec"];
    let template =
        [&spec["template"], &spec["jobTemplate"]["spec"]["template"]].into_iter().find(|t| !t.is_null())?;
    let mut pod = template.clone();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = format!("{}-pod", object["metadata"]["name"].as_str()?).into();
    pod["metadata"]["namespace"] = object["metadata"]["namespace"].clone();
    Some(pod)
}

fn add_default_account(plane: &ControlPlane, namespace: &str) {
    let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "default", "namespace": namespace } });
    assert!(plane.apply(&account).status < 300);
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn it_takes_every_manifest_without_a_warning() {
    let plane = ControlPlane::start();

    apply_all(&plane, &single_file(), "kube2ram.yaml");
    apply_all(&plane, &charted(&[]), "the chart");
    for variant in VARIANTS {
        apply_all(&plane, &kustomized(Some(variant)), variant);
        apply_all(&plane, &charted(&[variant]), variant);
    }

    // The twins: it does look.
    let mut daemon_set = objects(&single_file())["DaemonSet kube-system/kube2ram"].clone();
    daemon_set["spec"]["template"]["spec"]["hostPid"] = true.into();
    let refused = plane.apply(&daemon_set);
    assert!(refused.status >= 400 && refused.body["message"].to_string().contains("hostPid"), "{refused:?}");
    daemon_set["spec"]["template"]["spec"].as_object_mut().unwrap().remove("hostPid");
    daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] =
        json!(["CAP_SYS_ADMIN"]);
    let refused = plane.apply(&daemon_set);
    assert!(refused.body["message"].to_string().contains("allowPrivilegeEscalation"), "{refused:?}");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn pod_security_admits_the_agent_where_its_namespace_is_privileged_and_every_example() {
    let plane = ControlPlane::start();
    apply_all(&plane, &single_file(), "kube2ram.yaml");
    let daemon_set = objects(&single_file())["DaemonSet kube-system/kube2ram"].clone();
    for (level, admitted) in [("privileged", true), ("baseline", false)] {
        let labels = json!({ "metadata": { "labels": { "pod-security.kubernetes.io/enforce": level } } });
        assert_eq!(plane.patch(ADMIN, "/api/v1/namespaces/kube-system", &labels).status, 200);

        let pod = pod_of(&daemon_set).unwrap();
        let answer = plane.apply(&pod);

        assert_eq!(answer.status < 300, admitted, "{level}: {answer:?}");
        assert!(answer.warnings.is_empty(), "{answer:?}");
        if admitted {
            assert_eq!(answer.body["spec"]["priority"], 2_000_001_000, "system-node-critical");
            plane.delete(&path_of(&pod));
        } else {
            assert!(answer.body["message"].to_string().contains("host namespaces"), "{answer:?}");
        }
    }

    let mut files: Vec<_> =
        fs::read_dir(deploy().join("examples")).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The Deployment's namespace is the CronJob's too.
    files.sort_by_key(|path| !path.ends_with("deployment.yaml"));
    for path in files {
        let yaml = fs::read_to_string(&path).unwrap();
        apply_all(&plane, &yaml, &path.display().to_string());
        for object in parse(&yaml) {
            if let Some(pod) = pod_of(&object) {
                add_default_account(&plane, pod["metadata"]["namespace"].as_str().unwrap());
                let answer = plane.apply(&pod);
                assert!(answer.status < 300 && answer.warnings.is_empty(), "{}: {answer:?}", path.display());
            }
        }
    }
}

/// A cluster of one node, with the manifests applied, and pods that the API server knows.
struct Cluster {
    node: Node,
    plane: ControlPlane,
    yaml: String,
}

impl Cluster {
    fn new(name: &str, yaml: String) -> Self {
        let plane = ControlPlane::start();
        apply_all(&plane, &yaml, name);
        for namespace in ["default", "kube-system"] {
            add_default_account(&plane, namespace);
        }
        let allowed =
            json!({ "metadata": { "annotations": { "ram.aliyuncs.com/allowed-roles": r#"["*-role"]"# } } });
        assert_eq!(plane.patch(ADMIN, "/api/v1/namespaces/default", &allowed).status, 200);
        for node in [Sandbox::NODE, "other-node"] {
            let taints =
                json!([{ "key": TAINT, "effect": "NoSchedule" }, { "key": "keep", "effect": "NoSchedule" }]);
            let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node }, "spec": { "taints": taints } });
            assert_eq!(plane.post("/api/v1/nodes", &object).status, 201);
        }
        let node = Node::without_cluster(name, &plane.authority);
        let mut cluster = Self { node, plane, yaml };
        for pod in PODS {
            cluster.add(pod, &json!({ "ram.aliyuncs.com/role": format!("{pod}-role") }));
        }
        cluster
    }

    /// A pod, first in the API server, whose UID is its cgroup's.
    fn add(&mut self, name: &str, annotations: &Value) {
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

    fn template(&self) -> Value {
        template(&objects(&self.yaml)).clone()
    }

    /// Starts the agent as its service account, with a token that is bound to its pod on this node.
    fn start(&mut self) -> Result<Agent, String> {
        let token = self.bound_token();
        let authority = self.plane.authority.pem().to_owned();
        self.node.join(self.plane.address(), &token, &authority);
        let template = self.template();
        self.node.start(&template)
    }

    fn bound_token(&self) -> String {
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

    fn events(&self) -> Vec<Value> {
        let answer = self.plane.get("/apis/events.k8s.io/v1/events");
        answer.body["items"].as_array().unwrap().clone()
    }

    fn taints(&self, node: &str) -> Vec<String> {
        let node = self.plane.get(&format!("/api/v1/nodes/{node}")).body;
        let taints = node["spec"]["taints"].as_array().into_iter().flatten();
        taints.map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    }

    fn taint_again(&self) {
        let taints =
            json!([{ "key": TAINT, "effect": "NoSchedule" }, { "key": "keep", "effect": "NoSchedule" }]);
        let path = format!("/api/v1/nodes/{}", Sandbox::NODE);
        assert_eq!(self.plane.patch(ADMIN, &path, &json!({ "spec": { "taints": taints } })).status, 200);
    }

    /// The manifest's ClusterRole without one verb.
    fn take_away(&self, resource: &str, verb: &str) {
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

    fn give_back(&self) {
        assert_eq!(self.plane.apply(&objects(&self.yaml)["ClusterRole /kube2ram"]).status, 200);
    }
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn the_service_accounts_rights_are_enough() {
    let mut cluster = Cluster::new("rbac-enough", kustomized(Some("startup-taint")));
    cluster.add("greedy", &json!({ "ram.aliyuncs.com/role": "not-allowed" }));

    let agent = cluster.start().unwrap();

    assert_eq!((agent.ready().unwrap().as_str(), agent.live()), ("ready", 200));
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
        let mut agent = start_without_waiting(&mut cluster);
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
        let mut agent = start_without_waiting(&mut cluster);
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
        cluster.taint_again();
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

fn start_without_waiting(cluster: &mut Cluster) -> Agent {
    let token = cluster.bound_token();
    let authority = cluster.plane.authority.pem().to_owned();
    cluster.node.join(cluster.plane.address(), &token, &authority);
    let template = cluster.template();
    cluster.node.spawn(&template).unwrap()
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
    // A policy is in force a little after it was applied.
    eventually("the policy", || {
        plane.patch(&token, &own, &json!({ "metadata": { "labels": { "probe": "1" } } })).status != 200
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
        "rules": [{ "apiGroups": [""], "resources": ["namespaces"], "verbs": ["create", "get", "patch"] }],
    });
    assert_eq!(plane.apply(&role).status, 201);
    bind("namespaces");
    let annotate = |value: &str| {
        let change = json!({ "metadata": { "annotations": { "ram.aliyuncs.com/allowed-roles": value } } });
        plane.patch(TENANT, "/api/v1/namespaces/default", &change)
    };

    // Both the role and the policy are in force a little after they were applied; until then the annotation may get written, and what it is already
    // is no change.
    let mut attempt = 0;
    eventually("the policy", || {
        attempt += 1;
        let answer = annotate(&format!(r#"["{attempt}-*"]"#));
        answer.status == 403 && answer.body["message"].to_string().contains("allow-ram-roles")
    });
    let label = json!({ "metadata": { "labels": { "team": "a" } } });
    assert_eq!(
        plane.patch(TENANT, "/api/v1/namespaces/default", &label).status,
        200,
        "else they may do what they may"
    );
    let made = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "mine", "annotations": { "ram.aliyuncs.com/allowed-roles": r#"["*"]"# } },
    });
    let created = plane.request(TENANT, "POST", "/api/v1/namespaces", "application/json", &made);
    assert_eq!(created.status, 403, "{created:?}");
    assert!(created.body["message"].as_str().unwrap().contains("allow-ram-roles"), "{created:?}");

    bind("kube2ram-allow-lists");
    eventually("the right", || annotate(r#"["a-*"]"#).status == 200);
    assert_eq!(plane.request(TENANT, "POST", "/api/v1/namespaces", "application/json", &made).status, 201);
}
