//! The credential cache: entries by role session, and one refresh task for each. Depends on `clock`, `policy`
//! (for the permit), `audit`, `sts_scheduler` and an `Issuer`; called by `server` and by `app`'s prefetch.

mod refresh_task;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::refresh_task::ISSUE_DEADLINE;
use self::refresh_task::RefreshTask;
use super::{
    CredentialError, Issues, Limits, Metrics, SessionState,
    entry::{Answer, Entry, Now},
    issued::{Delivery, HOLDERS, HolderRoom, Issued},
    sts_queue::{Rates, TicketId},
    sts_scheduler::StsScheduler,
    survey::Survey,
};
use crate::{audit::Trail, identity::PodUid, policy::Permit};
use kube2ram_cloud::{
    credentials::{Credentials, IssueError, Issuer},
    role::RoleSession,
};
use kube2ram_service::clock::Clock;

/// A pod that is alive, and what it is permitted: a reason to keep a role session fresh.
#[derive(Debug)]
pub struct Claim {
    /// What it is permitted.
    pub permit: Permit,
    /// The pod.
    pub pod: PodUid,
    /// Whether to fetch before it asks.
    pub prefetch: bool,
}

/// Credentials by role session, refreshed ahead of their expiry while they are in use.
#[derive(Clone)]
pub struct Cache(Arc<Shared>);

struct Shared {
    issuer: Arc<dyn Issuer>,
    clock: Arc<dyn Clock>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    metrics: Arc<Metrics>,
    max_sessions: usize,
    answer: Duration,
    jitter: fn() -> f64,
    scheduler: Arc<StsScheduler>,
    trail: Arc<Trail>,
    holder_room: HolderRoom,
    /// How the last calls ended.
    issues: Mutex<Issues>,
    slots: Mutex<HashMap<Arc<RoleSession>, Slot>>,
}

/// An entry and the channels to and from its refresh task. It is in the map exactly as long as its refresh
/// task runs (except at a shutdown).
struct Slot {
    entry: Entry,
    /// Wakes the refresh task.
    wake: Arc<Notify>,
    /// Notifies the waiting requests that a fetch has ended. It is large, so it is there only after a
    /// request has waited, until that fetch's end.
    fetched: Option<watch::Sender<()>>,
    /// The pod that fetches are counted against: the first that asked, or the first with a claim.
    pod: PodUid,
    /// The refresh task's ticket at the STS scheduler.
    ticket: Option<TicketId>,
}

impl Cache {
    /// Creates an empty cache, whose refresh tasks run on `tasks`. After `shutdown` nothing is refreshed any
    /// longer. Held credentials are still served, and a fetch in flight ends by itself within
    /// [`ISSUE_DEADLINE`]. `trail` records what is issued, and which pods are given it.
    pub fn new(
        issuer: Arc<dyn Issuer>,
        clock: Arc<dyn Clock>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
        limits: Limits,
        metrics: Metrics,
        trail: Arc<Trail>,
    ) -> Self {
        let metrics = Arc::new(metrics);
        let rates = Rates {
            concurrent: limits.concurrent_issues,
            concurrent_ahead: limits.concurrent_ahead,
            node: limits.node,
            reserve: limits.reserve,
            pace: limits.pace,
            pod: limits.pod,
        };
        Self(Arc::new(Shared {
            issuer,
            clock,
            tasks,
            shutdown,
            scheduler: StsScheduler::new(rates, Arc::clone(&metrics)),
            metrics,
            max_sessions: limits.sessions,
            answer: limits.answer,
            jitter: limits.jitter,
            trail,
            holder_room: HolderRoom::new(HOLDERS),
            issues: Mutex::default(),
            slots: Mutex::default(),
        }))
    }

    /// Gives `pod` credentials for what was permitted: at once when they are held, else by `deadline`.
    ///
    /// # Errors
    /// See [`CredentialError`]; each of them is a denial, temporary or permanent.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing: the refresh task fetches.
    pub async fn get_by(
        &self,
        permit: Permit,
        pod: &PodUid,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, CredentialError> {
        self.hand_out(permit.into_session(), pod, deadline).await
    }

    /// Has credentials fetched for a pod that will ask for them, and returns when they are held, within
    /// [`Limits::answer`]. No pod is given them.
    ///
    /// # Errors
    /// As [`get_by`](Self::get_by).
    ///
    /// # Cancel safety
    /// As [`get_by`](Self::get_by).
    pub async fn hold(&self, permit: Permit, pod: &PodUid) -> Result<(), CredentialError> {
        let deadline = Instant::now() + self.0.answer;
        self.of_session_by(&permit.into_session(), pod, deadline).await.map(drop)
    }

    /// Sets the role sessions of all living pods. A session that none of them may have any longer is dropped
    /// after a while, at most half an hour, its credentials zeroised; the rest is kept fresh until the next
    /// call. What is to be prefetched is fetched within `spread`, earlier when a pod asks.
    pub fn set_claims(&self, claims: impl IntoIterator<Item = Claim>, spread: Duration) {
        let mut sessions = HashMap::new();
        for Claim { permit, pod, prefetch } in claims {
            let (_, wanted) = sessions.entry(permit.into_session()).or_insert((pod, false));
            *wanted |= prefetch;
        }
        self.set_claimed(sessions, spread);
    }

    /// The state of issuing, for status.
    pub fn issues(&self) -> Issues {
        let (queued, is_throttled) = self.0.scheduler.state();
        let sessions = self.0.slots().len();
        Issues { is_throttled, queued, sessions, ..self.0.ended().clone() }
    }

    /// How a role session stands, for people; `None` when it is not in the cache. Asks for nothing.
    pub fn state_of(&self, session: &RoleSession) -> Option<SessionState> {
        let now = self.0.now();
        self.0.slots().get(session).map(|slot| slot.entry.state(now))
    }

    pub(super) fn set_claimed(
        &self,
        mut sessions: HashMap<Arc<RoleSession>, (PodUid, bool)>,
        spread: Duration,
    ) {
        let now = self.0.now();
        let mut slots = self.0.slots();
        let mut lingering = slots.values().filter(|slot| slot.entry.lingers()).count();
        slots.retain(|session, slot| {
            let is_kept = match sessions.remove(session) {
                Some((pod, _)) => {
                    slot.entry.claim();
                    slot.pod = pod;
                    true
                }
                None => {
                    let lingered = slot.entry.lingers();
                    let is_kept = slot.entry.unclaim(now, lingering < MAX_LINGERING);
                    if !lingered && slot.entry.lingers() {
                        lingering += 1;
                        // Its refresh task sleeps until the next refresh, which is too long.
                        slot.wake.notify_one();
                    }
                    is_kept
                }
            };
            if !is_kept {
                self.0.let_go(slot);
            }
            is_kept
        });
        let mut refresh_tasks = Vec::new();
        for (session, (pod, prefetch)) in sessions {
            if prefetch && slots.len() < self.0.max_sessions {
                // The first moments are reserved for pods that ask.
                let entry = Entry::claimed(now.tick + spread.mul_f64(0.05 + 0.95 * (self.0.jitter)()));
                refresh_tasks.push(self.0.insert(&mut slots, session, Slot::new(entry, pod)));
                self.0.metrics.prefetches.inc();
            }
        }
        drop(slots);
        for refresh_task in refresh_tasks {
            self.0.tasks.spawn(refresh_task);
        }
    }

    /// The sessions that are held now. Reads every entry under the lock.
    pub fn survey(&self) -> Survey {
        let now = self.0.now();
        Survey::of(self.0.slots().values().map(|slot| &slot.entry), now)
    }

    #[cfg(test)]
    pub(super) async fn of_session(
        &self,
        session: impl Into<Arc<RoleSession>>,
        pod: &PodUid,
    ) -> Result<Arc<Credentials>, CredentialError> {
        self.hand_out(session.into(), pod, Instant::now() + self.0.answer).await
    }

    async fn hand_out(
        &self,
        session: Arc<RoleSession>,
        pod: &PodUid,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, CredentialError> {
        let issued = self.of_session_by(&session, pod, deadline).await?;
        let credentials = &issued.credentials;
        match issued.deliver(pod, &self.0.holder_room) {
            Delivery::First => self.0.trail.delivered(&session, credentials, pod),
            Delivery::Repeated => {}
            Delivery::Unknown { is_first } => {
                self.0.trail.not_recorded(&session, credentials, pod, is_first);
            }
        }
        Ok(Arc::clone(credentials))
    }

    pub(super) async fn of_session_by(
        &self,
        session: &Arc<RoleSession>,
        pod: &PodUid,
        deadline: Instant,
    ) -> Result<Arc<Issued>, CredentialError> {
        let metrics = &self.0.metrics;
        match self.0.ask(session, pod) {
            (Answer::Failed(error), _) => {
                metrics.failed.inc();
                Err(error)
            }
            (Answer::Hit(issued), _) => {
                metrics.hit.inc();
                Ok(issued)
            }
            // Boxed, because most requests do not wait, and would move this future.
            (Answer::Wait(fallback), fetched) => {
                Box::pin(self.wait(session, pod, fallback, fetched, deadline)).await
            }
        }
    }

    /// Waits for a fetch, and for following ones.
    async fn wait(
        &self,
        session: &Arc<RoleSession>,
        pod: &PodUid,
        fallback: Option<Arc<Issued>>,
        mut fetched: Option<watch::Receiver<()>>,
        deadline: Instant,
    ) -> Result<Arc<Issued>, CredentialError> {
        let metrics = &self.0.metrics;
        if fallback.is_some() { &metrics.refresh } else { &metrics.miss }.inc();

        while let Some(receiver) = &mut fetched
            && let Ok(Ok(())) = timeout_at(deadline, receiver.changed()).await
        {
            match self.0.ask(session, pod) {
                (Answer::Failed(error), _) => return Err(error),
                (Answer::Hit(issued), _) => return Ok(issued),
                (Answer::Wait(_), again) => fetched = again,
            }
        }
        if fallback.is_some() {
            metrics.below_floor.inc();
        }
        fallback.ok_or_else(|| match self.0.last_failure(session) {
            // It waits to be asked for again, and its pod should read why.
            Some(source) => CredentialError::Issue { source, retry_after: RETRY_AFTER },
            None => CredentialError::NotReady { retry_after: RETRY_AFTER },
        })
    }
}

impl Slot {
    fn new(entry: Entry, pod: PodUid) -> Self {
        Self { entry, wake: Arc::default(), fetched: None, pod, ticket: None }
    }

    /// Is notified of the next fetch's end.
    fn next_fetch(&mut self) -> watch::Receiver<()> {
        self.fetched.get_or_insert_default().subscribe()
    }

    /// A fetch has ended.
    fn notify(&mut self) {
        if let Some(fetched) = self.fetched.take() {
            fetched.send_replace(());
        }
    }
}

impl Shared {
    /// Asks the entry, which is created if it does not exist. The receiver, if the request must wait, is
    /// notified of the next fetch's end.
    fn ask(
        self: &Arc<Self>,
        session: &Arc<RoleSession>,
        pod: &PodUid,
    ) -> (Answer, Option<watch::Receiver<()>>) {
        let now = self.now();
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(session) {
            let (answer, wake) = slot.entry.ask(now);
            if wake {
                slot.wake.notify_one();
            }
            let fetched = match &answer {
                Answer::Wait(_) => {
                    if let Some(ticket) = slot.ticket {
                        self.scheduler.promote(ticket, pod, slot.entry.rank());
                    }
                    Some(slot.next_fetch())
                }
                Answer::Hit(_) if slot.entry.is_below_floor(now) => {
                    self.metrics.below_floor.inc();
                    None
                }
                Answer::Failed(_) | Answer::Hit(_) => None,
            };
            return (answer, fetched);
        }

        if slots.len() >= self.max_sessions && !self.evict(&mut slots) {
            return (Answer::Failed(CredentialError::Full), None);
        }
        let mut slot = Slot::new(Entry::asked(now), pod.clone());
        let fetched = slot.next_fetch();
        let refresh_task = self.insert(&mut slots, Arc::clone(session), slot);
        // A runtime that shuts down drops the refresh task at once, and the drop takes the lock.
        drop(slots);
        self.tasks.spawn(refresh_task);
        (Answer::Wait(None), Some(fetched))
    }

    fn insert(
        self: &Arc<Self>,
        slots: &mut HashMap<Arc<RoleSession>, Slot>,
        session: Arc<RoleSession>,
        slot: Slot,
    ) -> impl Future<Output = ()> + Send + 'static {
        let task = RefreshTask::new(Arc::clone(self), Arc::clone(&session), Arc::clone(&slot.wake));
        slots.insert(session, slot);
        self.metrics.entries.inc();
        task.run()
    }

    /// Makes room, at the cost of an entry that no pod has a claim to.
    fn evict(&self, slots: &mut HashMap<Arc<RoleSession>, Slot>) -> bool {
        let idle =
            slots.iter().find(|(_, slot)| slot.entry.is_idle()).map(|(session, _)| Arc::clone(session));
        let Some(slot) = idle.and_then(|session| slots.remove(&session)) else { return false };
        self.let_go(&slot);
        true
    }

    /// The refresh task of a removed slot does not find it, and ends.
    fn let_go(&self, slot: &Slot) {
        slot.wake.notify_one();
        self.metrics.entries.dec();
        self.metrics.dropped.inc();
    }

    fn last_failure(&self, session: &RoleSession) -> Option<Arc<IssueError>> {
        self.slots().get(session)?.entry.last_failure()
    }

    fn ended(&self) -> MutexGuard<'_, Issues> {
        self.issues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Now {
        Now { wall: self.clock.now(), tick: Instant::now() }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Arc<RoleSession>, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many role sessions may outlive their last pod: pods with individual session names must not fill the
/// memory.
const MAX_LINGERING: usize = 128;
/// When a pod that was not answered in time should ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
