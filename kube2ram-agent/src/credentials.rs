//! [`Permit`](crate::policy::Permit) → credentials: the cache with single flight and refresh ahead of expiry.
//! Called by `server`; asks an [`Issuer`] (implemented in `cloud`) on a miss.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use secrecy::SecretString;

use crate::role::RoleSession;

/// Temporary credentials of one role session. Secrets print as redacted.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// `AccessKeyId`.
    pub access_key_id: Box<str>,
    /// `AccessKeySecret`.
    pub access_key_secret: SecretString,
    /// `SecurityToken`; of any length.
    pub security_token: SecretString,
    /// When STS issued them (UTC): `LastUpdated` on the wire.
    pub issued_at: Timestamp,
    /// `Expiration`.
    pub expires_at: Timestamp,
}

/// Why credentials were not issued: the closed set that is also the metrics label and decides on retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IssueErrorKind {
    /// The agent's own (base) credentials are missing or refused, after one refresh.
    BaseCredentials,
    /// STS refuses: no permission, or the role does not trust the node. Not transient.
    Denied,
    /// STS calls the request wrong. Not transient.
    Invalid,
    /// The role does not exist. Not transient.
    NoSuchRole,
    /// STS throttles. Transient.
    Throttled,
    /// STS cannot be reached, is too slow, answers 5xx or nonsense. Transient.
    Unavailable,
}

/// An [`Issuer`]'s failure.
#[derive(Debug, thiserror::Error)]
#[error("cannot issue credentials: {code}: {message}")]
pub struct IssueError {
    /// What to do about it.
    pub kind: IssueErrorKind,
    /// STS's own error code, or one of ours (`Timeout`, `Connect`, …).
    pub code: Box<str>,
    /// STS's message, cut to 256 characters; never secret, for logs only.
    pub message: Box<str>,
    /// STS's request id.
    pub request_id: Option<Box<str>>,
    /// How long STS asks callers to wait.
    pub retry_after: Option<Duration>,
    /// The transport's error.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Issues credentials: AssumeRole, in production.
#[async_trait]
pub trait Issuer: Send + Sync + 'static {
    /// Asks once (with the error table's own single retries). The caller bounds the time.
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError>;
}
