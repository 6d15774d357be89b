//! From an AccessKeyId, as the cloud's trail has it, to the pods that were given it: from the agent's memory,
//! and from the file after a restart.

use std::{collections::BTreeSet, fs, path::Path};

use kube2ram_sandbox::{client::Credentials, node::PodSpec};
use serde_json::Value;

use crate::support::{LIST, Lab, assert_no_secrets, eventually};

fn access_key_id(lab: &Lab, pod: &str) -> String {
    let reply = lab.ask(pod, &format!("{LIST}shop-role"));
    serde_json::from_str::<Credentials>(&reply.body).unwrap().access_key_id
}

fn names(report: &Value) -> Vec<&str> {
    report["pods"].as_array().unwrap().iter().map(|pod| pod["name"].as_str().unwrap()).collect()
}

/// The events of the file's records of a session.
fn events(file: &Path, id: &str) -> Vec<String> {
    let records = fs::read_to_string(file).unwrap_or_default();
    let records = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_session = records.filter(|record| record["access_key_id"] == id);
    of_session.map(|record| record["event"].as_str().unwrap().to_owned()).collect()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_access_key_leads_to_its_pods_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("audit.jsonl");
    let pods = ["orders", "invoices", "idle"].map(|name| PodSpec::new(name).role("shop-role"));
    let mut lab = Lab::with_agent("audit", &pods, &[&format!("--audit-file={}", file.display())]);
    let id = access_key_id(&lab, "orders");
    assert_eq!(access_key_id(&lab, "invoices"), id, "pods of one role and ServiceAccount share a session");
    assert_eq!(access_key_id(&lab, "orders"), id);

    let (code, report) = lab.document(&["explain", "--access-key-id", &id]);

    assert_eq!((code, &report["source"]), (Some(0), &"memory".into()), "{report:#}");
    assert_eq!(report["is_complete"], true, "{report:#}");
    assert_eq!(names(&report), ["orders", "invoices"], "{report:#}");
    let session = &report["session"];
    assert!(session["role"].as_str().unwrap().ends_with("role/shop-role"), "{report:#}");
    assert_eq!((&session["session"], &session["grant"]), (&"default.default".into(), &"assume_role".into()));
    assert!(session["request_id"].is_string(), "the id of the call in the cloud's trail: {report:#}");
    assert_eq!(session["node"], "sandbox-node");
    eventually(["issued", "delivered", "delivered"].map(str::to_owned).to_vec(), || events(&file, &id));
    assert!(lab.metric(r#"kube2ram_audit_records_total{result="written"}"#) >= 3.0);

    lab.agent().unwrap().restart(None).unwrap();
    let next = access_key_id(&lab, "orders");
    let (code, report) = lab.document(&["explain", "--access-key-id", &id]);

    assert_ne!(next, id, "credentials end with the agent");
    assert_eq!((code, &report["source"]), (Some(0), &"file".into()), "{report:#}");
    assert_eq!(report["is_complete"], false, "a file can lack records: {report:#}");
    assert_eq!(names(&report), ["orders", "invoices"], "{report:#}");
    let uids: BTreeSet<_> =
        report["pods"].as_array().unwrap().iter().map(|pod| pod["uid"].as_str()).collect();
    assert_eq!(uids.len(), 2, "{report:#}");
    assert_no_secrets(&fs::read_to_string(&file).unwrap());
    let (code, report) = lab.document(&["explain", "--access-key-id", "STS.nobodys.key"]);
    assert_eq!((code, &report["session"]), (Some(66), &Value::Null), "{report:#}");
    let (_, text) = lab.kube2ram(&["explain", "--access-key-id", &next]);
    assert!(text.contains("given to          default/orders"), "{text}");
}

/// Pods are served, and the gap is visible.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_file_that_cannot_be_written_costs_no_pod_its_credentials() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing/audit.jsonl");
    let pods = [PodSpec::new("orders").role("shop-role")];
    let mut lab = Lab::with_agent("no-audit-file", &pods, &[&format!("--audit-file={}", missing.display())]);

    let id = access_key_id(&lab, "orders");

    assert!(id.starts_with("STS.shop-role."), "{id}");
    eventually(2.0, || lab.metric(r#"kube2ram_audit_records_total{result="error"}"#));
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("cannot write audit records to the file").count(), 1, "{log}");
    assert!(log.contains("credentials delivered") && log.contains(&id), "the log has the records: {log}");
}
