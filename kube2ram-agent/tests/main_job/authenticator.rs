//! kube2ram-authenticator as a client in a pod: its tokens are those of the pod's role, without any
//! configuration.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use kube2ram_sandbox::{node::PodSpec, standin::Accounts};
use serde_json::Value;

use crate::support::{Lab, eventually};

const CLUSTER: &str = "c-of-this-test";

/// Where cargo puts it: next to the agent.
fn authenticator() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_kube2ram")).with_file_name("kube2ram-authenticator");
    assert!(path.is_file(), "it is not built: cargo build --package kube2ram-authenticator");
    path
}

/// Runs `token` in a pod's container, with PATH as its whole environment.
fn token(lab: &Lab, pod: &str) -> Output {
    let mut command = lab.pod(pod).unwrap().pod().command("app", "env").unwrap();
    command.args(["-i", "PATH=/usr/bin:/bin"]).arg(authenticator());
    command.args(["token", "--cluster-id", CLUSTER]).stdin(Stdio::null()).output().unwrap()
}

/// Who a token is, by the authenticator's own verification against STS.
fn verified(lab: &Lab, token: &str) -> Value {
    let mut command = Command::new(authenticator());
    command.args(["verify", "--cluster-id", CLUSTER, "--token", token, "--output=json"]);
    let output = command.args(["--sts-endpoint", &lab.sts().url()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_made_in_a_pod_without_any_configuration_is_of_the_pods_role() {
    let pods = [PodSpec::new("orders").role("orders-role"), PodSpec::new("billing").role("billing-role")];
    let lab = Lab::with_agent("authenticator", &pods, &[]);

    for pod in ["orders", "billing"] {
        let role = format!("{pod}-role");
        // On a busy machine, the agent may answer that the first credentials take longer.
        eventually(role.clone(), || lab.credentials(pod, &role));

        let made = token(&lab, pod);

        assert!(made.status.success(), "{pod}: {}", String::from_utf8_lossy(&made.stderr));
        let document: Value = serde_json::from_slice(&made.stdout).unwrap();
        let identity = verified(&lab, document["status"]["token"].as_str().unwrap());
        let arn = Accounts::role_arn(&role);
        assert_eq!(identity["CanonicalARN"], arn, "{identity}");
        // The session is the one that the agent has assumed.
        let assumed = lab.sts().assumed(&arn);
        let session = assumed[0].param("RoleSessionName").unwrap();
        assert_eq!(identity["SessionName"], session, "{identity}");
        let calls = lab.sts().calls();
        let call = calls.iter().rfind(|call| call.action == "GetCallerIdentity").unwrap();
        assert!(call.outcome == "OK" && call.access_key_id.starts_with(&format!("STS.{role}.")), "{call:?}");
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn in_a_pod_without_a_role_there_is_no_token_and_the_client_says_why() {
    let lab = Lab::with_agent(
        "authenticator-none",
        &[PodSpec::new("plain"), PodSpec::new("orders").role("orders-role")],
        &[],
    );

    let refused = token(&lab, "plain");

    let why = String::from_utf8(refused.stderr).unwrap();
    assert_eq!((refused.status.code(), refused.stdout.is_empty()), (Some(1), true), "{why}");
    assert!(why.contains("found no credentials") && why.contains("attach a role to this machine"), "{why}");
    eventually(true, || token(&lab, "orders").status.success());
    assert_eq!(lab.leaks(), []);
}
