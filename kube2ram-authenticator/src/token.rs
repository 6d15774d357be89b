//! The bearer token, `k8s-ack-v2.` and base64 of JSON: a call of GetCallerIdentity that its bearer has signed
//! and not sent. Reads and writes tokens. Pure: no I/O, no clock, no logs. Depends on the cloud's signature;
//! called by `verify` and by `client`.
//!
//! The format is that of ack-ram-tool and ack-ram-authenticator, in both directions. What is read is bound to
//! one meaning: each part has one place, and everything that STS is to see is signed.

mod authorization;
mod document;
mod write;

use std::time::Duration;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, USER_AGENT},
};
use jiff::{SignedDuration, Timestamp};
use kube2ram_cloud::alibaba::caller_identity::{ACTION, EMPTY_PAYLOAD, VERSION, WINDOW, parse_call_date};

#[cfg(test)]
pub(crate) use self::authorization::KEY_LIMIT_BYTES;
pub use self::write::presign;
use self::{authorization::Authorization, document::Document};

/// What a token begins with.
pub const PREFIX: &str = "k8s-ack-v2.";
/// The longest token. The predecessor's limit is 4 KiB, but security tokens have no documented bound.
pub const LIMIT_BYTES: usize = 16 * 1024;

/// The id of the cluster that tokens are for: it keeps a token of one cluster from being used at another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterId(Box<str>);

/// A cluster id that cannot keep clusters apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterIdError {
    /// It holds blanks or characters outside of ASCII, or is too long.
    #[error("the cluster id must have 1 to 256 printable ASCII characters without blanks")]
    Characters,
    /// It is what several clusters would have.
    #[error("the cluster id {0:?} does not keep clusters apart: use one that no other cluster has")]
    Common(&'static str),
    /// It is empty.
    #[error("cluster ID cannot be empty")]
    Empty,
}

impl ClusterId {
    /// Parses a cluster id.
    ///
    /// # Errors
    /// See [`ClusterIdError`].
    pub fn parse(text: &str) -> Result<Self, ClusterIdError> {
        if text.is_empty() {
            return Err(ClusterIdError::Empty);
        }
        if text.len() > CLUSTER_ID_LIMIT_BYTES || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ClusterIdError::Characters);
        }
        match COMMON.into_iter().find(|common| common.eq_ignore_ascii_case(text)) {
            Some(common) => Err(ClusterIdError::Common(common)),
            None => Ok(Self(text.into())),
        }
    }

    /// The id as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A call that the bearer of a token has signed.
#[derive(Clone, Debug)]
pub struct SignedCall {
    cluster: ClusterId,
    headers: HeaderMap,
    access_key_id: Box<str>,
    signed_at: Timestamp,
}

/// Why a token is not one. Holds nothing of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The call is another one than GetCallerIdentity, or of another version.
    #[error("unexpected action in token")]
    Action,
    /// The `authorization` is not `ACS3-HMAC-SHA256 Credential=…,SignedHeaders=…,Signature=…`.
    #[error("malformed authorization in token")]
    Authorization,
    /// What follows the prefix is not standard base64 with padding.
    #[error("the token is not base64")]
    Base64,
    /// The token is for another cluster, or for none.
    #[error("unexpected clusterid in token")]
    Cluster,
    /// The date is malformed.
    #[error("malformed date in token")]
    Date,
    /// The call was signed too long ago.
    #[error("the token has expired")]
    Expired,
    /// The prefix is another one: the token is for another authenticator.
    #[error("token is missing expected prefix")]
    Foreign,
    /// The date is too far in the future.
    #[error("the token is not valid yet: check the client's clock")]
    Future,
    /// A header is unknown, there twice, empty, too long, or not printable ASCII.
    #[error("unexpected header in token")]
    Header,
    /// The content is not the expected JSON document.
    #[error("the token is not the expected JSON document")]
    Json,
    /// The call has a body.
    #[error("unexpected content hash in token")]
    Payload,
    /// The query holds more than the cluster id.
    #[error("unexpected query in token")]
    Query,
    /// The call is not `POST /`.
    #[error("unexpected method or path in token")]
    Target,
    /// The token is longer than [`LIMIT_BYTES`].
    #[error("token is too large")]
    TooLarge,
    /// The signed headers are not exactly those that STS is to see.
    #[error("unexpected signed headers in token")]
    Unsigned,
}

impl TokenError {
    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired | Self::Future => "expired_token",
            Self::Foreign => "foreign_token",
            Self::Cluster => "other_cluster",
            _ => "malformed_token",
        }
    }
}

impl SignedCall {
    /// Reads a token for `cluster`. Whether it is still valid is [`Self::time_left`].
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn parse(token: &str, cluster: &ClusterId) -> Result<Self, TokenError> {
        let encoded = token.strip_prefix(PREFIX).ok_or(TokenError::Foreign)?;
        if token.len() > LIMIT_BYTES {
            return Err(TokenError::TooLarge);
        }
        let Document { query, headers: pairs } = Document::parse(encoded, cluster)?;
        match query.as_slice() {
            [(name, value)] if name == CLUSTER_PARAMETER && **value == *cluster.as_str() => {}
            [(name, _)] if name == CLUSTER_PARAMETER => return Err(TokenError::Cluster),
            [] => return Err(TokenError::Cluster),
            _ => return Err(TokenError::Query),
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &pairs {
            let name = KNOWN.iter().find(|known| known.as_str().eq_ignore_ascii_case(name));
            let name = name.ok_or(TokenError::Header)?;
            if headers.insert(name.clone(), header_value(name, value)?).is_some() {
                return Err(TokenError::Header);
            }
        }
        Self::of_headers(cluster, headers)
    }

    fn of_headers(cluster: &ClusterId, headers: HeaderMap) -> Result<Self, TokenError> {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if text(&X_ACS_ACTION) != Some(ACTION) || text(&X_ACS_VERSION) != Some(VERSION) {
            return Err(TokenError::Action);
        }
        if text(&X_ACS_CONTENT_SHA256) != Some(EMPTY_PAYLOAD) {
            return Err(TokenError::Payload);
        }
        let signed_at = text(&X_ACS_DATE).and_then(parse_call_date).ok_or(TokenError::Date)?;
        let authorization = text(&AUTHORIZATION).and_then(Authorization::parse);
        let Authorization { access_key_id, signed_headers } =
            authorization.ok_or(TokenError::Authorization)?;
        // What STS is to see, and what its document requires to be signed: a host among them would bind the
        // call to an endpoint that the token has chosen.
        let mut expected: Vec<&str> =
            headers.keys().map(HeaderName::as_str).filter(|name| name.starts_with("x-acs-")).collect();
        expected.sort_unstable();
        if !signed_headers.split(';').eq(expected) {
            return Err(TokenError::Unsigned);
        }
        let access_key_id: Box<str> = access_key_id.into();
        Ok(Self { cluster: cluster.clone(), access_key_id, signed_at, headers })
    }

    /// How long STS will still take the call, at `now`.
    ///
    /// # Errors
    /// [`TokenError::Expired`] and [`TokenError::Future`].
    pub fn time_left(&self, now: Timestamp) -> Result<Duration, TokenError> {
        let age = now.duration_since(self.signed_at);
        let window = SignedDuration::try_from(WINDOW).unwrap_or(SignedDuration::MAX);
        if age > window {
            return Err(TokenError::Expired);
        }
        if age < -window {
            return Err(TokenError::Future);
        }
        Duration::try_from(window - age).or(Err(TokenError::Expired))
    }

    /// The query of the call.
    pub fn query(&self) -> [(&str, &str); 1] {
        [(CLUSTER_PARAMETER, self.cluster.as_str())]
    }

    /// The headers of the call, which print without secrets.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Whose key has signed it, if it has: nobody has checked the signature.
    pub fn access_key_id(&self) -> &str {
        &self.access_key_id
    }

    /// When it was signed.
    pub fn signed_at(&self) -> Timestamp {
        self.signed_at
    }
}

/// Printable ASCII, as far as both HTTP and a log line take it.
fn header_value(name: &HeaderName, text: &str) -> Result<HeaderValue, TokenError> {
    let limit = if *name == USER_AGENT { USER_AGENT_LIMIT_BYTES } else { LIMIT_BYTES };
    let is_legal = |byte: u8| byte.is_ascii_graphic() || (byte == b' ' && may_have_blanks(name));
    if text.is_empty() || text.len() > limit || !text.bytes().all(is_legal) {
        return Err(TokenError::Header);
    }
    let mut value = HeaderValue::from_str(text).or(Err(TokenError::Header))?;
    value.set_sensitive([AUTHORIZATION, X_ACS_SECURITY_TOKEN].contains(name));
    Ok(value)
}

fn may_have_blanks(name: &HeaderName) -> bool {
    [AUTHORIZATION, USER_AGENT].contains(name)
}

const CLUSTER_PARAMETER: &str = "ACKClusterId";
const CLUSTER_ID_LIMIT_BYTES: usize = 256;
/// What installations have that nobody has named.
const COMMON: [&str; 2] = ["default", "kubernetes"];
const USER_AGENT_LIMIT_BYTES: usize = 256;

const X_ACS_ACTION: HeaderName = HeaderName::from_static("x-acs-action");
const X_ACS_CONTENT_SHA256: HeaderName = HeaderName::from_static("x-acs-content-sha256");
const X_ACS_DATE: HeaderName = HeaderName::from_static("x-acs-date");
const X_ACS_NONCE: HeaderName = HeaderName::from_static("x-acs-signature-nonce");
const X_ACS_SECURITY_TOKEN: HeaderName = HeaderName::from_static("x-acs-security-token");
const X_ACS_VERSION: HeaderName = HeaderName::from_static("x-acs-version");

/// The headers that a token may have. The content's SM3 hash, which the predecessor passes on, belongs to
/// another signature.
static KNOWN: [HeaderName; 8] = [
    AUTHORIZATION,
    USER_AGENT,
    X_ACS_ACTION,
    X_ACS_CONTENT_SHA256,
    X_ACS_DATE,
    X_ACS_NONCE,
    X_ACS_SECURITY_TOKEN,
    X_ACS_VERSION,
];

#[cfg(test)]
mod tests;
