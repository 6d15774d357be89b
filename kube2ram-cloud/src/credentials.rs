//! Temporary credentials, and the seam by which they are issued: each cloud implements [`Issuer`], the
//! agent's cache calls it.

use std::{fmt, sync::OnceLock, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use secrecy::SecretString;

use crate::role::{RoleSession, ServiceAccount};

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
    /// STS's request id, by which the cloud's trail of actions has the call that issued them.
    pub request_id: Option<Box<str>>,
    /// What the wire makes of them.
    pub document: Document,
}

/// The metadata service's answer with these credentials. The first request serialises it, because that costs
/// more than the rest of a request. It is as secret as the credentials, and zeroised with them once the last
/// answer is sent.
#[derive(Clone, Default)]
pub struct Document(OnceLock<Bytes>);

impl Document {
    /// The answer that was serialised before, or the result of `write`.
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
    /// The agent's own (base) credentials are missing or refused, after one refresh. No fault of the role, so
    /// transient to it.
    BaseCredentials,
    /// The cluster's configuration is wrong: the agent may not ask for tokens of ServiceAccounts, or STS
    /// accepts none of this cluster's. No fault of the pod or of its role, so transient to it.
    ClusterConfiguration,
    /// STS denies the role: no permission, or the role does not trust the node or the ServiceAccount. Not
    /// transient.
    Denied,
    /// STS calls the request wrong. Not transient.
    Invalid,
    /// The role does not exist. Not transient.
    NoSuchRole,
    /// STS throttles. Transient.
    Throttled,
    /// The API server gives no token of the ServiceAccount now; or STS calls each token expired, because the
    /// clocks of the two differ; or the role's account does not know the cluster's issuer (AWS). Transient.
    Token,
    /// STS cannot be reached, is too slow, answers 5xx or nonsense. Transient.
    Unavailable,
    /// STS refuses with a code that is not known to concern the role: it may concern the account, the agent,
    /// or a gateway in between (risk control, overdue payment). Transient, because it is unrelated to the
    /// role.
    Unexpected,
}

impl IssueErrorKind {
    /// Whether asking again later may help, and valid credentials stay in use meanwhile.
    pub fn is_transient(self) -> bool {
        match self {
            Self::BaseCredentials
            | Self::ClusterConfiguration
            | Self::Throttled
            | Self::Token
            | Self::Unavailable
            | Self::Unexpected => true,
            Self::Denied | Self::Invalid | Self::NoSuchRole => false,
        }
    }

    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::BaseCredentials,
        Self::ClusterConfiguration,
        Self::Denied,
        Self::Invalid,
        Self::NoSuchRole,
        Self::Throttled,
        Self::Token,
        Self::Unavailable,
        Self::Unexpected,
    ];

    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BaseCredentials => "base_credentials",
            Self::ClusterConfiguration => "cluster_configuration",
            Self::Denied => "denied",
            Self::Invalid => "invalid",
            Self::NoSuchRole => "no_such_role",
            Self::Throttled => "throttled",
            Self::Token => "token",
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

/// A token of a ServiceAccount, for one exchange. Prints as redacted.
#[derive(Debug)]
pub struct AccountToken {
    /// The token: base64url and dots.
    pub token: SecretString,
    /// When it expires, by the API server's clock.
    pub expires_at: Timestamp,
}

/// Where tokens of ServiceAccounts come from: the API server, in production. The agent's `kubernetes`
/// implements it.
#[async_trait]
pub trait TokenSource: Send + Sync + 'static {
    /// Asks for a token of `account`, for `audience` alone, which lives for `lifetime` if the API server
    /// lets it. Bounds the time itself.
    ///
    /// # Errors
    /// [`IssueErrorKind::Token`], [`IssueErrorKind::Throttled`] with the time to wait, and
    /// [`IssueErrorKind::ClusterConfiguration`] when no repetition helps.
    async fn token(
        &self,
        account: &ServiceAccount,
        audience: &str,
        lifetime: Duration,
    ) -> Result<AccountToken, IssueError>;
}

/// Issues credentials: in production by AssumeRole, or by the exchange of a ServiceAccount's token. Each
/// refuses a session of the other's [`Grant`](crate::role::Grant).
#[async_trait]
pub trait Issuer: Send + Sync + 'static {
    /// Asks once (with the error table's own single retries). The caller bounds the time.
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError>;
}
