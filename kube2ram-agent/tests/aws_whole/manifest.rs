//! Arguments of kube2iam's published manifests, for an agent under the name of kube2iam. Their containers as
//! a whole are started by `tests/manifests/kube2iam.rs`.

use std::{os::unix::fs::symlink, path::PathBuf};

use kube2ram_sandbox::{
    Cloud, Sandbox,
    client::{Family, Request},
    node::PodSpec,
    standin::{Accounts, Role},
};
use tempfile::TempDir;

use crate::support::{AGENT, INSTANCE_ID, LIST, Lab, pod, role_arn};

/// The arguments of the manifest in kube2iam's README, and of its variant for clusters that discover
/// everything. `--app-port`, `--host-ip=$(HOST_IP)` and `--node=$(NODE_NAME)` are the sandbox's own.
const MANIFESTS: [&[&str]; 2] = [
    &["--base-role-arn=arn:aws:iam::123456789012:role/", "--iptables=true", "--host-interface=docker0"],
    &[
        "--auto-discover-base-arn",
        "--auto-discover-default-role=true",
        "--iptables=true",
        "--host-interface=eni+",
        "--use-regional-sts-endpoint",
    ],
];

/// A link to the agent, as the image has it.
fn link() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("kube2iam");
    symlink(AGENT, &program).unwrap();
    (directory, program)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_arguments_of_kube2iams_manifests_give_pods_their_roles() {
    for args in MANIFESTS {
        let mut lab = Lab::new("aws-kube2iam", &[pod("orders"), PodSpec::new("plain")]);
        lab.accounts().add_role(role_arn(Accounts::NODE_ROLE), Role::default());
        let (_directory, program) = link();
        let agent = lab.add_agent(&program, args).unwrap();
        agent.remove_flag("--cloud");
        agent.set_env("AWS_REGION", Cloud::Aws.region());

        agent.start().unwrap();

        assert_eq!(lab.ask("orders", LIST).body, "orders-role", "{args:?}");
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "{args:?}");
        assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403", "{args:?}");
        let own_keys = format!("{LIST}{}", Accounts::NODE_ROLE);
        if args.contains(&"--auto-discover-default-role=true") {
            // By a session of its own.
            assert_eq!(lab.ask("plain", LIST).body, Accounts::NODE_ROLE, "{args:?}");
            let caller = lab.caller(&lab.ask_until_ready("plain", &own_keys));
            let session = format!("assumed-role/{}/default.default", Accounts::NODE_ROLE);
            assert!(caller.ends_with(&session), "{args:?}: not the node's key: {caller}");
        } else {
            assert_eq!(lab.ask("plain", LIST).status, 404, "{args:?}");
            assert_eq!(lab.ask("plain", &own_keys).status, 404, "{args:?}");
        }
        assert_eq!(lab.ask("orders", INSTANCE_ID).body, Cloud::Aws.instance_id(), "{args:?}");
        // A region need not be asked for.
        let calls = lab.sts().calls();
        assert!(calls.iter().all(|call| call.outcome == "OK"), "{calls:?}");
        let log = lab.agent().unwrap().log();
        for flag in ["--iptables has no effect", "--host-interface has no effect"] {
            assert_eq!(log.matches(flag).count(), 1, "{log}");
        }
        assert_eq!(lab.leaks(), []);
        assert!(lab.agent().unwrap().terminate().unwrap().success());
    }
}

/// Two DaemonSets of kube2iam's README name no node.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_that_no_argument_names_has_the_machines_name_if_the_api_server_confirms_it() {
    // For the agent alone.
    const RENAME: &str = r#"echo "$1" > /proc/sys/kernel/hostname && shift && exec "$@""#;
    for machine in [Sandbox::NODE, "another-node"] {
        let mut lab = Lab::new("aws-kube2iam-node", &[pod("orders")]);
        lab.apply_host_pod().unwrap();
        let (_directory, program) = link();
        let agent = lab.add_agent(&program, &["--auto-discover-base-arn"]).unwrap();
        agent.remove_flag("--cloud");
        agent.remove_flag("--node");
        agent.set_wrapper(&["unshare", "--uts", "--", "sh", "-c", RENAME, "sh", machine]);

        if machine == Sandbox::NODE {
            agent.start().unwrap();
            assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
        } else {
            agent.spawn().unwrap();
            let ended = agent.wait().unwrap();
            assert_eq!(ended.code(), Some(64), "{}", agent.log());
            assert!(agent.log().contains("no pod of a node another-node"), "{}", agent.log());
        }
        assert!(lab.agent().unwrap().log().contains("--node is not set"));
    }
}

/// As the kubelet probes kube2iam's chart, at the port that pods can reach.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_app_port_tells_the_node_alone_that_the_agent_answers() {
    let mut lab = Lab::new("aws-kube2iam-health", &[pod("orders"), pod("daemon").host_network()]);
    let (_directory, program) = link();
    lab.add_agent(&program, &["--auto-discover-base-arn"]).unwrap().start().unwrap();
    let agent = lab.agent().unwrap().app_addr();
    let health = format!("http://{agent}/healthz");

    let healthy = Request::get(&health).send().unwrap();

    assert_eq!((healthy.status, healthy.body.as_str()), (200, "ok\n"));
    assert_eq!(lab.agent().unwrap().metric("kube2ram_unvouched_connections_total").unwrap(), 0.0);
    for target in [LIST, "/metrics", "/readyz", "/healthz/"] {
        assert_eq!(Request::get(format!("http://{agent}{target}")).send().unwrap().status, 403, "{target}");
    }
    // Pods are asked who they are, and get what the metadata server has at that path.
    for pod in ["orders", "daemon"] {
        let reply = lab.pod(pod).unwrap().curl_from("app", Family::V4, &health).unwrap();
        assert_eq!(reply.status, 404, "{pod}: {reply:?}");
        assert_eq!(lab.credentials(pod, &format!("{pod}-role")), format!("{pod}-role"));
    }
    // A process of a pod that dials another address of the node has no record, and is no probe.
    let daemon = lab.pod("daemon").unwrap();
    let loopback = format!("http://127.0.0.1:{}/healthz", agent.port());
    assert_eq!(daemon.curl_from("app", Family::V4, &loopback).unwrap().status, 403);
}
