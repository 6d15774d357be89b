//! [`Permit`](crate::policy::Permit) → credentials: the cache with single flight and refresh ahead of expiry.
//! Called by `server`; asks an [`Issuer`] (implemented in `cloud`) on a miss.

mod account;
mod cache;
mod entry;
mod gate;
mod metrics;
mod survey;
mod turns;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use secrecy::SecretString;

pub use self::{
    account::{Attempt, Failure, Issues, SessionState},
    cache::{ANSWER_DEADLINE, Cache, Claim, ISSUE_DEADLINE, Limits},
    metrics::Metrics,
    survey::{Standing, Survey},
    turns::Rate,
};
use crate::role::RoleSession;

/// Within this time an agent that has just started fetches what no pod has asked for. It is as long as credentials are used before they are refreshed, so
/// that a roll-out to all nodes of an account takes hardly more of STS than any other hour does (`tests/fleet.rs`). A pod that asks first waits for STS once,
/// some 50 ms.
pub const WARM_UP: Duration = Duration::from_mins(26);

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
    /// What the wire makes of them.
    pub document: Document,
}

/// What the metadata service answers with these credentials: written by the first request, for it costs more than all else that a request does. As
/// secret as they are; zeroised with them, once the last answer is sent.
#[derive(Clone, Default)]
pub struct Document(OnceLock<Bytes>);

impl Document {
    /// What was written before, or else what `write` does now.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn get_or_write<E>(&self, write: impl FnOnce() -> Result<Bytes, E>) -> Result<Bytes, E> {
        if let Some(written) = self.0.get() {
            return Ok(written.clone());
        }
        let written = write()?;
        Ok(self.0.get_or_init(|| written).clone())
    }
}

impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

/// Why credentials were not issued: the closed set that is also the metrics label and decides on retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IssueErrorKind {
    /// The agent's own (base) credentials are missing or refused, after one refresh. No fault of the role, so transient to it.
    BaseCredentials,
    /// STS denies the role: no permission, or the role does not trust the node. Not transient.
    Denied,
    /// STS calls the request wrong. Not transient.
    Invalid,
    /// The role does not exist. Not transient.
    NoSuchRole,
    /// STS throttles. Transient.
    Throttled,
    /// STS cannot be reached, is too slow, answers 5xx or nonsense. Transient.
    Unavailable,
    /// STS refuses with a code that is not known to be about the role: it may be about the account, the agent, or a gateway in between
    /// (risk control, overdue payment). Transient, because it says nothing about the role.
    Unexpected,
}

impl IssueErrorKind {
    /// Whether asking again later may help, and valid credentials stay in use meanwhile.
    pub fn is_transient(self) -> bool {
        match self {
            Self::BaseCredentials | Self::Throttled | Self::Unavailable | Self::Unexpected => true,
            Self::Denied | Self::Invalid | Self::NoSuchRole => false,
        }
    }

    /// What somebody can do about it: the end of a sentence that names the role and STS's code.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::BaseCredentials => {
                "the agent has no valid credentials of its own; attach a role to the node, renew the agent's static keys, or mend what its OIDC token takes"
            }
            Self::Denied => {
                "have the role's trust policy name the node's role (or what else the agent signs with), and allow that sts:AssumeRole on it; if the trust policy asks for an external id, \
                 annotate the pod with it"
            }
            Self::Invalid => "correct what the code names in the pod's annotations",
            Self::NoSuchRole => "create the role, or correct the pod's annotation",
            Self::Throttled => {
                "the account calls STS too often, and the agent asks again by itself; find out who does (ActionTrail), or have the limit raised"
            }
            Self::Unavailable => {
                "STS does not answer the node, and the agent asks again by itself; see that the node reaches its endpoint"
            }
            Self::Unexpected => {
                "the agent does not know this code of STS and asks again by itself; look the code up (api.aliyun.com/troubleshoot), it may be about the account"
            }
        }
    }

    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::BaseCredentials,
        Self::Denied,
        Self::Invalid,
        Self::NoSuchRole,
        Self::Throttled,
        Self::Unavailable,
        Self::Unexpected,
    ];

    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BaseCredentials => "base_credentials",
            Self::Denied => "denied",
            Self::Invalid => "invalid",
            Self::NoSuchRole => "no_such_role",
            Self::Throttled => "throttled",
            Self::Unavailable => "unavailable",
            Self::Unexpected => "unexpected",
        }
    }
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

/// Why the cache has no credentials to give.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The cache is full of sessions that are all in use.
    #[error("too many role sessions")]
    Full,
    /// Issuing failed, now or not long ago.
    #[error("no credentials for the role session")]
    Issue {
        /// The failure.
        #[source]
        source: Arc<IssueError>,
        /// When it is worth asking again.
        retry_after: Duration,
    },
    /// Issuing takes longer than a pod waits; it goes on.
    #[error("credentials are not ready yet")]
    NotReady {
        /// When it is worth asking again.
        retry_after: Duration,
    },
}

/// The closed set of [`CredentialError`]s: the metrics label, and what the HTTP status depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// [`CredentialError::Full`].
    Full,
    /// [`CredentialError::Issue`], by its own kind.
    Issue(IssueErrorKind),
    /// [`CredentialError::NotReady`].
    NotReady,
}

impl ErrorKind {
    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Issue(kind) => kind.as_str(),
            Self::NotReady => "not_ready",
        }
    }
}

impl CredentialError {
    /// Which of the closed set it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Full => ErrorKind::Full,
            Self::Issue { source, .. } => ErrorKind::Issue(source.kind),
            Self::NotReady { .. } => ErrorKind::NotReady,
        }
    }

    /// Whether asking again later may help; a denial otherwise.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Full | Self::NotReady { .. } => true,
            Self::Issue { source, .. } => source.kind.is_transient(),
        }
    }

    /// How long to wait before asking again, when that may help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Issue { retry_after, .. } | Self::NotReady { retry_after } if self.is_transient() => {
                Some(*retry_after)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
