//! The chart's values: the schema knows the agent's flags, a mistake ends the installation, and what a user
//! sets arrives.

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

/// The agent's flags and their aliases, by its own help: their names, and what they take.
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
    let mut flags = BTreeMap::new();
    let mut last = String::new();
    for line in std::str::from_utf8(&help).unwrap().lines() {
        if let Some((name, takes)) = of_line(line) {
            last.clone_from(&takes);
            flags.insert(name, takes);
        } else if let Some((_, alias)) = line.split_once("[alias: --") {
            // At the end of the text of the flag, which takes the same under either name.
            flags.insert(alias.trim_end_matches(']').to_owned(), last.clone());
        }
    }
    flags
}

#[test]
fn the_charts_schema_knows_the_agents_flags() {
    let schema = fs::read(deploy().join("helm/kube2ram/values.schema.json")).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let known = schema["properties"]["flags"]["properties"].as_object().unwrap();
    // A secret is no argument; what rights or mounts follow from has its own value.
    let elsewhere = [
        "api-token",
        "audit-file",
        "cloud",
        "credentials-from",
        "help",
        "oidc-provider-arn",
        "service-account-roles",
        "startup-taint",
        "token-requests-as",
        "version",
    ];

    let mut flags = flags();
    for name in elsewhere {
        assert!(flags.remove(name).is_some(), "--{name}");
    }
    // kube2iam's names of flags.
    for (name, alias) in [("ram-role-key", "iam-role-key"), ("ram-role-session-ttl", "iam-role-session-ttl")]
    {
        assert!(flags.contains_key(alias) && flags[alias] == flags[name], "--{alias}");
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
        ("cloud=AWS", "cloud"),
        ("seLinuxOptions.typ=spc_t", "typ"),
        ("credentialsFrom=pod", "credentialsFrom"),
        ("tokenRequests=namespace", "tokenRequests"),
        ("oidcProviderArn=acs:ram::1:role/a", "oidcProviderArn"),
        ("optInLabel=a b", "optInLabel"),
        // Its directory is mounted over the container's own.
        ("auditFile=/etc/audit.log", "auditFile"),
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
    let is_read = |flag: &str| {
        [format!("\"{flag}\""), format!("--{flag}=")].iter().any(|text| templates.contains(text))
    };

    // "node" is a value of two values, too.
    let mut read: Vec<_> = flags().into_keys().filter(|flag| flag != "node" && is_read(flag)).collect();
    for expected in ["iam-role-key", "namespace-restrictions", "startup-taint", "state-dir"] {
        assert!(read.iter().any(|flag| flag == expected), "{read:?}");
    }
    // By their values: variables of the containers, and a right.
    let by_value =
        ["cloud", "credentials-from", "oidc-provider-arn", "service-account-roles", "token-requests-as"];
    read.extend(by_value.map(str::to_owned));
    for flag in read {
        let refused = helm(&["--set", &format!("extraArgs={{--{flag}=x}}")]).unwrap_err();

        assert!(refused.contains(&format!("--{flag} is for flags")), "{flag}: {refused}");
    }
    let refused =
        helm(&["--set", "extraEnv[0].name=KUBE2RAM_STATE_DIR,extraEnv[0].value=/run/x"]).unwrap_err();
    assert!(refused.contains("KUBE2RAM_STATE_DIR is a flag"), "{refused}");
    for set in [
        "extraEnv[0].name=KUBE2RAM_CLOUD,extraEnv[0].value=aws",
        "bootGuard.enabled=true,bootGuard.args={--cloud=aws}",
    ] {
        let refused = helm(&["--set", set]).unwrap_err();

        assert!(refused.contains("follows from the value cloud"), "{set}: {refused}");
    }
    helm(&["--set", "bootGuard.enabled=true,bootGuard.args={--required-by-kubelet}"]).unwrap();
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
    let daemonset = &objects["DaemonSet kube-system/kube2ram"]["spec"];
    assert_eq!(daemonset["updateStrategy"], serde_json::json!({ "type": "OnDelete" }));
    let pod = &daemonset["template"]["metadata"];
    assert_eq!((&pod["annotations"]["c"], &pod["labels"]["e"]), (&"d".into(), &"f".into()));
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn numbers_and_booleans_become_the_strings_that_annotations_and_labels_are() {
    let set = "--set=podAnnotations.a=1,podAnnotations.b=true,podLabels.c=12345678,nodeSelector.d=5,annotations.e=0,\
               serviceAccount.annotations.f=7";

    let objects = objects(&helm(&[set]).unwrap());

    let (daemonset, account) =
        (&objects["DaemonSet kube-system/kube2ram"], &objects["ServiceAccount kube-system/kube2ram"]);
    let pod = &daemonset["spec"]["template"];
    let seen = [
        &pod["metadata"]["annotations"]["a"],
        &pod["metadata"]["annotations"]["b"],
        &pod["metadata"]["labels"]["c"],
        &pod["spec"]["nodeSelector"]["d"],
        &daemonset["metadata"]["annotations"]["e"],
        &account["metadata"]["annotations"]["f"],
    ];
    assert_eq!(seen, ["1", "true", "12345678", "5", "0", "7"]);
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn a_roll_out_surges_or_goes_without_and_not_both() {
    let strategy = |set: &str| {
        let objects = objects(&helm(&["--set", set]).unwrap());
        objects["DaemonSet kube-system/kube2ram"]["spec"]["updateStrategy"]["rollingUpdate"].clone()
    };
    let of = |set: &str| format!("updateStrategy.rollingUpdate.{set}");

    let percent = strategy(&of("maxSurge=10%"));
    assert_eq!(percent, serde_json::json!({ "maxSurge": "10%", "maxUnavailable": 0 }));
    let without = strategy(&format!("{},{}", of("maxSurge=0"), of("maxUnavailable=1")));
    assert_eq!(without, serde_json::json!({ "maxSurge": 0, "maxUnavailable": 1 }));
    for both_or_none in ["maxUnavailable=1", "maxSurge=0"] {
        let refused = helm(&["--set", &of(both_or_none)]).unwrap_err();
        assert!(
            refused.contains("one of maxSurge and maxUnavailable must be 0"),
            "{both_or_none}: {refused}"
        );
    }
    let nonsense = helm(&["--set", &of("maxSurge=most")]).unwrap_err();
    assert!(nonsense.contains("maxSurge") && nonsense.contains("schema"), "{nonsense}");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_audit_trail_is_on_the_node_and_its_directory_mounted_once() {
    let mounted = |set: &str| {
        let objects = objects(&helm(&["--set", set]).unwrap());
        let container = &template(&objects)["containers"][0];
        let named = |list: &Value| {
            let found = list.as_array().unwrap().iter().find(|item| item["name"] == "audit");
            found.cloned().unwrap_or(Value::Null)
        };
        let flag = strings(&container["args"]).into_iter().find(|arg| arg.starts_with("--audit-file="));
        let volume = named(&template(&objects)["volumes"])["hostPath"]["path"].clone();
        (flag.unwrap_or_default(), volume, named(&container["volumeMounts"])["mountPath"].clone())
    };

    let (flag, volume, mount) = mounted("auditFile=/var/log/kube2ram/audit.log");
    assert_eq!(flag, "--audit-file=/var/log/kube2ram/audit.log");
    assert_eq!((volume, mount), ("/var/log/kube2ram".into(), "/var/log/kube2ram".into()));
    let (flag, volume, mount) = mounted("auditFile=/run/kube2ram/audit.log");
    assert_eq!(flag, "--audit-file=/run/kube2ram/audit.log");
    assert_eq!((volume, mount), (Value::Null, Value::Null), "the state directory is mounted anyway");
    assert_eq!(mounted("cloud=alibaba"), (String::new(), Value::Null, Value::Null), "off");
}

fn shipped(name: &str) -> String {
    fs::read_to_string(deploy().join("monitoring").join(name)).unwrap()
}

/// An object without what is Helm's own.
fn without_helms_labels(object: &Value) -> Value {
    let mut object = object.clone();
    let labels = object["metadata"]["labels"].as_object_mut().unwrap();
    labels.retain(|name, _| !["helm.sh/chart", "app.kubernetes.io/managed-by"].contains(&name.as_str()));
    object
}

const MONITORING: &str = "--set=monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,monitoring.dashboard.enabled=true";

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn monitoring_is_off_and_by_value_what_deploy_monitoring_has() {
    let of_the_operator = |objects: &super::support::Objects| {
        objects
            .keys()
            .filter(|name| !name.starts_with("ConfigMap"))
            .filter(|name| name.contains("Monitor") || name.contains("Rule "))
            .count()
    };
    let off = objects(&helm(&[]).unwrap());
    assert_eq!(
        (of_the_operator(&off), off.contains_key("ConfigMap kube-system/kube2ram-dashboard")),
        (0, false)
    );

    let on = objects(&helm(&[MONITORING]).unwrap());

    for (name, file) in [
        ("PodMonitor kube-system/kube2ram", "podmonitor.yaml"),
        ("PrometheusRule kube-system/kube2ram", "prometheusrule.yaml"),
    ] {
        let [shipped] = &super::support::parse(&shipped(file))[..] else { panic!("{file}") };
        assert_eq!(&without_helms_labels(&on[name]), shipped, "{file}");
    }
    let dashboard = &on["ConfigMap kube-system/kube2ram-dashboard"];
    assert_eq!(
        dashboard["data"]["kube2ram.json"].as_str().unwrap().trim_end(),
        shipped("dashboard.json").trim_end()
    );
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn monitoring_follows_the_release_and_its_values() {
    let values = "--set=flags.metrics-port=9999,monitoring.rules.runbookUrl=https://git.example.com/runbooks.md,\
                  monitoring.podMonitor.labels.release=prometheus,monitoring.podMonitor.interval=15s";

    let on = objects(&helm(&[MONITORING, values]).unwrap());

    let (monitor, rules) =
        (&on["PodMonitor kube-system/kube2ram"], &on["PrometheusRule kube-system/kube2ram"]);
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    assert_eq!(
        (&endpoint["interval"], &endpoint["relabelings"][1]["replacement"]),
        (&"15s".into(), &"$1:9999".into())
    );
    let alerts: Vec<_> = rules["spec"]["groups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
        .collect();
    assert!(alerts.len() > 35, "{}", alerts.len());
    for alert in alerts {
        let section = alert["alert"].as_str().unwrap().to_lowercase();
        let url = format!("https://git.example.com/runbooks.md#{section}");
        assert_eq!(
            (&alert["annotations"]["runbook_url"], &alert["annotations"]["runbook"]),
            (&url.into(), &Value::Null)
        );
    }
    let refused = helm(&[MONITORING, "--set=monitoring.rules.runbookUrl=docs/runbooks.md"]).unwrap_err();
    assert!(refused.contains("runbookUrl"), "what cannot be clicked is no URL: {refused}");
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
fn the_notes_have_the_next_command() {
    let first = notes(&[]);
    let own =
        notes(&["--set=image.repository=registry.example.com/kube2ram,flags.namespace-restrictions=false"]);

    assert!(first.contains("--set image.repository=") && !own.contains("--set image.repository="), "{first}");
    for text in [&first, &own] {
        assert!(text.contains(&format!("kubectl --namespace {NAMESPACE} rollout status daemonset/kube2ram")));
        assert!(text.contains("ram.aliyuncs.com/role="), "{text}");
    }
    assert!(first.contains("allowed-roles") && !own.contains("allowed-roles"), "{own}");
    let on_aws = notes(&["--set=cloud=aws"]);
    for named in [
        "iam.amazonaws.com/role=",
        "iam.amazonaws.com/allowed-roles=",
        "http://169.254.169.254/latest/meta-data/iam/",
    ] {
        assert!(on_aws.contains(named), "{named}: {on_aws}");
    }
    assert!(!on_aws.contains("ram.aliyuncs.com") && !on_aws.contains("100.100.100.200"), "{on_aws}");
    for flag in ["ram-role-key", "iam-role-key"] {
        let own_key = notes(&[&format!("--set=cloud=aws,flags.{flag}=example.com/role")]);
        assert!(
            own_key.contains("example.com/role=") && !own_key.contains("amazonaws.com/role="),
            "{own_key}"
        );
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_admission_policy_guards_the_key_that_is_set_or_those_of_all_clouds() {
    let policy = |set: &str| {
        let objects = objects(&helm(&["--set", &format!("allowLists.admissionPolicy=true{set}")]).unwrap());
        objects["ValidatingAdmissionPolicy /kube2ram-allow-lists"].to_string()
    };

    for (set, guarded) in [
        ("", &["ram.aliyuncs.com/allowed-roles", "iam.amazonaws.com/allowed-roles"][..]),
        (",cloud=aws", &["ram.aliyuncs.com/allowed-roles", "iam.amazonaws.com/allowed-roles"]),
        (",flags.namespace-key=example.com/roles", &["example.com/roles"]),
    ] {
        let policy = policy(set);
        let keys = policy.matches("/allowed-roles\\\"]").count() + policy.matches("/roles\\\"]").count();

        assert_eq!(keys, 2 * guarded.len(), "{set}: after and before: {policy}");
        for key in guarded {
            assert!(policy.contains(key), "{set}: {policy}");
        }
    }
}

/// The first YAML after this text in a document.
fn example(document: &str, after: &str) -> tempfile::NamedTempFile {
    let text = fs::read_to_string(deploy().join("..").join(document)).unwrap();
    let (_, rest) = text.split_once(after).unwrap();
    let (_, rest) = rest.split_once("\n```yaml\n").unwrap();
    let values = tempfile::NamedTempFile::new().unwrap();
    fs::write(&values, rest.split_once("\n```").unwrap().0).unwrap();
    values
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn values_in_the_documents_are_accepted_and_have_their_effect() {
    let with = |values: &tempfile::NamedTempFile| {
        objects(&helm(&["--values", values.path().to_str().unwrap()]).unwrap())
    };

    let edge = with(&example("docs/install.md", "### Nodes without a metadata server"));
    let terms = "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
    let terms = template(&edge).pointer(terms).unwrap().as_array().unwrap();
    assert_eq!(terms.len(), 1, "terms are alternatives: {terms:?}");
    let keys: Vec<_> =
        terms[0]["matchExpressions"].as_array().unwrap().iter().map(|one| &one["key"]).collect();
    assert_eq!(keys, ["type", "alibabacloud.com/is-edge-worker"]);
    let monitored = with(&example("deploy/monitoring/README.md", "With Helm"));
    for kind in ["PodMonitor", "PrometheusRule"] {
        let object = &monitored[&format!("{kind} {NAMESPACE}/kube2ram")];
        assert_eq!(object["metadata"]["labels"]["release"], "prometheus", "{kind}");
    }
}
