//! The life of one cache entry: what it answers, and what its keeper does next. Pure: time and jitter are passed in.
//! Called by `cache` only, under its lock.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::{CredentialError, Credentials, IssueError, IssueErrorKind};

/// Both clocks: expiry is told by the wall, which may jump, so waiting and ageing go by the other one.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) wall: Timestamp,
    pub(super) tick: Instant,
}

/// One role session. A keeper task fetches for it and wakes it when it asked to be woken.
pub(super) struct Entry {
    phase: Phase,
    held: Option<Held>,
    failure: Option<Arc<IssueError>>,
    /// How often fetching has failed since it last succeeded.
    failures: u32,
    /// Whether anybody asked since the last fetch ended.
    used: bool,
}

/// What an entry says to who asks.
pub(super) enum Answer {
    /// Nothing, not long ago and still.
    Failed(CredentialError),
    /// These.
    Hit(Arc<Credentials>),
    /// Something better soon; until then these are still valid.
    Wait(Option<Arc<Credentials>>),
}

/// What the keeper does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Forget the entry.
    Drop,
    /// Fetch.
    Fetch,
    /// Wait, unless woken.
    Sleep(Instant),
}

enum Phase {
    /// Nobody used it since the last fetch: kept while it may be of use, but not refreshed.
    Dormant { until: Instant },
    /// The keeper fetches, or has been told to.
    Fetching,
    /// Until the next refresh, or the end of a back-off.
    Resting { until: Instant },
}

struct Held {
    credentials: Arc<Credentials>,
    /// From here on better ones are worth waiting for.
    stale_at: Instant,
    /// When they expire even if the wall clock denies it.
    ends_at: Instant,
}

impl Held {
    fn is_usable(&self, now: Now) -> bool {
        let by_wall = self.credentials.expires_at.duration_since(now.wall);
        let by_tick = self.ends_at.saturating_duration_since(now.tick);
        by_wall > SignedDuration::from_secs(MIN_LEFT.as_secs().cast_signed()) && by_tick > MIN_LEFT
    }
}

impl Entry {
    /// A new entry, whose keeper is about to fetch.
    pub(super) fn new() -> Self {
        Self { phase: Phase::Fetching, held: None, failure: None, failures: 0, used: true }
    }

    /// Answers; the flag says that the keeper must be woken.
    pub(super) fn ask(&mut self, now: Now) -> (Answer, bool) {
        self.used = true;
        let held = self.held.as_ref().filter(|held| held.is_usable(now));
        let credentials = held.map(|held| Arc::clone(&held.credentials));
        if let Phase::Resting { until } = self.phase {
            match (credentials, &self.failure) {
                (Some(credentials), _) => return (Answer::Hit(credentials), false),
                (None, Some(failure)) => {
                    let retry_after = until.saturating_duration_since(now.tick);
                    let source = Arc::clone(failure);
                    return (Answer::Failed(CredentialError::Issue { source, retry_after }), false);
                }
                // The wall clock has jumped.
                (None, None) => {
                    self.phase = Phase::Fetching;
                    return (Answer::Wait(None), true);
                }
            }
        }

        let wake = !matches!(self.phase, Phase::Fetching);
        self.phase = Phase::Fetching;
        let answer = match credentials {
            Some(credentials) if held.is_some_and(|held| now.tick < held.stale_at) => {
                Answer::Hit(credentials)
            }
            credentials => Answer::Wait(credentials),
        };
        (answer, wake)
    }

    /// Takes in what a fetch brought. `lifetime_limit` is what was asked for: a wall clock that is late must not lengthen it.
    /// `jitter` lies in 0 – 1.
    pub(super) fn finish(
        &mut self,
        result: Result<Credentials, IssueError>,
        lifetime_limit: Duration,
        now: Now,
        jitter: f64,
    ) {
        let wait = match result.and_then(|credentials| Self::fresh(credentials, now, lifetime_limit)) {
            Ok((held, lifetime)) => {
                self.held = Some(held);
                self.failure = None;
                self.failures = 0;
                lifetime.mul_f64(0.45 + 0.1 * jitter)
            }
            Err(error) => {
                let wait = self.back_off(&error, now, jitter);
                self.failure = Some(Arc::new(error));
                wait
            }
        };
        self.used = false;
        self.phase = Phase::Resting { until: now.tick + wait };
    }

    /// Tells the keeper what to do, after `finish` and whenever it wakes.
    pub(super) fn next(&mut self, now: Now) -> Next {
        match self.phase {
            Phase::Fetching => Next::Fetch,
            Phase::Dormant { until } | Phase::Resting { until } if now.tick < until => Next::Sleep(until),
            Phase::Dormant { .. } => Next::Drop,
            // A denial is forgotten, and asked about again by whoever comes next.
            Phase::Resting { .. } if self.failure.as_ref().is_some_and(|f| !f.kind.is_transient()) => {
                Next::Drop
            }
            Phase::Resting { .. } if self.used => {
                self.phase = Phase::Fetching;
                Next::Fetch
            }
            Phase::Resting { .. } => {
                let until =
                    self.held.as_ref().map_or(now.tick, |held| held.ends_at).max(now.tick + BACK_OFF_LIMIT);
                self.phase = Phase::Dormant { until };
                Next::Sleep(until)
            }
        }
    }

    /// Whether nobody would miss it.
    pub(super) fn is_idle(&self) -> bool {
        !self.used && !matches!(self.phase, Phase::Fetching)
    }

    fn fresh(credentials: Credentials, now: Now, limit: Duration) -> Result<(Held, Duration), IssueError> {
        let left = credentials.expires_at.duration_since(now.wall);
        let lifetime = Duration::try_from(left).unwrap_or_default().min(limit);
        let held = Held {
            credentials: Arc::new(credentials),
            stale_at: now.tick + lifetime.mul_f64(0.6),
            ends_at: now.tick + lifetime,
        };
        if held.is_usable(now) {
            return Ok((held, lifetime));
        }
        Err(IssueError {
            kind: IssueErrorKind::Unavailable,
            code: "Expired".into(),
            message: "issued credentials expire at once".into(),
            request_id: None,
            retry_after: None,
            source: None,
        })
    }

    fn back_off(&mut self, error: &IssueError, now: Now, jitter: f64) -> Duration {
        if !error.kind.is_transient() {
            self.held = None;
            return DENIAL_MEMORY;
        }
        let held = self.held.as_ref().filter(|held| held.is_usable(now));
        let limit = held.map_or(BACK_OFF_LIMIT, |held| {
            // The last moment at which asking again still helps before they run out.
            let left = held.ends_at.saturating_duration_since(now.tick).saturating_sub(MIN_LEFT);
            left.clamp(BACK_OFF, REFRESH_BACK_OFF_LIMIT)
        });
        let doubled = BACK_OFF.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let wait = doubled.min(limit).mul_f64(0.5 + 0.5 * jitter);
        wait.max(error.retry_after.unwrap_or_default().min(RETRY_AFTER_LIMIT))
    }
}

/// Credentials that are about to expire are not handed out: they would expire on the way.
const MIN_LEFT: Duration = Duration::from_secs(5);
/// How long a denial is remembered, so that a pod which keeps asking does not reach STS each time.
const DENIAL_MEMORY: Duration = Duration::from_secs(30);
/// The first back-off after a transient failure; it doubles.
const BACK_OFF: Duration = Duration::from_secs(1);
/// The longest back-off while there is nothing to hand out.
const BACK_OFF_LIMIT: Duration = Duration::from_secs(30);
/// The longest back-off while what is held is still valid.
const REFRESH_BACK_OFF_LIMIT: Duration = Duration::from_secs(300);
/// How much of a wait that STS asks for is granted.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(300);
