//! Agents end and start while the API server or STS is away.

use tempfile::TempDir;

use crate::support::{CLOUDS, Lab, eventually, pod};

/// Where the sandbox's own state directory may be on a disk, which a snapshot must not be.
fn state_dir() -> TempDir {
    tempfile::Builder::new().prefix("kube2ram-test").tempdir_in("/dev/shm").unwrap()
}

/// Pods are known by the snapshot, with their ServiceAccounts' annotations. Credentials are in no snapshot,
/// and new ones need a token.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn after_a_restart_without_the_api_server_pods_are_known_and_told_to_ask_again() {
    for cloud in CLOUDS {
        let state = state_dir();
        let flag = format!("--state-dir={}", state.path().display());
        let mut lab = Lab::with_agent("sa-restart", cloud, &["orders"], &[&flag]);
        lab.assert_served("orders", "orders");

        lab.api().down();
        lab.agent().unwrap().terminate().unwrap();
        lab.agent().unwrap().spawn().unwrap();

        // By the ServiceAccount's annotation, which nobody can read now.
        eventually(Some("orders-role".to_owned()), || {
            let reply = lab.pod("orders").unwrap().curl(cloud.list()).ok()?;
            (reply.status == 200).then_some(reply.body)
        });
        lab.assert_try_again("orders", "orders");
        lab.await_result("token");
        lab.add_account("late");
        lab.add_pod(&pod("late")).unwrap();
        lab.assert_try_again("late", "late");
        let snapshot = std::fs::read_to_string(state.path().join("snapshot")).unwrap();
        assert!(snapshot.contains("orders-role"), "{snapshot}");

        lab.api().up().unwrap();
        for name in ["orders", "late"] {
            lab.assert_served(name, name);
        }
        lab.assert_node_role_unused();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn after_an_upgrade_each_pod_gets_its_accounts_role() {
    for cloud in CLOUDS {
        let mut lab = Lab::with_agent("sa-upgrade", cloud, &["orders", "billing"], &[]);
        for name in ["orders", "billing"] {
            lab.assert_served(name, name);
        }

        let mut incoming = lab.surge().unwrap();
        incoming.start_beside().unwrap();
        let mut outgoing = lab.replace_agent(incoming).unwrap();
        outgoing.terminate().unwrap();
        lab.remove_agent(outgoing).unwrap();

        for name in ["orders", "billing"] {
            lab.assert_served(name, name);
        }
        lab.assert_node_role_unused();
    }
}
