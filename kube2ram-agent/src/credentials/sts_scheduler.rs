//! The STS scheduler: fetches queue, and wait for a permit. Depends on `sts_queue`, tokio's clock and the
//! metrics; called by `cache`. It has no task: one of the waiting fetches keeps the time for all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    Metrics,
    sts_queue::{Rank, Rates, StsQueue, TicketId},
};
use crate::identity::PodUid;
use kube2ram_cloud::credentials::{IssueError, IssueErrorKind};

pub(super) struct StsScheduler {
    queue: Mutex<StsQueue>,
    /// Held by the fetch that keeps the time.
    timekeeper: tokio::sync::Mutex<()>,
    /// Notifies the timekeeper that what it waits for may have changed.
    changed: Notify,
    metrics: Arc<Metrics>,
}

/// A position in the queue, later the permit; both end with the drop.
pub(super) struct StsPermit {
    scheduler: Arc<StsScheduler>,
    id: TicketId,
    granted: oneshot::Receiver<()>,
}

impl StsScheduler {
    pub(super) fn new(rates: Rates, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(StsQueue::new(rates, Instant::now())),
            timekeeper: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            metrics,
        })
    }

    pub(super) fn join(self: &Arc<Self>, pod: PodUid, rank: Rank) -> StsPermit {
        let (id, granted) = self.queue().join(pod, rank);
        self.advance();
        StsPermit { scheduler: Arc::clone(self), id, granted }
    }

    /// A pod asks for a queued session.
    pub(super) fn promote(&self, id: TicketId, pod: &PodUid, rank: Rank) {
        self.queue().promote(id, pod.clone(), rank);
        self.advance();
    }

    /// How many wait, and whether STS throttles.
    pub(super) fn state(&self) -> (usize, bool) {
        let queue = self.queue();
        (queue.waiting(), queue.is_throttled())
    }

    /// Learns from how STS answered a call that began at `since`. Whether that ended a time of throttling.
    pub(super) fn heed(&self, result: Result<(), &IssueError>, since: Instant, jitter: f64) -> bool {
        let has_ended = match result {
            Err(error) if error.kind == IssueErrorKind::Throttled => {
                self.metrics.throttle_pauses.inc();
                self.queue().throttle(error.retry_after, Instant::now(), jitter);
                false
            }
            Err(error) if error.kind.is_transient() => return false,
            // No is an answer.
            Ok(()) | Err(_) => self.queue().unthrottle(since),
        };
        self.changed.notify_one();
        has_ended
    }

    fn advance(&self) {
        self.grant();
        self.changed.notify_one();
    }

    fn grant(&self) -> Option<Instant> {
        let mut queue = self.queue();
        let due = queue.grant(Instant::now());
        self.metrics.queued.set(i64::try_from(queue.waiting()).unwrap_or(i64::MAX));
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

    fn queue(&self) -> MutexGuard<'_, StsQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StsPermit {
    pub(super) fn id(&self) -> TicketId {
        self.id
    }

    /// Resolves when the permit is granted. It lasts until the drop.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: the position is kept.
    pub(super) async fn granted(&mut self) {
        let Self { scheduler, granted, .. } = self;
        tokio::select! {
            biased;
            _ = granted => {}
            () = scheduler.keep_time() => {}
        }
    }
}

impl Drop for StsPermit {
    fn drop(&mut self) {
        let mut queue = self.scheduler.queue();
        if !queue.leave(self.id) {
            queue.finish();
        }
        drop(queue);
        self.scheduler.advance();
    }
}
