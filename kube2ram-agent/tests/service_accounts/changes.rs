//! Annotations of ServiceAccounts change while pods run.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::support::{CLOUDS, Lab, SHOP, pod};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(200);
/// The account is read again within 5 s.
const PATIENCE: Duration = Duration::from_secs(15);

/// A pod of a Deployment that is rolled out just after its ServiceAccount was changed.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_changed_annotation_counts_for_all_pods_once_a_new_pod_appears() {
    for cloud in CLOUDS {
        let mut lab = Lab::with_agent("sa-change", cloud, &["orders"], &[]);
        lab.assert_served("orders", "orders");
        lab.add_role_of_account("archive-role", SHOP, "orders");

        lab.annotate_account("orders", &[("role", "archive-role")]);
        lab.add_pod(&pod("orders-0").service_account("orders")).unwrap();
        let begun = Instant::now();
        while lab.ask("orders", cloud.list()).body != "archive-role" {
            assert!(begun.elapsed() < PATIENCE, "still the old role");
            thread::sleep(PAUSE);
        }

        lab.assert_served("orders", "archive");
        lab.assert_served("orders-0", "archive");
        assert_eq!(lab.ask_for("orders", "orders").status, 403, "no longer its role");
        let reads = lab.api().service_account_reads(SHOP, "orders");
        assert!(reads <= 3, "{reads} reads for two pods");
        lab.assert_node_role_unused();
    }
}
