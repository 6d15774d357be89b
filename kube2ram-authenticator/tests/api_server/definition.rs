//! A cluster with ack-ram-authenticator's custom resource definition, which has no `userID`: the API server
//! drops such a field without an error.

use std::fs;

use kube2ram_sandbox::login::{UNAUTHORIZED, user_arn};
use serde_json::{Value, json};

use super::cluster::{Cluster, eventually};

const DEFINITION: &str = "crd/ramidentitymappings.ramauthenticator.k8s.alibabacloud";
const ID: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/userID";
const SCHEMA: &str = "/openapi/v3/apis/ramauthenticator.k8s.alibabacloud/v1alpha1";

#[test]
#[ignore = "needs an API server: cargo xtask test --api-server"]
fn a_cluster_that_drops_ids_is_reported_and_a_mapping_that_has_lost_one_maps_nobody() {
    let mut cluster = Cluster::start(&["--authentication-token-webhook-version=v1"]);
    let bob = cluster.accounts().add_user("bob");
    let without_id = json!([{ "op": "remove", "path": ID }]).to_string();
    cluster.admin(&["patch", DEFINITION, "--type=json", "--patch", &without_id]).unwrap();
    eventually("the API server publishes the schema", || {
        cluster.admin(&["get", "--raw", SCHEMA]).is_ok_and(|schema| !schema.contains("The only id"))
    });
    // It looks at the schema at its start, and every ten minutes.
    cluster.stop_server().unwrap();
    cluster.start_server().unwrap();

    let ready = |name: &str| {
        let mapping = cluster.admin(&["get", "ramidentitymapping", name, "--output=json"]).unwrap();
        let mapping: Value = serde_json::from_str(&mapping).unwrap();
        let conditions = mapping["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default()
    };
    eventually("the report", || cluster.server_log().contains("drops spec.userID"));
    eventually("mappings without an id go on to map", || ready("developers")["status"] == "True");

    let mapping = json!({
        "apiVersion": "ramauthenticator.k8s.alibabacloud/v1alpha1", "kind": "RAMIdentityMapping",
        "metadata": { "name": "bob" },
        "spec": { "arn": user_arn("bob"), "username": "bob", "userID": "1" },
    });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mapping.json");
    fs::write(&path, mapping.to_string()).unwrap();
    // A kubectl of before 1.25, or a client that does not ask for strict validation.
    cluster.admin(&["apply", "--validate=ignore", "-f", path.to_str().unwrap()]).unwrap();

    eventually("the refusal", || ready("bob")["reason"] == "Refused");
    // The rights of the manifests are enough for the Event.
    eventually("its Event", || {
        let list = ["get", "events.events.k8s.io", "--namespace=default", "--output=json"];
        let events: Value = serde_json::from_str(&cluster.admin(&list).unwrap()).unwrap();
        let events = events["items"].as_array().cloned().unwrap_or_default();
        events.iter().any(|event| event["reason"] == "MappingRefused" && event["regarding"]["name"] == "bob")
    });
    let refused = cluster.login(&bob, &[]).unwrap_err().to_string();
    assert!(refused.contains(UNAUTHORIZED), "{refused}");
}
