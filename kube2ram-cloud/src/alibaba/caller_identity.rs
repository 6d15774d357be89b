//! GetCallerIdentity at STS: signed by one program and sent by another, which learns from the answer who
//! signed. Source: STS API 2015-04-01, GetCallerIdentity. Depends on `sign`, `wire` and the crate's `sts`;
//! called by the authenticator, whose client signs and whose server sends.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, header};
use jiff::Timestamp;
use secrecy::zeroize::Zeroizing;
use tokio::time::timeout;

use super::{
    base::BaseCredentials,
    endpoint::{Endpoint, EndpointKind},
    refusal,
    sign::{RpcCall, canonical_query},
    wire::parse_caller_identity,
};
pub use super::{
    sign::{ALGORITHM, EMPTY_PAYLOAD},
    wire::CallerIdentity,
};
use crate::{
    credentials::{IssueError, IssueErrorKind},
    sts::{
        StsClient,
        refusal::{Refusal, nonsense, parse_date},
        transport::Transport,
    },
    wire::parse_time,
};
use kube2ram_service::{clock::Clock, telemetry::chain};

/// The action, as the header `x-acs-action` names it.
pub const ACTION: &str = "GetCallerIdentity";
/// The version of the API, as the header `x-acs-version` names it.
pub const VERSION: &str = "2015-04-01";
/// How long STS takes a signed call, before and after its date.
pub const WINDOW: Duration = Duration::from_mins(15);

/// Signs a call for somebody else to send: names and values of its headers, `authorization` among them. No
/// host and no nonce are signed, so the call is valid at every endpoint, any number of times, for [`WINDOW`].
pub fn presign(
    query: &[(&str, &str)],
    credentials: &BaseCredentials,
    date: Timestamp,
) -> Vec<(&'static str, Zeroizing<String>)> {
    let canonical_query = &canonical_query(query);
    RpcCall { host: None, action: ACTION, version: VERSION, canonical_query, date, nonce: None }
        .sign(credentials, |headers| {
            headers.iter().map(|&(name, value)| (name, Zeroizing::new(value.to_owned()))).collect()
        })
}

/// Reads the date of a signed call; `None` unless it is exactly `YYYY-MM-DDThh:mm:ssZ`.
pub fn parse_call_date(text: &str) -> Option<Timestamp> {
    parse_time(text).ok()
}

/// Sends calls that others have signed.
pub struct CallerIdentityClient(Transport);

/// What came of a call.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Who signed it.
    pub outcome: Result<CallerIdentity, CallError>,
    /// Which endpoint answered; `None` if none did in time.
    pub endpoint: Option<EndpointKind>,
    /// STS's own time, where it answered with it.
    pub server_time: Option<Timestamp>,
}

/// Why STS did not name the signer. Holds nothing of the call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("STS did not accept the signed call: {code}: {message}")]
pub struct CallError {
    /// What it means.
    pub kind: CallErrorKind,
    /// STS's own error code, or one of ours (`Timeout`, `Connect`, …).
    pub code: Box<str>,
    /// STS's message, cut to 256 characters; for logs only.
    pub message: Box<str>,
    /// STS's request id.
    pub request_id: Option<Box<str>>,
    /// How long STS asks callers to wait.
    pub retry_after: Option<Duration>,
}

/// What an error of a call means: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallErrorKind {
    /// STS refuses the call: key, signature, date or security token are not valid. Definite.
    Refused,
    /// STS throttles. Transient.
    Throttled,
    /// STS cannot be reached, is too slow, answers 5xx or nonsense. Transient.
    Unavailable,
    /// A code that is not known to be about the call: it may concern the account (risk control, overdue
    /// payment). Neither definite nor worth a quick repetition.
    Unexpected,
}

impl CallErrorKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Refused, Self::Throttled, Self::Unavailable, Self::Unexpected];

    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Throttled => "throttled",
            Self::Unavailable => "unavailable",
            Self::Unexpected => "unexpected",
        }
    }
}

impl CallError {
    /// One that is not STS's own.
    pub fn unavailable(code: &str, message: &str) -> Self {
        Self {
            kind: CallErrorKind::Unavailable,
            code: code.into(),
            message: message.into(),
            request_id: None,
            retry_after: None,
        }
    }

    /// Whether the signature or its date are what STS refuses: the same call is refused again.
    pub fn is_of_signature(&self) -> bool {
        self.kind == CallErrorKind::Refused
            && (&*self.code == "SignatureDoesNotMatch" || self.code.starts_with("InvalidTimeStamp"))
    }

    /// Whether the access key itself is what STS refuses.
    pub fn is_of_access_key(&self) -> bool {
        self.kind == CallErrorKind::Refused && self.code.starts_with("InvalidAccessKeyId")
    }

    fn new(error: IssueError, call: &HeaderMap) -> Self {
        let kind = match error.kind {
            IssueErrorKind::Throttled => CallErrorKind::Throttled,
            // The agent can correct these in its own calls, but nobody can in a call that is already signed.
            IssueErrorKind::Unavailable if is_of_date_or_nonce(&error.code) => CallErrorKind::Refused,
            IssueErrorKind::Unavailable => CallErrorKind::Unavailable,
            IssueErrorKind::Unexpected => CallErrorKind::Unexpected,
            IssueErrorKind::BaseCredentials
            | IssueErrorKind::ClusterConfiguration
            | IssueErrorKind::Denied
            | IssueErrorKind::Invalid
            | IssueErrorKind::NoSuchRole
            | IssueErrorKind::Token => CallErrorKind::Refused,
        };
        let IssueError { code, message, request_id, retry_after, source, .. } = error;
        let message: Box<str> = match source {
            _ if repeats(&message, call) => "withheld, because it repeats the signed call".into(),
            Some(source) => format!("{message}: {}", chain(&*source)).into(),
            None => message,
        };
        Self { kind, code, message, request_id, retry_after }
    }
}

impl CallerIdentityClient {
    /// Connects on first use only. Tries `endpoints` in order.
    pub fn new(client: StsClient, endpoints: Vec<Endpoint>, clock: Arc<dyn Clock>) -> Self {
        Self(Transport::new(client, endpoints, clock))
    }

    /// Of which kinds the endpoints are, in their order.
    pub fn endpoints(&self) -> Vec<EndpointKind> {
        self.0.endpoints().iter().map(EndpointKind::of).collect()
    }

    /// Sends a signed call. The endpoint is one of ours, whatever the headers say: `host` is never sent.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the call.
    pub async fn ask(&self, query: &[(&str, &str)], headers: &HeaderMap) -> Answer {
        timeout(CALL_DEADLINE, self.call(query, headers)).await.unwrap_or_else(|_elapsed| Answer {
            outcome: Err(CallError::unavailable("Timeout", "no answer from STS in time")),
            endpoint: None,
            server_time: None,
        })
    }

    async fn call(&self, query: &[(&str, &str)], headers: &HeaderMap) -> Answer {
        let query = canonical_query(query);
        let mut headers = headers.clone();
        headers.remove(header::HOST);
        headers.insert(header::ACCEPT, header::HeaderValue::from_static("application/json"));
        let sending = self.0.send(0, |client, endpoint| {
            let mut url = endpoint.url().clone();
            url.set_query(Some(&query));
            Ok(client.post(url).headers(headers.clone()))
        });
        let (mut endpoint, mut server_time) = (None, None);
        let outcome = async {
            let response = sending.await?;
            endpoint = self.0.endpoint_of(&response).map(EndpointKind::of);
            server_time = response.headers().get(header::DATE).and_then(parse_date);
            let body = self.0.read(response, &refusal::TABLE).await?;
            parse_caller_identity(&body)
                .map_err(|error| nonsense("answer not understood", Some(error.into())))
        }
        .await;
        let outcome = outcome.map_err(|refusal: Refusal| CallError::new(refusal.error, &headers));
        Answer { outcome, endpoint, server_time }
    }
}

fn is_of_date_or_nonce(code: &str) -> bool {
    code.starts_with("InvalidTimeStamp") || code == "SignatureNonceUsed"
}

/// Whether a message of STS repeats the signed text or the security token.
fn repeats(message: &str, call: &HeaderMap) -> bool {
    let token = call.get("x-acs-security-token").and_then(|token| token.to_str().ok());
    let beginning: Option<String> = token.map(|token| token.chars().take(BEGINNING).collect());
    message.contains(ALGORITHM) || beginning.is_some_and(|beginning| message.contains(&beginning))
}

/// Bounds one call with all endpoints that it tries. The API server waits 30 s for the authenticator.
pub const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// The first characters of a token; no other text begins with them.
const BEGINNING: usize = 16;

#[cfg(test)]
mod tests;
