//! STS does not answer or throttles: the API server asks again by itself. The webhook is missing: it does
//! not.

use std::{
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{login::UNAUTHORIZED, standin::StsMode};

use super::cluster::{Cluster, eventually};

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_login_outlives_an_outage_of_sts() {
    survives(StsMode::Refuse, "sts_unavailable");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_login_outlives_throttling_by_sts() {
    survives(StsMode::Throttle, "sts_throttled");
}

/// One kubectl logs in while STS fails, and waits until it does not.
fn survives(mode: StsMode, result: &str) {
    let cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let alice = cluster.accounts().add_user("alice");
    assert_eq!(cluster.login(&alice, &[]).unwrap()["username"], "alice");
    // A token of another second is another token.
    thread::sleep(Duration::from_secs(1));
    cluster.sts().set_mode(mode).unwrap();

    let kubeconfig = cluster.plugin(&alice, "v1", &[]).unwrap();
    let mut waiting = cluster.begin_login(&kubeconfig).unwrap();
    eventually("the API server asks again", || {
        assert!(!waiting.has_ended().unwrap(), "kubectl waits");
        cluster.logins(result).unwrap() >= 2
    });
    cluster.sts().set_mode(StsMode::Ok).unwrap();
    let user = waiting.user().unwrap();

    assert_eq!(user["username"], "alice");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_long_outage_is_401_at_last_and_is_not_remembered() {
    let cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let alice = cluster.accounts().add_user("alice");
    let token = cluster.token(&alice, &[]).unwrap();
    cluster.sts().set_mode(StsMode::Unavailable).unwrap();

    let started = Instant::now();
    let refused = cluster.login_with(&token).unwrap_err().to_string();
    let waited = started.elapsed();

    assert!(refused.contains(UNAUTHORIZED), "{refused}");
    let attempts = cluster.logins("sts_unavailable").unwrap();
    // The API server's own limit for a token is 30 s.
    assert!(waited > Duration::from_secs(25), "{waited:?}");
    assert!((2..=11).contains(&attempts), "{attempts}");
    let log = cluster.api_server_log();
    assert!(log.contains("Unable to authenticate the request"), "{log}");
    cluster.sts().set_mode(StsMode::Ok).unwrap();
    assert_eq!(cluster.login_with(&token).unwrap()["username"], "alice", "the same token");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_missing_webhook_is_401_at_once_and_its_return_takes_no_restart_of_the_api_server() {
    let mut cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let alice = cluster.accounts().add_user("alice");
    assert_eq!(cluster.login(&alice, &[]).unwrap()["username"], "alice");

    cluster.stop_server().unwrap();
    thread::sleep(Duration::from_secs(1));
    let started = Instant::now();
    let refused = cluster.login(&alice, &[]).unwrap_err().to_string();
    let waited = started.elapsed();
    cluster.start_server().unwrap();

    assert!(refused.contains(UNAUTHORIZED), "{refused}");
    // Nothing listens: the API server does not ask again, as docs/authenticator/install.md says.
    assert!(waited < Duration::from_secs(5), "{waited:?}");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(cluster.login(&alice, &[]).unwrap()["username"], "alice", "by the CA that it knows");
}
