//! The server with the configuration and the arguments of ack-ram-authenticator's current example manifest.

use std::fs;

use jiff::Timestamp;
use kube2ram_sandbox::{
    login::{self, UNAUTHORIZED, token_of},
    standin::Accounts,
};

use super::cluster::{Cluster, eventually};

/// The configuration in its `deploy/example.yaml`.
const EXAMPLE: &str = include_str!("../../src/config/tests/predecessor-deploy-example.yaml");
const ID: &str = "<your-cluster-id>";

/// Only paths are others, and a port is added: other tests may have the usual one. The init container's work
/// is done.
#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn the_current_example_of_ack_ram_authenticator_starts_a_server_as_it_stands() {
    let mut cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let [alice, carol] = ["alice", "carol"].map(|name| cluster.accounts().add_user(name));
    let developer = cluster.accounts().add_session("dev-orders", "alice@laptop");
    cluster.stop_server().unwrap();
    let (config, state) = (cluster.directory().join("example.yaml"), cluster.directory().join("state"));
    fs::write(&config, EXAMPLE).unwrap();
    let flags = [
        format!("--config={}", config.display()),
        format!("--state-dir={}", state.display()),
        "--kubeconfig-pregenerated=true".to_owned(),
        format!("--port={}", cluster.port()),
    ];

    cluster.start_server_with(&flags).unwrap();

    let user = cluster.login_with(&token_of(ID, &developer, Timestamp::now())).unwrap();
    assert_eq!(user["username"], format!("ram:{}:alice-laptop", Accounts::UID), "{user}");
    // The former configuration maps alice, and the ConfigMap carol: the example has neither backend.
    for (who, cluster_id, key) in [
        ("alice", ID, &alice),
        ("carol", ID, &carol),
        ("the role with the former cluster id", login::Cluster::ID, &developer),
    ] {
        let refused =
            cluster.login_with(&token_of(cluster_id, key, Timestamp::now())).unwrap_err().to_string();
        assert!(refused.contains(UNAUTHORIZED), "{who}: {refused}");
    }
    let warning = format!("the cluster ID {ID} is that of an example");
    eventually("the warning", || cluster.server_log().contains(&warning));
}
