//! Against a real API server (`cargo xtask test --api-server`): its verdict on every manifest, that the
//! agent's rights are enough, that each is needed, what the admission policies deny, and which tokens of
//! ServiceAccounts an agent gets.

mod admission;
mod cluster;
mod control_plane;
mod rights;
mod service_accounts;

use std::fs;

use serde_json::{Value, json};

use self::control_plane::{ADMIN, ControlPlane, path_of};
use super::support::{VARIANTS, charted, deploy, kustomized, objects, parse, single_file};

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
