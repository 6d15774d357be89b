//! The chart's values: the schema knows the agent's flags, a mistake ends the installation, and what a user sets arrives.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use serde_json::Value;

use super::{
    rendered::variables,
    support::{AGENT, NAMESPACE, deploy, helm, notes, objects, strings, template},
};

/// The agent's flags, by its own help: their names, and what they take.
fn flags() -> BTreeMap<String, String> {
    let help = Command::new(AGENT).arg("--help").output().unwrap().stdout;
    let of_line = |line: &str| {
        let line = line.trim_start();
        let flag =
            line.strip_prefix("-h, ").or(line.strip_prefix("-V, ")).unwrap_or(line).strip_prefix("--")?;
        let end = flag.find(['[', ' ']).unwrap_or(flag.len());
        let (name, rest) = flag.split_at(end);
        // A line of help text may begin with a flag; a flag has its line for itself.
        let takes = rest.trim_start();
        (takes.is_empty() || takes.starts_with(['[', '<']) && takes.ends_with(['>', ']']))
            .then(|| (name.to_owned(), takes.to_owned()))
    };
    String::from_utf8(help).unwrap().lines().filter_map(of_line).collect()
}

#[test]
fn the_charts_schema_knows_the_agents_flags() {
    let schema = fs::read(deploy().join("helm/kube2ram/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let known = schema["properties"]["flags"]["properties"].as_object().unwrap();
    // A secret is no argument; the taint has values of its own, with the rights that it takes.
    let elsewhere = ["api-token", "help", "startup-taint", "version"];

    let mut flags = flags();
    for name in elsewhere {
        assert!(flags.remove(name).is_some(), "--{name}");
    }

    assert_eq!(known.keys().collect::<BTreeSet<_>>(), flags.keys().collect(), "values.schema.json");
    for (name, takes) in flags {
        let kind = match takes.as_str() {
            "[=<BOOL>]" => "boolean",
            "<NUMBER>" | "<PORT>" => "integer",
            _ => "string",
        };
        let is_of = |kind: &str| known[&name]["type"] == serde_json::json!([kind, "null"]);
        assert!(is_of(kind) || kind == "string" && known[&name]["enum"].is_array(), "{name}: {takes}");
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn a_typing_error_in_values_ends_the_installation() {
    let cases = [
        ("flags.namespace-restriction=true", "namespace-restriction"),
        ("flags.app-port=0", "app-port"),
        ("flags.metadata-policy=opne", "metadata-policy"),
        ("flags.debug=yes", "debug"),
        ("tolerrations=[]", "tolerrations"),
        ("startupTaint.enabled=1", "startupTaint"),
        ("image.repository=registry/kube2ram:1", "repository"),
        ("oidc.roleArn=kube2ram", "roleArn"),
    ];
    for (set, named) in cases {
        let refused = helm(&["--set", set]).unwrap_err();

        assert!(refused.contains(named) && refused.contains("schema"), "{set}: {refused}");
    }
    helm(&["--set=flags.namespace-restrictions=false,flags.app-port=8182,flags.debug=true"]).unwrap();
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn what_the_chart_itself_goes_by_is_no_extra_argument() {
    let templates = fs::read_dir(deploy().join("helm/kube2ram/templates")).unwrap();
    let templates: String =
        templates.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap()).collect();
    let is_read = |flag: &str| templates.contains(&format!("\"{flag}\""));

    let read: Vec<_> = flags().into_keys().filter(|flag| is_read(flag)).collect();
    for expected in ["namespace-restrictions", "state-dir"] {
        assert!(read.iter().any(|flag| flag == expected), "{read:?}");
    }
    for flag in read {
        let refused = helm(&["--set", &format!("extraArgs={{--{flag}=x}}")]).unwrap_err();

        assert!(refused.contains(&format!("--{flag} is for flags")), "{flag}: {refused}");
    }
    helm(&["--set", "extraArgs={--namespace-restriction-format=regexp,--log-level=debug}"]).unwrap();
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn a_users_values_arrive() {
    let values = tempfile::NamedTempFile::new().unwrap();
    let text = r#"
image: { repository: registry.example.com/kube2ram, digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000", pullPolicy: Always }
imagePullSecrets: [{ name: registry }]
flags: { namespace-restrictions: null, default-role: app, use-regional-sts-endpoint: false, pass-through-rate: 1000000 }
extraArgs: ["--log-format=json"]
extraEnv: [{ name: TZ, value: UTC }]
extraEnvFrom: [{ secretRef: { name: keys } }]
extraVolumes: [{ name: ca, configMap: { name: ca } }]
extraVolumeMounts: [{ name: ca, mountPath: /etc/ssl/certs }]
serviceAccount: { name: agent, annotations: { a: b } }
resources: { requests: { memory: 64Mi } }
dnsPolicy: ClusterFirstWithHostNet
dnsConfig: { options: [{ name: timeout, value: "2" }] }
priorityClassName: mine
nodeSelector: { pool: a }
tolerations: []
podAnnotations: { c: d }
podLabels: { e: f }
updateStrategy: { type: OnDelete }
"#;
    fs::write(&values, text).unwrap();

    let objects = objects(&helm(&["--values", values.path().to_str().unwrap()]).unwrap());

    let spec = template(&objects);
    let container = &spec["containers"][0];
    let image = "registry.example.com/kube2ram@sha256:0000000000000000000000000000000000000000000000000000000000000000";
    assert_eq!((&container["image"], &container["imagePullPolicy"]), (&image.into(), &"Always".into()));
    let args = [
        "--auto-discover-base-arn",
        "--default-role=app",
        "--pass-through-rate=1000000",
        "--use-regional-sts-endpoint=false",
        "--log-format=json",
    ];
    assert_eq!(strings(&container["args"]), args);
    assert_eq!(variables(container)["TZ"], "UTC");
    assert_eq!(container["envFrom"][0]["secretRef"]["name"], "keys");
    assert_eq!(container["resources"]["requests"]["memory"], "64Mi");
    assert_eq!(spec["serviceAccountName"], "agent");
    assert!(objects.contains_key("ServiceAccount kube-system/agent"));
    assert_eq!(objects["ClusterRoleBinding /kube2ram"]["subjects"][0]["name"], "agent");
    assert_eq!(spec["nodeSelector"]["pool"], "a");
    assert_eq!(spec["dnsPolicy"], "ClusterFirstWithHostNet");
    assert_eq!(spec["dnsConfig"]["options"][0]["value"], "2");
    assert!(spec["tolerations"].is_null() && spec["priorityClassName"] == "mine");
    let pod = &objects["DaemonSet kube-system/kube2ram"]["spec"]["template"]["metadata"];
    assert_eq!((&pod["annotations"]["c"], &pod["labels"]["e"]), (&"d".into(), &"f".into()));
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn before_kubernetes_1_30_apparmor_is_an_annotation() {
    let of = |version: &str| {
        let objects = objects(&helm(&["--kube-version", version]).unwrap());
        let template = objects["DaemonSet kube-system/kube2ram"]["spec"]["template"].clone();
        let annotation =
            template["metadata"]["annotations"]["container.apparmor.security.beta.kubernetes.io/kube2ram"]
                .clone();
        let field = template["spec"]["containers"][0]["securityContext"]["appArmorProfile"]["type"].clone();
        (annotation, field)
    };

    assert_eq!(of("1.29.9"), ("unconfined".into(), Value::Null));
    assert_eq!(of("1.30.0-aliyun.1"), (Value::Null, "Unconfined".into()));
    assert!(helm(&["--kube-version=1.24.0"]).unwrap_err().contains("1.25"));
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_notes_tell_the_next_command() {
    let first = notes(&[]);
    let own =
        notes(&["--set=image.repository=registry.example.com/kube2ram,flags.namespace-restrictions=false"]);

    assert!(first.contains("--set image.repository=") && !own.contains("--set image.repository="), "{first}");
    for text in [&first, &own] {
        assert!(text.contains(&format!("kubectl --namespace {NAMESPACE} rollout status daemonset/kube2ram")));
        assert!(text.contains("ram.aliyuncs.com/role="), "{text}");
    }
    assert!(first.contains("allowed-roles") && !own.contains("allowed-roles"), "{own}");
}
