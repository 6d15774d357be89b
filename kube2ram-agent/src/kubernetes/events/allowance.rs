//! How many Events a node may post: a token bucket. Pure: time is passed in. Called by `events`.

use std::time::Duration;

use tokio::time::Instant;

/// What may be posted now, and when more.
#[derive(Debug)]
pub(super) struct Allowance {
    burst: u32,
    one_every: Duration,
    /// When the bucket is full again.
    full_at: Instant,
}

impl Allowance {
    pub(super) fn new(burst: u32, one_every: Duration, now: Instant) -> Self {
        Self { burst, one_every, full_at: now }
    }

    /// How long to wait before the next post.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        self.full_at = self.full_at.max(now);
        let missing = self.full_at - now;
        missing.saturating_sub(self.one_every * (self.burst - 1))
    }

    /// Notes a post.
    pub(super) fn take(&mut self) {
        self.full_at += self.one_every;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_a_burst_through_and_then_one_at_a_time() {
        let (start, pause) = (Instant::now(), Duration::from_secs(30));
        let mut allowance = Allowance::new(3, pause, start);

        for _ in 0..3 {
            assert_eq!(allowance.wait(start), Duration::ZERO);
            allowance.take();
        }
        assert_eq!(allowance.wait(start), pause);
        assert_eq!(allowance.wait(start + pause), Duration::ZERO);
        allowance.take();
        assert_eq!(allowance.wait(start + pause), pause);
        // A long rest brings back the burst and no more.
        let later = start + pause * 100;
        for _ in 0..3 {
            assert_eq!(allowance.wait(later), Duration::ZERO);
            allowance.take();
        }
        assert_eq!(allowance.wait(later), pause);
    }
}
