//! The refresh task of an entry: waits until a fetch is due and STS may be called, fetches, and gives the
//! result to the entry. Depends on `sts_scheduler`, `audit` and an `Issuer`. Started by `cache`, of which it
//! is a part.

use std::{collections::HashMap, future::pending, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tracing::warn;

use super::{Shared, Slot};
use crate::{
    credentials::{
        Attempt, Failure,
        entry::{Next, Now},
        sts_queue::Rank,
        sts_scheduler::StsPermit,
    },
    identity::PodUid,
};
use kube2ram_cloud::{
    credentials::{Credentials, IssueError, IssueErrorKind},
    role::RoleSession,
};
use kube2ram_service::telemetry::chain;

/// The refresh task of an entry.
pub(super) struct RefreshTask {
    cache: Arc<Shared>,
    session: Arc<RoleSession>,
    /// Of its own slot.
    wake: Arc<Notify>,
}

/// Bounds one issue.
pub const ISSUE_DEADLINE: Duration = Duration::from_secs(10);

impl RefreshTask {
    /// The task of the slot with this `wake`.
    pub(super) fn new(cache: Arc<Shared>, session: Arc<RoleSession>, wake: Arc<Notify>) -> Self {
        Self { cache, session, wake }
    }

    pub(super) async fn run(self) {
        loop {
            while let Some(until) = match self.next() {
                Next::Drop => return,
                Next::Fetch => None,
                Next::Idle => Some(None),
                Next::Sleep(until) => Some(Some(until)),
            } {
                let rest = async {
                    match until {
                        Some(until) => sleep_until(until).await,
                        None => pending().await,
                    }
                };
                tokio::select! {
                    () = self.cache.shutdown.cancelled() => return,
                    () = rest => {}
                    () = self.wake.notified() => {}
                }
            }
            // Boxed for the moment of the fetch: otherwise a thousand sleeping refresh tasks would each hold
            // that memory.
            let Some(result) = Box::pin(self.fetch()).await else { return };
            let (limit, jitter) = (self.session.duration, self.cache.jitter);
            self.with_slot(|slot, now| {
                slot.ticket = None;
                slot.entry.finish(result, limit, now, jitter());
                slot.notify();
                if slot.entry.awaits_confirmation() {
                    let (role, session) = (self.session.role.as_str(), self.session.session_name.as_str());
                    warn!(
                        role,
                        session, "STS denied a role whose credentials are still valid; asking once more"
                    );
                }
            });
        }
    }

    /// `None` when the entry was removed, or at a shutdown.
    async fn fetch(&self) -> Option<Result<Credentials, IssueError>> {
        let _permit = self.sts_permit().await?;
        let pod = self.with_slot(|slot, _| slot.pod.clone())?;
        Some(self.cache.issue(&self.session, &pod).await)
    }

    /// Waits for a permit of the STS scheduler; `None` when the entry was removed, or at a shutdown.
    async fn sts_permit(&self) -> Option<StsPermit> {
        let queued = Instant::now();
        let mut permit = self.with_slot(|slot, _| {
            let permit = self.cache.scheduler.join(slot.pod.clone(), slot.entry.rank());
            slot.ticket = Some(permit.id());
            permit
        })?;
        loop {
            // Who waits during a drain is still served.
            let is_ahead = self.with_slot(|slot, _| slot.entry.rank())? == Rank::Ahead;
            tokio::select! {
                biased;
                () = self.cache.shutdown.cancelled(), if is_ahead => return None,
                () = permit.granted() => break,
                () = self.wake.notified() => {}
            }
        }
        let rank = self.with_slot(|slot, _| slot.entry.rank())?;
        self.cache.metrics.turn(rank, queued.elapsed());
        Some(permit)
    }

    /// What to do next; an entry to drop is removed when this returns, before a request can ask it again.
    fn next(&self) -> Next {
        let mut slots = self.cache.slots();
        let next = self.slot_of(&mut slots).map_or(Next::Drop, |slot| slot.entry.next(self.cache.now()));
        if next == Next::Drop {
            self.cache.metrics.dropped.inc();
            self.remove(&mut slots);
        }
        next
    }

    /// `None` when the slot was removed.
    fn with_slot<T>(&self, change: impl FnOnce(&mut Slot, Now) -> T) -> Option<T> {
        let now = self.cache.now();
        self.slot_of(&mut self.cache.slots()).map(|slot| change(slot, now))
    }

    /// Its own slot: another entry may have the same key since this one was evicted.
    fn slot_of<'s>(&self, slots: &'s mut HashMap<Arc<RoleSession>, Slot>) -> Option<&'s mut Slot> {
        slots.get_mut(&self.session).filter(|slot| Arc::ptr_eq(&slot.wake, &self.wake))
    }

    fn remove(&self, slots: &mut HashMap<Arc<RoleSession>, Slot>) {
        if self.slot_of(slots).is_some() {
            slots.remove(&self.session);
            self.cache.metrics.entries.dec();
        }
    }
}

impl Drop for RefreshTask {
    /// If the refresh task panicked, requests would wait for the entry for ever.
    fn drop(&mut self) {
        if !self.cache.shutdown.is_cancelled() {
            self.remove(&mut self.cache.slots());
        }
    }
}

impl Shared {
    async fn issue(&self, session: &RoleSession, pod: &PodUid) -> Result<Credentials, IssueError> {
        let started = Instant::now();
        let result = timeout(ISSUE_DEADLINE, self.issuer.issue(session)).await.unwrap_or_else(|_elapsed| {
            Err(IssueError {
                kind: IssueErrorKind::Unavailable,
                code: "Timeout".into(),
                message: "issuing took too long".into(),
                request_id: None,
                retry_after: None,
                source: None,
            })
        });
        self.note(session, &result);
        match &result {
            Ok(credentials) => self.trail.issued(session, credentials, pod),
            Err(error) => warn!(
                role = session.role.as_str(),
                session = session.session_name.as_str(),
                kind = error.kind.as_str(),
                request_id = error.request_id.as_deref(),
                error = chain(error),
                "credentials not issued"
            ),
        }
        if self.scheduler.heed(result.as_ref().map(drop), started, (self.jitter)()) {
            self.unthrottle();
        }
        self.metrics.issued(result.as_ref().map(drop).map_err(|error| error.kind), started.elapsed());
        result
    }

    /// What failed while STS throttled waits no longer.
    fn unthrottle(&self) {
        let now = self.now();
        for slot in self.slots().values_mut() {
            if slot.entry.unthrottle(now, (self.jitter)()) {
                slot.wake.notify_one();
            }
        }
    }

    fn note(&self, session: &RoleSession, result: &Result<Credentials, IssueError>) {
        let (role, now) = (session.role.clone(), self.clock.now());
        let mut ended = self.ended();
        match result {
            Ok(_) => ended.succeeded = Some(Attempt { role, outcome: now }),
            Err(error) => ended.failed = Some(Attempt { role, outcome: Failure::of(error, now) }),
        }
    }
}
