//! Why a call gave nothing, and what may help: what all clouds' tables of errors have in common. Pure: no
//! I/O, no clock, no logs. Depends on `wire`; called by the parent, by `base`, by `issuer` and by each
//! cloud's `refusal`, which has the table.

use std::{error::Error, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode};
use jiff::{Timestamp, fmt::rfc2822::DateTimeParser};

use crate::{
    credentials::{IssueError, IssueErrorKind},
    wire::ErrorDocument,
};

/// A call that gave no credentials.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: IssueError,
    /// The `Date` of the answer.
    pub(crate) server_time: Option<Timestamp>,
    /// Which endpoint answered.
    pub(crate) endpoint: Option<u8>,
    remedy: Option<Remedy>,
}

/// What may help against a refusal; each is worth one retry, and a shorter session one for each step down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Other base credentials; another token, where the call is made with a token.
    FreshBase,
    /// The same once more; a cloud that takes nonces gets another one.
    FreshNonce,
    /// STS is off in the endpoint's region, for the account of the role or of what the agent signs with.
    NextEndpoint,
    /// A session of one hour: no session of what the agent signs with may be longer.
    OneHour,
    /// STS's own time, where the agent's clock is wrong.
    ServerTime,
    /// A shorter session: the role allows none as long.
    ShorterSession,
}

/// One cloud's table of errors.
pub(crate) struct Table {
    /// Reads an error document; `None` when it is none of STS's own.
    pub(crate) parse: fn(&[u8]) -> Option<ErrorDocument>,
    /// What an error means, and what may help.
    pub(crate) judge: fn(StatusCode, &ErrorDocument) -> (IssueErrorKind, Option<Remedy>),
    /// How long STS asks callers to wait.
    pub(crate) time_left: fn(&HeaderMap) -> Option<Duration>,
}

impl Table {
    /// Reads an answer of another status than 2xx.
    pub(crate) fn refusal(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Refusal {
        let Some(document) = (self.parse)(body) else {
            // Not an answer of STS, but of a proxy or load balancer. From the status alone only throttling is
            // certain.
            let mut refusal = nonsense(status.as_str(), None);
            if status == StatusCode::TOO_MANY_REQUESTS {
                refusal.error.kind = IssueErrorKind::Throttled;
                refusal.error.retry_after = (self.time_left)(headers);
            }
            return refusal;
        };
        let (kind, remedy) = (self.judge)(status, &document);
        let ErrorDocument { code, message, request_id } = document;
        let throttled = kind == IssueErrorKind::Throttled;
        Refusal {
            error: IssueError {
                kind,
                code: code.into(),
                message: message.into(),
                request_id: (!request_id.is_empty()).then(|| request_id.into()),
                retry_after: throttled.then(|| (self.time_left)(headers)).flatten(),
                source: None,
            },
            server_time: headers.get(http::header::DATE).and_then(parse_date),
            endpoint: None,
            remedy,
        }
    }
}

impl Refusal {
    pub(crate) fn remedy(&self) -> Option<Remedy> {
        self.remedy
    }
}

/// The transport failed.
pub(crate) fn transport(error: reqwest::Error) -> Refusal {
    let code = if error.is_timeout() {
        "Timeout"
    } else if error.is_connect() {
        "Connect"
    } else {
        "Transport"
    };
    // The URL holds external ids and policies.
    let source = Some(error.without_url().into());
    ours(IssueErrorKind::Unavailable, code, "cannot reach STS", source).into()
}

/// An endpoint that can be connected to, perhaps, and does not answer.
pub(crate) fn silence() -> Refusal {
    ours(IssueErrorKind::Unavailable, "Timeout", "no answer from the endpoint in time", None).into()
}

/// Reads a `Date` header.
pub(crate) fn parse_date(date: &HeaderValue) -> Option<Timestamp> {
    DateTimeParser::new().parse_timestamp(date.to_str().ok()?).ok()
}

/// An answer that STS would not give.
pub(crate) fn nonsense(message: &str, source: Option<Box<dyn Error + Send + Sync>>) -> Refusal {
    ours(IssueErrorKind::Unavailable, "Nonsense", message, source).into()
}

/// A base credential contains characters that a header may not have.
pub(crate) fn unsendable(error: http::header::InvalidHeaderValue) -> Refusal {
    let source = Some(error.into());
    ours(IssueErrorKind::BaseCredentials, "BaseCredentials", "malformed", source).into()
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        Self { error, server_time: None, endpoint: None, remedy: None }
    }
}

/// An error that is not STS's own.
pub(crate) fn ours(
    kind: IssueErrorKind,
    code: &str,
    message: &str,
    source: Option<Box<dyn Error + Send + Sync>>,
) -> IssueError {
    IssueError {
        kind,
        code: code.into(),
        message: message.into(),
        request_id: None,
        retry_after: None,
        source,
    }
}

/// `Retry-After: <s>` (RFC 9110, 10.2.3), which a gateway in between may send.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// The longest wait that STS, or a gateway in between, may ask for.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);
