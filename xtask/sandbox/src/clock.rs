//! The time that the stand-ins believe in: the system's, moved by what a test adds to it.
//! Depends on nothing. Used by the STS and metadata stand-ins.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use jiff::{SignedDuration, Timestamp};

/// A clock whose clones move together.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    offset_seconds: Arc<AtomicI64>,
}

impl Clock {
    /// Returns the time.
    pub fn now(&self) -> Timestamp {
        let offset = SignedDuration::from_secs(self.offset_seconds.load(Ordering::Relaxed));
        Timestamp::now().saturating_add(offset).unwrap_or(Timestamp::MAX)
    }

    /// Moves the clock, forward when positive.
    pub fn shift(&self, by: SignedDuration) {
        self.offset_seconds.fetch_add(by.as_secs(), Ordering::Relaxed);
    }
}

/// Prints a time as every Alibaba Cloud document does: `YYYY-MM-DDThh:mm:ssZ`, UTC, no fraction.
pub(crate) fn iso8601(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
