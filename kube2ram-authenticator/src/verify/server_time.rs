//! STS's clock, by the `Date` of its answers: a token is judged by it, so that a wrong clock of this machine
//! neither refuses valid tokens nor keeps expired ones. Depends on nothing; called by the parent.

use std::sync::atomic::{AtomicI64, Ordering};

use jiff::{SignedDuration, Timestamp};
use tracing::warn;

/// How far STS's clock is ahead of ours; 0 until it has answered.
#[derive(Debug, Default)]
pub(super) struct ServerTime(AtomicI64);

impl ServerTime {
    /// STS's time, when ours is `now`.
    pub(super) fn at(&self, now: Timestamp) -> Timestamp {
        let offset = SignedDuration::from_secs(self.0.load(Ordering::Relaxed));
        now.checked_add(offset).unwrap_or(now)
    }

    /// Adopts the time of an answer; returns the difference. A `Date` is in whole seconds, and the answer was
    /// on its way.
    pub(super) fn learn(&self, now: Timestamp, server_time: Timestamp) -> i64 {
        let difference = server_time.duration_since(now).as_secs();
        let offset = if difference.abs() <= TOLERANCE_SECONDS { 0 } else { difference };
        let before = self.0.swap(offset, Ordering::Relaxed);
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
    use jiff::ToSpan as _;

    use super::*;

    #[test]
    fn follows_sts_beyond_a_few_seconds() {
        let (time, now) = (ServerTime::default(), "2026-01-02T03:04:05Z".parse::<Timestamp>().unwrap());
        assert_eq!(time.at(now), now);

        assert_eq!(time.learn(now, now + 3.seconds()), 0);
        assert_eq!(time.at(now), now);
        assert_eq!(time.learn(now, now - 1.hours()), -3600);
        assert_eq!(time.at(now), now - 1.hours());
        assert_eq!(time.learn(now, now), 0);

        assert_eq!(time.at(now), now, "the clock was set");
    }

    #[test]
    fn no_time_is_out_of_range() {
        let time = ServerTime::default();

        time.learn(Timestamp::MIN, Timestamp::MAX);

        assert_eq!(time.at(Timestamp::MAX), Timestamp::MAX);
    }
}
