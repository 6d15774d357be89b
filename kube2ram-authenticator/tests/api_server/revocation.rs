//! A mapping is removed or changed: it counts for new tokens at once, and for those that the API server
//! remembers when it has forgotten them.

use std::time::{Duration, Instant};

use kube2ram_sandbox::login::{UNAUTHORIZED, user_arn};
use serde_json::json;

use super::cluster::{Cluster, eventually};

/// Two minutes unless the flag says otherwise.
const CACHE_TTL: Duration = Duration::from_secs(20);
/// What the API server remembers of every kind of token, in front of the webhook's cache.
const SUCCESS_CACHE_TTL: Duration = Duration::from_secs(10);
const SPARE: Duration = Duration::from_secs(5);

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_removed_mapping_ends_new_logins_at_once_and_others_with_the_api_servers_cache() {
    let ttl = format!("--authentication-token-webhook-cache-ttl={}s", CACHE_TTL.as_secs());
    let cluster = Cluster::start(&["--authentication-token-webhook-version=v1", &ttl]);
    let alice = cluster.accounts().add_user("alice");
    let assume = cluster.assume("dev-orders", "alice");
    let assume = assume.each_ref().map(String::as_str);
    let remembered = cluster.token(&alice, &assume).unwrap();
    cluster.login_with(&remembered).unwrap();
    let logged_in = Instant::now();

    cluster.admin(&["delete", "ramidentitymapping", "developers"]).unwrap();

    // Each kubectl makes a token of its own.
    let new = eventually("a new token is denied", || cluster.login(&alice, &assume).is_err());
    let still = cluster.login_with(&remembered);
    assert!(logged_in.elapsed() < CACHE_TTL, "this machine is too slow for this test");
    still.unwrap();
    eventually("the remembered token is denied", || {
        cluster.login_with(&remembered).is_err_and(|error| error.to_string().contains(UNAUTHORIZED))
    });
    let old = logged_in.elapsed();
    assert!(new < SPARE, "{new:?}");
    assert!(old < CACHE_TTL + SUCCESS_CACHE_TTL + SPARE, "{old:?}");
    assert_eq!(cluster.login(&alice, &[]).unwrap()["username"], "alice", "another mapping of the same user");
}

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_changed_mapping_counts_for_new_tokens_at_once_and_a_remembered_denial_stays() {
    let cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let [alice, bob] = ["alice", "bob"].map(|name| cluster.accounts().add_user(name));
    let assume = cluster.assume("dev-orders", "alice");
    let assume = assume.each_ref().map(String::as_str);
    let remembered = cluster.token(&bob, &[]).unwrap();
    let denied =
        || cluster.login_with(&remembered).is_err_and(|error| error.to_string().contains(UNAUTHORIZED));
    assert!(denied());
    cluster.login(&alice, &assume).unwrap();

    // From the roles dev-* to bob.
    let change = json!({ "spec": { "arn": user_arn("bob"), "username": "bob" } }).to_string();
    cluster
        .admin(&["patch", "ramidentitymapping", "developers", "--type=merge", "--patch", &change])
        .unwrap();

    let new = eventually("bob is let in", || cluster.login(&bob, &[]).is_ok());
    assert!(new < SPARE, "{new:?}");
    assert!(denied(), "for two minutes");
    let role = cluster.login(&alice, &assume).unwrap_err().to_string();
    assert!(role.contains(UNAUTHORIZED), "nothing of the wildcard is left: {role}");
}
