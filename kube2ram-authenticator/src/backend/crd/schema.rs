//! Whether the cluster keeps the id that a mapping is for. ack-ram-authenticator's custom resource definition
//! has no `userID`, and the API server drops fields that a definition does not have, without an error: such a
//! mapping would count for every user or role of the name. The schema is read where the API server publishes
//! it to everybody who has logged in, so no right on definitions is needed. Called by `follow`.

use std::time::Duration;

use http::Request;
use kube::Client;
use kube2ram_service::telemetry::chain;
use serde_json::Value;
use tokio::time::timeout;
use tracing::debug;

/// What an object of such a definition reports.
pub(in crate::backend) const DROPS_IDS: &str = "the custom resource definition of the cluster drops \
    spec.userID: apply that of kube2ram-authenticator before a mapping names an id";

const PATH: &str = "/openapi/v3/apis/ramauthenticator.k8s.alibabacloud/v1alpha1";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the API server drops the ids of mappings; `None` if it does not publish their schema.
pub(in crate::backend) async fn drops_ids(client: &Client) -> Option<bool> {
    let request = Request::get(PATH).body(Vec::new()).ok()?;
    let document = match timeout(TIMEOUT, client.request::<Value>(request)).await {
        Ok(Ok(document)) => document,
        Ok(Err(error)) => {
            debug!(error = chain(&error), "cannot read the schema of mappings");
            return None;
        }
        Err(error) => {
            debug!(error = chain(&error), "cannot read the schema of mappings");
            return None;
        }
    };
    drops(&document)
}

fn drops(document: &Value) -> Option<bool> {
    let schemas = document["components"]["schemas"].as_object()?;
    let mut specs = schemas.values().map(|schema| &schema["properties"]["spec"]);
    let spec = specs.find(|spec| spec["properties"]["arn"].is_object())?;
    let keeps_all = spec["x-kubernetes-preserve-unknown-fields"] == true;
    Some(!keeps_all && !spec["properties"]["userID"].is_object())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of_spec(spec: Value) -> Option<bool> {
        drops(&json!({ "components": { "schemas": {
            "io.k8s.Other": { "properties": { "spec": { "properties": { "userID": {} } } } },
            "alibabacloud.k8s.ramauthenticator.v1alpha1.RAMIdentityMapping": { "properties": { "spec": spec } },
        } } }))
    }

    #[test]
    fn a_definition_without_ids_drops_them() {
        assert_eq!(of_spec(json!({ "properties": { "arn": {}, "username": {} } })), Some(true));
        assert_eq!(of_spec(json!({ "properties": { "arn": {}, "userID": {} } })), Some(false));
        let open = json!({ "properties": { "arn": {} }, "x-kubernetes-preserve-unknown-fields": true });
        assert_eq!(of_spec(open), Some(false));
    }

    #[test]
    fn nothing_is_concluded_from_another_document() {
        for document in [Value::Null, json!([]), json!({ "components": { "schemas": [] } })] {
            assert_eq!(drops(&document), None, "{document}");
        }
        assert_eq!(of_spec(json!({ "properties": {} })), None);
    }
}
