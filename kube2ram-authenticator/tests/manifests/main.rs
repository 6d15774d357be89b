//! The manifests in `deploy/authenticator`: few rights, no root, and nothing that this version does not know.
//! The rendered ones are read as they are committed; one test renders them again. `container` starts their
//! containers.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod container;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use kube2ram_authenticator::{
    args::{self, Args},
    backend::Mode,
    config::Config,
};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kube2ram-authenticator");

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/authenticator")
}

fn documents(file: &str) -> Vec<Value> {
    let text = fs::read_to_string(deploy().join(file)).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

fn rendered() -> Vec<Value> {
    documents("kustomize/authenticator.yaml")
}

fn of_kind(kind: &str) -> Value {
    let mut found = rendered().into_iter().filter(|object| object["kind"] == kind);
    let object = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    object
}

/// The pod of the DaemonSet, and the static one.
fn pods() -> [Value; 2] {
    let [pod] = documents("static-pod.yaml").try_into().unwrap();
    [of_kind("DaemonSet")["spec"]["template"]["spec"].clone(), pod["spec"].clone()]
}

fn arguments(container: &Value) -> Vec<OsString> {
    let words = container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().into());
    ["kube2ram-authenticator".into()].into_iter().chain(words).collect()
}

fn parsed(container: &Value) -> args::Command {
    Args::parse(arguments(container), &|_| None).unwrap().command
}

#[test]
fn the_server_has_no_rights_on_its_node() {
    for pod in pods() {
        let of_pod = &pod["securityContext"];
        assert_eq!((&of_pod["runAsNonRoot"], &of_pod["runAsUser"]), (&json!(true), &json!(64532)));
        assert_eq!(of_pod["seccompProfile"], json!({ "type": "RuntimeDefault" }));
        let [server] = pod["containers"].as_array().unwrap().as_slice() else { panic!("{pod}") };
        assert_eq!(
            server["securityContext"],
            json!({
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
            })
        );
        let mounts = server["volumeMounts"].as_array().unwrap();
        let writable: Vec<_> = mounts.iter().filter(|mount| mount["readOnly"] != true).collect();
        assert_eq!(writable, [&json!({ "name": "run", "mountPath": "/run/kube2ram-authenticator" })]);
        let volumes = pod["volumes"].as_array().unwrap();
        let run = volumes.iter().find(|volume| volume["name"] == "run").unwrap();
        assert!(run["emptyDir"].is_object(), "nothing of the node: {run}");
        assert!(pod["hostPID"].is_null() && pod["hostIPC"].is_null());
    }
}

#[test]
fn the_init_container_has_what_it_needs_to_give_the_key_away_and_no_more() {
    let [daemon, static_pod] = pods();

    let [init] = daemon["initContainers"].as_array().unwrap().as_slice() else { panic!("{daemon}") };

    let context = &init["securityContext"];
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE"] }));
    assert_eq!((&context["runAsUser"], &context["allowPrivilegeEscalation"]), (&json!(0), &json!(false)));
    assert!(static_pod["initContainers"].is_null());
    let args::Command::Init(init) = parsed(init) else { panic!() };
    assert_eq!((init.owner, init.is_check), (Some(64532), false), "the server's user");
}

#[test]
fn the_rights_in_the_cluster_are_few_and_none_is_to_define_resources() {
    let events =
        json!({ "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"] });

    let group = "ramauthenticator.k8s.alibabacloud";
    assert_eq!(
        of_kind("ClusterRole")["rules"],
        json!([
            { "apiGroups": [group], "resources": ["ramidentitymappings"], "verbs": ["list", "watch"] },
            { "apiGroups": [group], "resources": ["ramidentitymappings/status"], "verbs": ["patch"] },
        ])
    );
    let roles: Vec<_> = rendered().into_iter().filter(|object| object["kind"] == "Role").collect();
    let [of_objects, of_config_map] = roles.as_slice() else { panic!("{roles:?}") };
    assert_eq!(
        (&of_objects["metadata"]["namespace"], &of_config_map["metadata"]["namespace"]),
        (&json!("default"), &json!("kube-system"))
    );
    assert_eq!(of_objects["rules"], json!([events]));
    assert_eq!(
        of_config_map["rules"],
        json!([
            {
                "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["alibabacloud-auth"],
                "verbs": ["get", "list", "watch"],
            },
            events,
        ])
    );
}

#[test]
fn the_servers_arguments_and_configuration_are_understood() {
    for pod in pods() {
        let args::Command::Server(server) = parsed(&pod["containers"][0]) else { panic!() };
        assert!(server.metrics_address.is_loopback());
        let container = &pod["containers"][0];
        // A probe of a port would reach either server during an upgrade.
        let command = |probe: &str| {
            let words = container[probe]["exec"]["command"].as_array().unwrap().iter();
            let words: Vec<OsString> = words.map(|word| word.as_str().unwrap().into()).collect();
            Args::parse(words, &|_| None).unwrap().command
        };
        let args::Command::Live { probe_dir: live } = command("livenessProbe") else { panic!() };
        let args::Command::Ready { probe_dir } = command("readinessProbe") else { panic!() };
        assert_eq!((&live, &probe_dir), (&server.probe_dir, &server.probe_dir));
        let mounts = container["volumeMounts"].as_array().unwrap();
        assert!(mounts.iter().any(|mount| mount["mountPath"] == json!(probe_dir)), "{mounts:?}");
        assert!(container["ports"].is_null(), "the next pod would not be scheduled next to this one");
    }
    let update = of_kind("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"].clone();
    assert_eq!(update, json!({ "maxUnavailable": 0, "maxSurge": 1 }));
    let text = of_kind("ConfigMap")["data"]["config.yaml"].as_str().unwrap().to_owned();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    fs::write(&path, &text).unwrap();
    let args::Command::Server(server) = parsed(&pods()[0]["containers"][0]) else { panic!() };
    let given = kube2ram_authenticator::config::Given { config: Some(path.clone()), ..server.given };
    assert!(Config::load(given.clone()).is_err(), "nobody starts it without a cluster id");
    fs::write(&path, text.replace("clusterID: \"\"", "clusterID: \"c\"")).unwrap();

    let config = Config::load(given).unwrap();

    let modes: Vec<Mode> = config.backends.iter().map(|(mode, _)| *mode).collect();
    assert_eq!(modes, [Mode::MountedFile, Mode::Crd, Mode::AckConfigMap]);
    assert!(config.kubeconfig_pregenerated && config.webhook.address.is_loopback());
    let mounted: Vec<_> =
        pods()[0]["volumes"].as_array().unwrap().iter().map(|v| v["hostPath"]["path"].clone()).collect();
    assert!(mounted.contains(&json!(config.webhook.state_dir)), "{mounted:?}");
    assert!(mounted.contains(&json!(config.webhook.generate_kubeconfig.parent().unwrap())), "{mounted:?}");
}

#[test]
fn the_examples_are_understood() {
    let given = kube2ram_authenticator::config::Given {
        config: Some(deploy().join("examples/config.yaml")),
        ..Default::default()
    };

    let config = Config::load(given).unwrap();

    let [notice] = config.notices.as_slice() else { panic!("{:?}", config.notices) };
    assert!(notice.contains(" is that of an example"), "{notice}");
    assert!(config.region.is_some());
    let [kubeadm] = documents("examples/kubeadm.yaml").try_into().unwrap();
    let flag = &kubeadm["apiServer"]["extraArgs"][0];
    assert_eq!(flag["name"], "authentication-token-webhook-config-file");
    assert_eq!(flag["value"], json!(config.webhook.generate_kubeconfig));
    let [kubeconfig] = documents("examples/kubeconfig.yaml").try_into().unwrap();
    let exec = &kubeconfig["users"][0]["user"]["exec"];
    let args::Command::Token(token) = parsed(exec) else { panic!() };
    assert_eq!(token.cluster_id, *config.cluster_id);
}

#[test]
fn the_custom_resource_is_ack_ram_authenticators_with_room_for_what_is_reported() {
    let [crd] = documents("kustomize/crd.yaml").try_into().unwrap();

    assert_eq!(crd["metadata"]["name"], "ramidentitymappings.ramauthenticator.k8s.alibabacloud");
    assert_eq!(
        (&crd["spec"]["scope"], &crd["spec"]["names"]["categories"]),
        (&json!("Cluster"), &json!(["all"]))
    );
    let [version] = crd["spec"]["versions"].as_array().unwrap().as_slice() else { panic!() };
    assert_eq!((&version["name"], &version["subresources"]), (&json!("v1alpha1"), &json!({ "status": {} })));
    let schema = &version["schema"]["openAPIV3Schema"]["properties"];
    assert_eq!(schema["spec"]["required"], json!(["arn", "username"]));
    for field in ["arn", "username", "groups", "userID"] {
        assert!(schema["spec"]["properties"][field].is_object(), "{field}");
    }
    let condition = &schema["status"]["properties"]["conditions"]["items"]["properties"];
    for field in ["type", "status", "reason", "message", "observedGeneration", "lastTransitionTime"] {
        assert!(condition[field].is_object(), "{field}");
    }
}

/// `cargo xtask setup` links to Helm next to the directory of the profile.
#[test]
fn the_kustomization_is_as_the_chart_renders_it() {
    let helm = Path::new(PROGRAM).ancestors().nth(2).unwrap().join("tools/helm/bin/helm");
    let copy = tempfile::tempdir().unwrap();
    let run = |command: &mut Command| {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(Command::new("cp").arg("-r").arg(deploy()).arg(copy.path()));
    let copied = copy.path().join("authenticator");

    run(Command::new("sh").arg(copied.join("render.sh")).arg(helm));

    for file in ["kustomize/authenticator.yaml", "kustomize/crd.yaml"] {
        let (committed, fresh) =
            (fs::read(deploy().join(file)).unwrap(), fs::read(copied.join(file)).unwrap());
        assert!(committed == fresh, "{file}: run deploy/authenticator/render.sh");
    }
}
