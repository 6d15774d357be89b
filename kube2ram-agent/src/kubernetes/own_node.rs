//! Whether the API server takes the agent for one of this node: it must, before it lets the agent act as the
//! node. For status; decides nothing. Depends on kube; called by `kubernetes::cluster`.

use std::{collections::BTreeMap, mem::replace, sync::PoisonError, time::Duration};

use http::{Request, header::CONTENT_TYPE};
use kube::client::Body;
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::{
    Cluster, TokenRequester,
    account_api::{ANSWER_LIMIT_BYTES, CallError, call},
};
use kube2ram_service::{clock::jitter, telemetry::chain};

/// What the API server reads of the agent's own token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum OwnNode {
    /// It was not asked yet, does not answer, or is older than Kubernetes 1.28.
    #[default]
    Unknown,
    /// The token is bound to this node.
    Bound,
    /// The token is bound to no node: it is not one of a pod's ServiceAccount, or the API server is older
    /// than Kubernetes 1.30.
    NotBound,
    /// The token is bound to another node, by this name.
    Other(Box<str>),
}

/// The answer, as far as it is used (`SelfSubjectReview` of authentication.k8s.io/v1).
#[derive(Deserialize)]
struct Review {
    status: ReviewStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReviewStatus {
    user_info: UserInfo,
}

#[derive(Deserialize)]
struct UserInfo {
    extra: Option<BTreeMap<Box<str>, Vec<Box<str>>>>,
}

const PATH: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
/// Of a ServiceAccount's token that is bound to a pod; its value is the pod's node (KEP-4193).
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const DEADLINE: Duration = Duration::from_secs(5);
/// The shortest time between two checks, and the longest between two attempts.
const PAUSE: Duration = Duration::from_secs(60);
const BACK_OFF: Duration = Duration::from_secs(1);

impl Cluster {
    /// Checks at the start, and after each refusal that it may explain, for ever. Returns at once where the
    /// agent does not act as its node.
    pub(super) async fn check_own_node(&self) {
        let Some(api) = &self.account_api else { return };
        if api.requester != Some(TokenRequester::Node) {
            return;
        }
        let mut back_off = BACK_OFF;
        loop {
            match self.review().await {
                Ok(own_node) => {
                    let node = &self.config.node;
                    let is_new = {
                        let mut known = api.own_node.lock().unwrap_or_else(PoisonError::into_inner);
                        replace(&mut *known, own_node.clone()) != own_node
                    };
                    match own_node {
                        OwnNode::NotBound if is_new => warn!(
                            %node,
                            "the agent's own token is bound to no node, so that the API server does not let it act as its node: run it as a DaemonSet on Kubernetes 1.36 or later, or set --token-requests-as=agent"
                        ),
                        OwnNode::Other(other) if is_new => {
                            warn!(%node, %other, "the agent's own token is bound to another node: check --node");
                        }
                        _ => {}
                    }
                    back_off = BACK_OFF;
                    sleep(PAUSE).await;
                    api.review_wanted.notified().await;
                }
                Err(error) => {
                    debug!(error = chain(&error), "cannot check the node of the agent's own token");
                    sleep(back_off.mul_f64(1.0 + 0.5 * jitter())).await;
                    back_off = (back_off * 2).min(PAUSE);
                }
            }
        }
    }

    /// Asks as the agent itself: an answer to the impersonated node would be about that.
    async fn review(&self) -> Result<OwnNode, CallError> {
        let body = r#"{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}"#;
        let request = Request::post(PATH).header(CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.as_bytes().to_vec())).map_err(CallError::Build)?;
        match call(&self.client, request, ANSWER_LIMIT_BYTES, Instant::now() + DEADLINE).await {
            Ok(answer) => own_node(&answer, &self.config.node).ok_or(CallError::Unreadable),
            // The API server has no such resource.
            Err(CallError::Refused(refusal)) if refusal.code == 404 => Ok(OwnNode::Unknown),
            Err(error) => Err(error),
        }
    }
}

/// `None` when it is no such answer.
fn own_node(answer: &[u8], node: &str) -> Option<OwnNode> {
    let review: Review = serde_json::from_slice(answer).ok()?;
    let mut extra = review.status.user_info.extra.unwrap_or_default();
    Some(match extra.remove(NODE_NAME).and_then(|names| names.into_iter().next()) {
        None => OwnNode::NotBound,
        Some(name) if *name == *node => OwnNode::Bound,
        Some(name) => OwnNode::Other(name),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn reads_the_node_that_the_token_is_bound_to() {
        let of = |extra: Value| {
            let answer = json!({"kind": "SelfSubjectReview", "status": {"userInfo": {"username": "u", "extra": extra}}});
            own_node(answer.to_string().as_bytes(), "node-1")
        };

        assert_eq!(of(json!({ NODE_NAME: ["node-1"] })), Some(OwnNode::Bound));
        assert_eq!(of(json!({ NODE_NAME: ["node-2"] })), Some(OwnNode::Other("node-2".into())));
        for unbound in [json!({}), json!(null), json!({ NODE_NAME: [] }), json!({"other": ["node-1"]})] {
            assert_eq!(of(unbound), Some(OwnNode::NotBound));
        }
        for odd in ["", "[]", r#"{"status":{}}"#, r#"{"status":{"userInfo":{"extra":[1]}}}"#] {
            assert_eq!(own_node(odd.as_bytes(), "node-1"), None, "{odd}");
        }
    }
}
