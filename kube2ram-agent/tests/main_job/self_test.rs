//! Readiness includes a connection to the metadata address that the agent makes as a pod does and must meet
//! itself.

use std::process::Command;

use kube2ram_sandbox::node::PodSpec;

use crate::support::{LIST, Lab, eventually};

const ARRIVED: &str = r#"kube2ram_interceptions_total{result="arrived"}"#;
const CONDITION: &str = "an intercepted connection of the agent itself";

/// A rule of the host's firewall that closes a port for all; removed when it is dropped.
struct Firewall(&'static str);

impl Firewall {
    fn drop_port(port: u16) -> Self {
        const TABLE: &str = "kube2ram-test-firewall";
        let rules = format!(
            "table ip {TABLE} {{ chain input {{ type filter hook input priority 0; tcp dport {port} drop\n }}\n }}"
        );
        let status = Command::new("nft").arg(rules).status().unwrap();
        assert!(status.success());
        Self(TABLE)
    }
}

impl Drop for Firewall {
    fn drop(&mut self) {
        drop(Command::new("nft").args(["delete", "table", "ip", self.0]).status());
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_meets_itself_is_ready_and_counts_as_no_pod() {
    let mut lab = Lab::with_agent("meets", &[PodSpec::new("orders").role("orders-role")], &[]);

    assert!(lab.metric(ARRIVED) >= 1.0);
    assert_eq!(lab.metric(r#"kube2ram_interceptions_total{result="lost"}"#), 0.0);
    lab.agent().unwrap().await_metric("kube2ram_connections", 0.0).unwrap();
    assert_eq!(lab.metric("kube2ram_unvouched_connections_total"), 0.0);
    assert!(!lab.agent().unwrap().log().contains("request answered"));
    assert_eq!(lab.leaks(), []);

    // What pods and the host do is never taken for it.
    let arrived = lab.metric(ARRIVED);
    for _ in 0..20 {
        assert_eq!(lab.ask("orders", LIST).status, 200);
    }
    assert!(lab.metric(ARRIVED) <= arrived + 1.0);
    assert!(lab.metric(r#"kube2ram_http_requests_total{route="role_list",status="200"}"#) >= 20.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_a_firewall_separates_from_itself_is_not_ready_and_reports_why() {
    let mut lab = Lab::with_agent("firewall", &[PodSpec::new("orders").role("orders-role")], &[]);
    let ready = |lab: &mut Lab| lab.agent().unwrap().ready().map_err(|error| error.to_string());
    assert_eq!(ready(&mut lab), Ok("ready".to_owned()));
    let port = lab.agent().unwrap().app_addr().port();

    let firewall = Firewall::drop_port(port);

    eventually(true, || ready(&mut lab).is_err_and(|why| why.contains(CONDITION)));
    let (code, status) = lab.document(&["status"]);
    assert_eq!(code, Some(1), "{status:#}");
    let failure = status["datapath"]["interception"]["failure"].as_str().unwrap();
    assert!(failure.contains("no answer within"), "{failure}");
    let text = lab.kube2ram(&["status"]).1;
    assert!(text.contains("does not arrive at the agent") && text.contains("nft list ruleset"), "{text}");
    // Pods with an in-pod listener do not need the host's.
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.agent().unwrap().live().unwrap(), "live", "a restart would not help");

    drop(firewall);
    eventually(Ok("ready".to_owned()), || ready(&mut lab));
    assert_eq!(lab.document(&["status"]).0, Some(0));
}
