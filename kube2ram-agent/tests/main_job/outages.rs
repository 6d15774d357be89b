//! The API server, the metadata server or STS is away: what is known keeps working, the rest is told to ask
//! again, within the time that SDKs wait. Nobody ever falls back to another role.

use std::time::Duration;

use http::StatusCode;
use kube2ram_sandbox::{
    node::PodSpec,
    standin::{Accounts, MetadataMode, Role, StsMode},
};

use crate::support::{
    ALLOW_LIST, INSTANCE_ID, LIST, Lab, assert_in_time, assert_no_secrets, assert_try_again, eventually,
    owner,
};

fn orders() -> PodSpec {
    PodSpec::new("orders").role("orders-role")
}

/// Starts the agent and waits until pods reach it, but not until it is ready.
fn start_unready(lab: &mut Lab, extra: &[&str]) {
    lab.prepare(extra);
    lab.agent().unwrap().spawn().unwrap();
    eventually(Some(503), || lab.agent().unwrap().admin("/readyz").ok().map(|reply| reply.status));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_api_server_that_is_away_at_the_start_is_waited_for() {
    let mut lab = Lab::new("api-start", &[orders(), PodSpec::new("plain")]);
    lab.api().down();
    start_unready(&mut lab, &["--default-role=orders-role"]);

    for pod in ["orders", "plain"] {
        assert_try_again(&lab.ask(pod, LIST));
        assert_try_again(&lab.ask(pod, &format!("{LIST}orders-role")));
    }
    assert_eq!(lab.agent().unwrap().live().unwrap(), "live", "a restart would not help");

    lab.api().up().unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
    eventually(200, || lab.agent().unwrap().admin("/readyz").unwrap().status);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_api_server_that_goes_away_later_is_missed_by_new_pods_only() {
    let mut lab =
        Lab::with_agent("api-later", &[orders(), PodSpec::new("billing").role("billing-role")], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    lab.api().down();
    lab.add(&PodSpec::new("late").role("late-role"));

    assert_try_again(&lab.ask("late", LIST));
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.credentials("billing", "billing-role"), "billing-role", "known, though it never asked");

    lab.api().up().unwrap();
    eventually("late-role".to_owned(), || lab.credentials("late", "late-role"));
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_metadata_server_that_is_away_at_the_start_is_waited_for() {
    let mut lab = Lab::new("metadata-start", &[orders()]);
    lab.metadata().set_mode(MetadataMode::Down).unwrap();
    start_unready(&mut lab, &[]);

    for target in [LIST, &format!("{LIST}orders-role"), &format!("{LIST}{}", Accounts::NODE_ROLE)] {
        assert_try_again(&lab.ask("orders", target));
    }
    let passed = lab.ask("orders", INSTANCE_ID);
    assert_eq!(passed.status, 502);
    assert_in_time(&passed);

    lab.metadata().set_mode(MetadataMode::Up).unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
    assert_eq!(lab.ask("orders", INSTANCE_ID).status, 200);
}

/// docs/install.md, "Nodes without a metadata server".
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_without_a_metadata_server_is_served_by_an_agent_that_discovers_nothing() {
    let pods = [orders(), PodSpec::new("daemon").role("daemon-role").host_network(), PodSpec::new("plain")];
    let mut lab = Lab::new("metadata-none", &pods);
    lab.metadata().set_mode(MetadataMode::Down).unwrap();
    // The control: with the flag of the manifests, the agent waits for the metadata server.
    start_unready(&mut lab, &[]);
    assert_try_again(&lab.ask("orders", &format!("{LIST}orders-role")));
    lab.agent().unwrap().terminate().unwrap();

    let key = lab.accounts().add_user("kube2ram");
    let agent = lab.agent().unwrap();
    // The sandbox has set `--sts-endpoint`.
    agent.remove_flag("--auto-discover-base-arn");
    agent.add_arg(&format!("--base-role-arn={}", Accounts::role_arn("")));
    agent.set_env("ALIBABA_CLOUD_ACCESS_KEY_ID", &key.id);
    agent.set_env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", &key.secret);
    agent.start().unwrap();

    assert_eq!(lab.agent().unwrap().ready().unwrap(), "ready");
    for pod in ["orders", "daemon"] {
        let role = format!("{pod}-role");
        eventually(role.clone(), || lab.credentials(pod, &role));
    }
    assert_eq!(lab.ask("plain", LIST).status, 404);
    let calls = lab.sts().calls();
    assert!(calls.iter().all(|call| call.access_key_id == key.id), "{calls:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_metadata_server_that_goes_away_later_leaves_cached_credentials_alone_and_is_in_the_status() {
    let mut lab = Lab::with_agent("metadata-later", &[orders()], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    for (mode, status) in [(MetadataMode::Down, 502), (MetadataMode::Slow(Duration::from_secs(5)), 504)] {
        lab.metadata().set_mode(mode).unwrap();

        let passed = lab.ask("orders", INSTANCE_ID);
        assert_eq!(passed.status, status, "{mode:?}");
        assert_in_time(&passed);
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "{mode:?}");
        let (code, status) = lab.document(&["status"]);
        let (server, problem) = (&status["metadata_server"], &status["problems"][0]);
        assert_eq!((code, &problem["part"]), (Some(1), &"metadata_server".into()), "{mode:?}: {status:#}");
        assert!(server["failing_since"].is_string() && server["answered_at"].is_string(), "{server}");
        let (address, what) = (server["address"].as_str().unwrap(), problem["what"].as_str().unwrap());
        assert!(address.starts_with("100.100.100.200:80") && what.contains(address), "{what}");
    }

    lab.metadata().set_mode(MetadataMode::Up).unwrap();
    eventually(200, || lab.ask("orders", INSTANCE_ID).status);
    let (code, status) = lab.document(&["status"]);
    assert_eq!((code, &status["metadata_server"]["failing_since"]), (Some(0), &serde_json::Value::Null));
}

/// A pod for each fault, since failures are remembered for each role session.
const FAULTS: &[(&str, StsMode)] = &[
    ("broken", StsMode::Error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError")),
    ("refuse", StsMode::Refuse),
    ("slow", StsMode::Slow(Duration::from_secs(3))),
    ("throttle", StsMode::Throttle),
    ("unavailable", StsMode::Unavailable),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_sts_that_cannot_answer_now_is_a_503_and_spoils_nothing_that_is_cached() {
    let mut pods =
        FAULTS.iter().map(|(name, _)| PodSpec::new(name).role(&format!("{name}-role"))).collect::<Vec<_>>();
    pods.push(orders());
    let lab = Lab::with_agent("sts-away", &pods, &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    for (pod, mode) in FAULTS {
        lab.sts().set_mode(mode.clone()).unwrap();

        let reply = lab.ask(pod, &format!("{LIST}{pod}-role"));
        println!(
            "{pod}: {} after {} µs, Retry-After {:?}",
            reply.status,
            reply.latency_us,
            reply.headers.get("retry-after")
        );
        assert_try_again(&reply);
        assert_eq!(lab.ask(pod, LIST).status, 200, "{pod}: the name needs no STS");
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "{pod}: cached");
    }

    lab.sts().set_mode(StsMode::Ok).unwrap();
    for (pod, _) in FAULTS {
        eventually(format!("{pod}-role"), || lab.credentials(pod, &format!("{pod}-role")));
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_refusal_by_sts_is_a_403_that_is_remembered_and_reported() {
    let pods = ["stranger", "missing", "orders"].map(|name| PodSpec::new(name).role(&format!("{name}-role")));
    let lab = Lab::with_agent("sts-denies", &pods, &[]);
    let [stranger, missing] = ["stranger-role", "missing-role"].map(Accounts::role_arn);
    lab.accounts().add_role(&stranger, Role { trusts_node: false, ..Role::default() });
    lab.accounts().remove_role(&missing);

    for _ in 0..3 {
        for pod in ["stranger", "missing"] {
            let reply = lab.ask(pod, &format!("{LIST}{pod}-role"));
            assert_eq!((owner(&reply), reply.body.trim()), ("403".into(), "the role cannot be assumed"));
            assert_in_time(&reply);
        }
    }

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!((lab.sts().assumed(&stranger).len(), lab.sts().assumed(&missing).len()), (1, 1));
    let told = |pod: &str| lab.api().events().iter().any(|event| event["regarding"]["name"] == pod);
    eventually((true, true, false), || (told("stranger"), told("missing"), told("orders")));
}

/// Where the sandbox's own state directory may be on a disk, which a snapshot must not be.
fn state_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("kube2ram-test").tempdir_in("/dev/shm").unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_restarts_while_the_api_server_is_away_serves_the_pods_that_were_known() {
    let state = state_dir();
    let flag = format!("--state-dir={}", state.path().display());
    let pods = [orders(), PodSpec::new("locked").role("locked-role"), PodSpec::new("gone").role("gone-role")];
    let mut lab = Lab::with_agent("api-restart", &pods, &[&flag, "--namespace-restrictions"]);
    lab.api().apply_namespace("default", &[(ALLOW_LIST, r#"["orders-role", "gone-role"]"#)]).unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
    assert_eq!(lab.credentials("locked", "locked-role"), "403");

    lab.api().down();
    lab.agent().unwrap().terminate().unwrap();
    lab.remove_pod("gone").unwrap();
    lab.agent().unwrap().spawn().unwrap();
    eventually(Some(503), || lab.agent().unwrap().admin("/readyz").ok().map(|reply| reply.status));
    lab.add(&PodSpec::new("late").role("orders-role"));

    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
    assert_eq!(lab.credentials("locked", "locked-role"), "403", "the allow-list is known too");
    assert_try_again(&lab.ask("late", LIST));
    assert_eq!(lab.metric("kube2ram_kubernetes_restored_pods"), 3.0, "two of these, and the agent's own");
    let text = std::fs::read_to_string(state.path().join("snapshot")).unwrap();
    assert!(text.contains("orders-role"));
    assert_no_secrets(&text);

    lab.api().up().unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("late", "orders-role"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_snapshot_that_is_cut_is_ignored_and_reported() {
    let state = state_dir();
    let flag = format!("--state-dir={}", state.path().display());
    let mut lab = Lab::with_agent("api-damaged", &[orders()], &[&flag]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    lab.agent().unwrap().terminate().unwrap();
    let path = state.path().join("snapshot");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    lab.api().down();

    lab.agent().unwrap().spawn().unwrap();
    eventually(Some(503), || lab.agent().unwrap().admin("/readyz").ok().map(|reply| reply.status));

    assert_try_again(&lab.ask("orders", &format!("{LIST}orders-role")));
    assert!(lab.agent().unwrap().log().contains("snapshot ignored"));
    lab.api().up().unwrap();
    eventually("orders-role".to_owned(), || lab.credentials("orders", "orders-role"));
}
