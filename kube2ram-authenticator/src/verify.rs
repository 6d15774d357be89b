//! Token → identity: STS is asked who signed the call in a token. One call for each token at a time, a short
//! memory of answers, and limits that strangers cannot use up. What an identity is mapped to is never
//! remembered. Depends on `token` and `identity`; called by `webhook` and by the command `verify`.

mod cache;
mod limits;
mod metrics;
mod server_time;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use http::{HeaderValue, header::USER_AGENT};
use jiff::Timestamp;
use kube2ram_cloud::alibaba::{
    caller_identity::{Answer, CallError, CallErrorKind, CallerIdentityClient},
    endpoint::EndpointKind,
};
use prometheus_client::registry::Registry;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::TaskTracker;

#[cfg(test)]
pub(crate) use self::limits::KEYS;
pub use self::limits::{Budget, Rates};
use self::{
    cache::{Cache, Digest},
    limits::{Limits, Over},
    metrics::Metrics,
    server_time::ServerTime,
};
use crate::{
    identity::{Identity, IdentityError},
    token::{ClusterId, LIMIT_BYTES, PREFIX, SignedCall, TokenError},
};
use kube2ram_service::clock::Clock;

/// What the operator decides.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long the identity of a token is remembered, at most [`MAX_TTL`]: for so long a key counts after it
    /// was disabled. Zero: nothing is remembered.
    pub cache_ttl: Duration,
    /// How often STS is asked.
    pub rates: Rates,
}

/// The longest memory of an answer, and the usual one. The API server remembers it for 2 minutes already.
pub const MAX_TTL: Duration = Duration::from_mins(1);

/// Who is asked who signed a call: STS, in production.
#[async_trait]
pub trait Sts: Send + Sync + 'static {
    /// Asks once. The time is bounded.
    async fn caller(&self, call: &SignedCall) -> Answer;

    /// Of which kinds the endpoints are. Their counters are there from the start.
    fn endpoints(&self) -> Vec<EndpointKind> {
        EndpointKind::ALL.to_vec()
    }
}

#[async_trait]
impl Sts for CallerIdentityClient {
    async fn caller(&self, call: &SignedCall) -> Answer {
        let mut headers = call.headers().clone();
        let client = headers.get(USER_AGENT).and_then(|client| client.to_str().ok()).unwrap_or_default();
        let agent = format!("{USER_AGENT_PREFIX} {client}");
        // What the token was parsed with is legal in a header.
        let agent = HeaderValue::from_str(agent.trim_end());
        headers.insert(USER_AGENT, agent.unwrap_or(HeaderValue::from_static(USER_AGENT_PREFIX)));
        self.ask(&call.query(), &headers).await
    }

    fn endpoints(&self) -> Vec<EndpointKind> {
        CallerIdentityClient::endpoints(self)
    }
}

/// What the trail of actions shows before what the client calls itself.
const USER_AGENT_PREFIX: &str = concat!("kube2ram-authenticator/", env!("CARGO_PKG_VERSION"));

/// An identity that STS vouched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Who.
    pub identity: Arc<Identity>,
    /// By which answer of STS.
    pub source: Source,
}

/// Whose answer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// One that was remembered.
    Cached,
    /// One that another caller with the same token waited for as well.
    Joined,
    /// STS's, to this caller.
    Sts,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cached, Self::Joined, Self::Sts];

    /// The label in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cached => "hit",
            Self::Joined => "joined",
            Self::Sts => "miss",
        }
    }
}

/// Why a token names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// STS's answer names no identity.
    #[error("cannot use the answer of STS")]
    Identity(#[source] IdentityError),
    /// STS would be asked too often.
    #[error("too many tokens to verify ({})", budget.as_str())]
    Limited {
        /// Which limit was reached.
        budget: Budget,
        /// When it would be admitted; `None` when more tokens of unknown keys wait than the API server
        /// waits for.
        retry_after: Option<Duration>,
    },
    /// STS named nobody.
    #[error("STS does not vouch for the token")]
    Sts(#[source] CallError),
    /// The token is not one for this cluster and this time.
    #[error("the token is not valid here")]
    Token(#[source] TokenError),
}

impl VerifyError {
    /// Whether the token would be refused again.
    pub fn is_definite(&self) -> bool {
        match self {
            Self::Sts(error) => error.kind == CallErrorKind::Refused,
            Self::Token(_) => true,
            Self::Identity(_) | Self::Limited { .. } => false,
        }
    }

    /// The metrics label.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Identity(_) => "sts_nonsense",
            Self::Limited { .. } => "rate_limited",
            Self::Sts(error) => match error.kind {
                CallErrorKind::Refused => "sts_refused",
                CallErrorKind::Throttled => "sts_throttled",
                CallErrorKind::Unavailable => "sts_unavailable",
                CallErrorKind::Unexpected => "sts_unexpected",
            },
            Self::Token(error) => error.as_str(),
        }
    }
}

/// Verifies tokens of one cluster.
pub struct Verifier {
    cluster: ClusterId,
    sts: Box<dyn Sts>,
    clock: Arc<dyn Clock>,
    cache_ttl: Duration,
    limits: Limits,
    server_time: ServerTime,
    remembered: Mutex<Remembered>,
    flights: Mutex<Flights>,
    metrics: Metrics,
    tasks: TaskTracker,
}

type Outcome = Result<Arc<Identity>, VerifyError>;

/// Receives the outcome of a call; nothing more when its task has panicked.
type Flight = watch::Receiver<Option<Outcome>>;

/// The calls that STS has not answered yet.
#[derive(Default)]
struct Flights {
    all: HashMap<Digest, Flight>,
    /// Those of keys that have never logged in: they leave room for the others.
    of_strangers: HashSet<Digest>,
}

/// Apart, so that refusals, which anybody can cause, take no room from identities.
struct Remembered {
    identities: Cache<Arc<Identity>>,
    refusals: Cache<CallError>,
}

impl Verifier {
    /// Calls of STS become tasks of `tasks`.
    pub fn new(
        cluster: ClusterId,
        settings: Settings,
        sts: impl Sts,
        clock: Arc<dyn Clock>,
        tasks: TaskTracker,
        registry: &mut Registry,
    ) -> Arc<Self> {
        let (identities, refusals) = (Cache::new(IDENTITIES), Cache::new(REFUSALS));
        let remembered = Remembered { identities, refusals };
        let metrics = Metrics::new(registry, &sts.endpoints());
        Arc::new(Self {
            cluster,
            sts: Box::new(sts),
            clock,
            cache_ttl: settings.cache_ttl.min(MAX_TTL),
            limits: Limits::new(settings.rates),
            server_time: ServerTime::default(),
            remembered: Mutex::new(remembered),
            flights: Mutex::default(),
            metrics,
            tasks,
        })
    }

    /// The identity that has signed the call in `token`.
    ///
    /// # Errors
    /// See [`VerifyError`].
    ///
    /// # Cancel safety
    /// Dropping the future does not abandon the call: others may wait for it.
    pub async fn verify(self: &Arc<Self>, token: &str) -> Result<Verified, VerifyError> {
        // The API server sends every bearer token here that nobody else knows: these must cost nothing.
        if !token.starts_with(PREFIX) {
            return Err(VerifyError::Token(TokenError::Foreign));
        }
        if token.len() > LIMIT_BYTES {
            return Err(VerifyError::Token(TokenError::TooLarge));
        }
        let digest = Digest::of(token);
        if let Some(outcome) = self.recall(&digest) {
            return self.verified(Source::Cached, outcome);
        }
        let call = SignedCall::parse(token, &self.cluster).map_err(VerifyError::Token)?;
        let left = match call.time_left(self.now()) {
            Ok(left) => left,
            // The wrong clock may be ours. Now and then STS judges, and its time corrects ours.
            Err(_) if self.limits.may_doubt(Instant::now()) => Duration::ZERO,
            Err(error) => return Err(VerifyError::Token(error)),
        };
        let (source, outcome) = match self.join_or_start(digest, call, Instant::now() + left)? {
            Boarded::Flight(source, flight) => (source, landed(flight).await),
            Boarded::Landed(outcome) => (Source::Cached, outcome),
        };
        self.verified(source, outcome)
    }

    /// The key's identity is mapped to a user: its further tokens do not share a budget with those of
    /// strangers. Whoever is nobody here stays a stranger, whatever STS says.
    pub fn trust(&self, access_key_id: &str) {
        self.limits.trust(access_key_id, Instant::now());
    }

    /// STS's time, as far as it is known.
    pub fn now(&self) -> Timestamp {
        self.server_time.at(self.clock.now())
    }

    fn verified(&self, source: Source, outcome: Outcome) -> Result<Verified, VerifyError> {
        self.metrics.answered(source);
        outcome.map(|identity| Verified { identity, source })
    }

    fn join_or_start(
        self: &Arc<Self>,
        digest: Digest,
        call: SignedCall,
        window_end: Instant,
    ) -> Result<Boarded, VerifyError> {
        let mut flights = self.flights();
        if let Some(flight) = flights.all.get(&digest) {
            return Ok(Boarded::Flight(Source::Joined, flight.clone()));
        }
        // It may have landed since: then it was remembered before it left the map.
        if let Some(outcome) = self.recall(&digest) {
            return Ok(Boarded::Landed(outcome));
        }
        let (key, now) = (call.access_key_id(), Instant::now());
        let is_stranger = !self.limits.knows(key);
        let admitted = if is_stranger && flights.of_strangers.len() >= FLIGHTS_OF_STRANGERS {
            Err(self.limits.turn_away(Budget::Pending, PENDING_RETRY, now))
        } else if flights.all.len() >= FLIGHTS {
            Err(Over { budget: Budget::Pending, retry_after: Some(PENDING_RETRY) })
        } else {
            self.limits.admit(key, now)
        };
        if let Err(Over { budget, retry_after }) = admitted {
            self.metrics.limited(budget);
            return Err(VerifyError::Limited { budget, retry_after });
        }
        let (outcome, flight) = watch::channel(None);
        flights.all.insert(digest, flight.clone());
        if is_stranger {
            flights.of_strangers.insert(digest);
        }
        drop(flights);
        // In a task of its own: the caller may end, and others wait as well.
        self.tasks.spawn(Arc::clone(self).fly(digest, call, window_end, outcome));
        Ok(Boarded::Flight(Source::Sts, flight))
    }

    async fn fly(
        self: Arc<Self>,
        digest: Digest,
        call: SignedCall,
        window_end: Instant,
        landing: watch::Sender<Option<Outcome>>,
    ) {
        let _leaves = Leaves { verifier: &self, digest };
        let begun = Instant::now();
        let Answer { outcome, endpoint, server_time } = self.sts.caller(&call).await;
        if let Some(server_time) = server_time {
            self.metrics.clock_offset.set(self.server_time.learn(self.clock.now(), server_time));
        }
        self.metrics.asked(outcome.as_ref().err(), endpoint, begun.elapsed());
        let key = call.access_key_id();
        let outcome = match outcome {
            Ok(caller) => Identity::of_caller(&caller, key).map(Arc::new).map_err(VerifyError::Identity),
            Err(error) => Err(VerifyError::Sts(error)),
        };
        self.learn(digest, &outcome, window_end);
        // Those who waited may have ended.
        drop(landing.send(Some(outcome)));
    }

    /// Remembers what may be remembered of an outcome.
    fn learn(&self, digest: Digest, outcome: &Outcome, window_end: Instant) {
        let now = Instant::now();
        match outcome {
            Ok(identity) => {
                let until = window_end.min(now + self.cache_ttl);
                self.remembered().identities.put(digest, Arc::clone(identity), until, now);
            }
            Err(VerifyError::Sts(error)) if error.is_of_signature() => {
                let until = window_end.min(now + self.cache_ttl.min(REFUSAL_TTL));
                self.remembered().refusals.put(digest, error.clone(), until, now);
            }
            Err(_) => {}
        }
        let remembered = self.remembered();
        self.metrics.remembered.set(remembered.len());
    }

    fn recall(&self, digest: &Digest) -> Option<Outcome> {
        let now = Instant::now();
        let remembered = self.remembered();
        let identity: Option<Outcome> = remembered.identities.get(digest, now).map(Ok);
        identity.or_else(|| remembered.refusals.get(digest, now).map(|error| Err(VerifyError::Sts(error))))
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remembered {
    fn len(&self) -> i64 {
        i64::try_from(self.identities.len() + self.refusals.len()).unwrap_or(i64::MAX)
    }
}

/// How a caller gets its outcome.
enum Boarded {
    Flight(Source, Flight),
    Landed(Outcome),
}

async fn landed(mut flight: Flight) -> Outcome {
    let landed = flight.wait_for(Option::is_some).await;
    let outcome = landed.ok().and_then(|outcome| outcome.clone());
    let crashed = || Err(VerifyError::Sts(CallError::unavailable("Ended", "the call was abandoned")));
    outcome.unwrap_or_else(crashed)
}

/// Takes a call off the map when it ends, also by a panic.
struct Leaves<'a> {
    verifier: &'a Verifier,
    digest: Digest,
}

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        let mut flights = self.verifier.flights();
        drop(flights.all.remove(&self.digest));
        flights.of_strangers.remove(&self.digest);
    }
}

/// How many identities are remembered.
pub(crate) const IDENTITIES: usize = 10_000;
/// How many refusals are remembered: twice as many as calls of STS in [`REFUSAL_TTL`], by the default rates.
pub(crate) const REFUSALS: usize = 2_000;
/// How long a refusal is remembered at most: one of a signature or a date, which stays as it is.
const REFUSAL_TTL: Duration = Duration::from_secs(10);
/// How many calls may wait for STS at once.
pub(crate) const FLIGHTS: usize = 256;
/// How many of them may be of keys that have never logged in.
const FLIGHTS_OF_STRANGERS: usize = 128;
/// A call takes less than this, unless STS is in trouble.
const PENDING_RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
