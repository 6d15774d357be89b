//! TokenRequest: a token of a ServiceAccount, bound to a pod, with the real server's checks in its order, and
//! what may go wrong with it. Depends on `rights`, the store and the issuer. Called by `accounts`.
//!
//! Sources: kubernetes 1.36.3, `pkg/registry/core/serviceaccount/storage/token.go`,
//! `pkg/serviceaccount/claims.go` and `plugin/pkg/admission/noderestriction`.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Kind, Refusal, Right, State,
    accounts::ServiceAccounts,
    json_reply,
    rights::{AGENT, Actor, Deed, impersonated},
};
use crate::{
    clock::iso8601,
    locked,
    standin::server::{Body, Fate, withheld},
};

/// A request for a token, as the API server understood it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenCall {
    /// `spec.audiences`.
    pub audiences: Vec<String>,
    /// `spec.expirationSeconds`.
    pub expiration_seconds: Option<i64>,
    /// `Impersonate-User`.
    pub impersonates: Option<String>,
    /// The ServiceAccount's name.
    pub name: String,
    /// The ServiceAccount's namespace.
    pub namespace: String,
    /// The name and the UID in `spec.boundObjectRef`, if that is a pod.
    pub pod: Option<(String, String)>,
    /// Who asked, by its own token.
    pub requester: &'static str,
    /// The answer's status; 0 if none was sent.
    pub status: u16,
}

/// What goes wrong with a request for a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenRequestFault {
    /// The connection is cut before the answer.
    Cut,
    /// The answer never comes.
    Hang,
    /// The replica that answers lags behind: it knows nothing of the pod.
    PodUnknown,
    /// It is refused with this status, message, and for some seconds.
    Refuse(StatusCode, &'static str, Option<u32>),
    /// The token names a key that is nobody's.
    UnknownKey,
    /// The token is for somebody else.
    WrongAudience,
    /// The token is of another issuer.
    WrongIssuer,
}

/// The shortest life that may be asked for.
const MIN_SECONDS: i64 = 600;
const MAX_SECONDS: i64 = 1 << 32;
const DEFAULT_SECONDS: i64 = 3600;
const OTHER_UID: &str =
    "does not match the UID in record. The object might have been deleted and then recreated";

impl State {
    pub(super) fn token(
        &self,
        namespace: &str,
        name: &str,
        request: &Request<Bytes>,
    ) -> Result<Response<Body>, Refusal> {
        let parsed = serde_json::from_slice::<Value>(request.body());
        let asked = Asked::of(parsed.as_ref().unwrap_or(&Value::Null), namespace, name);
        let fault = locked(&self.service_accounts.faults).take();
        let outcome = match &fault {
            Some(TokenRequestFault::Cut) => Ok(withheld(Fate::Cut)),
            Some(TokenRequestFault::Hang) => Ok(withheld(Fate::Silence)),
            Some(TokenRequestFault::Refuse(status, message, seconds)) => {
                Err(Refusal::new(*status, *message).retry_after(*seconds))
            }
            fault => self
                .authorize(request.headers(), Deed::CreateToken, namespace, name)
                .and_then(|actor| self.granted(&actor, &asked, fault.as_ref()))
                .map(|token| json_reply(StatusCode::CREATED, &token)),
        };
        let status = match &outcome {
            Ok(response) if response.extensions().get::<Fate>().is_some() => 0,
            Ok(response) => response.status().as_u16(),
            Err(refusal) => refusal.status.as_u16(),
        };
        locked(&self.service_accounts.calls).push(TokenCall {
            audiences: asked.audiences,
            expiration_seconds: asked.seconds,
            impersonates: impersonated(request.headers()),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            pod: asked.pod.map(|pod| (pod.name, pod.uid)),
            requester: AGENT,
            status,
        });
        outcome
    }

    /// The answer to an authorized request.
    fn granted(
        &self,
        actor: &Actor,
        asked: &Asked<'_>,
        fault: Option<&TokenRequestFault>,
    ) -> Result<Value, Refusal> {
        if asked.kind != "TokenRequest" {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "the body is no TokenRequest"));
        }
        if let (Some(TokenRequestFault::PodUnknown), Some(pod)) = (fault, &asked.pod) {
            return Err(Refusal::not_found("pod", &pod.name));
        }
        if let Actor::Node(node) = actor {
            self.restrict(node, asked)?;
        }
        let account = self.store.get(Kind::ServiceAccount, asked.namespace, asked.name);
        let account = account.ok_or_else(|| Refusal::not_found("serviceaccounts", asked.name))?;
        let uid = &account["metadata"]["uid"];
        if asked.uid.as_deref().is_some_and(|asked| uid != asked) {
            let what = "the UID in the token request does not match the UID of the service account";
            return Err(Refusal::conflict("TokenRequest.authentication.k8s.io", asked.name, what));
        }
        let seconds = asked.seconds.unwrap_or(DEFAULT_SECONDS);
        if !(MIN_SECONDS..=MAX_SECONDS).contains(&seconds) {
            return Err(Refusal::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!(
                    "TokenRequest.authentication.k8s.io \"\" is invalid: spec.expirationSeconds: Invalid value: \
                     {seconds}: may not specify a duration less than 10 minutes"
                ),
            ));
        }
        let (pod, node) = self.bound(asked)?;
        let limit = *locked(&self.service_accounts.max_expiration);
        let limit =
            limit.map_or(MAX_SECONDS, |limit: Duration| limit.as_secs().try_into().unwrap_or(MAX_SECONDS));
        let kubernetes = json!({
            "namespace": asked.namespace, "node": node, "pod": pod,
            "serviceaccount": { "name": asked.name, "uid": uid },
        });
        self.signed(asked, seconds.min(limit), without_null(kubernetes), fault)
    }

    /// NodeRestriction: a node may ask for a token that is bound to a pod of its own, for one audience which
    /// the pod's volumes or a rule allow.
    fn restrict(&self, node: &str, asked: &Asked<'_>) -> Result<(), Refusal> {
        let name = asked.name;
        let forbidden = |why: &str| {
            let message = format!("serviceaccounts {name:?} is forbidden: {why}");
            Refusal::forbidden(message).about("serviceaccounts", name)
        };
        let bound = asked.pod.as_ref().filter(|pod| !pod.name.is_empty());
        let bound = bound.ok_or_else(|| forbidden("node requested token not bound to a pod"))?;
        if bound.uid.is_empty() {
            return Err(forbidden("node requested token with a pod binding without a uid"));
        }
        let pod = self.store.get(Kind::Pod, asked.namespace, &bound.name);
        let pod = pod.ok_or_else(|| Refusal::not_found("pod", &bound.name))?;
        if pod["metadata"]["uid"] != bound.uid.as_str() {
            return Err(forbidden(&format!(
                "the UID in the bound object reference ({}) {OTHER_UID}",
                bound.uid
            )));
        }
        if pod["spec"]["nodeName"] != node {
            return Err(forbidden("node requested token bound to a pod scheduled on a different node"));
        }
        let audience: &str = match &asked.audiences[..] {
            [] => "",
            [audience] => audience,
            _ => return Err(forbidden("node may only request 0 or 1 audiences")),
        };
        if self.may(Right::RequestAudience) || has_volume(&pod, audience) {
            return Ok(());
        }
        Err(forbidden(&format!(
            "audience {audience:?} not found in pod spec volume, system:node:{node} is not authorized to request \
             tokens for this audience"
        )))
    }

    /// What the claims have of the pod that a token is bound to, and of its node.
    fn bound(&self, asked: &Asked<'_>) -> Result<(Value, Value), Refusal> {
        let Some(bound) = &asked.pod else {
            if asked.is_bound {
                let message = "cannot bind token to object of this type";
                return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
            }
            return Ok((Value::Null, Value::Null));
        };
        let pod = self.store.get(Kind::Pod, asked.namespace, &bound.name);
        let pod = pod.ok_or_else(|| Refusal::not_found("pods", &bound.name))?;
        if pod["spec"]["serviceAccountName"] != asked.name {
            let message = format!(
                "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                asked.name
            );
            return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
        }
        let uid = &pod["metadata"]["uid"];
        if !bound.uid.is_empty() && uid != bound.uid.as_str() {
            let what = format!("the UID in the bound object reference ({}) {OTHER_UID}", bound.uid);
            return Err(Refusal::conflict("Pod", &bound.name, &what));
        }
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        let node = json!({
            "name": node,
            "uid": self.store.get(Kind::Node, "", node).map(|node| node["metadata"]["uid"].clone()),
        });
        Ok((json!({ "name": bound.name, "uid": uid }), without_null(node)))
    }

    fn signed(
        &self,
        asked: &Asked<'_>,
        seconds: i64,
        kubernetes: Value,
        fault: Option<&TokenRequestFault>,
    ) -> Result<Value, Refusal> {
        let accounts = &self.service_accounts;
        let now = accounts.clock.now();
        let expires = now.saturating_add(SignedDuration::from_secs(seconds));
        let expires = expires.or(Err(StatusCode::INTERNAL_SERVER_ERROR))?;
        let (audiences, issuer) = match fault {
            Some(TokenRequestFault::WrongAudience) => (vec!["elsewhere.example.com".to_owned()], None),
            Some(TokenRequestFault::WrongIssuer) => {
                (asked.audiences(), Some("https://elsewhere.example.com"))
            }
            _ => (asked.audiences(), None),
        };
        let claims = json!({
            "aud": audiences,
            "exp": expires.as_second(),
            "iat": now.as_second(),
            "iss": issuer.unwrap_or(accounts.issuer.url()),
            "jti": Uuid::new_v4().to_string(),
            "kubernetes.io": kubernetes,
            "nbf": now.as_second(),
            "sub": format!("system:serviceaccount:{}:{}", asked.namespace, asked.name),
        });
        let key = (fault == Some(&TokenRequestFault::UnknownKey)).then_some("nobodys");
        let token = accounts.issuer.sign_as(&claims, key).or(Err(StatusCode::INTERNAL_SERVER_ERROR))?;
        locked(&accounts.issued).push(token.clone());
        Ok(json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "metadata": {
                "name": asked.name, "namespace": asked.namespace, "creationTimestamp": iso8601(now),
            },
            "spec": {
                "audiences": asked.audiences(), "expirationSeconds": seconds,
                "boundObjectRef": asked.pod.as_ref().map(|pod| json!({
                    "apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid,
                })),
            },
            "status": { "expirationTimestamp": iso8601(expires), "token": token },
        }))
    }
}

/// What a request asks.
struct Asked<'a> {
    audiences: Vec<String>,
    /// To an object of any kind.
    is_bound: bool,
    kind: String,
    name: &'a str,
    namespace: &'a str,
    pod: Option<Bound>,
    seconds: Option<i64>,
    /// Of the ServiceAccount.
    uid: Option<String>,
}

/// A pod, as a request names it.
struct Bound {
    name: String,
    uid: String,
}

impl<'a> Asked<'a> {
    fn of(body: &Value, namespace: &'a str, name: &'a str) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (spec, bound) = (&body["spec"], &body["spec"]["boundObjectRef"]);
        let is_pod = bound["kind"] == "Pod" && bound["apiVersion"] == "v1";
        Self {
            audiences: spec["audiences"].as_array().into_iter().flatten().map(text).collect(),
            is_bound: !bound.is_null(),
            // A client may leave it to the path.
            kind: body["kind"]
                .as_str()
                .unwrap_or(if body.is_object() { "TokenRequest" } else { "" })
                .to_owned(),
            name,
            namespace,
            pod: is_pod.then(|| Bound { name: text(&bound["name"]), uid: text(&bound["uid"]) }),
            seconds: spec["expirationSeconds"].as_i64(),
            uid: body["metadata"]["uid"].as_str().map(str::to_owned),
        }
    }

    /// With the server's own by default.
    fn audiences(&self) -> Vec<String> {
        if self.audiences.is_empty() {
            vec![ServiceAccounts::AUDIENCE.to_owned()]
        } else {
            self.audiences.clone()
        }
    }
}

/// Whether the kubelet would have a token for this audience for the pod anyway.
fn has_volume(pod: &Value, audience: &str) -> bool {
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    let sources = volumes.filter_map(|volume| volume["projected"]["sources"].as_array()).flatten();
    sources.into_iter().any(|source| {
        let token = &source["serviceAccountToken"];
        token.is_object() && token["audience"].as_str().unwrap_or_default() == audience
    })
}

/// Without the fields that are null.
fn without_null(mut object: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    object
}
