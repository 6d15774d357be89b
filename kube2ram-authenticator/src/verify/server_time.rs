//! STS's clock, by the `Date` of its answers: a token is judged by it, so that a wrong clock of this machine
//! neither refuses valid tokens nor keeps expired ones. From an answer on it runs by the monotonic clock:
//! what sets this machine's clock right must not set STS's wrong. Depends on nothing; called by the parent.

use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use tracing::warn;

/// What STS's clock said, and when that was, where it was not ours; `None` until then.
#[derive(Debug, Default)]
pub(super) struct ServerTime(Mutex<Option<(Instant, Timestamp)>>);

impl ServerTime {
    /// STS's time, when ours is `now`.
    pub(super) fn at(&self, now: Timestamp) -> Timestamp {
        let learned = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((at, server_time)) = learned else { return now };
        let since = SignedDuration::try_from(at.elapsed()).unwrap_or(SignedDuration::MAX);
        server_time.checked_add(since).unwrap_or(server_time)
    }

    /// Adopts the time of an answer; returns the difference in seconds. A `Date` is in whole seconds, and the
    /// answer was on its way.
    pub(super) fn learn(&self, now: Timestamp, server_time: Timestamp) -> i64 {
        let before = self.at(now).duration_since(now).as_secs();
        let difference = server_time.duration_since(now).as_secs();
        let offset = if difference.abs() <= TOLERANCE_SECONDS { 0 } else { difference };
        let learned = (offset != 0).then(|| (Instant::now(), server_time));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = learned;
        if before.abs_diff(offset) > NOTABLE_SECONDS {
            warn!(offset_seconds = offset, "this machine's clock differs from that of STS");
        }
        offset
    }
}

const TOLERANCE_SECONDS: i64 = 3;
/// A change that is logged.
const NOTABLE_SECONDS: u64 = 30;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::ToSpan as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn follows_sts_beyond_a_few_seconds() {
        let (time, now) = (ServerTime::default(), "2026-01-02T03:04:05Z".parse::<Timestamp>().unwrap());
        assert_eq!(time.at(now), now);

        assert_eq!(time.learn(now, now + 3.seconds()), 0);
        assert_eq!(time.at(now), now);
        assert_eq!(time.learn(now, now - 1.hours()), -3600);
        assert_eq!(time.at(now), now - 1.hours());
        assert_eq!(time.learn(now, now), 0);

        assert_eq!(time.at(now), now, "the clock was set");
    }

    #[tokio::test(start_paused = true)]
    async fn what_sets_this_machines_clock_right_does_not_set_stss_wrong() {
        let (time, wrong) = (ServerTime::default(), "2026-01-02T03:04:05Z".parse::<Timestamp>().unwrap());
        let right = wrong + 1.hours();
        time.learn(wrong, right);

        tokio::time::advance(Duration::from_secs(60)).await;

        for ours in [wrong + 60.seconds(), right + 60.seconds()] {
            assert_eq!(time.at(ours), right + 60.seconds(), "whatever our clock says");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_time_is_out_of_range() {
        let time = ServerTime::default();

        time.learn(Timestamp::MIN, Timestamp::MAX);
        tokio::time::advance(Duration::from_secs(60)).await;

        assert_eq!(time.at(Timestamp::MAX), Timestamp::MAX);
    }
}
