//! How far two clocks are apart, logged when it changes and not at each call. Called by `exchange`.

use std::sync::atomic::{AtomicI64, Ordering};

use tracing::{info, warn};

/// The difference that was last logged, in seconds; 0 while the clocks agree.
#[derive(Debug, Default)]
pub(super) struct Skew(AtomicI64);

impl Skew {
    /// Notes how many seconds the API server's clock is ahead of that of STS. Returns whether that is logged.
    pub(super) fn note(&self, seconds: i64) -> bool {
        let apart = seconds.unsigned_abs();
        // With one limit alone, a difference around it could be logged at each call.
        if apart > AGREE_SECONDS && apart <= TOLERANCE_SECONDS {
            return false;
        }
        let seconds = if apart > TOLERANCE_SECONDS { seconds } else { 0 };
        let logged = self.0.load(Ordering::Relaxed);
        let is_news = seconds.abs_diff(logged) > TOLERANCE_SECONDS;
        // Of several calls at once, one logs it.
        let exchange = || self.0.compare_exchange(logged, seconds, Ordering::Relaxed, Ordering::Relaxed);
        if !is_news || exchange().is_err() {
            return false;
        }
        if seconds == 0 {
            info!("the clocks of the API server and of STS agree again");
        } else {
            warn!(
                ahead_seconds = seconds,
                "the API server's clock differs from that of STS, which may refuse its tokens; correct it"
            );
        }
        true
    }
}

/// A token takes a few seconds from the API server to STS, with a call that is repeated.
const TOLERANCE_SECONDS: u64 = 60;
/// Clocks agree again at a smaller difference than the one that is logged.
const AGREE_SECONDS: u64 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_logged_once_and_its_end_too() {
        let skew = Skew::default();

        let logged = [0, 60, -60, 61, 61, 60, 100, 122, -61, -70, -60, 30, 0, i64::MIN, i64::MAX]
            .map(|seconds| skew.note(seconds));

        let (no, yes) = (false, true);
        let expected = [no, no, no, yes, no, no, no, yes, yes, no, no, yes, no, yes, yes];
        assert_eq!(logged, expected);
    }
}
