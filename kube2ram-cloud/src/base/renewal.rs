//! Credentials that end, held and renewed ahead of that: single flight, and a failed renewal keeps what is
//! valid. Depends on `sts::transport`; called by the parent.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{sync::Semaphore, time::Instant};
use tracing::warn;

use super::{BaseCredentials, BaseError, BaseSource};
use crate::{role::RoleArn, sts::transport::Transport, wire::Issued};
use kube2ram_service::{clock::Clock, telemetry::chain};

/// Who gives them.
#[async_trait]
pub(crate) trait Origin: Send + Sync + 'static {
    fn source(&self) -> BaseSource;

    /// The role, where it is known without asking anybody.
    fn role(&self) -> Option<&RoleArn> {
        None
    }

    /// The role's name, and its credentials.
    async fn ask(&self, sts: &Transport) -> Result<(Box<str>, Issued), BaseError>;
}

pub(crate) struct Renewal {
    pub(crate) origin: Box<dyn Origin>,
    clock: Arc<dyn Clock>,
    cached: Mutex<Option<Cached>>,
    /// The last one, unless fetching has succeeded since.
    failure: Mutex<Option<(jiff::Timestamp, Box<str>)>>,
    fetched: AtomicU64,
    not_fetched: AtomicU64,
    /// The task with the permit fetches.
    fetching: Semaphore,
}

#[derive(Clone)]
pub(crate) struct Cached {
    pub(crate) role: Box<str>,
    credentials: Arc<BaseCredentials>,
    pub(crate) expires_at: jiff::Timestamp,
    pub(crate) renew_at: Instant,
}

impl Renewal {
    pub(crate) fn new(origin: Box<dyn Origin>, clock: Arc<dyn Clock>) -> Self {
        let (cached, failure) = (Mutex::new(None), Mutex::new(None));
        let (fetched, not_fetched) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { origin, clock, cached, failure, fetched, not_fetched, fetching: Semaphore::new(1) }
    }

    /// How often they could not be fetched, and how often they were.
    pub(crate) fn counts(&self) -> [u64; 2] {
        [&self.not_fetched, &self.fetched].map(|count| count.load(Ordering::Relaxed))
    }

    pub(crate) async fn current(&self, sts: &Transport) -> Result<Arc<BaseCredentials>, BaseError> {
        if let Some(cached) = self.usable() {
            let permit = (cached.renew_at <= Instant::now()).then(|| self.fetching.try_acquire());
            let Some(Ok(_permit)) = permit else {
                return Ok(cached.credentials);
            };
            return Ok(self.fetch(sts).await.unwrap_or_else(|error| {
                let source = self.origin.source().as_str();
                warn!(source, error = chain(&error), "cannot renew the agent's own credentials");
                if let Some(cached) = &mut *self.cached() {
                    cached.renew_at = Instant::now() + RETRY_AFTER;
                }
                cached.credentials
            }));
        }

        let _permit = self.fetching.acquire().await;
        match self.usable() {
            Some(cached) => Ok(cached.credentials),
            None => self.fetch(sts).await,
        }
    }

    pub(crate) async fn refresh(
        &self,
        refused: &Arc<BaseCredentials>,
        sts: &Transport,
    ) -> Result<Option<Arc<BaseCredentials>>, BaseError> {
        let _permit = self.fetching.acquire().await;
        let current = match self.usable() {
            Some(cached) if !Arc::ptr_eq(&cached.credentials, refused) => cached.credentials,
            _ => self.fetch(sts).await?,
        };
        Ok((current.access_key_id != refused.access_key_id).then_some(current))
    }

    async fn fetch(&self, sts: &Transport) -> Result<Arc<BaseCredentials>, BaseError> {
        let fetched = self.ask(sts).await;
        let count = if fetched.is_ok() { &self.fetched } else { &self.not_fetched };
        count.fetch_add(1, Ordering::Relaxed);
        *self.failure() = fetched.as_ref().err().map(|error| (self.clock.now(), chain(error).into()));
        fetched
    }

    async fn ask(&self, sts: &Transport) -> Result<Arc<BaseCredentials>, BaseError> {
        let (role, issued) = self.origin.ask(sts).await?;

        // Half of what is left: the metadata server has new ones 30 minutes before the old expire (on AWS 5),
        // and hands out the old until then.
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

    pub(crate) fn failure(&self) -> MutexGuard<'_, Option<(jiff::Timestamp, Box<str>)>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cached(&self) -> MutexGuard<'_, Option<Cached>> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Never signs with credentials that could expire on the way.
const MIN_LEFT: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_secs(30);
const MAX_RENEWAL: Duration = Duration::from_hours(6);
