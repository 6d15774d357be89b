//! Base credentials: what the agent signs its own STS calls with. Static keys, its own OIDC token's role, or
//! the node's role. Depends on `metadata`, `transport` and `clock`; called by `sts`, composed by `app`.

mod environment;
mod oidc;
mod renewal;

use std::sync::Arc;

use secrecy::SecretString;

pub use self::{
    environment::Configured,
    oidc::{OidcError, OidcSettings},
};
use self::{
    oidc::Oidc,
    renewal::{Origin, Renewal},
};
use super::{
    metadata::{Metadata, MetadataError},
    transport::Transport,
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
    /// The source that the environment configures; the node's role without a configuration.
    pub fn new(configured: Configured, metadata: Metadata, clock: Arc<dyn Clock>) -> Self {
        match configured {
            Configured::NodeRole => Self::of_node_role(metadata, clock),
            Configured::Oidc(settings) => Self::of_oidc(settings, clock),
            Configured::StaticKeys(keys) => Self::of_keys(keys),
        }
    }

    /// Always these.
    pub fn of_keys(credentials: BaseCredentials) -> Self {
        Self(Arc::new(Source::Static(Arc::new(credentials))))
    }

    /// The role attached to the node; fetched on first use, renewed well ahead of its expiry.
    pub fn of_node_role(metadata: Metadata, clock: Arc<dyn Clock>) -> Self {
        Self::renewed(Origin::NodeRole(metadata), clock)
    }

    /// The agent's own role; fetched and renewed as the node's.
    pub fn of_oidc(settings: OidcSettings, clock: Arc<dyn Clock>) -> Self {
        Self::renewed(Origin::Oidc(Oidc::new(settings)), clock)
    }

    /// The account of the agent's own role, if it is known without a request: with OIDC.
    pub fn account(&self) -> Option<&str> {
        self.oidc().map(|settings| settings.role.account())
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
        BaseState {
            source: self.source(),
            role: role.or_else(|| self.oidc().map(|settings| settings.role.name().into())),
            expires_at: held.map(|held| held.expires_at),
            failure: self.renewal().and_then(|renewal| renewal.failure().clone()),
        }
    }

    /// Credentials to sign with now.
    ///
    /// # Errors
    /// See [`BaseError`]; a failed renewal is no error while the old ones are valid.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing but the fetch it may be making.
    pub(super) async fn current(&self, sts: &Transport) -> Result<Arc<BaseCredentials>, BaseError> {
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
    pub(super) async fn refresh(
        &self,
        refused: &Arc<BaseCredentials>,
        sts: &Transport,
    ) -> Result<Option<Arc<BaseCredentials>>, BaseError> {
        match &*self.0 {
            Source::Renewed(renewal) => renewal.refresh(refused, sts).await,
            Source::Static(_) => Ok(None),
        }
    }

    fn renewed(origin: Origin, clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Source::Renewed(Box::new(Renewal::new(origin, clock)))))
    }

    fn oidc(&self) -> Option<&OidcSettings> {
        match &self.renewal()?.origin {
            Origin::NodeRole(_) => None,
            Origin::Oidc(oidc) => Some(oidc.settings()),
        }
    }

    fn renewal(&self) -> Option<&Renewal> {
        match &*self.0 {
            Source::Renewed(renewal) => Some(renewal),
            Source::Static(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
