//! Tokens of the ServiceAccounts of this node's pods, each for one audience and bound to one of these pods
//! (TokenRequest of authentication.k8s.io/v1). None is kept. Depends on kube; called through `TokenSource` by
//! what exchanges the tokens, and by `app` for status.

use std::{
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use http::{Request, header::CONTENT_TYPE};
use jiff::Timestamp;
use kube::client::Body;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::{
    About, Cluster, Notice, Notices as _, OwnNode,
    account_api::{ANSWER_LIMIT_BYTES, AccountApi, CallError, Refusal, account_path, call},
    token_failures::TokenFailures,
};
use crate::pod::Pod;
use kube2ram_cloud::{
    credentials::{AccountToken, IssueError, IssueErrorKind, TokenSource},
    role::ServiceAccount,
};
use kube2ram_service::telemetry::chain;

/// By whose right the API server is asked for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRequester {
    /// As the agent itself.
    Agent,
    /// As the agent's node, which the agent impersonates.
    Node,
}

/// How requests about ServiceAccounts stand, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenState {
    /// By whose right tokens are asked for; `None` if none are.
    pub requester: Option<TokenRequester>,
    /// When and why a request for a token failed last; `None` if that is long ago, after a success of the
    /// same ServiceAccount, and for what concerns one ServiceAccount or namespace only.
    pub failure: Option<(Timestamp, Box<str>)>,
    /// Which node the agent's own token is bound to. Not asked unless the agent acts as its node.
    pub own_node: OwnNode,
    /// When and why reading a ServiceAccount last failed, if one that is used cannot be read.
    pub accounts_failure: Option<(Timestamp, Box<str>)>,
}

/// Why there is no token.
#[derive(Debug)]
enum TokenError {
    Call(CallError),
    /// No pod of this node uses the account, so nothing shows that this node may have its token.
    NoPod,
    /// What the API server calls a token is none that STS takes.
    NoToken,
    /// The agent is not configured to ask.
    Off,
}

/// What a refusal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Account,
    Configuration(Missing),
    /// The namespace lacks the label that the admission policy wants. Its owner decides on it.
    NotOptedIn,
    /// Anything that passes.
    Other,
    Overload,
    /// The pod that the token would be bound to: another pod, or another moment, may be better.
    Pod,
    /// The namespace is being deleted: nothing is created in it any more.
    Terminating,
}

/// What the cluster's operator has to add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// To the group of the nodes: the right to ask for this audience.
    Audience,
    /// The right to impersonate the own node, or an API server that has it.
    Impersonation,
    /// A lifetime that the API server grants, or one of our parameters is wrong.
    Lifetime,
    /// Anything else that authorization or admission demands.
    Right,
}

/// The answer, as far as it is used.
#[derive(Deserialize)]
struct ApiToken {
    status: TokenStatus,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenStatus {
    token: SecretString,
    expiration_timestamp: Timestamp,
}

/// Codes of a cluster's configuration that the API server refuses: the node's Event about them is raised
/// here, and names what is missing.
pub const CODES_OF_API_SERVER: [&str; 2] = ["TokenForbidden", "TokenInvalid"];
/// The reason of that Event.
pub(super) const TOKENS_UNAVAILABLE: &str = "TokensUnavailable";
/// Of one token, with all attempts.
const DEADLINE: Duration = Duration::from_secs(1);
/// How many pods are tried.
const PODS: usize = 3;
/// An API server whose cache lags behind knows of a new pod after this time.
const LAG: Duration = Duration::from_millis(100);
/// AssumeRoleWithOIDC takes 20,000 characters, AssumeRoleWithWebIdentity as many.
const TOKEN_LIMIT_BYTES: usize = 20_000;
/// Of an error's message, which is in logs and status: what is missing, and most of the API server's text.
const MESSAGE_LIMIT: usize = 512;

#[async_trait]
impl TokenSource for Cluster {
    async fn token(
        &self,
        account: &ServiceAccount,
        audience: &str,
        lifetime: Duration,
    ) -> Result<AccountToken, IssueError> {
        let result = match &self.account_api {
            Some(api) if api.requester.is_some() => self.request(api, account, audience, lifetime).await,
            _ => Err(TokenError::Off),
        };
        match result {
            Ok(token) => {
                self.metrics.token_request("issued");
                if let Some(mut failures) = self.token_failures() {
                    failures.clear(account);
                }
                Ok(token)
            }
            Err(error) => {
                let failed = self.failed(account, error);
                self.metrics.token_request(failed.kind.as_str());
                Err(failed)
            }
        }
    }
}

impl Cluster {
    /// How requests about ServiceAccounts stand.
    pub fn token_state(&self) -> TokenState {
        let api = self.account_api.as_ref();
        let failure = self.lookups().pods.accounts().and_then(|accounts| accounts.failure());
        TokenState {
            requester: api.and_then(|api| api.requester),
            failure: self.token_failures().and_then(|failures| failures.latest(self.clock.now())),
            own_node: self.own_node(),
            accounts_failure: failure.map(|failure| (failure.at, chain(&*failure.error).into())),
        }
    }

    fn own_node(&self) -> OwnNode {
        let api = self.account_api.as_ref();
        api.map(|api| api.own_node.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    fn token_failures(&self) -> Option<MutexGuard<'_, TokenFailures>> {
        let api = self.account_api.as_ref()?;
        Some(api.failures.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_token_failure(&self, account: &ServiceAccount, reason: &str) {
        if let Some(mut failures) = self.token_failures() {
            failures.note(account, self.clock.now(), reason);
        }
    }

    async fn request(
        &self,
        api: &AccountApi,
        account: &ServiceAccount,
        audience: &str,
        lifetime: Duration,
    ) -> Result<AccountToken, TokenError> {
        let deadline = Instant::now() + DEADLINE;
        let path = account_path(account).map_err(TokenError::Call)? + "/token";
        let pods = self.lookups().pods.with_account(account, PODS);
        let mut last = TokenError::NoPod;
        // The newest pod once more at the end: only it can be too new for an API server whose cache lags.
        for (attempt, pod) in pods.iter().chain(pods.first()).enumerate() {
            if attempt == pods.len() {
                sleep_until(deadline.min(Instant::now() + LAG)).await;
            }
            let request = Request::post(&path).header(CONTENT_TYPE, "application/json");
            let request = request
                .body(Body::from(body(pod, audience, lifetime)))
                .map_err(|error| TokenError::Call(CallError::Build(error)))?;
            match call(&api.client, request, ANSWER_LIMIT_BYTES, deadline).await {
                Ok(answer) => return token(&answer).ok_or(TokenError::NoToken),
                Err(CallError::Refused(refusal)) if cause(&refusal) == Cause::Pod => {
                    last = TokenError::Call(CallError::Refused(refusal));
                }
                // The time is used up, and what used it up is known.
                Err(CallError::Timeout(_)) if attempt > 0 => break,
                Err(error) => return Err(TokenError::Call(error)),
            }
        }
        Err(last)
    }

    /// Makes the error that callers get, and notes it where it concerns more than one account.
    fn failed(&self, account: &ServiceAccount, error: TokenError) -> IssueError {
        use IssueErrorKind::{ClusterConfiguration, Throttled, Token};
        let refusal = match error {
            TokenError::Off => {
                let message = "the agent is not configured to ask for tokens of ServiceAccounts";
                return issue_error(ClusterConfiguration, "TokensOff", message);
            }
            TokenError::NoPod => {
                let message = "no pod of this node uses the ServiceAccount: a token can be bound to none";
                return issue_error(Token, "NoPod", message);
            }
            TokenError::NoToken => {
                let message = "the API server's answer contains no token that can be used";
                self.note_token_failure(account, message);
                return issue_error(Token, "NoToken", message);
            }
            TokenError::Call(CallError::Refused(refusal)) => refusal,
            TokenError::Call(CallError::Name) => {
                return issue_error(Token, "NoServiceAccount", "its name cannot be a ServiceAccount's");
            }
            TokenError::Call(error) => {
                self.note_token_failure(account, &chain(&error));
                let failed = issue_error(Token, "NoAnswer", &error.to_string());
                return IssueError { source: Some(Box::new(error)), ..failed };
            }
        };
        let retry_after = refusal.retry_after;
        let failed = match cause(&refusal) {
            Cause::Account => {
                return issue_error(Token, "NoServiceAccount", "the ServiceAccount does not exist");
            }
            Cause::NotOptedIn => {
                let message = format!("the namespace has not opted in to tokens: {refusal}");
                return issue_error(Token, "NamespaceNotOptedIn", &message);
            }
            Cause::Terminating => {
                let message = "the namespace is being deleted, and gets no tokens any more";
                return issue_error(Token, "NamespaceTerminating", message);
            }
            Cause::Pod => {
                let message = format!("the API server binds no token to a pod of this node: {refusal}");
                return issue_error(Token, "NoPod", &message);
            }
            Cause::Configuration(missing) => {
                let advice = self.advice(missing);
                self.warn(Notice {
                    about: About::Node,
                    reason: TOKENS_UNAVAILABLE,
                    message: format!(
                        "Cannot get tokens of ServiceAccounts, so pods get no new credentials by them: {advice}."
                    ),
                });
                if let Some(api) = &self.account_api {
                    api.review_wanted.notify_one();
                }
                let [forbidden, invalid] = CODES_OF_API_SERVER;
                let code = if missing == Missing::Lifetime { invalid } else { forbidden };
                issue_error(ClusterConfiguration, code, &format!("{advice}: {refusal}"))
            }
            Cause::Overload => {
                issue_error(Throttled, "TooManyRequests", &format!("the API server is overloaded: {refusal}"))
            }
            Cause::Other => issue_error(Token, "NoToken", &format!("the API server refuses: {refusal}")),
        };
        self.note_token_failure(account, &failed.message);
        IssueError { retry_after, ..failed }
    }

    /// Names what is missing. The same text for all accounts, so that it makes one Event.
    fn advice(&self, missing: Missing) -> String {
        let requester = self.account_api.as_ref().and_then(|api| api.requester);
        let text = match (requester, missing) {
            (_, Missing::Lifetime) => {
                "the API server rejects the request: check that --service-account-max-token-expiration of the API server is at least 10m"
            }
            (Some(TokenRequester::Node), Missing::Impersonation) => match self.own_node() {
                OwnNode::NotBound => {
                    "the agent may not act as its node, because its own token is bound to no node: run it as a DaemonSet on Kubernetes 1.36 or later"
                }
                OwnNode::Other(_) => {
                    "the agent may not act as its node, because its own token is bound to another node: check --node"
                }
                OwnNode::Bound | OwnNode::Unknown => {
                    "the agent may not act as its node: this needs Kubernetes 1.36 or later with the feature ConstrainedImpersonation, and the ClusterRole kube2ram-node-tokens"
                }
            },
            (Some(TokenRequester::Node), Missing::Audience) => {
                "the node may not ask for this audience: bind the ClusterRole kube2ram-audience to the group system:nodes"
            }
            (Some(TokenRequester::Node), Missing::Right) => {
                "the API server denies the node this token: check the Node authorizer, NodeRestriction, and admission policies"
            }
            (None | Some(TokenRequester::Agent), _) => {
                "the agent may not ask for this token: check that RBAC lets it create serviceaccounts/token there, and admission policies"
            }
        };
        text.to_owned()
    }
}

fn body(pod: &Pod, audience: &str, lifetime: Duration) -> Vec<u8> {
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {
            "audiences": [audience],
            "expirationSeconds": lifetime.as_secs(),
            // With the UID, so that a pod of the same name that was made meanwhile is not meant.
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": &*pod.name, "uid": pod.uid.as_str()},
        },
    });
    request.to_string().into_bytes()
}

/// `None` when the answer has no token that STS takes, or not when it expires.
fn token(answer: &[u8]) -> Option<AccountToken> {
    // The cause of a failure may quote the answer, so it is not kept.
    let ApiToken { status } = serde_json::from_slice(answer).ok()?;
    let text = status.token.expose_secret();
    // RFC 7515, section 7.1: three parts in base64url.
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_token = text.len() <= TOKEN_LIMIT_BYTES
        && text.bytes().all(is_legal)
        && text.split('.').count() == 3
        && text.split('.').all(|part| !part.is_empty());
    is_token.then_some(AccountToken { token: status.token, expires_at: status.expiration_timestamp })
}

/// pkg/registry/core/serviceaccount/storage/token.go and plugin/pkg/admission/noderestriction of Kubernetes.
/// What is not recognised stays the cluster's configuration if it is forbidden, and else passes. Messages
/// contain names that users choose, and every text that is looked for has a blank, which no name has.
fn cause(refusal: &Refusal) -> Cause {
    let mentions = |text: &str| refusal.message.contains(text);
    match refusal.code {
        429 => Cause::Overload,
        404 if !refusal.is_not_found() => Cause::Other,
        404 if &*refusal.kind == "serviceaccounts" => Cause::Account,
        404 | 409 => Cause::Pod,
        // The name was used again, for a pod of another account.
        400 if mentions("different serviceaccount") => Cause::Pod,
        // An admission policy whose parameters are pods: the API server has seen none of the namespace yet.
        422 if mentions("no params found") => Cause::Other,
        400 | 422 => Cause::Configuration(Missing::Lifetime),
        // The Node authorizer has not seen the pod yet, or not any more; NodeRestriction has another UID.
        403 if refusal.is_unrelated() || mentions("UID in the bound object reference") => Cause::Pod,
        403 if mentions(" cannot impersonate") => Cause::Configuration(Missing::Impersonation),
        403 if mentions("not found in pod spec volume") => Cause::Configuration(Missing::Audience),
        // The admission plugin NamespaceLifecycle.
        403 if mentions("it is being terminated") => Cause::Terminating,
        // The policy kube2ram-token-requests of the manifests.
        403 if mentions("the namespace has not opted in to tokens for agents") => Cause::NotOptedIn,
        403 => Cause::Configuration(Missing::Right),
        _ => Cause::Other,
    }
}

fn issue_error(kind: IssueErrorKind, code: &str, message: &str) -> IssueError {
    let message = &message[..message.floor_char_boundary(MESSAGE_LIMIT)];
    IssueError {
        kind,
        code: code.into(),
        message: message.into(),
        request_id: None,
        retry_after: None,
        source: None,
    }
}

#[cfg(test)]
mod tests;
