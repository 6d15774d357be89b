//! How much of the real metadata server one pod may use. The real server limits the node as a whole, so a pod
//! that sends requests in a loop would take it away from all others. Depends on `connection_limiter` and
//! `rate_limiter`; called by `connection`.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::identity::PodUid;
use kube2ram_service::{
    connection_limiter::{ConnectionLimiter, ConnectionPermit},
    rate_limiter::{Rate, RateLimiters},
};

/// How many exchanges with the real server, and so connections to it, may be in flight.
pub(crate) const EXCHANGES: usize = 128;
/// How many of them may be one pod's.
const EXCHANGES_PER_POD: usize = 16;

/// A share of the real server; dropping it gives it back.
pub(super) type Share = ConnectionPermit<PodUid>;

/// Why a pod must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PassThroughLimitError {
    /// It asks too often.
    #[error("too many requests")]
    Rate {
        /// When it may ask again.
        retry_after: Duration,
    },
    /// Too many of its requests, or of all pods' requests, are in flight.
    #[error("too many requests under way")]
    InFlight,
}

/// Who has used how much.
#[derive(Debug)]
pub(super) struct PassThroughLimiter {
    exchanges: Arc<ConnectionLimiter<PodUid>>,
    rates: RateLimiters<PodUid>,
}

impl PassThroughLimiter {
    /// `rate` is the number of requests a second that a pod may make; zero is no limit.
    pub(super) fn new(rate: u32) -> Self {
        let exchanges = ConnectionLimiter::new(EXCHANGES, EXCHANGES_PER_POD, Duration::ZERO);
        Self { exchanges, rates: RateLimiters::new(Rate::per_second(rate)) }
    }

    /// Takes a share for one exchange.
    ///
    /// # Errors
    /// [`PassThroughLimitError`].
    pub(super) fn take(&self, pod: &PodUid) -> Result<Share, PassThroughLimitError> {
        self.rates
            .of(Some(pod))
            .admit(Instant::now())
            .map_err(|retry_after| PassThroughLimitError::Rate { retry_after })?;
        self.exchanges.take_free(pod.clone()).ok_or(PassThroughLimitError::InFlight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: usize) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_above_its_rate_gets_a_time_to_ask_again() {
        let pass_through_limiter = PassThroughLimiter::new(1);
        let taken = (0..10).filter(|_| pass_through_limiter.take(&uid(1)).is_ok()).count();

        assert_eq!(taken, 2);
        let Err(PassThroughLimitError::Rate { retry_after }) = pass_through_limiter.take(&uid(1)) else {
            panic!("must wait")
        };
        assert_eq!(retry_after, Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn one_pod_cannot_occupy_every_exchange() {
        let pass_through_limiter = PassThroughLimiter::new(0);
        let held: Vec<_> =
            (0..EXCHANGES_PER_POD).map(|_| pass_through_limiter.take(&uid(1)).unwrap()).collect();

        assert_eq!(pass_through_limiter.take(&uid(1)).err(), Some(PassThroughLimitError::InFlight));
        assert!(pass_through_limiter.take(&uid(2)).is_ok());
        drop(held);
        assert!(pass_through_limiter.take(&uid(1)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn all_pods_together_cannot_open_connections_without_end() {
        let pass_through_limiter = PassThroughLimiter::new(0);

        let held: Vec<_> =
            (0..EXCHANGES + 10).filter_map(|n| pass_through_limiter.take(&uid(n)).ok()).collect();

        assert_eq!(held.len(), EXCHANGES);
    }
}
