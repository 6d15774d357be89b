//! Rung 2: the containers of the overlays, as in `container`.

use std::fs;

use kube2ram_sandbox::{
    Cloud,
    standin::{OidcTrust, Role},
};
use serde_json::{Value, json};

use super::{
    node::{LIST, Node, PODS, eventually},
    support::{kustomized, objects, template},
};

fn overlay(variant: &str) -> Value {
    template(&objects(&kustomized(Some(variant)))).clone()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_overlays_container_does_the_main_job() {
    for variant in ["debug", "namespace-restrictions", "service-account-roles", "startup-taint"] {
        let mut node = Node::new(&format!("overlay-{variant}"));

        let agent = node.start(&overlay(variant)).unwrap();

        assert_eq!(
            (agent.ready().unwrap().as_str(), agent.live().unwrap().as_str()),
            ("ready", "live"),
            "{variant}"
        );
        node.assert_served();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_overlays_container_for_aws_does_the_main_job() {
    const SUBJECT: &str = "system:serviceaccount:kube-system:kube2ram";
    for variant in ["aws", "irsa"] {
        let mut node = Node::new_in(&format!("overlay-{variant}"), Cloud::Aws);
        if variant == "irsa" {
            // The role of the overlay's ARN; the node's may assume nothing.
            let (provider, issuer) = (Cloud::Aws.cluster_provider(), node.api().issuer());
            let hour = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
            let token = issuer.token(SUBJECT, Cloud::Aws.audience(), hour).unwrap();
            let oidc = Some(OidcTrust::equals(provider, SUBJECT));
            let role = Role { oidc, may_assume: true, ..Role::default() };
            node.accounts().add_role(Cloud::Aws.role_arn("kube2ram"), role);
            node.accounts().deny_node();
            node.surroundings.tokens.insert(Cloud::Aws.audience().to_owned(), token);
        }

        let agent = node.start(&overlay(variant)).unwrap();

        assert_eq!(
            (agent.ready().unwrap().as_str(), agent.live().unwrap().as_str()),
            ("ready", "live"),
            "{variant}"
        );
        node.assert_served();
        let exchanged = node.sts().calls().iter().any(|call| call.action == Cloud::Aws.exchange());
        assert_eq!(exchanged, variant == "irsa", "{variant}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn migrations_container_serves_the_roles_that_the_predecessors_would() {
    let mut node = Node::new("overlay-migration");

    let agent = node.start(&overlay("migration")).unwrap();

    assert_eq!(agent.ready().unwrap(), "ready");
    for pod in PODS {
        assert_eq!(node.ask(pod, LIST).body, format!("{pod}-role"));
    }
    // Without an annotation: the node's own role, because of --auto-discover-default-role.
    let reply = node.ask("plain", LIST);
    assert_eq!(reply.status, 200, "{reply:?}");
    let log = agent.container.log();
    for flag in ["--iptables", "--host-interface"] {
        assert!(log.contains(&format!("{flag} has no effect")), "{log}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_boot_guards_container_reaches_the_host() {
    let mut node = Node::new("overlay-boot-guard");
    let template = overlay("boot-guard");
    for directory in ["etc/systemd/system", "opt"] {
        fs::create_dir_all(node.host_root().join(directory)).unwrap();
    }

    let mut install = node.container(&template, "boot-guard").unwrap();
    install.start().unwrap();
    let ended = install.wait().unwrap();

    // What is not static would not run on the host; a test's binary seldom is.
    let unit = node.host_root().join("etc/systemd/system/kube2ram-boot-guard.service");
    if install.log().contains("this binary is not static") {
        let told = "the boot guard could not be installed: this binary is not static";
        assert!(ended.success() && !unit.exists() && install.log().contains(told), "{}", install.log());
    } else {
        assert!(ended.success() && unit.is_file(), "{}", install.log());
        assert!(node.host_root().join("opt/kube2ram/bin/kube2ram").is_file());
    }
    drop(install);
    let _agent = node.start(&template).unwrap();
    node.assert_served();
}

/// The item of this name in a list of the pod template.
fn named<'a>(list: &'a mut Value, name: &str) -> &'a mut Value {
    list.as_array_mut().unwrap().iter_mut().find(|item| item["name"] == name).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_boot_guards_container_that_fails_leaves_the_reason_to_an_agent_that_serves() {
    // Each container has its own pod here, so the directory that they share is one of the node's.
    let shared = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut node = Node::new("overlay-no-guard");
    fs::create_dir_all(node.host_root().join("usr/lib/systemd")).unwrap();
    node.surroundings.host_paths.insert("/pod".into(), shared.path().to_owned());
    let mut template = overlay("boot-guard");
    *named(&mut template["volumes"], "pod") = json!({ "name": "pod", "hostPath": { "path": "/pod" } });
    let guard = named(&mut template["initContainers"], "boot-guard");
    named(&mut guard["volumeMounts"], "host")["readOnly"] = json!(true);

    let mut install = node.container(&template, "boot-guard").unwrap();
    install.start().unwrap();
    let ended = install.wait().unwrap();
    let said = install.log();
    drop(install);
    let agent = node.start(&template).unwrap();

    assert!(ended.success(), "the kubelet would not start the agent: {ended}: {said}");
    node.assert_served();
    // A binary that is not static is refused before the host's files are touched. A test's seldom is static.
    let is_static = !said.contains("this binary is not static");
    let reason = if is_static { "Read-only file system" } else { "this binary is not static" };
    let status = agent.status();
    let failure = status["boot_guard"]["installation_failure"].as_str().unwrap();
    assert!(failure.contains(reason) && said.contains(failure), "{failure}: {said}");
    let problems = status["problems"].as_array().unwrap();
    assert!(problems.iter().any(|problem| problem["part"] == "boot_guard"), "{status:#}");
    eventually("a metric reports it", || agent.metric("kube2ram_boot_guard_installation_failed") == 1.0);
    let log = agent.container.log();
    assert!(log.contains("the boot guard could not be installed on this node"), "{log}");
}
