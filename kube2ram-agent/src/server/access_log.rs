//! How many lines of the log each caller may cause: one pod in a tight loop would drown the others' and fill the disk.
//! Depends on the pod's UID only; called by `server` and `connection`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::identity::PodUid;

/// How many lines one pod may cause in each [`WINDOW`]: far more than any SDK does, which asks again after minutes. Callers that are no
/// pod share one such allowance.
pub(super) const LINES: u32 = 200;
const WINDOW: Duration = Duration::from_secs(10);
/// More pods than a node has.
const CALLERS: usize = 1024;

/// Who has written how much.
#[derive(Debug, Default)]
pub(super) struct AccessLog(Mutex<HashMap<Option<PodUid>, Arc<Lines>>>);

/// How much one caller has written.
#[derive(Debug)]
pub(super) struct Lines(Mutex<Written>);

#[derive(Debug)]
struct Written {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

impl AccessLog {
    /// The allowance of a caller, to be kept for as long as its connection.
    pub(super) fn of(&self, caller: Option<&PodUid>) -> Arc<Lines> {
        let now = Instant::now();
        let mut callers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= CALLERS {
            callers.retain(|_, lines| Arc::strong_count(lines) > 1 || now - lines.written().since < WINDOW);
        }
        // Those that have an allowance keep it; newcomers share one when there are too many.
        let caller = caller.cloned();
        let has_room = callers.len() < CALLERS || callers.contains_key(&caller);
        let caller = caller.filter(|_| has_room);
        let new = || Arc::new(Lines(Mutex::new(Written { since: now, lines: 0, suppressed: 0 })));
        Arc::clone(callers.entry(caller).or_insert_with(new))
    }
}

impl Lines {
    /// Whether the caller may cause one more line now; if so, how many it could not since its last one.
    pub(super) fn admit(&self, now: Instant) -> Option<u64> {
        let mut written = self.written();
        if now.saturating_duration_since(written.since) >= WINDOW {
            (written.since, written.lines) = (now, 0);
        }
        if written.lines == LINES {
            written.suppressed += 1;
            return None;
        }
        written.lines += 1;
        Some(std::mem::take(&mut written.suppressed))
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: usize) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn admit(log: &AccessLog, caller: Option<&PodUid>) -> Option<u64> {
        log.of(caller).admit(Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn a_loud_caller_is_cut_off_until_the_window_ends_and_then_says_how_much() {
        let log = AccessLog::default();
        let admitted = (0..LINES + 50).filter(|_| admit(&log, Some(&uid(1))).is_some()).count();

        assert_eq!(admitted, LINES as usize);
        assert_eq!(admit(&log, Some(&uid(2))), Some(0), "others are not affected");
        assert_eq!(admit(&log, None), Some(0));
        tokio::time::advance(WINDOW).await;
        assert_eq!(admit(&log, Some(&uid(1))), Some(50));
        assert_eq!(admit(&log, Some(&uid(1))), Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_does_not_take_the_allowance_of_a_caller_that_has_one() {
        let log = AccessLog::default();
        for n in 0..CALLERS {
            admit(&log, Some(&uid(n)));
        }
        while admit(&log, Some(&uid(CALLERS))).is_some() {}

        assert_eq!(admit(&log, Some(&uid(0))), Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number_of_callers() {
        let log = AccessLog::default();
        for n in 0..2 * CALLERS {
            admit(&log, Some(&uid(n)));
        }
        assert_eq!(log.0.lock().unwrap().len(), CALLERS + 1, "the surplus shares one allowance");
        assert_eq!(admit(&log, Some(&uid(2 * CALLERS))), None);

        tokio::time::advance(WINDOW).await;
        assert_eq!(admit(&log, Some(&uid(2 * CALLERS))), Some(0));
        assert_eq!(log.0.lock().unwrap().len(), 1);
    }
}
