//! Base credentials: what the agent signs its own STS calls with. Static keys, or what an [`Origin`] gives
//! and renews: the node's role, or a role of the agent's own by its OIDC token. Each cloud's `base` has the
//! origins and reads the environment. Depends on `metadata`, `sts` and `clock`; called by `issuer`, composed
//! by `app`.

pub(crate) mod environment;
mod node_role;
mod oidc;
mod renewal;

use std::sync::Arc;

use secrecy::SecretString;

pub use self::oidc::OidcError;
use self::renewal::Renewal;
pub(crate) use self::{
    oidc::{Exchange, Oidc, TokenFile, form_with_token, is_token, withhold},
    renewal::Origin,
};
use crate::{
    credentials::{IssueError, IssueErrorKind},
    endpoint::Endpoint,
    metadata::MetadataError,
    role::{BaseArn, RoleArn},
    sts::{StsClient, refusal::ours, transport::Transport},
};
use kube2ram_service::clock::Clock;

/// Credentials of the agent itself. Secrets print as redacted.
#[derive(Clone, Debug)]
pub struct BaseCredentials {
    /// `AccessKeyId`.
    pub access_key_id: Box<str>,
    /// `AccessKeySecret`.
    pub access_key_secret: SecretString,
    /// `SecurityToken`, unless the key is a RAM user's own.
    pub security_token: Option<SecretString>,
}

/// Why the agent has no base credentials.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A variable holds what cannot be a key or a token.
    #[error("environment variable {0} is malformed")]
    Malformed(&'static str),
    /// The metadata server did not give them.
    #[error("cannot obtain the node role's credentials")]
    Metadata(#[source] MetadataError),
    /// Half of a key pair, or of what OIDC takes, is set.
    #[error("environment variable {present} is set, but {missing} is not")]
    Missing {
        /// What is set.
        present: &'static str,
        /// What goes with it.
        missing: &'static str,
    },
    /// No role is attached to the node.
    #[error("no role is attached to the node")]
    NoNodeRole,
    /// A variable is malformed.
    #[error("environment variable {variable} is not of the form {form}")]
    NotOfForm {
        /// Which.
        variable: &'static str,
        /// What it should be.
        form: &'static str,
    },
    /// The OIDC token brought none.
    #[error("cannot obtain the credentials of the agent's own role (OIDC)")]
    Oidc(#[source] OidcError),
}

impl BaseError {
    /// There is nothing to sign with. An outage of STS is one, whichever of its calls meets it.
    pub(crate) fn into_issue_error(self) -> IssueError {
        use IssueErrorKind::{BaseCredentials, Throttled, Unavailable};
        match self {
            Self::Oidc(OidcError::Sts { source, .. }) if matches!(source.kind, Throttled | Unavailable) => {
                *source
            }
            error => ours(BaseCredentials, "BaseCredentials", "none to sign with", Some(error.into())),
        }
    }
}

/// Where the agent's own credentials come from. Clones share them.
#[derive(Clone)]
pub struct Base(Arc<Source>);

/// The kinds of base credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseSource {
    /// The role attached to the node.
    NodeRole,
    /// The agent's own role, by the token of its service account.
    Oidc,
    /// Keys of the environment.
    StaticKeys,
}

impl BaseSource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NodeRole, Self::Oidc, Self::StaticKeys];

    /// Whether they are a role's. Session keys of the environment may be one's, too: that is not known.
    pub fn is_role(self) -> bool {
        match self {
            Self::NodeRole | Self::Oidc => true,
            Self::StaticKeys => false,
        }
    }

    /// The label in metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NodeRole => "node_role",
            Self::Oidc => "oidc",
            Self::StaticKeys => "static_keys",
        }
    }
}

/// The state of the base credentials, without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseState {
    /// Their kind.
    pub source: BaseSource,
    /// The role's name, as far as it is known.
    pub role: Option<Box<str>>,
    /// When the held credentials expire; `None` before they were first needed, and for static keys, which
    /// have no known expiry.
    pub expires_at: Option<jiff::Timestamp>,
    /// When they could not be obtained last, and why; `None` once they could.
    pub failure: Option<(jiff::Timestamp, Box<str>)>,
}

enum Source {
    Renewed(Box<Renewal>),
    Static(Arc<BaseCredentials>),
}

impl Base {
    /// Always these.
    pub fn of_keys(credentials: BaseCredentials) -> Self {
        Self(Arc::new(Source::Static(Arc::new(credentials))))
    }

    /// Those of `origin`; fetched on first use, renewed well ahead of their expiry.
    pub(crate) fn renewed(origin: impl Origin, clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Source::Renewed(Box::new(Renewal::new(Box::new(origin), clock)))))
    }

    /// The base ARN of the account of the agent's own role, if it is known without a request: with OIDC.
    pub fn account(&self) -> Option<BaseArn> {
        self.renewal()?.origin.role().and_then(RoleArn::of_account)
    }

    /// How often they were fetched, by result.
    pub fn fetches(&self) -> [(&'static str, u64); 2] {
        let counts = self.renewal().map(Renewal::counts).unwrap_or_default();
        [("error", counts[0]), ("ok", counts[1])]
    }

    /// Their kind.
    pub fn source(&self) -> BaseSource {
        match &*self.0 {
            Source::Renewed(renewal) => renewal.origin.source(),
            Source::Static(_) => BaseSource::StaticKeys,
        }
    }

    /// Their state. Sends no request.
    pub fn state(&self) -> BaseState {
        let held = self.renewal().and_then(|renewal| renewal.cached().clone());
        let role = held.as_ref().map(|held| held.role.clone());
        let known = || self.renewal()?.origin.role().map(|role| role.name().into());
        BaseState {
            source: self.source(),
            role: role.or_else(known),
            expires_at: held.map(|held| held.expires_at),
            failure: self.renewal().and_then(|renewal| renewal.failure().clone()),
        }
    }

    /// Credentials to sign something else with than a call of AssumeRole, and when they expire, where that is
    /// known. STS is asked at `endpoints`, where an origin needs it.
    ///
    /// # Errors
    /// See [`BaseError`].
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing but the fetch it may be making.
    pub async fn credentials(
        &self,
        client: StsClient,
        endpoints: Vec<Endpoint>,
        clock: Arc<dyn Clock>,
    ) -> Result<(Arc<BaseCredentials>, Option<jiff::Timestamp>), BaseError> {
        let credentials = self.current(&Transport::new(client, endpoints, clock)).await?;
        Ok((credentials, self.state().expires_at))
    }

    /// Credentials to sign with now.
    ///
    /// # Errors
    /// See [`BaseError`]; a failed renewal is no error while the old ones are valid.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing but the fetch it may be making.
    pub(crate) async fn current(&self, sts: &Transport) -> Result<Arc<BaseCredentials>, BaseError> {
        match &*self.0 {
            Source::Renewed(renewal) => renewal.current(sts).await,
            Source::Static(credentials) => Ok(Arc::clone(credentials)),
        }
    }

    /// Other credentials than those that STS just refused; `None` when there are none.
    ///
    /// # Errors
    /// See [`BaseError`].
    ///
    /// # Cancel safety
    /// As [`current`](Self::current).
    pub(crate) async fn refresh(
        &self,
        refused: &Arc<BaseCredentials>,
        sts: &Transport,
    ) -> Result<Option<Arc<BaseCredentials>>, BaseError> {
        match &*self.0 {
            Source::Renewed(renewal) => renewal.refresh(refused, sts).await,
            Source::Static(_) => Ok(None),
        }
    }

    pub(crate) fn renewal(&self) -> Option<&Renewal> {
        match &*self.0 {
            Source::Renewed(renewal) => Some(renewal),
            Source::Static(_) => None,
        }
    }
}
