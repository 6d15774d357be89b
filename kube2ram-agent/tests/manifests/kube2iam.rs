//! Rung 2: kube2iam's published DaemonSets with kube2ram's image for them, and with nothing else than
//! deploy/kustomize/kube2iam adds. They are written down here by what reaches the pod: arguments, variables,
//! security context, probes.
//!
//! The sandbox injects what stands for a node, a cluster and a cloud: directories of the host, the names of
//! STS, a host name, and a pod on the host's network, which each node has. From the machine that runs the
//! tests it must keep the variable `KUBE2RAM_METADATA_ADDR`: it may be one of another cloud.

use std::fs;

use kube2ram_sandbox::{
    Cloud, Sandbox,
    client::{Credentials, caller_identity},
};
use serde_json::{Value, json};

use super::{
    node::{Node, PODS, eventually},
    support::{deploy, kustomize, objects, parse, single_file, template},
};

/// The account of the sandbox, which README.md writes out or leaves to its reader.
const BASE: &str = "--base-role-arn=arn:aws:iam::123456789012:role/";

/// README.md at 75ba9b4, in its order, and what `helm template` renders of the chart at 39fc48d without a
/// value.
fn published() -> [(&'static str, Value); 5] {
    let privileged = || json!({ "securityContext": { "privileged": true } });
    let health = |delay: u32| {
        json!({
            "httpGet": { "path": "/healthz", "port": 8181, "scheme": "HTTP" }, "initialDelaySeconds": delay,
            "periodSeconds": 5, "successThreshold": 1, "failureThreshold": 3, "timeoutSeconds": 1,
        })
    };
    // The image has no shell: the hook fails, and the container ends all the same.
    let hook = ["/bin/sh", "-c", "iptables-save"];
    let of_chart = json!({
        "livenessProbe": health(30), "readinessProbe": health(0),
        "lifecycle": { "preStop": { "exec": { "command": hook } } },
    });
    [
        (
            "first",
            daemon_set("jtblin/kube2iam:latest", &[BASE, "--node=$(NODE_NAME)"], &[NODE_NAME], json!({})),
        ),
        (
            "iptables",
            daemon_set(
                "jtblin/kube2iam:latest",
                &[BASE, "--iptables=true", "--host-ip=$(HOST_IP)", "--node=$(NODE_NAME)"],
                &[HOST_IP, NODE_NAME],
                privileged(),
            ),
        ),
        (
            "rbac",
            daemon_set(
                "jtblin/kube2iam:latest",
                &[
                    "--app-port=8181",
                    BASE,
                    "--iptables=true",
                    "--host-ip=$(HOST_IP)",
                    "--host-interface=weave",
                    "--verbose",
                ],
                &[HOST_IP],
                privileged(),
            ),
        ),
        (
            "openshift",
            daemon_set(
                "docker.io/jtblin/kube2iam:latest",
                &[
                    "--app-port=8181",
                    "--auto-discover-base-arn",
                    "--iptables=true",
                    "--host-ip=$(HOST_IP)",
                    "--host-interface=tun0",
                    "--verbose",
                ],
                &[HOST_IP],
                privileged(),
            ),
        ),
        (
            "chart",
            daemon_set(
                "jtblin/kube2iam:0.13.0",
                &[
                    "--host-interface=docker0",
                    "--node=$(NODE_NAME)",
                    "--iptables=false",
                    "--app-port=8181",
                    "--metrics-port=8181",
                ],
                &[HOST_IP, NODE_NAME],
                of_chart,
            ),
        ),
    ]
}

const HOST_IP: (&str, &str) = ("HOST_IP", "status.podIP");
const NODE_NAME: (&str, &str) = ("NODE_NAME", "spec.nodeName");

fn daemon_set(image: &str, args: &[&str], fields: &[(&str, &str)], more: Value) -> Value {
    let env = fields
        .iter()
        .map(|(name, path)| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } }));
    let mut container = json!({
        "name": "kube2iam", "image": image, "args": args, "env": env.collect::<Vec<_>>(),
        "ports": [{ "name": "http", "containerPort": 8181, "hostPort": 8181 }],
    });
    let Value::Object(more) = more else { panic!("{more}") };
    container.as_object_mut().unwrap().extend(more);
    let labels = json!({ "name": "kube2iam" });
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": { "name": "kube2iam", "namespace": "kube-system" },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": { "serviceAccountName": "kube2iam", "hostNetwork": true, "containers": [container] },
            },
        },
    })
}

fn pod_of(daemon_set: &Value) -> Value {
    daemon_set["spec"]["template"]["spec"].clone()
}

/// The pod's template as kustomize makes it of the DaemonSet and the component.
fn patched(daemon_set: &Value) -> Value {
    let directory = tempfile::tempdir().unwrap();
    // kustomize takes relative paths only, from where the directory really is.
    let place = directory.path().canonicalize().unwrap();
    let up = "../".repeat(place.components().count() - 1);
    let component = deploy().join("kustomize/kube2iam");
    let component = component.strip_prefix("/").unwrap().display();
    fs::write(place.join("kube2iam.yaml"), daemon_set.to_string()).unwrap();
    let text = format!("resources: [kube2iam.yaml]\ncomponents: [{up}{component}]\n");
    fs::write(place.join("kustomization.yaml"), text).unwrap();
    let patched = parse(&kustomize(&place).unwrap());
    assert_eq!(patched.len(), 1, "{patched:?}");
    pod_of(&patched[0])
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_patch_for_kube2iams_manifests_adds_what_the_agents_own_has_and_changes_no_argument() {
    let own = template(&objects(&single_file())).clone();
    let by_name = |list: &Value| {
        let mut list = list.as_array().unwrap().clone();
        list.sort_by_key(|item| item["name"].as_str().unwrap().to_owned());
        list
    };
    for (name, published) in published() {
        let (before, after) = (pod_of(&published), patched(&published));

        let image = format!("kube2ram-as-kube2iam:{}", env!("CARGO_PKG_VERSION"));
        assert_eq!(after["containers"][0]["image"], image, "{name}");
        for field in ["args", "env", "ports", "livenessProbe", "readinessProbe", "lifecycle", "command"] {
            assert_eq!(after["containers"][0][field], before["containers"][0][field], "{name}: {field}");
        }
        let privileged = |pod: &Value| pod["containers"][0]["securityContext"]["privileged"].clone();
        assert_eq!(privileged(&after), privileged(&before), "{name}");
        assert_eq!(after["hostPID"], own["hostPID"], "{name}");
        assert_eq!(by_name(&after["volumes"]), by_name(&own["volumes"]), "{name}");
        let (one, other) = (&after["containers"][0], &own["containers"][0]);
        assert_eq!(by_name(&one["volumeMounts"]), by_name(&other["volumeMounts"]), "{name}");
        let (one, other) = (&one["securityContext"], &other["securityContext"]);
        assert_eq!(one["capabilities"]["add"], other["capabilities"]["add"], "{name}");
        for field in ["appArmorProfile", "seLinuxOptions"] {
            assert_eq!(one[field], other[field], "{name}: {field}");
        }
    }
}

/// A node of AWS with the image for kube2iam's manifests, and a pod on its network, as kube-proxy is.
fn node(name: &str) -> Node {
    let mut node = Node::new_in(&format!("kube2iam-{name}"), Cloud::Aws);
    node.take_image_for_kube2iam();
    node.surroundings.host_name = Sandbox::NODE.to_owned();
    node.apply_host_pod().unwrap();
    node
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn kube2iams_published_manifests_start_it_with_the_image_and_the_patch() {
    for (name, published) in published() {
        let mut node = node(name);
        if name == "chart" {
            // Without a base ARN, kube2iam takes ARNs only.
            for pod in PODS {
                let role = Cloud::Aws.role_arn(&format!("{pod}-role"));
                node.annotate(pod, &Cloud::Aws.annotation("role"), &role).unwrap();
            }
        }

        let mut agent = node.spawn(&patched(&published)).unwrap();
        agent.await_serving().unwrap();

        for pod in PODS {
            let listed = node.ask(pod, Cloud::Aws.list());
            assert!(
                listed.status == 200 && listed.body.ends_with(&format!("{pod}-role")),
                "{name}: {listed:?}"
            );
            let reply = node.ask_until_ready(pod, &format!("{}{}", Cloud::Aws.list(), listed.body));
            let credentials = serde_json::from_str::<Credentials>(&reply.body)
                .unwrap_or_else(|error| panic!("{name}: {pod}: {error}: {reply:?}"));
            let caller = caller_identity(&node.sts().url(), &credentials).unwrap();
            assert!(caller.contains(&format!("assumed-role/{pod}-role/")), "{name}: {caller}");
        }
        assert_eq!(node.ask("plain", Cloud::Aws.list()).status, 404, "{name}");
        if agent.spec()["livenessProbe"].is_object() {
            let is_ok = |said: anyhow::Result<String>| said.is_ok_and(|said| said == "ok\n");
            eventually("the kubelet's probes", || is_ok(agent.live()) && is_ok(agent.ready()));
        }
        assert_eq!(agent.admin("/readyz").status, 200, "{name}: not at the app port");
        assert!(node.node().sniffer().packets().iter().all(|packet| node.node().owns(packet.source.ip())));
        assert!(agent.container.terminate().unwrap().success(), "{name}: {}", agent.container.log());
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_patch_it_names_the_directory_that_kube2iams_manifests_do_not_mount() {
    let mut node = node("bare");
    let [(_, published), ..] = published();

    let mut agent = node.spawn(&pod_of(&published)).unwrap();
    let ended = agent.container.wait().unwrap();

    assert!(!ended.success());
    let log = agent.container.log();
    assert!(log.contains("mount the host's at /sys/fs/cgroup"), "{log}");
}
