//! Whether the cluster keeps the id that a mapping is for, and the conditions of its status.
//! ack-ram-authenticator's custom resource definition has neither, and the API server drops fields that a
//! definition does not have, without an error: a mapping would count for every user or role of the name, and
//! its status would be written again for ever. The schema is read where the API server publishes
//! it to everybody who has logged in, so no right on definitions is needed. Called by `follow`.

use std::time::Duration;

use http::Request;
use kube::Client;
use kube2ram_service::telemetry::chain;
use serde_json::Value;
use tokio::time::timeout;
use tracing::debug;

/// What is logged of a definition that drops ids.
pub(in crate::backend) const DROPS_IDS: &str = "the custom resource definition of the cluster drops \
    spec.userID: apply that of kube2ram-authenticator before a mapping names an id";

const PATH: &str = "/openapi/v3/apis/ramauthenticator.k8s.alibabacloud/v1alpha1";
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the API server drops of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::backend) struct Drops {
    /// The id that it is for.
    pub(in crate::backend) ids: bool,
    /// The report on it.
    pub(in crate::backend) conditions: bool,
}

/// What the API server drops of mappings; `None` if it does not publish their schema.
pub(in crate::backend) async fn drops(client: &Client) -> Option<Drops> {
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
    of_document(&document)
}

fn of_document(document: &Value) -> Option<Drops> {
    let schemas = document["components"]["schemas"].as_object()?;
    let mut mappings = schemas.values().map(|schema| &schema["properties"]);
    let mapping = mappings.find(|mapping| mapping["spec"]["properties"]["arn"].is_object())?;
    let drops = |part: &Value, field: &str| {
        part["x-kubernetes-preserve-unknown-fields"] != true && !part["properties"][field].is_object()
    };
    Some(Drops {
        ids: drops(&mapping["spec"], "userID"),
        conditions: drops(&mapping["status"], "conditions"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(spec: Value, status: Value) -> Option<Drops> {
        of_document(&json!({ "components": { "schemas": {
            "io.k8s.Other": { "properties": { "spec": { "properties": { "userID": {} } } } },
            "alibabacloud.k8s.ramauthenticator.v1alpha1.RAMIdentityMapping": {
                "properties": { "spec": spec, "status": status },
            },
        } } }))
    }

    #[test]
    fn a_definition_drops_what_it_does_not_have() {
        let of_predecessor = of(
            json!({ "properties": { "arn": {}, "username": {} } }),
            json!({ "properties": { "userID": {} } }),
        );
        assert_eq!(of_predecessor, Some(Drops { ids: true, conditions: true }));
        let ours = of(
            json!({ "properties": { "arn": {}, "userID": {} } }),
            json!({ "properties": { "conditions": {} } }),
        );
        assert_eq!(ours, Some(Drops::default()));
        let open = json!({ "x-kubernetes-preserve-unknown-fields": true });
        let spec = json!({ "properties": { "arn": {} }, "x-kubernetes-preserve-unknown-fields": true });
        assert_eq!(of(spec, open), Some(Drops::default()));
    }

    #[test]
    fn nothing_is_concluded_from_another_document() {
        for document in [Value::Null, json!([]), json!({ "components": { "schemas": [] } })] {
            assert_eq!(of_document(&document), None, "{document}");
        }
        assert_eq!(of(json!({ "properties": {} }), Value::Null), None);
    }
}
