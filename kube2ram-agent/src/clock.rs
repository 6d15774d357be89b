//! Wall-clock time, injected: everything that compares expiry times or signs a date takes a [`Clock`].
//! Depends on nothing of ours; called by `credentials`, `cloud` and `server`.

use jiff::Timestamp;

/// Tells the time. Waiting is tokio's business, so that tests can pause it.
pub trait Clock: Send + Sync + 'static {
    /// The current wall-clock time.
    fn now(&self) -> Timestamp;
}

/// The machine's own clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}
