//! How often repairs are logged. Below Linux 6.6, a pod with NET_ADMIN can cause one at each check. Called by
//! `wire_guard`.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest time between two warnings.
const LOG_EVERY: Duration = Duration::from_mins(1);

/// The repairs that were not logged yet.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    unlogged: usize,
    logged_at: Option<Instant>,
}

impl Repairs {
    /// Adds the repairs of one check. Returns how many are to be logged now, since the last time; `None` if
    /// there are none, or if it is too soon. To be called at each check.
    pub(super) fn add(&mut self, repairs: usize, now: Instant) -> Option<usize> {
        self.unlogged += repairs;
        let is_too_soon = self.logged_at.is_some_and(|logged_at| now < logged_at + LOG_EVERY);
        if self.unlogged == 0 || is_too_soon {
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_are_logged_at_once_and_then_once_a_minute_with_their_number() {
        let (mut repairs, begun) = (Repairs::default(), Instant::now());
        let mut logged = Vec::new();

        // Two at a check, twice a second, for a minute and a half; then none.
        for check in 0..=300 {
            let at = Duration::from_millis(500) * check;
            let found = if at < Duration::from_secs(90) { 2 } else { 0 };
            logged.extend(repairs.add(found, begun + at).map(|number| (at.as_secs(), number)));
        }

        assert_eq!(logged, [(0, 2), (60, 240), (120, 118)]);
    }

    #[test]
    fn a_repair_after_a_quiet_minute_is_logged_at_once() {
        let (mut repairs, begun) = (Repairs::default(), Instant::now());

        assert_eq!(repairs.add(0, begun), None);
        assert_eq!(repairs.add(1, begun), Some(1));
        assert_eq!(repairs.add(1, begun + Duration::from_secs(59)), None);
        assert_eq!(repairs.add(0, begun + LOG_EVERY), Some(1));
        assert_eq!(repairs.add(0, begun + LOG_EVERY * 2), None);
        assert_eq!(repairs.add(3, begun + LOG_EVERY * 2), Some(3));
    }
}
