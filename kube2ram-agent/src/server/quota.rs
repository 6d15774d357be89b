//! How much of the real metadata server one pod may use: it limits whom it serves, by the node, so a pod that asks without end would
//! take it away from all others. Depends on `listener` for the slots; called by `connection`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::listener::{Slot, Slots};
use crate::identity::PodUid;

/// How many exchanges with the real server may be under way, and hence connections to it.
const EXCHANGES: usize = 128;
/// How many of them may be one pod's.
const EXCHANGES_PER_POD: usize = 16;
/// More pods than a node has.
const PODS: usize = 1024;

/// A share of the real server; dropping it gives it back.
pub(super) type Share = Slot<PodUid>;

/// Why a pod must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuotaError {
    /// It asks too often.
    #[error("too many requests")]
    Rate {
        /// When it may ask again.
        retry_after: Duration,
    },
    /// Too many of its requests, or of all pods', are under way.
    #[error("too many requests under way")]
    UnderWay,
}

/// Who has used how much.
#[derive(Debug)]
pub(super) struct Quota {
    slots: Arc<Slots<PodUid>>,
    /// The time between two requests of a pod, on the average; zero is no limit.
    interval: Duration,
    /// When each pod would have used up what it has asked for at that pace. `None`: the pods beyond [`PODS`], together.
    paid_until: Mutex<HashMap<Option<PodUid>, Instant>>,
}

impl Quota {
    /// `rate` is the number of requests a second that a pod may make, and twice as many at once; zero is no limit.
    pub(super) fn new(rate: u32) -> Self {
        Self {
            slots: Slots::new(EXCHANGES, EXCHANGES_PER_POD),
            interval: Duration::from_secs(1).checked_div(rate).unwrap_or_default(),
            paid_until: Mutex::default(),
        }
    }

    /// Takes a share for one exchange.
    ///
    /// # Errors
    /// As [`QuotaError`] says.
    pub(super) fn take(&self, pod: &PodUid) -> Result<Share, QuotaError> {
        self.pay(pod)?;
        self.slots.take(pod.clone()).ok_or(QuotaError::UnderWay)
    }

    /// A leaky bucket, kept as the one instant at which it will be empty (the generic cell rate algorithm).
    fn pay(&self, pod: &PodUid) -> Result<(), QuotaError> {
        let now = Instant::now();
        let mut pods = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
        if pods.len() >= PODS {
            pods.retain(|_, until| *until > now);
        }
        let known = pods.len() < PODS || pods.contains_key(&Some(pod.clone()));
        let until = pods.entry(known.then(|| pod.clone())).or_insert(now);
        let owed = until.saturating_duration_since(now);
        let burst = Duration::from_secs(2);
        if owed > burst.saturating_sub(self.interval) {
            return Err(QuotaError::Rate { retry_after: (owed + self.interval).saturating_sub(burst) });
        }
        *until = now + owed + self.interval;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: usize) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn taken(quota: &Quota, pod: &PodUid, times: usize) -> usize {
        (0..times).filter(|_| quota.take(pod).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_asks_without_end_gets_its_rate_and_others_theirs() {
        let quota = Quota::new(100);

        assert_eq!(taken(&quota, &uid(1), 1000), 200, "two seconds' worth at once");
        let Err(QuotaError::Rate { retry_after }) = quota.take(&uid(1)) else { panic!("must wait") };
        assert!(retry_after <= Duration::from_millis(10), "{retry_after:?}");
        assert_eq!(taken(&quota, &uid(2), 1000), 200);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(taken(&quota, &uid(1), 1000), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_of_zero_is_no_limit_and_a_low_one_still_lets_a_request_through() {
        assert_eq!(taken(&Quota::new(0), &uid(1), 10_000), 10_000);
        assert_eq!(taken(&Quota::new(1), &uid(1), 10), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn one_pod_cannot_occupy_every_exchange() {
        let quota = Quota::new(0);
        let held: Vec<_> = (0..EXCHANGES_PER_POD).map(|_| quota.take(&uid(1)).unwrap()).collect();

        assert_eq!(quota.take(&uid(1)).err(), Some(QuotaError::UnderWay));
        assert!(quota.take(&uid(2)).is_ok());
        drop(held);
        assert!(quota.take(&uid(1)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn all_pods_together_cannot_open_connections_without_end() {
        let quota = Quota::new(0);

        let held: Vec<_> = (0..EXCHANGES + 10).filter_map(|n| quota.take(&uid(n)).ok()).collect();

        assert_eq!(held.len(), EXCHANGES);
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number_of_pods() {
        let quota = Quota::new(100);
        for n in 0..2 * PODS {
            drop(quota.take(&uid(n)));
        }
        assert_eq!(quota.paid_until.lock().unwrap().len(), PODS + 1, "the surplus shares one rate");
        assert!(quota.take(&uid(0)).is_ok(), "those that are known keep theirs");

        tokio::time::advance(Duration::from_secs(2)).await;
        drop(quota.take(&uid(2 * PODS)));
        assert_eq!(quota.paid_until.lock().unwrap().len(), 1);
    }
}
