//! Users and roles become whom they are mapped to, by each version of the webhook's API.

use jiff::Timestamp;
use kube2ram_sandbox::{
    login::{self, UNAUTHORIZED, token_of, user_arn},
    standin::Accounts,
};
use serde_json::{Value, json};

use super::cluster::{Cluster, eventually};

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn users_and_roles_become_whom_they_are_mapped_to_by_v1() {
    logins_by("v1");
}

/// The API server's default.
#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn users_and_roles_become_whom_they_are_mapped_to_by_v1beta1() {
    logins_by("v1beta1");
}

/// Both by the webhook's API and by the plugin's.
fn logins_by(version: &str) {
    let cluster = Cluster::start(&[&format!("--authentication-token-webhook-version={version}")]);
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| cluster.accounts().add_user(name));
    let account = Accounts::UID;
    let assume = cluster.assume("dev-orders", "alice@laptop");
    let assume = assume.each_ref().map(String::as_str);
    let login = |key, flags: &[&str]| {
        cluster.begin_login(&cluster.plugin(key, version, flags).unwrap()).unwrap().user()
    };

    // By the configuration file.
    let user = login(&alice, &[]).unwrap();
    assert_eq!(
        user,
        json!({
            "username": "alice", "uid": format!("ack-ram-authenticator:{account}:200000000000000000"),
            "groups": ["developers", "system:authenticated"],
            "extra": {
                "arn": [user_arn("alice")], "canonicalArn": [user_arn("alice")], "sessionName": [""],
            },
        })
    );

    // By the RAMIdentityMapping: a role, and its session's name.
    let user = login(&alice, &assume).unwrap();
    assert_eq!(user["username"], format!("ram:{account}:alice-laptop"), "{user}");
    assert_eq!(user["groups"], json!(["developers", "system:authenticated"]));
    assert_eq!(
        user["extra"],
        json!({
            "arn": [format!("acs:ram::{account}:assumed-role/dev-orders/alice@laptop")],
            "canonicalArn": [Accounts::role_arn("dev-orders")], "sessionName": ["alice@laptop"],
        })
    );

    // The same by a token in the form of ack-ram-tool, with keys that STS has issued.
    let issued = cluster.accounts().add_session("dev-orders", "alice@laptop");
    let by_another_client =
        cluster.login_with(&token_of(login::Cluster::ID, &issued, Timestamp::now())).unwrap();
    assert_eq!(by_another_client, user);

    // By the ConfigMap.
    assert_eq!(login(&carol, &[]).unwrap()["groups"], json!(["auditors", "system:authenticated"]));

    // RBAC knows the groups, and the audit log the ARN. Nobody fills the aggregated role view here.
    cluster.admin(&["create", "clusterrole", "pods", "--verb=list", "--resource=pods"]).unwrap();
    let binding = ["create", "clusterrolebinding", "pods", "--clusterrole=pods", "--group=developers"];
    cluster.admin(&binding).unwrap();
    let pods = |key| cluster.kubectl(&cluster.plugin(key, version, &[]).unwrap(), &["get", "pods"]);
    eventually("the right", || pods(&alice).is_ok());
    let forbidden = pods(&carol).unwrap_err().to_string();
    assert!(forbidden.contains("User \"carol\" cannot list resource \"pods\""), "{forbidden}");
    let audited = cluster.audit_log().unwrap().into_iter().any(|event| {
        event["objectRef"]["resource"] == "pods"
            && event["user"]["username"] == "alice"
            && event["user"]["extra"]["canonicalArn"] == json!([user_arn("alice")])
    });
    assert!(audited, "the audit log has no request for pods with alice's ARN");

    // A user who is not mapped: the twin.
    assert!(login(&bob, &[]).unwrap_err().to_string().contains(UNAUTHORIZED));

    // The rights of the manifests are enough for the report.
    let ready = || {
        let mapping = cluster.admin(&["get", "ramidentitymapping", "developers", "--output=json"]).unwrap();
        let mapping: Value = serde_json::from_str(&mapping).unwrap();
        let conditions = mapping["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    };
    eventually("the mapping's status", ready);

    // A token is a bearer's: who has a copy of it is taken for its owner, until its time is over.
    let token = cluster.token(&alice, &[]).unwrap();
    assert_eq!(cluster.login_with(&token).unwrap()["username"], "alice");
    assert_eq!(cluster.login_with(&token).unwrap()["username"], "alice");

    // No error of the webhook was seen, and no token is in the log.
    let log = cluster.api_server_log();
    assert!(!log.contains("failed to make webhook authenticator request"), "{log}");
    let log = cluster.server_log();
    assert!(log.contains(&user_arn("alice")), "{log}");
    assert!(!log.contains(&token) && !log.contains(&alice.secret), "a secret is in the log");
}
