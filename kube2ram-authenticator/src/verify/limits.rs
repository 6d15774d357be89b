//! How often STS is asked. Keys of users who have logged in before share one budget, and each has a small
//! limit of its own; all others share a smaller budget. So somebody who sends tokens of invented keys, or of
//! an identity that is mapped to nobody, keeps out only others who log in for the first time. Somebody who
//! knows the id of a user's key keeps out that user; it takes those of thirty users to keep out all. Time is
//! passed in, but to the limiters of single keys. Depends on the rate limiter; called by the parent.
//!
//! The API server repeats a login up to ten times if it is told to wait. That helps a burst, such as a
//! hundred jobs with fresh role sessions, and makes a flood ten times as large. So of the tokens of unknown
//! keys, only as many are told to wait as STS can be asked about while the API server waits. All others get
//! no decision, and are not repeated.
//!
//! Source of the sum: GetCallerIdentity allows 100 calls a second for the account of the signer in a region.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kube2ram_service::rate_limiter::{Rate, RateLimiter, RateLimiters};
use tokio::time::Instant;

/// Calls of STS for each second; of two seconds at once. Zero is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// For one access key that has logged in before.
    pub key: u32,
    /// For all access keys together that have logged in before.
    pub known: u32,
    /// For all other access keys together, those of fresh role sessions among them.
    pub unknown: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self { key: 2, known: 60, unknown: 30 }
    }
}

/// The limits that there are: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Budget {
    /// Of one key.
    Key,
    /// Of all keys that have logged in before.
    Known,
    /// Of calls that STS has not answered yet.
    Pending,
    /// Of all other keys.
    Unknown,
}

impl Budget {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Key, Self::Known, Self::Pending, Self::Unknown];

    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Known => "known_keys",
            Self::Pending => "pending",
            Self::Unknown => "unknown_keys",
        }
    }
}

/// A limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over {
    pub(super) budget: Budget,
    /// `None`: too many wait already, so that waiting does not help.
    pub(super) retry_after: Option<Duration>,
}

pub(super) struct Limits {
    each: RateLimiters<Box<str>>,
    known: Arc<RateLimiter>,
    unknown: Arc<RateLimiter>,
    /// For tokens of unknown keys that are told to wait.
    waits: Arc<RateLimiter>,
    /// For tokens that are out of their window by our clock.
    doubts: Arc<RateLimiter>,
    /// Keys that have logged in, and when last.
    succeeded: Mutex<HashMap<Box<str>, Instant>>,
}

impl Limits {
    pub(super) fn new(rates: Rates) -> Self {
        let of = |rate: Option<Rate>| RateLimiters::<()>::new(rate).of(None);
        let shared = |rate| of(Rate::per_second(rate));
        // Without a limit of its own, it still needs one for those who wait for STS.
        let waits = Rate::per_second(rates.unknown).unwrap_or(UNLIMITED_WAITS);
        Self {
            each: RateLimiters::new(Rate::per_second(rates.key)),
            known: shared(rates.known),
            unknown: shared(rates.unknown),
            waits: of(Some(Rate { burst: waits.burst.saturating_mul(WAITS_FACTOR), ..waits })),
            doubts: shared(DOUBTS_PER_SECOND),
            succeeded: Mutex::default(),
        }
    }

    /// Whether a token of this key has logged in.
    pub(super) fn knows(&self, access_key_id: &str) -> bool {
        self.keys().contains_key(access_key_id)
    }

    /// Takes what one call for a token of this key costs.
    pub(super) fn admit(&self, access_key_id: &str, now: Instant) -> Result<(), Over> {
        let over = |budget| move |retry_after| Over { budget, retry_after: Some(retry_after) };
        if !self.knows(access_key_id) {
            let over = |retry_after| self.turn_away(Budget::Unknown, retry_after, now);
            return self.unknown.admit(now).map(drop).map_err(over);
        }
        // A key without tokens must not take one of all others.
        self.each.of(Some(&access_key_id.into())).admit(now).map_err(over(Budget::Key))?;
        self.known.admit(now).map(drop).map_err(over(Budget::Known))
    }

    /// What a token of an unknown key gets when a limit was reached: it may wait if there is room.
    pub(super) fn turn_away(&self, budget: Budget, retry_after: Duration, now: Instant) -> Over {
        Over { budget, retry_after: self.waits.admit(now).is_ok().then_some(retry_after) }
    }

    /// Whether STS may be asked about a token that is out of its window by our clock.
    pub(super) fn may_doubt(&self, now: Instant) -> bool {
        self.doubts.admit(now).is_ok()
    }

    /// A token of this key has brought somebody in.
    pub(super) fn trust(&self, access_key_id: &str, now: Instant) {
        let mut succeeded = self.keys();
        if let Some(last) = succeeded.get_mut(access_key_id) {
            *last = now;
            return;
        }
        if succeeded.len() >= KEYS {
            let oldest = succeeded.iter().min_by_key(|(_, last)| **last).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                succeeded.remove(&oldest);
            }
        }
        succeeded.insert(access_key_id.into(), now);
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<Box<str>, Instant>> {
        self.succeeded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many keys are remembered that have logged in.
pub(crate) const KEYS: usize = 4096;
const DOUBTS_PER_SECOND: u32 = 1;
/// How many times the burst of unknown keys may wait at once: those of the 30 s that the API server waits. A
/// token counts again each time that it is told to wait.
const WAITS_FACTOR: u32 = 15;
/// The measure where unknown keys have no limit: that of the default.
const UNLIMITED_WAITS: Rate = Rate { burst: 60, interval: Duration::from_millis(33) };

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { key: 5, known: 20, unknown: 10 };

    fn admitted(limits: &Limits, key: &str, times: usize) -> usize {
        (0..times).filter(|_| limits.admit(key, Instant::now()).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn invented_keys_keep_nobody_out_who_has_logged_in_before() {
        let limits = Limits::new(RATES);
        limits.trust("alice", Instant::now());

        let invented: usize = (0..1000).map(|n| admitted(&limits, &format!("invented{n}"), 1)).sum();

        assert_eq!(invented, 20, "two seconds' worth");
        assert_eq!(limits.admit("another", Instant::now()).unwrap_err().budget, Budget::Unknown);
        assert_eq!(admitted(&limits, "alice", 3), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_unknown_keys_may_wait_and_a_flood_may_not() {
        let limits = Limits::new(RATES);
        let waiting = |times: usize| {
            let refused = (0..times).filter_map(|_| limits.admit("stranger", Instant::now()).err());
            refused.filter(|over| over.retry_after.is_some()).count()
        };

        // Twenty are admitted, and those of thirty seconds may wait.
        assert_eq!(waiting(320), 300);
        assert_eq!(waiting(1000), 0);
        let over = limits.admit("another", Instant::now()).unwrap_err();
        assert_eq!((over.budget, over.retry_after), (Budget::Unknown, None));
        limits.trust("alice", Instant::now());
        assert_eq!(admitted(&limits, "alice", 3), 3, "no budget of users was used");
        tokio::time::advance(Duration::from_secs(1)).await;

        // Of each second of a flood, as many wait as are admitted.
        assert_eq!(waiting(1000), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_known_key_is_always_told_to_wait() {
        let limits = Limits::new(RATES);
        limits.trust("alice", Instant::now());

        let refused = (0..1000).filter_map(|_| limits.admit("alice", Instant::now()).err());

        assert!(refused.map(|over| over.retry_after).all(|retry_after| retry_after.is_some()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_key_cannot_use_up_the_share_of_others() {
        let limits = Limits::new(RATES);
        for key in ["alice", "bob"] {
            limits.trust(key, Instant::now());
        }

        assert_eq!(admitted(&limits, "alice", 100), 10);

        assert_eq!(limits.admit("alice", Instant::now()).unwrap_err().budget, Budget::Key);
        assert_eq!(admitted(&limits, "bob", 5), 5);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(admitted(&limits, "alice", 100), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn all_known_keys_together_stay_below_the_limit_of_sts() {
        let limits = Limits::new(RATES);
        let keys: Vec<String> = (0..50).map(|n| format!("key{n}")).collect();
        keys.iter().for_each(|key| limits.trust(key, Instant::now()));

        let admitted: usize = keys.iter().map(|key| admitted(&limits, key, 10)).sum();

        assert_eq!(admitted, 40);
        limits.trust("late", Instant::now());
        assert_eq!(limits.admit("late", Instant::now()).unwrap_err().budget, Budget::Known);
    }

    #[tokio::test(start_paused = true)]
    async fn zero_is_no_limit() {
        let limits = Limits::new(Rates { key: 0, known: 0, unknown: 0 });

        assert_eq!(admitted(&limits, "stranger", 1000), 1000);
        limits.trust("alice", Instant::now());
        assert_eq!(admitted(&limits, "alice", 1000), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number_of_keys_and_those_that_came_last() {
        let limits = Limits::new(RATES);
        for n in 0..KEYS {
            limits.trust(&format!("key{n}"), Instant::now());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        limits.trust("key0", Instant::now());

        limits.trust("another", Instant::now());

        let keys = limits.keys();
        assert_eq!(keys.len(), KEYS);
        assert!(keys.contains_key("key0") && keys.contains_key("another") && !keys.contains_key("key1"));
    }
}
