//! The ways in which operators run it: other base credentials, hardened mode, and the predecessors' manifests
//! as they stand.

use std::{fs, io::ErrorKind, net::TcpListener};

use kube2ram_sandbox::{
    node::PodSpec,
    standin::{Accounts, Authority, Role, Tokens},
};

use crate::support::{INSTANCE_ID, LIST, Lab, eventually, run, url};

fn orders() -> PodSpec {
    PodSpec::new("orders").role("orders-role")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn static_keys_of_the_environment_sign_instead_of_the_nodes_role() {
    for (id, secret) in [
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"),
        ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET"),
    ] {
        let mut lab = Lab::new("static-keys", &[orders()]);
        let key = lab.accounts().add_user("kube2ram");
        lab.prepare(&[]);
        let agent = lab.agent().unwrap();
        agent.set_env(id, &key.id);
        agent.set_env(secret, &key.secret);
        agent.start().unwrap();

        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

        let signers = lab.sts().calls().into_iter().map(|call| call.access_key_id).collect::<Vec<_>>();
        assert_eq!(signers, [key.id], "{id}");
        let asked = lab.metadata().seen();
        assert!(!asked.iter().any(|seen| seen.target.contains("security-credentials")), "{asked:?}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn half_a_pair_of_static_keys_stops_the_agent_instead_of_the_nodes_role_stepping_in() {
    let mut lab = Lab::new("half-a-key", &[orders()]);
    lab.prepare(&[]);
    lab.agent().unwrap().set_env("ALIBABA_CLOUD_ACCESS_KEY_ID", "LTAI.half");

    let error = lab.agent().unwrap().start().unwrap_err().to_string();

    assert!(error.contains("ALIBABA_CLOUD_ACCESS_KEY_SECRET is not"), "{error}");
}

/// On a node where nothing is attached yet: whoever may not be asked for credentials must not leave the
/// node's to pods.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_cannot_ask_sts_ends_and_leaves_pods_denied() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty.pem");
    fs::write(&empty, "").unwrap();
    for (name, value, said) in [
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "LTAI.half", "ALIBABA_CLOUD_ACCESS_KEY_SECRET is not"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE"),
        ("SSL_CERT_FILE", empty.to_str().unwrap(), "SSL_CERT_FILE"),
    ] {
        let mut lab = Lab::new("no-sts", &[orders()]);
        assert_eq!(lab.ask("orders", LIST).body, Accounts::NODE_ROLE, "before the first agent");
        lab.prepare(&[]);
        let plain = lab.sts().url();
        let before = lab.leaks().len();
        let agent = lab.agent().unwrap();
        agent.remove_flag("--sts-endpoint");
        agent.set_env(name, value);
        // A machine may have it set.
        agent.set_env("SSL_CERT_DIR", directory.path().to_str().unwrap());

        let error = agent.start().unwrap_err().to_string();

        assert!(error.contains(said), "{error}");
        lab.assert_refused("orders");
        assert_eq!(lab.leaks()[before..], [], "{said}");
        if name == "SSL_CERT_FILE" {
            // Over plain HTTP no certificate is needed.
            let agent = lab.agent().unwrap();
            agent.add_arg(&format!("--sts-endpoint={plain}"));
            agent.start().unwrap();
            assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_variable_leads_the_agent_through_a_proxy() {
    let mut lab = Lab::new("env-proxy", &[orders(), PodSpec::new("billing").role("billing-role")]);
    // Nobody serves there: each connection waits until it is accepted here.
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let accepted = || proxy.accept().map(drop).map_err(|error| error.kind());
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let names = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    // A machine may exempt the loopback device, where the stand-ins are.
    let exemptions = [("NO_PROXY", ""), ("no_proxy", "")];
    let variables: Vec<_> = names.iter().map(|name| (*name, &*address)).chain(exemptions).collect();
    let authority = Authority::new().unwrap();
    let upstream = lab.sts().url().trim_start_matches("http://").parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = authority.front(listener, upstream, &["127.0.0.1"]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let bundle = directory.path().join("ca.pem");
    fs::write(&bundle, authority.pem()).unwrap();
    lab.prepare(&[]);
    let agent = lab.agent().unwrap();
    agent.set_env("SSL_CERT_FILE", bundle.to_str().unwrap());
    for (name, value) in &variables {
        agent.set_env(name, value);
    }

    agent.start().unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("the agent uses no proxy").count(), 1, "{log}");
    let agent = lab.agent().unwrap();
    agent.terminate().unwrap();
    agent.remove_flag("--sts-endpoint");
    agent.add_arg(&format!("--sts-endpoint=https://{}", front.addr()));
    agent.start().unwrap();
    eventually("billing-role".to_owned(), || lab.credentials("billing", "billing-role"));

    assert_eq!(accepted(), Err(ErrorKind::WouldBlock), "the agent has not connected to the proxy");
    let mut curl = lab.node().host_command("curl");
    curl.envs(variables.iter().copied());
    run(curl.args(["--silent", "--max-time", "1", &lab.sts().url()]));
    assert_eq!(accepted(), Ok(()), "the control: curl obeys the variables");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn hardened_mode_changes_nothing_for_pods() {
    let pods = [orders(), PodSpec::new("cni").host_network()];
    let mut lab = Lab::new("hardened", &pods);
    lab.metadata().set_tokens(Tokens::Required);
    lab.start(&[]);
    assert_eq!(lab.host_curl(INSTANCE_ID).unwrap().status, 403, "the real server is in hardened mode");

    // Twice: before and after the real server has forgotten the agent's token.
    for _ in 0..2 {
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
        assert_eq!(lab.ask("orders", INSTANCE_ID).status, 200, "without a token");
        assert_eq!(lab.credentials("cni", Accounts::NODE_ROLE), Accounts::NODE_ROLE);
        lab.metadata().forget_tokens();
    }

    // As the SDKs do it.
    let script = format!(
        "token=$(curl -sf -X PUT -H 'X-aliyun-ecs-metadata-token-ttl-seconds: 60' {}) && \
         for item in {} {}; do curl -sf -H \"X-aliyun-ecs-metadata-token: $token\" $item; echo; done",
        url("/latest/api/token"),
        url(LIST),
        url(INSTANCE_ID)
    );
    let sdk = run(lab.pod("orders").unwrap().pod().command("app", "sh").unwrap().args(["-c", &script]));
    assert_eq!(sdk, (Some(0), "orders-role\ni-bp1sandbox0000000001".into()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_predecessors_manifest_starts_it_as_it_stands() {
    let mut lab = Lab::new("predecessor", &[orders(), PodSpec::new("plain")]);
    lab.accounts().add_role(Accounts::role_arn(Accounts::NODE_ROLE), Role::default());
    // Its ports and addresses come from the sandbox: `--app-port=<port>`, `--host-ip=<address>`,
    // `--node=<name>`.
    lab.start(&["--iptables=true", "--host-interface=cni0", "--verbose", "--auto-discover-default-role"]);

    assert_eq!(lab.ask("plain", LIST).body, Accounts::NODE_ROLE);
    let credentials = lab.ask("plain", &format!("{LIST}{}", Accounts::NODE_ROLE));
    let session = format!("assumed-role/{}/default.default", Accounts::NODE_ROLE);
    assert!(lab.caller(&credentials).ends_with(&session), "a session of its own, not the node's key");
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403");
    let log = lab.agent().unwrap().log();
    for flag in ["--iptables has no effect", "--host-interface has no effect"] {
        assert_eq!(log.matches(flag).count(), 1, "{log}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_environment_of_the_predecessors_manifest_stands_for_flags() {
    let mut lab = Lab::new("environment", &[orders()]);
    lab.prepare(&[]);
    let agent = lab.agent().unwrap();
    // The command line wins; what it leaves open is taken.
    agent.set_env("HOST_IP", "192.0.2.1");
    agent.set_env("NODE_NAME", "another-node");
    agent.set_env("KUBE2RAM_LOG_FORMAT", "json");
    agent.start().unwrap();

    assert_eq!(lab.ask("orders", LIST).body, "orders-role");
    let log = lab.agent().unwrap().log();
    assert!(log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{log}");
}
