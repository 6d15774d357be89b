//! The STS scheduler: fetches queue, and wait for a permit. Depends on `turns`, tokio's clock and the
//! metrics; called by `cache`. It has no task: one of the waiting fetches keeps the time for all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    Metrics,
    turns::{Rank, Rates, TicketId, Turns},
};
use crate::identity::PodUid;
use kube2ram_cloud::credentials::{IssueError, IssueErrorKind};

pub(super) struct Gate {
    turns: Mutex<Turns>,
    /// Held by the fetch that keeps the time.
    timekeeper: tokio::sync::Mutex<()>,
    /// Notifies the timekeeper that what it waits for may have changed.
    changed: Notify,
    metrics: Arc<Metrics>,
}

/// A position in the queue, later the permit; both end with the drop.
pub(super) struct Place {
    gate: Arc<Gate>,
    id: TicketId,
    granted: oneshot::Receiver<()>,
}

impl Gate {
    pub(super) fn new(rates: Rates, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            turns: Mutex::new(Turns::new(rates, Instant::now())),
            timekeeper: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            metrics,
        })
    }

    pub(super) fn join(self: &Arc<Self>, pod: PodUid, rank: Rank) -> Place {
        let (id, granted) = self.turns().join(pod, rank);
        self.advance();
        Place { gate: Arc::clone(self), id, granted }
    }

    /// A pod asks for a queued session.
    pub(super) fn promote(&self, id: TicketId, pod: &PodUid, rank: Rank) {
        self.turns().promote(id, pod.clone(), rank);
        self.advance();
    }

    /// How many wait, and whether STS throttles.
    pub(super) fn state(&self) -> (usize, bool) {
        let turns = self.turns();
        (turns.waiting(), turns.is_throttled())
    }

    /// Learns from how STS answered a call that began at `since`. Whether that ended a time of throttling.
    pub(super) fn heed(&self, result: Result<(), &IssueError>, since: Instant, jitter: f64) -> bool {
        let has_ended = match result {
            Err(error) if error.kind == IssueErrorKind::Throttled => {
                self.metrics.throttle_pauses.inc();
                self.turns().throttle(error.retry_after, Instant::now(), jitter);
                false
            }
            Err(error) if error.kind.is_transient() => return false,
            // No is an answer.
            Ok(()) | Err(_) => self.turns().unthrottle(since),
        };
        self.changed.notify_one();
        has_ended
    }

    fn advance(&self) {
        self.grant();
        self.changed.notify_one();
    }

    fn grant(&self) -> Option<Instant> {
        let mut turns = self.turns();
        let due = turns.grant(Instant::now());
        self.metrics.queued.set(i64::try_from(turns.waiting()).unwrap_or(i64::MAX));
        due
    }

    async fn keep_time(&self) {
        let _timekeeper = self.timekeeper.lock().await;
        loop {
            match self.grant() {
                Some(due) => tokio::select! {
                    () = sleep_until(due) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(super) fn id(&self) -> TicketId {
        self.id
    }

    /// Resolves when the permit is granted. It lasts until the drop.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: the position is kept.
    pub(super) async fn turn(&mut self) {
        let Self { gate, granted, .. } = self;
        tokio::select! {
            biased;
            _ = granted => {}
            () = gate.keep_time() => {}
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut turns = self.gate.turns();
        if !turns.leave(self.id) {
            turns.finish();
        }
        drop(turns);
        self.gate.advance();
    }
}
