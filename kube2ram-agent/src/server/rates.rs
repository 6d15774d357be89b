//! How often each caller may ask. Depends on `identity` for the pod's UID; used by `server` and `quota`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::identity::PodUid;

/// More pods than a node has.
const PODS: usize = 1024;
/// How much of its rate a caller may use at once.
const BURST: Duration = Duration::from_secs(2);

/// The rates of all callers. What is remembered is bounded: those who have used nothing lately are forgotten.
#[derive(Debug)]
pub(super) struct Rates {
    interval: Duration,
    /// `None`: callers that are no pod, and the pods beyond [`PODS`], together.
    rates: Mutex<HashMap<Option<PodUid>, Arc<Rate>>>,
}

/// One caller's rate: a leaky bucket, kept as the one instant at which it will be empty (the generic cell rate algorithm).
#[derive(Debug)]
pub(super) struct Rate {
    /// The time between two requests, on the average; zero is no limit.
    interval: Duration,
    paid_until: Mutex<Instant>,
}

impl Rates {
    /// `rate` is the number of requests a second that a caller may make, and twice as many at once; zero is no limit.
    pub(super) fn new(rate: u32) -> Self {
        let interval = Duration::from_secs(1).checked_div(rate).unwrap_or_default();
        Self { interval, rates: Mutex::default() }
    }

    /// The rate of a caller, to be kept for as long as its connection.
    pub(super) fn of(&self, caller: Option<&PodUid>) -> Arc<Rate> {
        let now = Instant::now();
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if rates.len() >= PODS {
            rates.retain(|_, rate| Arc::strong_count(rate) > 1 || *rate.paid_until() > now);
        }
        let caller = caller.cloned();
        let is_known = rates.len() < PODS || rates.contains_key(&caller);
        let caller = caller.filter(|_| is_known);
        let new = || Arc::new(Rate { interval: self.interval, paid_until: Mutex::new(now) });
        Arc::clone(rates.entry(caller).or_insert_with(new))
    }
}

impl Rate {
    /// Counts a request of this moment.
    ///
    /// # Errors
    /// When it comes too early: how long the caller should wait.
    pub(super) fn pay(&self, now: Instant) -> Result<(), Duration> {
        if self.interval.is_zero() {
            return Ok(());
        }
        let mut until = self.paid_until();
        let owed = until.saturating_duration_since(now);
        if owed > BURST.saturating_sub(self.interval) {
            return Err((owed + self.interval).saturating_sub(BURST));
        }
        *until = now + owed + self.interval;
        Ok(())
    }

    fn paid_until(&self) -> MutexGuard<'_, Instant> {
        self.paid_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: usize) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn paid(rates: &Rates, pod: usize, times: usize) -> usize {
        (0..times).filter(|_| rates.of(Some(&uid(pod))).pay(Instant::now()).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_asks_without_end_gets_its_rate_and_others_theirs() {
        let rates = Rates::new(100);

        assert_eq!(paid(&rates, 1, 1000), 200, "two seconds' worth at once");
        let retry_after = rates.of(Some(&uid(1))).pay(Instant::now()).unwrap_err();
        assert!(retry_after <= Duration::from_millis(10), "{retry_after:?}");
        assert_eq!(paid(&rates, 2, 1000), 200);
        assert!(rates.of(None).pay(Instant::now()).is_ok(), "callers that are no pod");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(paid(&rates, 1, 1000), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_of_zero_is_no_limit_and_a_low_one_still_lets_a_request_through() {
        assert_eq!(paid(&Rates::new(0), 1, 10_000), 10_000);
        assert_eq!(paid(&Rates::new(1), 1, 10), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number_of_pods_and_those_that_are_connected() {
        let rates = Rates::new(100);
        let connected = rates.of(Some(&uid(0)));
        for n in 0..2 * PODS {
            assert_eq!(paid(&rates, n, 1), usize::from(n < PODS + 200));
        }
        assert_eq!(rates.rates.lock().unwrap().len(), PODS + 1, "the surplus shares one rate");
        assert!(Arc::ptr_eq(&connected, &rates.of(Some(&uid(0)))));

        tokio::time::advance(BURST).await;
        assert_eq!(paid(&rates, 2 * PODS, 1), 1);

        assert_eq!(rates.rates.lock().unwrap().len(), 2, "who is connected, and who has just asked");
        assert!(Arc::ptr_eq(&connected, &rates.of(Some(&uid(0)))));
    }
}
