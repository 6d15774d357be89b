//! Tokens that must not be taken: 401, and one question to the webhook at most.

use jiff::{SignedDuration, Timestamp};
use kube2ram_sandbox::{
    login::{self, UNAUTHORIZED, tampered, token_of},
    standin::{AccessKey, Principal},
};

use super::cluster::Cluster;

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn intruders_get_401_and_the_webhook_is_asked_once() {
    let cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let [alice, bob] = ["alice", "bob"].map(|name| cluster.accounts().add_user(name));
    let assume = cluster.assume("billing", "alice");
    let assume = assume.each_ref().map(String::as_str);
    let now = Timestamp::now;
    let guessed = AccessKey { secret: "guessed".into(), ..alice.clone() };
    let invented =
        AccessKey { id: "LTAI.nobody".into(), principal: Principal::User("nobody".into()), ..alice.clone() };
    let minutes = SignedDuration::from_mins;
    let genuine = token_of(login::Cluster::ID, &alice, now());
    // Almost a quarter of an hour ago, and just before that.
    let late = token_of(login::Cluster::ID, &alice, now() - minutes(14));
    let too_late = token_of(login::Cluster::ID, &alice, now() - minutes(15) - SignedDuration::from_secs(1));

    for (what, token) in [("the twin", &genuine), ("the twin in its last minute", &late)] {
        assert_eq!(cluster.login_with(token).unwrap()["username"], "alice", "{what}");
    }
    for (who, token, result) in [
        ("a user who is not mapped", token_of(login::Cluster::ID, &bob, now()), "unknown_user"),
        ("a role that is not mapped", cluster.token(&alice, &assume).unwrap(), "unknown_user"),
        ("a token of another cluster", token_of("another-cluster", &alice, now()), "other_cluster"),
        // STS judges the first few: the wrong clock might be the server's.
        ("a token that is replayed after its window", too_late, "sts_refused"),
        ("a token from the future", token_of(login::Cluster::ID, &alice, now() + minutes(16)), "sts_refused"),
        ("a wrong secret", token_of(login::Cluster::ID, &guessed, now()), "sts_refused"),
        ("an invented key", token_of(login::Cluster::ID, &invented, now()), "sts_refused"),
        ("the key of another user", tampered(&genuine, &alice.id, &bob.id).unwrap(), "sts_refused"),
        ("another action", tampered(&genuine, "GetCallerIdentity", "AssumeRole").unwrap(), "malformed_token"),
        ("a token that ends early", genuine[..genuine.len() - 8].to_owned(), "malformed_token"),
        ("a token of another issuer", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln".to_owned(), "foreign_token"),
    ] {
        let before = cluster.logins(result).unwrap();
        for attempt in ["first", "second"] {
            let refused = cluster.login_with(&token).unwrap_err().to_string();
            assert!(refused.contains(UNAUTHORIZED), "{who}, {attempt}: {refused}");
        }
        // The API server remembers a denial: the second attempt did not come to the webhook.
        assert_eq!(cluster.logins(result).unwrap() - before, 1, "{who}: {}", cluster.server_log());
    }

    // Those who hold the plugin get the same.
    for (key, flags) in [(&bob, &[][..]), (&alice, &assume[..])] {
        let refused = cluster.login(key, flags).unwrap_err().to_string();
        assert!(refused.contains(UNAUTHORIZED), "{refused}");
    }
    assert_eq!(cluster.login(&alice, &[]).unwrap()["username"], "alice", "the twin");
    let log = cluster.api_server_log();
    assert!(!log.contains("failed to make webhook authenticator request"), "{log}");
}
