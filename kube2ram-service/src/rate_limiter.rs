//! The rate limiter that everything here uses: a token bucket, and a bounded table of them by caller. Time is
//! passed in, but to the table. Depends on nothing of ours; used by the agent's `server` and `credentials`,
//! and by `kubernetes::events`.
//!
//! The crate `governor` cannot do three things that the STS scheduler needs: look at a bucket without taking
//! a token, leave a reserve in it, and change its rate.

use std::{
    collections::HashMap,
    hash::Hash,
    mem::take,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The measure of a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many tokens may be taken at once after a rest.
    pub burst: u32,
    /// The time in which one more token comes.
    pub interval: Duration,
}

impl Rate {
    /// So many a second, and those of two seconds at once; `None`, which is no limit, for zero.
    pub fn per_second(rate: u32) -> Option<Self> {
        let interval = Duration::from_secs(1).checked_div(rate).filter(|interval| !interval.is_zero())?;
        Some(Self { burst: rate.saturating_mul(2), interval })
    }
}

/// A token bucket. Its rate is passed with each call, because it may change.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    tokens: f64,
    counted_at: Instant,
}

impl TokenBucket {
    /// One that was not used lately.
    pub fn full(rate: Rate, now: Instant) -> Self {
        Self { tokens: f64::from(rate.burst), counted_at: now }
    }

    /// When there is a token above a reserve of so many: `now`, if there is one already. Moments of several
    /// threads may come out of order.
    pub fn ready_at(&mut self, rate: Rate, reserve: u32, now: Instant) -> Instant {
        self.refill(rate, now);
        let missing = f64::from(reserve) + 1.0 - self.tokens;
        // The last digit of a floating-point sum is no reason to wait.
        if missing > 1e-9 { self.counted_at + rate.interval.mul_f64(missing) } else { now }
    }

    /// Takes a token, which [`Self::ready_at`] has found to be there.
    pub fn take(&mut self) {
        self.tokens -= 1.0;
    }

    /// Whether it is as good as a new one.
    pub fn is_full(&mut self, rate: Rate, now: Instant) -> bool {
        self.refill(rate, now);
        self.tokens >= f64::from(rate.burst)
    }

    fn refill(&mut self, rate: Rate, now: Instant) {
        let come = now.saturating_duration_since(self.counted_at).div_duration_f64(rate.interval);
        self.tokens = (self.tokens + come).min(f64::from(rate.burst));
        self.counted_at = self.counted_at.max(now);
    }
}

/// The limiters of all callers. What is remembered is bounded: callers that have used nothing lately are
/// forgotten.
#[derive(Debug)]
pub struct RateLimiters<K> {
    rate: Option<Rate>,
    /// `None`: callers without a key, and those beyond [`CALLERS`], together.
    callers: Mutex<HashMap<Option<K>, Arc<RateLimiter>>>,
}

/// One caller's limiter; `None` is no limit.
#[derive(Debug)]
pub struct RateLimiter(Option<Mutex<Limited>>);

#[derive(Debug)]
struct Limited {
    rate: Rate,
    bucket: TokenBucket,
    /// How many tokens were refused since the last one was taken.
    refused: u64,
}

/// How many callers have a limiter of their own: more than a node has pods.
pub const CALLERS: usize = 1024;

impl<K: Clone + Eq + Hash> RateLimiters<K> {
    /// `rate` is each caller's; `None` is no limit.
    pub fn new(rate: Option<Rate>) -> Self {
        Self { rate, callers: Mutex::default() }
    }

    /// The limiter of a caller, to be kept for as long as its connection.
    pub fn of(&self, caller: Option<&K>) -> Arc<RateLimiter> {
        let now = Instant::now();
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= CALLERS {
            callers.retain(|_, limiter| Arc::strong_count(limiter) > 1 || !limiter.is_full(now));
        }
        // Callers that have a limiter keep it; new ones share one when there are too many.
        let caller = caller.cloned();
        let has_room = callers.len() < CALLERS || callers.contains_key(&caller);
        let caller = caller.filter(|_| has_room);
        Arc::clone(callers.entry(caller).or_insert_with(|| Arc::new(RateLimiter::new(self.rate, now))))
    }
}

impl RateLimiter {
    fn new(rate: Option<Rate>, now: Instant) -> Self {
        Self(rate.map(|rate| Mutex::new(Limited { rate, bucket: TokenBucket::full(rate, now), refused: 0 })))
    }

    /// Takes a token for this moment. Returns how many were refused since the last one.
    ///
    /// # Errors
    /// When there is none: how long the caller should wait.
    pub fn admit(&self, now: Instant) -> Result<u64, Duration> {
        let Some(mut limited) = self.limited() else { return Ok(0) };
        let Limited { rate, bucket, refused } = &mut *limited;
        let wait = bucket.ready_at(*rate, 0, now).saturating_duration_since(now);
        if !wait.is_zero() {
            *refused += 1;
            return Err(wait);
        }
        bucket.take();
        Ok(take(refused))
    }

    fn is_full(&self, now: Instant) -> bool {
        self.limited().is_none_or(|mut limited| {
            let rate = limited.rate;
            limited.bucket.is_full(rate, now)
        })
    }

    fn limited(&self) -> Option<MutexGuard<'_, Limited>> {
        self.0.as_ref().map(|limited| limited.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(30);

    fn admitted(limiters: &RateLimiters<usize>, caller: usize, times: usize) -> usize {
        (0..times).filter(|_| limiters.of(Some(&caller)).admit(Instant::now()).is_ok()).count()
    }

    #[test]
    fn lets_a_burst_through_and_then_one_at_a_time() {
        let (rate, start) = (Rate { burst: 3, interval: PAUSE }, Instant::now());
        let mut bucket = TokenBucket::full(rate, start);

        for _ in 0..3 {
            assert_eq!(bucket.ready_at(rate, 0, start), start);
            bucket.take();
        }
        assert_eq!(bucket.ready_at(rate, 0, start), start + PAUSE);
        assert_eq!(bucket.ready_at(rate, 0, start + PAUSE), start + PAUSE);
        bucket.take();
        assert_eq!(bucket.ready_at(rate, 0, start + PAUSE), start + 2 * PAUSE);
        // A long rest brings back the burst and no more.
        let later = start + PAUSE * 100;
        for _ in 0..3 {
            assert_eq!(bucket.ready_at(rate, 0, later), later);
            bucket.take();
        }
        assert_eq!(bucket.ready_at(rate, 0, later), later + PAUSE);
    }

    #[test]
    fn leaves_a_reserve_and_is_full_after_a_rest() {
        let (rate, now) = (Rate { burst: 3, interval: PAUSE }, Instant::now());
        let mut bucket = TokenBucket::full(rate, now);

        assert!(bucket.is_full(rate, now));
        assert_eq!(bucket.ready_at(rate, 2, now), now);
        bucket.take();
        assert_eq!(bucket.ready_at(rate, 2, now), now + PAUSE);
        assert_eq!(bucket.ready_at(rate, 1, now), now, "the allowed twin");
        assert!(!bucket.is_full(rate, now + PAUSE / 2));
        assert!(bucket.is_full(rate, now + PAUSE));
    }

    #[test]
    fn a_moment_that_has_passed_brings_no_tokens_and_costs_none() {
        let (rate, start) = (Rate { burst: 1, interval: PAUSE }, Instant::now());
        let mut bucket = TokenBucket::full(rate, start + PAUSE);
        assert_eq!(bucket.ready_at(rate, 0, start), start);
        bucket.take();

        for now in [start + PAUSE, start, start + PAUSE] {
            assert_eq!(bucket.ready_at(rate, 0, now), start + 2 * PAUSE);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_asks_without_end_gets_its_rate_and_others_theirs() {
        let limiters = RateLimiters::new(Rate::per_second(100));

        assert_eq!(admitted(&limiters, 1, 1000), 200, "two seconds' worth at once");
        let retry_after = limiters.of(Some(&1)).admit(Instant::now()).unwrap_err();
        assert!(!retry_after.is_zero() && retry_after <= Duration::from_millis(10), "{retry_after:?}");
        assert_eq!(admitted(&limiters, 2, 1000), 200);
        assert!(limiters.of(None).admit(Instant::now()).is_ok(), "callers without a key");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(admitted(&limiters, 1, 1000), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_of_zero_is_no_limit_and_a_low_one_still_lets_a_request_through() {
        assert_eq!(admitted(&RateLimiters::new(Rate::per_second(0)), 1, 10_000), 10_000);
        assert_eq!(admitted(&RateLimiters::new(Rate::per_second(1)), 1, 10), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_was_refused_learns_how_often_once() {
        let limiters = RateLimiters::new(Some(Rate { burst: 200, interval: PAUSE }));
        assert_eq!(admitted(&limiters, 1, 250), 200);

        assert_eq!(limiters.of(Some(&2)).admit(Instant::now()), Ok(0), "others are not affected");
        assert_eq!(limiters.of(None).admit(Instant::now()), Ok(0));
        tokio::time::advance(PAUSE * 2).await;
        assert_eq!(limiters.of(Some(&1)).admit(Instant::now()), Ok(50));
        assert_eq!(limiters.of(Some(&1)).admit(Instant::now()), Ok(0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_does_not_take_the_limiter_of_a_caller_that_has_one() {
        let limiters = RateLimiters::new(Rate::per_second(100));
        for n in 0..CALLERS {
            assert_eq!(admitted(&limiters, n, 1), 1);
        }
        assert_eq!(admitted(&limiters, CALLERS, 1000), 200);

        assert_eq!(admitted(&limiters, CALLERS + 1, 1), 0, "the surplus shares one");
        assert_eq!(admitted(&limiters, 0, 1), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number_of_callers_and_those_that_are_connected() {
        let limiters = RateLimiters::new(Rate::per_second(100));
        let connected = limiters.of(Some(&0));
        for n in 0..2 * CALLERS {
            assert_eq!(admitted(&limiters, n, 1), usize::from(n < CALLERS + 200));
        }
        assert_eq!(limiters.callers.lock().unwrap().len(), CALLERS + 1);
        assert!(Arc::ptr_eq(&connected, &limiters.of(Some(&0))));

        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(admitted(&limiters, 2 * CALLERS, 1), 1);

        let remembered = limiters.callers.lock().unwrap().len();
        assert_eq!(remembered, 2, "the one that is connected, and the one that has just asked");
        assert!(Arc::ptr_eq(&connected, &limiters.of(Some(&0))));
    }
}
