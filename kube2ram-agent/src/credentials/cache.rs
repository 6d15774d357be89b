//! The credential cache: entries by role session, and one keeper task for each.
//! Depends on `clock`, `policy` (for the permit) and an `Issuer`; called by `server`, composed by `app`.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::{
    CredentialError, Credentials, IssueError, IssueErrorKind, Issuer, Metrics,
    entry::{Answer, Entry, Next, Now},
};
use crate::{clock::Clock, policy::Permit, role::RoleSession, telemetry::chain};

/// What bounds a [`Cache`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many role sessions are kept.
    pub sessions: usize,
    /// How many of them are issued at once. STS allows 100 requests a second to all nodes of an account together.
    pub concurrent_issues: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sessions: 4096, concurrent_issues: 8 }
    }
}

/// Credentials by role session, refreshed ahead of their expiry while they are in use.
#[derive(Clone)]
pub struct Cache(Arc<Shared>);

struct Shared {
    issuer: Arc<dyn Issuer>,
    clock: Arc<dyn Clock>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    metrics: Metrics,
    max_sessions: usize,
    issuing: Semaphore,
    slots: Mutex<HashMap<Arc<RoleSession>, Slot>>,
}

/// An entry and the ways to and from its keeper. It is in the map exactly as long as its keeper runs (but for a shutdown).
struct Slot {
    entry: Entry,
    /// Wakes the keeper.
    wake: Arc<Notify>,
    /// Tells who waits that a fetch has ended.
    fetched: watch::Sender<()>,
}

impl Cache {
    /// Makes an empty cache, whose keepers run on `tasks`. After `shutdown` nothing is refreshed any more, but what is held is still
    /// handed out and a fetch that is under way ends by itself within [`ISSUE_DEADLINE`].
    pub fn new(
        issuer: Arc<dyn Issuer>,
        clock: Arc<dyn Clock>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
        limits: Limits,
        metrics: Metrics,
    ) -> Self {
        Self(Arc::new(Shared {
            issuer,
            clock,
            tasks,
            shutdown,
            metrics,
            max_sessions: limits.sessions,
            issuing: Semaphore::new(limits.concurrent_issues),
            slots: Mutex::default(),
        }))
    }

    /// Credentials for what was permitted: at once when they are held, else within [`ANSWER_DEADLINE`].
    ///
    /// # Errors
    /// See [`CredentialError`]; each of them is a denial, for now or for good.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: fetching is the keeper's.
    pub async fn get(&self, permit: Permit) -> Result<Arc<Credentials>, CredentialError> {
        self.of_session(permit.into_session()).await
    }

    pub(super) async fn of_session(&self, session: RoleSession) -> Result<Arc<Credentials>, CredentialError> {
        let Shared { metrics, .. } = &*self.0;
        let (fallback, mut fetched) = match self.0.ask(&session) {
            (Answer::Failed(error), _) => {
                metrics.failed.inc();
                return Err(error);
            }
            (Answer::Hit(credentials), _) => {
                metrics.hit.inc();
                return Ok(credentials);
            }
            (Answer::Wait(fallback), fetched) => (fallback, fetched),
        };
        if fallback.is_some() { &metrics.refresh } else { &metrics.miss }.inc();

        let deadline = Instant::now() + ANSWER_DEADLINE;
        while let Some(receiver) = &mut fetched
            && let Ok(Ok(())) = timeout_at(deadline, receiver.changed()).await
        {
            match self.0.ask(&session) {
                (Answer::Failed(error), _) => return Err(error),
                (Answer::Hit(credentials), _) => return Ok(credentials),
                (Answer::Wait(_), again) => fetched = again,
            }
        }
        fallback.ok_or(CredentialError::NotReady { retry_after: RETRY_AFTER })
    }
}

impl Shared {
    /// Asks the entry, which is made if there is none. The receiver, when there is something to wait for, tells of the next fetch's end.
    fn ask(self: &Arc<Self>, session: &RoleSession) -> (Answer, Option<watch::Receiver<()>>) {
        let now = self.now();
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(session) {
            let (answer, wake) = slot.entry.ask(now);
            if wake {
                slot.wake.notify_one();
            }
            let fetched = matches!(answer, Answer::Wait(_)).then(|| slot.fetched.subscribe());
            return (answer, fetched);
        }

        if slots.len() >= self.max_sessions && !self.evict(&mut slots) {
            return (Answer::Failed(CredentialError::Full), None);
        }
        let session = Arc::new(session.clone());
        let slot = Slot { entry: Entry::new(), wake: Arc::default(), fetched: watch::Sender::new(()) };
        let tenure = Tenure { cache: Arc::clone(self), session: Arc::clone(&session) };
        let keeper = tenure.keep(Arc::clone(&slot.wake));
        let fetched = slot.fetched.subscribe();
        slots.insert(session, slot);
        self.metrics.entries.inc();
        // A runtime that shuts down drops the keeper on the spot, and that takes the lock.
        drop(slots);
        self.tasks.spawn(keeper);
        (Answer::Wait(None), Some(fetched))
    }

    /// Makes room, at the cost of an entry that nobody used since its last fetch.
    fn evict(&self, slots: &mut HashMap<Arc<RoleSession>, Slot>) -> bool {
        let idle =
            slots.iter().find(|(_, slot)| slot.entry.is_idle()).map(|(session, _)| Arc::clone(session));
        let Some(slot) = idle.and_then(|session| slots.remove(&session)) else { return false };
        // Its keeper finds the entry gone, and ends.
        slot.wake.notify_one();
        self.metrics.entries.dec();
        true
    }

    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let _permit = self.issuing.acquire().await;
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
        let (role, session) = (session.role.as_str(), session.session_name.as_str());
        match &result {
            Ok(credentials) => {
                info!(role, session, expires_at = %credentials.expires_at, "credentials issued")
            }
            Err(error) => warn!(
                role,
                session,
                kind = error.kind.as_str(),
                request_id = error.request_id.as_deref(),
                error = chain(error),
                "credentials not issued"
            ),
        }
        self.metrics.issued(result.as_ref().map(drop).map_err(|error| error.kind), started.elapsed());
        result
    }

    fn now(&self) -> Now {
        Now { wall: self.clock.now(), tick: Instant::now() }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Arc<RoleSession>, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A keeper's hold of its entry.
struct Tenure {
    cache: Arc<Shared>,
    session: Arc<RoleSession>,
}

impl Tenure {
    async fn keep(self, wake: Arc<Notify>) {
        loop {
            let result = self.cache.issue(&self.session).await;
            let limit = self.session.duration;
            self.with_slot(|slot, now| {
                slot.entry.finish(result, limit, now, jitter());
                slot.fetched.send_replace(());
            });
            while let Some(until) = match self.next() {
                Next::Drop => return,
                Next::Fetch => None,
                Next::Sleep(until) => Some(until),
            } {
                tokio::select! {
                    () = self.cache.shutdown.cancelled() => return,
                    () = sleep_until(until) => {}
                    () = wake.notified() => {}
                }
            }
        }
    }

    /// What to do next; an entry to drop is gone when this returns, before anybody can ask it again.
    fn next(&self) -> Next {
        let mut slots = self.cache.slots();
        let next = self.slot_of(&mut slots).map_or(Next::Drop, |slot| slot.entry.next(self.cache.now()));
        if next == Next::Drop {
            self.remove(&mut slots);
        }
        next
    }

    fn with_slot(&self, change: impl FnOnce(&mut Slot, Now)) {
        let now = self.cache.now();
        if let Some(slot) = self.slot_of(&mut self.cache.slots()) {
            change(slot, now);
        }
    }

    /// Its own slot: another entry may have the same key since this one was evicted.
    fn slot_of<'s>(&self, slots: &'s mut HashMap<Arc<RoleSession>, Slot>) -> Option<&'s mut Slot> {
        let (session, _) = slots.get_key_value(&self.session)?;
        if !Arc::ptr_eq(session, &self.session) {
            return None;
        }
        slots.get_mut(&self.session)
    }

    fn remove(&self, slots: &mut HashMap<Arc<RoleSession>, Slot>) {
        if self.slot_of(slots).is_some() {
            slots.remove(&self.session);
            self.cache.metrics.entries.dec();
        }
    }
}

impl Drop for Tenure {
    /// An entry whose keeper panicked would be waited for in vain for ever.
    fn drop(&mut self) {
        if !self.cache.shutdown.is_cancelled() {
            self.remove(&mut self.cache.slots());
        }
    }
}

/// A random number in 0 – 1. Each `RandomState` has keys of its own.
fn jitter() -> f64 {
    f64::from(u16::try_from(RandomState::new().hash_one(0) >> 48).unwrap_or_default()) / f64::from(u16::MAX)
}

/// Bounds how long a pod waits: SDKs give up at 1 s.
pub const ANSWER_DEADLINE: Duration = Duration::from_millis(800);
/// Bounds one issue.
pub const ISSUE_DEADLINE: Duration = Duration::from_secs(10);
/// When a pod that was not answered in time should ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
