//! Wall-clock time, injected: everything that compares expiry times or signs a date takes a [`Clock`].
//! Depends on nothing of ours; called by `credentials`, `cloud` and `server`.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// Returns the time. Waiting is done by tokio, so that tests can pause it.
pub trait Clock: Send + Sync + 'static {
    /// The current wall-clock time.
    fn now(&self) -> Timestamp;
}

/// The time since the machine booted, its sleep included. It never jumps, and is the same for one process
/// after another.
pub fn since_boot() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// The machine's own clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// A random number in 0 – 1. Each `RandomState` has its own keys.
pub fn jitter() -> f64 {
    f64::from(u16::try_from(RandomState::new().hash_one(0) >> 48).unwrap_or_default()) / f64::from(u16::MAX)
}
