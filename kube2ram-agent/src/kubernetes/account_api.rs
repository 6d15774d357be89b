//! Requests about ServiceAccounts: the client for them, and one call, which is sent once and whose answer is
//! bounded. Depends on kube; made by `kubernetes::cluster`, called by `kubernetes::service_accounts`,
//! `kubernetes::token_request` and `kubernetes::own_node`.

use std::{error::Error, fmt, sync::Mutex, time::Duration};

use http::{HeaderMap, Request, StatusCode, header::RETRY_AFTER};
use http_body_util::{BodyExt as _, Limited};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
    core::Status,
};
use secrecy::zeroize::Zeroizing;
use tokio::{
    sync::Notify,
    time::{Instant, error::Elapsed, timeout_at},
};

use super::{
    OwnNode, ServiceAccountConfig, TokenRequester, projection::Projection, token_failures::TokenFailures,
};
use kube2ram_cloud::role::ServiceAccount;
use kube2ram_service::kubernetes::ClientError;

/// The way to ServiceAccounts and their tokens, and how it stands.
pub(super) struct AccountApi {
    pub(super) client: Client,
    /// By whose right tokens are asked for; `None` if none are.
    pub(super) requester: Option<TokenRequester>,
    pub(super) own_node: Mutex<OwnNode>,
    /// Why requests for tokens failed, where the reason may concern more than one account.
    pub(super) failures: Mutex<TokenFailures>,
    /// Asks for another check of the agent's own node.
    pub(super) review_wanted: Notify,
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("cannot read the API server's answer")]
    Body(#[source] Box<dyn Error + Send + Sync>),
    #[error("cannot build a request to the API server")]
    Build(#[source] http::Error),
    #[error("this cannot be the name of a ServiceAccount")]
    Name,
    #[error("the API server refuses: {0}")]
    Refused(Box<Refusal>),
    #[error("cannot ask the API server")]
    Send(#[source] kube::Error),
    #[error("the API server does not answer in time")]
    Timeout(#[source] Elapsed),
    /// Without the cause: it would quote the answer, which may contain a token.
    #[error("the API server's answer is not as the API has it")]
    Unreadable,
}

/// An answer that is no success, as far as it is used.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: u16,
    /// The `reason` of the `Status`; empty if the answer is none, for example because a proxy made it.
    pub(super) reason: Box<str>,
    /// What it is about, such as `pods`; empty if the answer does not have it.
    pub(super) kind: Box<str>,
    pub(super) message: Box<str>,
    pub(super) retry_after: Option<Duration>,
}

/// Of a message. The API server's own have up to three names of 253 bytes, and what is recognised comes last.
const MESSAGE_LIMIT: usize = 1024;
const RETRY_AFTER_LIMIT: Duration = Duration::from_mins(5);
/// Of a `Status`, and more than a token has.
pub(super) const ANSWER_LIMIT_BYTES: usize = 64 * 1024;
/// `metadata.name` of any object: a DNS subdomain (RFC 1123).
const NAME_LIMIT_BYTES: usize = 253;

impl CallError {
    /// Whether the object does not exist, according to the API server itself.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.is_not_found())
    }
}

impl AccountApi {
    /// Prepares the client. It is one of its own also where it acts as the agent: it keeps another part of
    /// the answers.
    ///
    /// # Errors
    /// Those of the client's files, as for any client.
    pub(super) fn connect(
        mut config: Config,
        node: &str,
        accounts: &ServiceAccountConfig,
    ) -> Result<Self, ClientError> {
        if accounts.tokens == Some(TokenRequester::Node) {
            let auth = &mut config.auth_info;
            // KEP-5284 allows `impersonate:associated-node` for requests that name the user and nothing else.
            auth.impersonate = Some(format!("system:node:{node}"));
            (auth.impersonate_uid, auth.impersonate_groups, auth.impersonate_user_extra) = (None, None, None);
        }
        let projection = Projection::of_objects(accounts.annotations.iter().cloned());
        let client = ClientBuilder::try_from(config).map_err(ClientError::Client)?;
        Ok(Self {
            client: client.with_layer(&projection).build(),
            requester: accounts.tokens,
            own_node: Mutex::new(OwnNode::Unknown),
            failures: Mutex::default(),
            review_wanted: Notify::new(),
        })
    }
}

/// The path of a ServiceAccount. Names are checked, although the API server has checked them: they come from
/// other objects, and must not lead to another path.
pub(super) fn account_path(account: &ServiceAccount) -> Result<String, CallError> {
    let ServiceAccount { namespace, name } = account;
    if !is_name(namespace) || !is_name(name) {
        return Err(CallError::Name);
    }
    Ok(format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}"))
}

fn is_name(name: &str) -> bool {
    let is_end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= NAME_LIMIT_BYTES
        && name.starts_with(is_end)
        && name.ends_with(is_end)
        && name.chars().all(|c| is_end(c) || matches!(c, '-' | '.'))
}

/// Sends one request, and returns the body of a success.
///
/// # Errors
/// Any other answer, and none by `deadline`.
pub(super) async fn call(
    client: &Client,
    request: Request<Body>,
    limit_bytes: usize,
    deadline: Instant,
) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let answer = async {
        let (head, body) = client.send(request).await.map_err(CallError::Send)?.into_parts();
        if head.status.is_success() {
            return read(body, limit_bytes).await;
        }
        let body = read(body, ANSWER_LIMIT_BYTES).await?;
        Err(CallError::Refused(Box::new(Refusal::of(head.status, &head.headers, &body))))
    };
    timeout_at(deadline, answer).await.map_err(CallError::Timeout).flatten()
}

async fn read(body: Body, limit_bytes: usize) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let mut body = Limited::new(body, limit_bytes);
    // Large enough for a token from the beginning: a buffer that grows leaves copies.
    let mut text = Zeroizing::new(Vec::with_capacity(ANSWER_LIMIT_BYTES));
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(CallError::Body)?.into_data() {
            text.extend_from_slice(&data);
        }
    }
    Ok(text)
}

impl Refusal {
    fn of(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let text: Status = serde_json::from_slice(body).unwrap_or_default();
        let details = text.details.map(|details| (details.kind, details.retry_after_seconds));
        let (kind, retry_after_seconds) = details.unwrap_or_default();
        let of_header = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let retry_after = of_header.or(Some(u64::from(retry_after_seconds)).filter(|it| *it > 0));
        Self {
            code: status.as_u16(),
            reason: plain(&text.reason),
            kind: plain(&kind),
            message: plain(&text.message),
            retry_after: retry_after.map(|secs| Duration::from_secs(secs).min(RETRY_AFTER_LIMIT)),
        }
    }

    /// Whether an object does not exist, according to the API server itself.
    pub(super) fn is_not_found(&self) -> bool {
        self.code == 404 && &*self.reason == "NotFound"
    }

    /// Whether the Node authorizer does not know of a pod with that account on the node: not yet, or not any
    /// more. No name of an object contains this text.
    pub(super) fn is_unrelated(&self) -> bool {
        self.code == 403 && self.message.contains("no relationship found")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, " {}", self.message) }
    }
}

/// Users write admission policies, and so their messages.
fn plain(text: &str) -> Box<str> {
    text.chars().filter(|c| !c.is_control()).take(MESSAGE_LIMIT).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(namespace: &str, name: &str) -> ServiceAccount {
        ServiceAccount { namespace: namespace.into(), name: name.into() }
    }

    #[test]
    fn a_name_cannot_lead_to_another_path() {
        let path = account_path(&account("team-a", "web.v2")).unwrap();
        assert_eq!(path, "/api/v1/namespaces/team-a/serviceaccounts/web.v2");

        let long = "a".repeat(NAME_LIMIT_BYTES + 1);
        for odd in ["", ".", "..", "a/b", "a?b", "a%2fb", "a#", "A", "-a", "a-", "é", long.as_str()] {
            assert!(matches!(account_path(&account("team-a", odd)), Err(CallError::Name)), "{odd:?}");
            assert!(matches!(account_path(&account(odd, "web")), Err(CallError::Name)), "{odd:?}");
        }
    }

    #[test]
    fn reads_of_a_refusal_what_is_used_within_bounds() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "86400".parse().unwrap());
        let body = serde_json::json!({
            "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": format!("pods\n{}", "x".repeat(2000)), "details": {"kind": "pods", "name": "web"},
        });

        let refusal = Refusal::of(StatusCode::NOT_FOUND, &headers, body.to_string().as_bytes());

        assert!(refusal.is_not_found());
        assert_eq!((&*refusal.kind, refusal.retry_after), ("pods", Some(RETRY_AFTER_LIMIT)));
        assert!(refusal.message.starts_with("podsxxx"));
        assert_eq!(refusal.message.len(), MESSAGE_LIMIT);
    }

    #[test]
    fn an_answer_that_is_no_status_proves_nothing_absent() {
        for body in ["404 page not found", "{}", ""] {
            let refusal = Refusal::of(StatusCode::NOT_FOUND, &HeaderMap::new(), body.as_bytes());

            assert!(!refusal.is_not_found(), "{body}");
            assert_eq!(refusal.to_string(), "404");
        }
    }
}
