//! Base credentials: what the agent signs its own STS calls with. Static keys, or the node's role.
//! Depends on `metadata` and `clock`; called by `sts`, composed by `app`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::SecretString;
use tokio::{sync::Semaphore, time::Instant};
use tracing::warn;

use super::metadata::{Metadata, MetadataError};
use crate::{clock::Clock, telemetry::chain};

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

/// Why there are no base credentials.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A variable holds what cannot be a key or a token.
    #[error("environment variable {0} is malformed")]
    Malformed(&'static str),
    /// The metadata server did not give them.
    #[error("cannot obtain the node role's credentials")]
    Metadata(#[source] MetadataError),
    /// Half of a key pair is set.
    #[error("environment variable {present} is set, but {missing} is not")]
    Missing {
        /// The half that is set.
        present: &'static str,
        /// The half that is not.
        missing: &'static str,
    },
    /// No role is attached to the node.
    #[error("no role is attached to the node")]
    NoNodeRole,
}

impl BaseCredentials {
    /// Reads static keys from the environment: `ALIBABA_CLOUD_ACCESS_KEY_ID`, `…_SECRET` and `ALIBABA_CLOUD_SECURITY_TOKEN`, else the
    /// ancestors' `ACCESS_KEY_ID` and `ACCESS_KEY_SECRET`. An empty variable counts as unset. `None` when none is set.
    ///
    /// # Errors
    /// [`BaseError::Missing`] and [`BaseError::Malformed`]: falling back to the node's role would hide the mistake.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, BaseError> {
        let read = |name| match variable(name).filter(|value| !value.is_empty()) {
            Some(value) if !value.bytes().all(|c| c.is_ascii_graphic()) => Err(BaseError::Malformed(name)),
            value => Ok(value),
        };
        for (id, secret, token) in [
            (
                "ALIBABA_CLOUD_ACCESS_KEY_ID",
                "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
                Some("ALIBABA_CLOUD_SECURITY_TOKEN"),
            ),
            ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET", None),
        ] {
            match (read(id)?, read(secret)?) {
                (None, None) => {}
                (Some(_), None) => return Err(BaseError::Missing { present: id, missing: secret }),
                (None, Some(_)) => return Err(BaseError::Missing { present: secret, missing: id }),
                (Some(access_key_id), Some(access_key_secret)) => {
                    return Ok(Some(Self {
                        access_key_id: access_key_id.into(),
                        access_key_secret: access_key_secret.into(),
                        security_token: token.map(read).transpose()?.flatten().map(SecretString::from),
                    }));
                }
            }
        }
        Ok(None)
    }
}

/// Where the agent's own credentials come from. Clones share them.
#[derive(Clone)]
pub struct Base(Arc<Source>);

/// What can be told of base credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// The node's role.
    NodeRole {
        /// Its name, and when what is held expires; `None` before it was first needed.
        held: Option<(Box<str>, jiff::Timestamp)>,
        /// When they could not be obtained last, and why; `None` once they could.
        failure: Option<(jiff::Timestamp, Box<str>)>,
    },
    /// Keys of the environment.
    StaticKeys {
        /// Whether a security token goes with them, so that they expire, nobody knows when.
        are_temporary: bool,
    },
}

impl BaseState {
    /// When those of the node's role end that were fetched last; `None` before the first fetch, and for static keys.
    pub fn expires_at(&self) -> Option<jiff::Timestamp> {
        match self {
            Self::NodeRole { held, .. } => held.as_ref().map(|(_, expires_at)| *expires_at),
            Self::StaticKeys { .. } => None,
        }
    }
}

enum Source {
    NodeRole(NodeRole),
    Static(Arc<BaseCredentials>),
}

impl Base {
    /// Always these.
    pub fn of_keys(credentials: BaseCredentials) -> Self {
        Self(Arc::new(Source::Static(Arc::new(credentials))))
    }

    /// The role attached to the node; fetched on first use, renewed well ahead of its expiry.
    pub fn of_node_role(metadata: Metadata, clock: Arc<dyn Clock>) -> Self {
        let (cached, failure) = (Mutex::new(None), Mutex::new(None));
        let (fetched, not_fetched) = (AtomicU64::new(0), AtomicU64::new(0));
        let fetching = Semaphore::new(1);
        let node = NodeRole { metadata, clock, cached, failure, fetched, not_fetched, fetching };
        Self(Arc::new(Source::NodeRole(node)))
    }

    /// How often they were fetched, by result.
    pub fn fetches(&self) -> [(&'static str, u64); 2] {
        let counts = match &*self.0 {
            Source::NodeRole(node) => {
                [&node.not_fetched, &node.fetched].map(|count| count.load(Ordering::Relaxed))
            }
            Source::Static(_) => [0; 2],
        };
        [("error", counts[0]), ("ok", counts[1])]
    }

    /// What can be told of them. Asks for nothing.
    pub fn state(&self) -> BaseState {
        match &*self.0 {
            Source::NodeRole(node) => BaseState::NodeRole {
                held: node.cached().as_ref().map(|cached| (cached.role.clone(), cached.expires_at)),
                failure: node.failure().clone(),
            },
            Source::Static(keys) => BaseState::StaticKeys { are_temporary: keys.security_token.is_some() },
        }
    }

    /// Credentials to sign with now.
    ///
    /// # Errors
    /// See [`BaseError`]; a failed renewal is no error while the old ones are valid.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing but the fetch it may be making.
    pub async fn current(&self) -> Result<Arc<BaseCredentials>, BaseError> {
        match &*self.0 {
            Source::NodeRole(node) => node.current().await,
            Source::Static(credentials) => Ok(Arc::clone(credentials)),
        }
    }

    /// Others than those that STS just refused; `None` when there are none.
    ///
    /// # Errors
    /// See [`BaseError`].
    ///
    /// # Cancel safety
    /// As [`current`](Self::current).
    pub async fn refresh(
        &self,
        refused: &Arc<BaseCredentials>,
    ) -> Result<Option<Arc<BaseCredentials>>, BaseError> {
        match &*self.0 {
            Source::NodeRole(node) => node.refresh(refused).await,
            Source::Static(_) => Ok(None),
        }
    }
}

struct NodeRole {
    metadata: Metadata,
    clock: Arc<dyn Clock>,
    cached: Mutex<Option<Cached>>,
    /// The last one, unless fetching has succeeded since.
    failure: Mutex<Option<(jiff::Timestamp, Box<str>)>>,
    fetched: AtomicU64,
    not_fetched: AtomicU64,
    /// Whoever holds the permit is the one that fetches.
    fetching: Semaphore,
}

#[derive(Clone)]
struct Cached {
    role: Box<str>,
    credentials: Arc<BaseCredentials>,
    expires_at: jiff::Timestamp,
    renew_at: Instant,
}

impl NodeRole {
    async fn current(&self) -> Result<Arc<BaseCredentials>, BaseError> {
        if let Some(cached) = self.usable() {
            let permit = (cached.renew_at <= Instant::now()).then(|| self.fetching.try_acquire());
            let Some(Ok(_permit)) = permit else {
                return Ok(cached.credentials);
            };
            return Ok(self.fetch().await.unwrap_or_else(|error| {
                warn!(error = chain(&error), "node role's credentials not renewed");
                if let Some(cached) = &mut *self.cached() {
                    cached.renew_at = Instant::now() + RETRY_AFTER;
                }
                cached.credentials
            }));
        }

        let _permit = self.fetching.acquire().await;
        match self.usable() {
            Some(cached) => Ok(cached.credentials),
            None => self.fetch().await,
        }
    }

    async fn refresh(
        &self,
        refused: &Arc<BaseCredentials>,
    ) -> Result<Option<Arc<BaseCredentials>>, BaseError> {
        let _permit = self.fetching.acquire().await;
        let current = match self.usable() {
            Some(cached) if !Arc::ptr_eq(&cached.credentials, refused) => cached.credentials,
            _ => self.fetch().await?,
        };
        Ok((current.access_key_id != refused.access_key_id).then_some(current))
    }

    async fn fetch(&self) -> Result<Arc<BaseCredentials>, BaseError> {
        let fetched = self.ask().await;
        let count = if fetched.is_ok() { &self.fetched } else { &self.not_fetched };
        count.fetch_add(1, Ordering::Relaxed);
        *self.failure() = fetched.as_ref().err().map(|error| (self.clock.now(), chain(error).into()));
        fetched
    }

    async fn ask(&self) -> Result<Arc<BaseCredentials>, BaseError> {
        // The name too: a role can be replaced while the node runs.
        let role = self.metadata.node_role_name().await.map_err(BaseError::Metadata)?;
        let role = role.ok_or(BaseError::NoNodeRole)?;
        let issued = self.metadata.node_credentials(&role).await.map_err(BaseError::Metadata)?;

        // Half of what is left: the metadata server has new ones 30 minutes before the old expire, and hands out the old until then.
        let left = Duration::try_from(issued.expires_at.duration_since(self.clock.now())).unwrap_or_default();
        let renew_in = (left / 2).clamp(RETRY_AFTER, MAX_RENEWAL);
        let credentials = Arc::new(BaseCredentials {
            access_key_id: issued.access_key_id,
            access_key_secret: issued.access_key_secret,
            security_token: Some(issued.security_token),
        });
        *self.cached() = Some(Cached {
            role,
            credentials: Arc::clone(&credentials),
            expires_at: issued.expires_at,
            renew_at: Instant::now() + renew_in,
        });
        Ok(credentials)
    }

    fn usable(&self) -> Option<Cached> {
        self.cached().clone().filter(|c| c.expires_at.duration_since(self.clock.now()) > MIN_LEFT)
    }

    fn failure(&self) -> MutexGuard<'_, Option<(jiff::Timestamp, Box<str>)>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cached(&self) -> MutexGuard<'_, Option<Cached>> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Never signs with credentials that could expire on the way.
const MIN_LEFT: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_secs(30);
const MAX_RENEWAL: Duration = Duration::from_hours(6);

#[cfg(test)]
mod tests;
