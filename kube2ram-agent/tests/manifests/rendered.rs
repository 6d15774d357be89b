//! kustomize and Helm: the same objects, and nothing in them that the agent's own parser does not take.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command as Process,
};

use kube2ram_agent::{args::Command, cloud::alibaba::base::Configured};
use serde_json::Value;

use super::support::{
    AGENT, NAMESPACE, Objects, TOGETHER, VARIANTS, charted, containers, deploy, helm, helm_lint, kustomize,
    kustomized, notes, objects, single_file, strings, template, values,
};

/// Without Helm's own labels, and without the order of flags, variables and volumes, which means nothing.
fn comparable(mut objects: Objects) -> Objects {
    for object in objects.values_mut() {
        if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
            labels.retain(|name, _| name != "helm.sh/chart" && name != "app.kubernetes.io/managed-by");
        }
        for list in ["/volumes", "/containers/0/args", "/containers/0/env", "/containers/0/volumeMounts"] {
            let list = object.pointer_mut(&format!("/spec/template/spec{list}"));
            if let Some(list) = list.and_then(Value::as_array_mut) {
                list.sort_by_key(Value::to_string);
            }
        }
    }
    objects
}

fn assert_same(kustomized: &str, charted: &str, what: &str) {
    let (ours, helms) = (comparable(objects(kustomized)), comparable(objects(charted)));
    let names = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&helms), "{what}");
    for (name, object) in &ours {
        let pretty = |object: &Value| serde_json::to_string_pretty(object).unwrap();
        assert!(object == &helms[name], "{what}, {name}:\n{}\n---\n{}", pretty(object), pretty(&helms[name]));
    }
}

/// A kustomization of the base and components, outside of the repository, as a user's is.
fn composed(components: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    // kustomize takes relative paths only, from where the directory really is.
    let place = directory.path().canonicalize().unwrap();
    let up = "../".repeat(place.components().count() - 1);
    let kustomize_dir = deploy().join("kustomize");
    let from_root =
        |path: &str| format!("{up}{}", kustomize_dir.join(path).strip_prefix("/").unwrap().display());
    let components: Vec<_> =
        components.iter().map(|name| format!("  - {}\n", from_root(&format!("components/{name}")))).collect();
    let text = format!("resources: [{}]\ncomponents:\n{}", from_root("base"), components.concat());
    fs::write(place.join("kustomization.yaml"), text).unwrap();
    kustomize(&place).unwrap()
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn helms_defaults_are_the_base() {
    assert_same(&kustomized(None), &charted(&[]), "the base");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn each_overlay_has_values_that_render_the_same() {
    for variant in VARIANTS {
        let overlay = kustomized(Some(variant));

        assert_same(&overlay, &charted(&[variant]), variant);
        assert_ne!(objects(&overlay), objects(&kustomized(None)), "{variant} changes nothing");
        helm_lint(variant).unwrap();
    }
    let directories = fs::read_dir(deploy().join("kustomize/overlays")).unwrap();
    let directories: BTreeSet<_> =
        directories.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(directories, VARIANTS.map(str::to_owned).into());
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn overlays_can_be_had_together() {
    assert_same(&composed(&TOGETHER), &charted(&TOGETHER), "all together");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_single_file_is_the_base() {
    let rendered = kustomized(None);
    let (head, rest) =
        single_file().split_once("\n---\n").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();

    assert!(head.lines().all(|line| line.starts_with('#')), "{head}");
    assert!(rest == rendered, "run `cargo xtask manifests`, which writes deploy/kube2ram.yaml");
}

/// What the container's process would see.
fn variables(container: &Value) -> BTreeMap<String, String> {
    let fields = BTreeMap::from([("spec.nodeName", "cn-hangzhou.10.0.0.1"), ("status.podIP", "10.0.0.1")]);
    let of = |variable: &Value| {
        let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
        let value = variable["value"].as_str().unwrap_or_else(|| fields[field.unwrap()]);
        (variable["name"].as_str().unwrap().to_owned(), value.to_owned())
    };
    container["env"].as_array().into_iter().flatten().map(of).collect()
}

/// What the parser makes of a container's arguments and variables.
fn parsed(container: &Value) -> Result<Command, String> {
    let env = variables(container);
    let expand =
        |arg: String| env.iter().fold(arg, |arg, (name, value)| arg.replace(&format!("$({name})"), value));
    let args = [AGENT.to_owned()].into_iter().chain(strings(&container["args"]).into_iter().map(expand));
    let look_up = |name: &str| Some(env.get(name)?.into());
    Command::from_args(args.map(Into::into), &look_up).map_err(|error| error.to_string())
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_agent_takes_every_flag_of_every_variant() {
    let rendered = VARIANTS.map(|variant| kustomized(Some(variant)));
    for yaml in rendered.into_iter().chain([kustomized(None), composed(&TOGETHER), single_file()]) {
        let objects = objects(&yaml);
        for container in containers(template(&objects)) {
            let command = parsed(container).unwrap_or_else(|error| panic!("{error}: {container}"));

            match container["name"].as_str().unwrap() {
                "kube2ram" => assert!(matches!(command, Command::Agent(_)), "{command:?}"),
                "boot-guard" => assert!(matches!(command, Command::BootGuard(_)), "{command:?}"),
                other => panic!("a container {other}"),
            }
            // The last of a name wins, so that two of one name are a mistake.
            let args = strings(&container["args"]);
            let names: BTreeSet<_> = args.iter().map(|arg| arg.split('=').next().unwrap()).collect();
            assert_eq!(names.len(), args.len(), "{args:?}");
        }
    }
    // The twin: this parser does refuse.
    let mut container = template(&objects(&single_file()))["containers"][0].clone();
    container["args"].as_array_mut().unwrap().push("--nonsense".into());
    assert!(parsed(&container).unwrap_err().contains("--nonsense"));
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_probe_asks_as_the_agent_was_told() {
    let objects = objects(&helm(&["--set=flags.state-dir=/run/k2r,flags.metrics-port=9999"]).unwrap());
    let container = &template(&objects)["containers"][0];

    let mut args = strings(&container["readinessProbe"]["exec"]["command"]);
    args[0] = AGENT.to_owned();

    let probe = Command::from_args(args.into_iter().map(Into::into), &|_| None).unwrap();
    let Command::Ready { state_dir, .. } = probe else { panic!("{probe:?}") };
    assert_eq!(state_dir, Path::new("/run/k2r"));
    let Ok(Command::Agent(config)) = parsed(container) else { panic!("{container}") };
    assert_eq!((config.state_dir.as_path(), config.metrics_port), (Path::new("/run/k2r"), 9999));
    assert_eq!(container["livenessProbe"]["httpGet"]["port"], 9999);
    let mounts = container["volumeMounts"].as_array().unwrap();
    assert!(mounts.iter().any(|mount| mount["mountPath"] == "/run/k2r"), "{mounts:?}");
}

/// The agent's flags, by its own help: their names, and what they take.
fn flags() -> BTreeMap<String, String> {
    let help = Process::new(AGENT).arg("--help").output().unwrap().stdout;
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
fn oidc_is_rendered_with_both_arns_as_the_agent_takes_them_or_not_at_all() {
    let role = "oidc.enabled=true,oidc.roleArn=acs:ram::1:role/kube2ram";
    let provider = "oidc.providerArn=acs:ram::1:oidc-provider/ack";

    let refused = helm(&["--set", role]).unwrap_err();
    let rendered = objects(&helm(&["--set", &format!("{role},{provider}")]).unwrap());

    assert!(refused.contains("oidc.providerArn"), "{refused}");
    for objects in [rendered, objects(&kustomized(Some("oidc")))] {
        let template = template(&objects);
        let env = variables(&template["containers"][0]);
        let configured = Configured::from_env(|name| env.get(name).cloned(), "node").unwrap();
        let Configured::Oidc(settings) = configured else { panic!("{configured:?}") };
        let volumes = template["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == "rrsa-token").unwrap();
        let token = &volume["projected"]["sources"][0]["serviceAccountToken"];
        let mounts = template["containers"][0]["volumeMounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["name"] == "rrsa-token").unwrap();
        let file = Path::new(mount["mountPath"].as_str().unwrap()).join(token["path"].as_str().unwrap());
        assert_eq!((&token["audience"], settings.token_file), (&"sts.aliyuncs.com".into(), file));
        // 0400: of the agent's user, and of nobody else.
        assert_eq!((&volume["projected"]["defaultMode"], &mount["readOnly"]), (&256.into(), &true.into()));
    }
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

#[test]
fn all_values_files_are_some_overlays() {
    for variant in VARIANTS {
        assert!(values(variant).is_file(), "{variant}");
    }
    let files = fs::read_dir(deploy().join("helm/values")).unwrap().count();
    assert_eq!(files, VARIANTS.len());
}
