//! The state machine of one cache entry: what it answers, and what its refresh task does next. Pure: time and
//! jitter are passed in. Called by `cache` only, under its lock.

use std::{mem::replace, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{CredentialError, Failure, SessionState, issued::Issued, sts_queue::Rank, survey::Standing};
use kube2ram_cloud::credentials::{Credentials, IssueError, IssueErrorKind};

/// Both clocks: expiry is given in wall-clock time, which may jump, so waiting and ageing use the monotonic
/// clock.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) wall: Timestamp,
    pub(super) tick: Instant,
}

/// One role session. A refresh task fetches for it, and runs when the entry asked to be woken.
pub(super) struct Entry {
    phase: Phase,
    held: Option<Held>,
    failure: Option<Arc<IssueError>>,
    /// The last failure for status, also when it no longer counts.
    told: Option<(Timestamp, Arc<IssueError>)>,
    /// How often fetching has failed since it last succeeded.
    failures: u32,
    /// Whether STS has denied the role since the last success. While what is held is valid, one denial is not
    /// believed.
    is_doubted: bool,
    /// Until when STS asked not to be asked, when it failed last.
    barred_until: Option<Instant>,
    /// Whether a request has waited since the last fetch ended.
    wanted: bool,
    asked_at: Option<Instant>,
    /// Whether a pod that is alive has a claim to it.
    claimed: bool,
    /// Until when it outlives the last pod that had one.
    lingers_until: Option<Instant>,
}

/// An entry's answer to a request.
pub(super) enum Answer {
    /// Nothing, not long ago and still.
    Failed(CredentialError),
    /// These.
    Hit(Arc<Issued>),
    /// Something better soon; until then these are still valid.
    Wait(Option<Arc<Issued>>),
}

/// What the refresh task does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Forget the entry.
    Drop,
    /// Fetch.
    Fetch,
    /// Wait until woken.
    Idle,
    /// Wait, unless woken.
    Sleep(Instant),
}

#[derive(Clone, Copy)]
enum Phase {
    /// The refresh task fetches, or was woken to do so.
    Fetching,
    /// Denied, and the denial has expired: the next request causes a fetch.
    Forgotten,
    /// Until the first fetch, the next refresh, or the end of a back-off.
    Resting { until: Instant },
}

struct Held {
    issued: Arc<Issued>,
    /// With less left, better ones are worth waiting for.
    floor: Duration,
    /// When they expire even if the wall clock denies it.
    ends_at: Instant,
}

impl Held {
    /// The shorter remaining time by either clock: the wall clock may have jumped, and the monotonic clock
    /// stops while the machine sleeps.
    fn left(&self, now: Now) -> Duration {
        let by_wall = self.issued.credentials.expires_at.duration_since(now.wall);
        let by_tick = self.ends_at.saturating_duration_since(now.tick);
        Duration::try_from(by_wall).unwrap_or_default().min(by_tick)
    }
}

impl Entry {
    /// A new entry that a pod asks for; its refresh task is about to fetch.
    pub(super) fn asked(now: Now) -> Self {
        Self { wanted: true, asked_at: Some(now.tick), ..Self::planned(Phase::Fetching, false) }
    }

    /// A new entry that a pod has a claim to; its refresh task fetches at `at`, or when a pod asks.
    pub(super) fn claimed(at: Instant) -> Self {
        Self::planned(Phase::Resting { until: at }, true)
    }

    fn planned(phase: Phase, claimed: bool) -> Self {
        Self {
            phase,
            held: None,
            failure: None,
            told: None,
            failures: 0,
            is_doubted: false,
            barred_until: None,
            wanted: false,
            asked_at: None,
            claimed,
            lingers_until: None,
        }
    }

    /// Answers; the flag means that the refresh task must be woken.
    pub(super) fn ask(&mut self, now: Now) -> (Answer, bool) {
        self.asked_at = Some(now.tick);
        let held = self.held.as_ref().map(|held| (held, held.left(now)));
        let usable = held.filter(|(_, left)| *left > MIN_LEFT);
        let issued = usable.map(|(held, _)| Arc::clone(&held.issued));
        let is_above = usable.is_some_and(|(held, left)| left >= held.floor);
        if let Some(issued) = issued.as_ref().filter(|_| is_above) {
            return (Answer::Hit(Arc::clone(issued)), false);
        }
        self.wanted = true;
        // Below the floor only while STS fails: then waiting would be useless.
        if let Some(issued) = issued.as_ref().filter(|_| self.failure.is_some()) {
            return (Answer::Hit(Arc::clone(issued)), false);
        }
        if let (Phase::Resting { until }, Some(failure)) = (self.phase, &self.failure) {
            let rest = until.saturating_duration_since(now.tick);
            // A longer back-off applies to sessions that no pod asks for; a pause that STS requested applies
            // to all.
            let barred = self.barred_until.map(|until| until.saturating_duration_since(now.tick));
            let retry_after =
                if rest <= BACK_OFF_LIMIT { Some(rest) } else { barred.filter(|rest| !rest.is_zero()) };
            if let Some(retry_after) = retry_after {
                let source = Arc::clone(failure);
                return (Answer::Failed(CredentialError::Issue { source, retry_after }), false);
            }
        }
        let wake = !matches!(self.phase, Phase::Fetching);
        self.phase = Phase::Fetching;
        (Answer::Wait(issued), wake)
    }

    /// Takes in what a fetch brought. `lifetime_limit` is what was asked for: a wall clock that is late must
    /// not lengthen it. `jitter` lies in 0 – 1.
    pub(super) fn finish(
        &mut self,
        result: Result<Credentials, IssueError>,
        lifetime_limit: Duration,
        now: Now,
        jitter: f64,
    ) {
        let wait = match result.and_then(|credentials| Self::fresh(credentials, now, lifetime_limit)) {
            Ok((held, lifetime)) => {
                let refresh_in = (lifetime - held.floor).min(lifetime / 2).mul_f64(0.8 + 0.15 * jitter);
                self.held = Some(held);
                (self.failure, self.told) = (None, None);
                (self.failures, self.is_doubted) = (0, false);
                refresh_in
            }
            Err(error) => {
                let wait = self.back_off(&error, now, jitter);
                let error = Arc::new(error);
                self.told = Some((now.wall, Arc::clone(&error)));
                self.failure = Some(error);
                wait
            }
        };
        self.wanted = false;
        self.phase = Phase::Resting { until: now.tick + wait };
    }

    /// STS no longer throttles: a wait that throttling caused ends within [`RETURN_SPREAD`]. `false` when
    /// there is no such wait.
    pub(super) fn unthrottle(&mut self, now: Now, jitter: f64) -> bool {
        let is_throttled = self.failure.as_ref().is_some_and(|e| e.kind == IssueErrorKind::Throttled);
        let Phase::Resting { until } = self.phase else { return false };
        let sooner = now.tick + RETURN_SPREAD.mul_f64(jitter);
        if !is_throttled || until <= sooner {
            return false;
        }
        self.phase = Phase::Resting { until: sooner };
        self.barred_until = None;
        true
    }

    /// Why the fetch before the one in flight failed, if another attempt may succeed.
    pub(super) fn last_failure(&self) -> Option<Arc<IssueError>> {
        self.failure.clone().filter(|failure| failure.kind.is_transient())
    }

    /// What the refresh task must do, after `finish` and whenever it wakes.
    pub(super) fn next(&mut self, now: Now) -> Next {
        match self.phase {
            Phase::Fetching => Next::Fetch,
            Phase::Forgotten => Next::Idle,
            Phase::Resting { .. }
                if self.lingers_until.is_some_and(|end| end <= now.tick) && !self.wanted =>
            {
                Next::Drop
            }
            Phase::Resting { until } if now.tick < until => {
                Next::Sleep(self.lingers_until.map_or(until, |end| end.min(until)))
            }
            // No living pod needs it; but the back-off must not restart for a pod that keeps asking.
            Phase::Resting { .. } if !self.claimed && (!self.wanted || self.is_denied()) => Next::Drop,
            Phase::Resting { .. } if self.is_denied() => {
                self.phase = Phase::Forgotten;
                self.failure = None;
                Next::Idle
            }
            Phase::Resting { .. } => {
                self.phase = Phase::Fetching;
                Next::Fetch
            }
        }
    }

    /// What people see of it.
    pub(super) fn state(&self, now: Now) -> SessionState {
        let held = self.held.as_ref().filter(|held| held.left(now) > MIN_LEFT);
        SessionState {
            held: held
                .map(|Held { issued, .. }| (issued.credentials.issued_at, issued.credentials.expires_at)),
            failure: self.told.as_ref().map(|(at, error)| Failure::of(error, *at)),
            is_fetching: matches!(self.phase, Phase::Fetching),
            next_in: match self.phase {
                Phase::Resting { until } => Some(until.saturating_duration_since(now.tick)),
                Phase::Fetching | Phase::Forgotten => None,
            },
        }
    }

    /// What the fetch that is due is for.
    pub(super) fn rank(&self) -> Rank {
        match (self.wanted, self.failures) {
            (false, _) => Rank::Ahead,
            (true, 0) => Rank::Demand,
            (true, _) => Rank::Retry,
        }
    }

    /// A pod that is alive has a claim to it.
    pub(super) fn claim(&mut self) {
        self.claimed = true;
        self.lingers_until = None;
    }

    /// No pod that is known has a claim to it. `false` when it must go at once. It stays for a while if it
    /// had one, holds what the next pod would be given, and `may_linger`; or if the pod that asked for it may
    /// not be known yet.
    pub(super) fn unclaim(&mut self, now: Now, may_linger: bool) -> bool {
        if replace(&mut self.claimed, false) && may_linger && self.failure.is_none() && self.is_fresh(now) {
            self.lingers_until = Some(now.tick + LINGER);
        }
        match self.lingers_until {
            Some(end) => now.tick < end,
            None => self.asked_at.is_some_and(|at| now.tick.saturating_duration_since(at) < CLAIM_PATIENCE),
        }
    }

    /// Whether it outlives its last pod.
    pub(super) fn lingers(&self) -> bool {
        self.lingers_until.is_some()
    }

    fn is_fresh(&self, now: Now) -> bool {
        self.held.as_ref().is_some_and(|held| held.left(now) >= held.floor)
    }

    /// Whether no pod has a claim to it, and no request waits.
    pub(super) fn is_idle(&self) -> bool {
        !self.claimed && !matches!(self.phase, Phase::Fetching)
    }

    /// Whether what it would hand out now is below the floor.
    pub(super) fn is_below_floor(&self, now: Now) -> bool {
        self.held.as_ref().is_some_and(|held| held.left(now) < held.floor)
    }

    /// For the operator.
    pub(super) fn standing(&self, now: Now) -> Standing {
        match &self.held {
            Some(_) if self.is_fresh(now) => Standing::Fresh,
            Some(held) if held.left(now) > MIN_LEFT => Standing::BelowFloor,
            _ if self.is_denied() || matches!(self.phase, Phase::Forgotten) => Standing::Denied,
            _ if self.failure.is_some() || self.held.is_some() => Standing::Failing,
            _ => Standing::Pending,
        }
    }

    /// What is left of credentials that are valid, and how old they are.
    pub(super) fn span(&self, now: Now) -> Option<(Duration, Duration)> {
        let held = self.held.as_ref().filter(|held| held.left(now) > MIN_LEFT)?;
        let age = now.wall.duration_since(held.issued.credentials.issued_at);
        Some((held.left(now), Duration::try_from(age).unwrap_or_default()))
    }

    /// Whether STS denies the role, and nothing is held that this still has to be confirmed for.
    fn is_denied(&self) -> bool {
        self.held.is_none() && self.failure.as_ref().is_some_and(|failure| !failure.kind.is_transient())
    }

    /// Whether a denial has to be confirmed before what is held is dropped.
    pub(super) fn awaits_confirmation(&self) -> bool {
        self.held.is_some() && self.failure.as_ref().is_some_and(|failure| !failure.kind.is_transient())
    }

    fn fresh(credentials: Credentials, now: Now, limit: Duration) -> Result<(Held, Duration), IssueError> {
        let [by_wall, by_issuer] =
            [now.wall, credentials.issued_at].map(|since| credentials.expires_at.duration_since(since));
        let lifetime = Duration::try_from(by_wall.min(by_issuer)).unwrap_or_default().min(limit);
        if lifetime > MIN_LEFT {
            let floor = if lifetime < SHORT_LIFETIME { lifetime / 2 } else { FLOOR };
            let held =
                Held { issued: Arc::new(Issued::new(credentials)), floor, ends_at: now.tick + lifetime };
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
        let failures = self.failures;
        self.failures = failures.saturating_add(1);
        // Nodes that get the same number from STS must not return at the same moment.
        let asked = error.retry_after.map(|asked| asked.min(RETRY_AFTER_LIMIT).mul_f64(1.0 + 0.25 * jitter));
        self.barred_until = asked.map(|asked| now.tick + asked);
        let left = self.held.as_ref().map(|held| held.left(now)).filter(|left| *left > MIN_LEFT);
        if !error.kind.is_transient() {
            let is_confirmed = replace(&mut self.is_doubted, true);
            if let Some(left) = left.filter(|_| !is_confirmed) {
                // In time for an answer while they are still valid.
                return CONFIRMATION.mul_f64(1.0 + 0.25 * jitter).min((left - MIN_LEFT) / 2);
            }
            self.held = None;
            return DENIAL_MEMORY;
        }
        let limit = match left {
            // The last moment at which asking again still helps before they run out.
            Some(left) => (left - MIN_LEFT).clamp(BACK_OFF, QUIET_BACK_OFF_LIMIT),
            None if self.wanted => BACK_OFF_LIMIT,
            None => QUIET_BACK_OFF_LIMIT,
        };
        // The cluster's configuration changes when a person changes it. Jitter halves the first back-off.
        let first = match (error.kind, left) {
            (IssueErrorKind::ClusterConfiguration, Some(_)) => 2 * CONFIGURATION_QUIET_BACK_OFF,
            (IssueErrorKind::ClusterConfiguration, None) => 2 * CONFIGURATION_BACK_OFF,
            _ => BACK_OFF,
        };
        let doubled = first.saturating_mul(1 << failures.min(16));
        let wait = doubled.min(limit).mul_f64(0.5 + 0.5 * jitter);
        wait.max(asked.unwrap_or_default())
    }
}

/// Credentials that are about to expire are not served: they would expire on the way.
const MIN_LEFT: Duration = Duration::from_secs(5);
/// What is left of credentials when they are handed out, unless STS fails: as long as the real metadata
/// server's always are, and SDKs fetch again on each call with less (`ack-ram-tool`).
const FLOOR: Duration = Duration::from_mins(30);
/// Credentials with a shorter life than this have half of it as their floor: with [`FLOOR`] they would hardly
/// ever rest.
const SHORT_LIFETIME: Duration = Duration::from_mins(45);
/// How long a denial is remembered, so that a pod which keeps asking does not reach STS each time.
const DENIAL_MEMORY: Duration = Duration::from_secs(30);
/// After which time STS is asked again before a denial takes valid credentials away. A trust policy that was
/// just changed is refused for up to a minute. Nothing is gained by haste: what was issued stays valid at the
/// cloud's services until its end.
const CONFIRMATION: Duration = Duration::from_secs(60);
/// When throttling ends, whatever waited for that is asked for within this time, not all at once.
const RETURN_SPREAD: Duration = Duration::from_secs(10);
/// The first back-off after a transient failure; it doubles.
const BACK_OFF: Duration = Duration::from_secs(1);
/// The least back-off after a fault of the cluster's configuration, while there are no credentials.
const CONFIGURATION_BACK_OFF: Duration = Duration::from_secs(10);
/// The same while held credentials are valid, unless they end sooner.
const CONFIGURATION_QUIET_BACK_OFF: Duration = Duration::from_secs(60);
/// The longest back-off while there are no credentials for pods that ask.
const BACK_OFF_LIMIT: Duration = Duration::from_secs(30);
/// The longest back-off while held credentials are valid, or no pod asks.
const QUIET_BACK_OFF_LIMIT: Duration = Duration::from_secs(300);
/// How much of a wait that STS asks for is granted.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(300);
/// How long credentials outlive the last pod that had a claim to them, if they would not be refreshed before:
/// jobs of one role, one after another, then cost one call and not one each.
const LINGER: Duration = Duration::from_mins(30);
/// How long a requested entry may be without a claim: its pod's claim may not be registered yet.
const CLAIM_PATIENCE: Duration = Duration::from_secs(10);
