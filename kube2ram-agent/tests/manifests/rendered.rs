//! kustomize and Helm: the same objects, and nothing in them that the agent's own parser does not take.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use kube2ram_agent::{args::Command, probe::SocketPaths};
use kube2ram_cloud::{alibaba, aws};
use serde_json::Value;

use super::support::{
    AGENT, Objects, TOGETHER, TOGETHER_ON_AWS, VARIANTS, charted, containers, deploy, helm, helm_lint,
    kustomize, kustomized, objects, single_file, strings, template, values,
};

/// Without Helm's own labels, and without the order of flags, variables and volumes, which means nothing.
/// Whose requests the policies on tokens judge differs: Helm knows the agent's ServiceAccount, and kustomize
/// may yet rename it.
fn comparable(mut objects: Objects) -> Objects {
    for policy in ["kube2ram-token-pods", "kube2ram-token-requests"] {
        let Some(policy) = objects.get_mut(&format!("ValidatingAdmissionPolicy /{policy}")) else { continue };
        let judged = &mut policy["spec"]["matchConditions"][0]["expression"];
        let text = judged.as_str().unwrap();
        let of_helm = r#"request.userInfo.username == "system:serviceaccount:kube-system:kube2ram""#;
        let of_kustomize = r#"request.userInfo.username.startsWith("system:serviceaccount:") && request.userInfo.username.split(":")[3].contains("kube2ram")"#;
        assert!([of_helm, of_kustomize].contains(&text), "{text}");
        *judged = Value::Null;
    }
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

/// A kustomization of a resource and components, outside of the repository, as a user's is.
fn composed(resource: &str, components: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    // kustomize takes relative paths only, from where the directory really is.
    let place = directory.path().canonicalize().unwrap();
    let up = "../".repeat(place.components().count() - 1);
    let kustomize_dir = deploy().join("kustomize");
    let from_root =
        |path: &str| format!("{up}{}", kustomize_dir.join(path).strip_prefix("/").unwrap().display());
    let components: Vec<_> =
        components.iter().map(|name| format!("  - {}\n", from_root(&format!("components/{name}")))).collect();
    let text = format!("resources: [{}]\ncomponents:\n{}", from_root(resource), components.concat());
    fs::write(place.join("kustomization.yaml"), text).unwrap();
    kustomize(&place).unwrap()
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
    assert_same(&composed("base", &TOGETHER), &charted(&TOGETHER), "all together");
    for on_aws in [&TOGETHER_ON_AWS[..], &["bottlerocket", "startup-taint"], &["migration"]] {
        let values = [&["aws"][..], on_aws].concat();
        assert_same(&composed("overlays/aws", on_aws), &charted(&values), &format!("on AWS: {on_aws:?}"));
    }
    for mode in SERVICE_ACCOUNTS {
        let others = ["namespace-restrictions", "startup-taint"];
        let on_alibaba = [&others[..], &[mode]].concat();
        assert_same(&composed("base", &on_alibaba), &charted(&on_alibaba), mode);
        let on_aws = [&others[..], &[mode, "service-accounts-aws"]].concat();
        let values = [&others[..], &[mode, "aws"]].concat();
        assert_same(&composed("overlays/aws", &on_aws), &charted(&values), &format!("on AWS: {mode}"));
    }
}

/// The components with roles by ServiceAccount: one for each right to request tokens.
const SERVICE_ACCOUNTS: [&str; 3] =
    ["service-accounts", "service-accounts-by-namespace", "service-accounts-by-policy"];

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn every_container_has_the_cloud_whatever_replaces_its_arguments() {
    for (resource, components, cloud) in [
        ("base", &TOGETHER[..], "alibaba"),
        ("base", &["migration"], "alibaba"),
        // These are for AWS only, so they set the cloud themselves.
        ("base", &["irsa", "boot-guard"], "aws"),
        ("base", &["bottlerocket"], "aws"),
        ("overlays/aws", &TOGETHER_ON_AWS, "aws"),
        ("overlays/aws", &["migration"], "aws"),
        ("overlays/aws", &["service-accounts", "service-accounts-aws", "boot-guard"], "aws"),
    ] {
        let objects = objects(&composed(resource, components));
        for container in containers(template(&objects)) {
            assert_eq!(
                variables(container)["KUBE2RAM_CLOUD"],
                cloud,
                "{resource} {components:?}: {container}"
            );
        }
    }
}

/// What the container's process would see.
pub(super) fn variables(container: &Value) -> BTreeMap<String, String> {
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
fn preflight_in_the_agents_container_checks_the_token_that_acts_as_the_node() {
    for (variant, is_checked) in
        [("debug", false), ("service-accounts", true), ("service-accounts-by-policy", false)]
    {
        let mut container = template(&objects(&kustomized(Some(variant))))["containers"][0].clone();
        // As kubectl exec runs it: with the container's variables, and without its arguments.
        container["args"] = serde_json::json!(["preflight"]);

        let Ok(Command::Preflight(paths)) = parsed(&container) else { panic!("{container}") };

        assert_eq!(paths.impersonates_node, is_checked, "{variant}");
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_agent_takes_every_flag_of_every_variant() {
    let rendered = VARIANTS.map(|variant| kustomized(Some(variant)));
    let together = [composed("base", &TOGETHER), composed("overlays/aws", &TOGETHER_ON_AWS)];
    for yaml in rendered.into_iter().chain(together).chain([kustomized(None), single_file()]) {
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
fn the_right_to_read_namespaces_comes_with_the_restrictions_that_need_it() {
    let rendered = VARIANTS.iter().flat_map(|variant| [kustomized(Some(variant)), charted(&[variant])]);
    let off = helm(&["--set=flags.namespace-restrictions=false"]).unwrap();
    let mut found = BTreeSet::new();
    for yaml in rendered.chain([single_file(), charted(&[]), off]) {
        let objects = objects(&yaml);
        let command = parsed(&template(&objects)["containers"][0]);
        let Ok(Command::Agent(config)) = command else { panic!("{command:?}") };
        let rules = objects["ClusterRole /kube2ram"]["rules"].as_array().unwrap();

        let of_namespaces = |rule: &&Value| rule["resources"] == serde_json::json!(["namespaces"]);
        let granted = rules.iter().find(of_namespaces).map(|rule| strings(&rule["verbs"]));

        let needed = config.namespace_restrictions.map(|_| vec!["list".to_owned(), "watch".to_owned()]);
        assert_eq!(granted, needed, "{yaml}");
        found.insert(granted.is_some());
    }
    assert_eq!(found.len(), 2, "with and without");
}

/// Everything that the variants, and values that no variant has, make of the chart and of kustomize.
fn renderings() -> Vec<String> {
    let modes = [
        "--set=credentialsFrom=service-account,tokenRequests=agent,cloud=aws",
        "--set=credentialsFrom=service-account,tokenRequests=agent,cloud=aws,rbac.create=false",
        "--set=credentialsFrom=service-account,tokenRequests=namespaces,cloud=aws,rbac.create=false",
        "--set=credentialsFrom=service-account,tokenRequests=namespaces,serviceAccountRoles=true,cloud=aws",
        "--set=credentialsFrom=node,tokenRequests=agent",
        "--set=serviceAccountRoles=true,tokenRequests=namespaces",
        "--set=tokenRights={namespaces}",
        "--set=tokenRights={agent}",
        "--set=credentialsFrom=service-account,tokenRights={agent},cloud=aws",
    ];
    let set = modes.map(|set| helm(&[set]).unwrap());
    let before_policies = helm(&["--kube-version=1.29", modes[3]]).unwrap();
    let variants = VARIANTS.iter().flat_map(|variant| [kustomized(Some(variant)), charted(&[variant])]);
    variants.chain(set).chain([before_policies, single_file(), charted(&[])]).collect()
}

/// Whether a rule lets somebody create tokens of ServiceAccounts.
pub(super) fn lets_create_tokens(rule: &Value) -> bool {
    let has =
        |list: &str, names: &[&str]| strings(&rule[list]).iter().any(|name| names.contains(&name.as_str()));
    has("verbs", &["create", "*"])
        && has("apiGroups", &["", "*"])
        && has("resources", &["serviceaccounts/token", "serviceaccounts/*", "*/token", "*"])
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_right_to_create_tokens_never_comes_without_both_policies() {
    let (mut with, mut without) = (0, 0);
    for yaml in renderings() {
        let objects = objects(&yaml);
        let roles = objects.values().filter(|object| {
            let is_role = object["kind"] == "ClusterRole" || object["kind"] == "Role";
            is_role && object["rules"].as_array().into_iter().flatten().any(lets_create_tokens)
        });
        let roles: Vec<_> = roles.collect();
        if roles.is_empty() {
            without += 1;
            continue;
        }
        with += 1;
        for policy in ["kube2ram-token-requests", "kube2ram-token-pods"] {
            let binding = &objects[&format!("ValidatingAdmissionPolicyBinding /{policy}")]["spec"];
            assert_eq!(binding["policyName"], policy);
            assert_eq!(binding["validationActions"], serde_json::json!(["Deny"]), "{policy}");
            assert!(binding["matchResources"].is_null(), "{policy}: no request is left out");
            let spec = &objects[&format!("ValidatingAdmissionPolicy /{policy}")]["spec"];
            assert_eq!(spec["failurePolicy"], "Fail", "{policy}");
            let judged = &spec["matchConstraints"]["resourceRules"][0]["resources"];
            assert_eq!(judged, &serde_json::json!(["serviceaccounts/token"]), "{policy}");
        }
        let parameters =
            &objects["ValidatingAdmissionPolicyBinding /kube2ram-token-pods"]["spec"]["paramRef"];
        let of_all_pods = serde_json::json!({ "selector": {}, "parameterNotFoundAction": "Deny" });
        assert_eq!(parameters, &of_all_pods);
    }
    assert!(with >= 3 && without > 10, "with it {with}, without it {without}");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_right_to_get_service_accounts_comes_with_what_reads_them() {
    let mut found = BTreeSet::new();
    for yaml in renderings() {
        let objects = objects(&yaml);
        let container = &template(&objects)["containers"][0];
        let Some(role) = objects.get("ClusterRole /kube2ram") else { continue };
        let of_accounts = |rule: &&Value| rule["resources"] == serde_json::json!(["serviceaccounts"]);
        let granted = role["rules"].as_array().unwrap().iter().find(of_accounts);
        let granted = granted.map(|rule| strings(&rule["verbs"]));

        let by_flag = strings(&container["args"]).iter().any(|arg| arg == "--service-account-roles");
        let requester = variables(container).remove("KUBE2RAM_TOKEN_REQUESTS_AS");
        // Of agents by another way, as tokenRights has it.
        let has_policies = objects.contains_key("ValidatingAdmissionPolicy /kube2ram-token-requests");
        let needs_it = by_flag || requester.as_deref() == Some("agent") || has_policies;
        assert_eq!(granted, needs_it.then(|| vec!["get".to_owned()]), "{container}");
        found.insert(granted.is_some());
    }
    assert_eq!(found.len(), 2, "with and without");
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn rights_and_policies_have_the_audience_that_the_agent_requests() {
    let (ours, theirs) = (alibaba::DIALECT.audience, aws::DIALECT.audience);
    for (resource, components, audience, other) in [
        ("base", &["service-accounts"][..], ours, theirs),
        ("base", &["service-accounts-by-policy"], ours, theirs),
        ("base", &["service-accounts-by-namespace"], ours, theirs),
        ("overlays/aws", &["service-accounts", "service-accounts-aws"], theirs, ours),
        ("overlays/aws", &["service-accounts-by-policy", "service-accounts-aws"], theirs, ours),
        ("overlays/aws", &["service-accounts-by-namespace", "service-accounts-aws"], theirs, ours),
    ] {
        let objects = objects(&composed(resource, components));
        let of_tokens = objects.iter().filter(|(name, _)| {
            ["ClusterRole /kube2ram-audience", "ValidatingAdmissionPolicy /kube2ram-token-requests"]
                .contains(&name.as_str())
        });
        let of_tokens: Vec<_> = of_tokens.map(|(_, object)| object.to_string()).collect();
        assert_eq!(of_tokens.len(), 1, "{components:?}");
        assert!(of_tokens[0].contains(audience) && !of_tokens[0].contains(other), "{}", of_tokens[0]);
        let env = variables(&template(&objects)["containers"][0]);
        assert_eq!(env.contains_key("KUBE2RAM_OIDC_PROVIDER_ARN"), audience == ours, "{components:?}");
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_probes_ask_as_the_agent_is_configured() {
    let objects = objects(&helm(&["--set=flags.state-dir=/run/k2r,flags.pod-dir=/run/pod"]).unwrap());
    let container = &template(&objects)["containers"][0];
    let of = |probe: &str| {
        let mut args = strings(&container[probe]["exec"]["command"]);
        args[0] = AGENT.to_owned();
        Command::from_args(args.into_iter().map(Into::into), &|_| None).unwrap()
    };
    let told = SocketPaths::new(Path::new("/run/pod"), Path::new("/run/k2r"));

    let (ready, live) = (of("readinessProbe"), of("livenessProbe"));

    let Command::Ready(paths) = ready else { panic!("{ready:?}") };
    assert_eq!(paths, told);
    let Command::Live(paths) = live else { panic!("{live:?}") };
    assert_eq!(paths, told);
    for probe in ["readinessProbe", "livenessProbe"] {
        let args = strings(&container[probe]["exec"]["command"]);
        assert_eq!(args[2..], ["--pod-dir=/run/pod", "--state-dir=/run/k2r"]);
    }
    let Ok(Command::Agent(config)) = parsed(container) else { panic!("{container}") };
    assert_eq!((&*config.state_dir, &*config.pod_dir), (Path::new("/run/k2r"), Path::new("/run/pod")));
    let mounts = container["volumeMounts"].as_array().unwrap();
    for path in ["/run/k2r", "/run/pod"] {
        assert!(mounts.iter().any(|mount| mount["mountPath"] == path), "{mounts:?}");
    }
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
        let configured = alibaba::base::Configured::from_env(|name| env.get(name).cloned(), "node").unwrap();
        let alibaba::base::Configured::Oidc(settings) = configured else { panic!("{configured:?}") };
        assert_token(template, "rrsa-token", "sts.aliyuncs.com", &settings.token_file);
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn on_aws_oidc_is_rendered_as_the_agent_takes_it_or_not_at_all() {
    let enabled = "cloud=aws,oidc.enabled=true";
    let role = "oidc.roleArn=arn:aws-cn:iam::123456789012:role/agents/kube2ram";

    let without_role = helm(&["--set", enabled]).unwrap_err();
    let with_provider =
        helm(&["--set", &format!("{enabled},{role},oidc.providerArn=acs:ram::1:oidc-provider/a")]);
    let rendered = objects(&helm(&["--set", &format!("{enabled},{role}")]).unwrap());

    assert!(without_role.contains("oidc.roleArn"), "{without_role}");
    assert!(with_provider.unwrap_err().contains("oidc.providerArn is for Alibaba Cloud"));
    for objects in [rendered, objects(&kustomized(Some("irsa")))] {
        let template = template(&objects);
        let env = variables(&template["containers"][0]);
        assert!(env.keys().all(|name| !name.starts_with("ALIBABA")), "{env:?}");
        let configured = aws::base::Configured::from_env(|name| env.get(name).cloned(), "node").unwrap();
        let aws::base::Configured::WebIdentity(identity) = configured else { panic!("{configured:?}") };
        assert_token(template, "irsa-token", "sts.amazonaws.com", &identity.token_file);
    }
}

/// The token of this volume is where the agent reads it, for this audience, and for the agent's user alone.
fn assert_token(template: &Value, name: &str, audience: &str, read: &Path) {
    let named = |list: &Value| {
        let found = list.as_array().unwrap().iter().find(|item| item["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {list}")).clone()
    };
    let (volume, mount) = (named(&template["volumes"]), named(&template["containers"][0]["volumeMounts"]));
    let token = &volume["projected"]["sources"][0]["serviceAccountToken"];
    let file = Path::new(mount["mountPath"].as_str().unwrap()).join(token["path"].as_str().unwrap());
    assert_eq!((token["audience"].as_str().unwrap(), &*file), (audience, read));
    // 0400
    assert_eq!((&volume["projected"]["defaultMode"], &mount["readOnly"]), (&256.into(), &true.into()));
}

#[test]
fn all_values_files_are_some_overlays() {
    for variant in VARIANTS {
        assert!(values(variant).is_file(), "{variant}");
    }
    let files = fs::read_dir(deploy().join("helm/values")).unwrap().count();
    assert_eq!(files, VARIANTS.len());
}
