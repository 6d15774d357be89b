//! The credential cache: entries by role session, and one refresh task for each. Depends on `clock`, `policy`
//! (for the permit), `audit`, `sts_scheduler` and an `Issuer`; called by `server` and by `app`'s prefetch.

use std::{
    collections::HashMap,
    future::pending,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use super::{
    Attempt, CredentialError, Failure, Issues, Metrics, SessionState,
    entry::{Answer, Entry, Next, Now},
    issued::{Delivery, HOLDERS, HolderRoom, Issued},
    sts_queue::{Rank, Rates, TicketId},
    sts_scheduler::{StsPermit, StsScheduler},
    survey::Survey,
};
use crate::{audit::Trail, identity::PodUid, policy::Permit};
use kube2ram_cloud::{
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    role::RoleSession,
};
use kube2ram_service::{
    clock::{Clock, jitter},
    rate_limiter::Rate,
    telemetry::chain,
};

/// What bounds a [`Cache`].
///
/// STS allows 100 requests per second to all nodes of an account together. In steady state a node requests
/// each of its sessions every 26 minutes, so the rates matter only in bad moments. Over minutes a node uses
/// at most a tenth of the account's limit. When many pods start at once, a node may use 50 calls at once and
/// 50 per second, which is the whole limit in the first second and half of it afterwards, until it has used
/// 250. So 250 pods of different roles, as many as a large node runs, are served within five seconds. Fetches
/// that no pod waits for get a fifth of that. A pod's own rate is far above the needs of one annotation, and
/// keeps a pod that changes its annotation in a loop from delaying the others.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many role sessions are kept.
    pub sessions: usize,
    /// How many of them are issued at once.
    pub concurrent_issues: usize,
    /// How many calls may be in flight when a fetch that no pod waits for begins.
    pub concurrent_ahead: usize,
    /// How fast the node asks STS, over minutes.
    pub node: Rate,
    /// How much of the burst is reserved for sessions that a pod waits for.
    pub reserve: u32,
    /// How fast the node asks STS, over seconds.
    pub pace: Rate,
    /// How fast it asks for one pod.
    pub pod: Rate,
    /// How long a pod waits for credentials that are being issued. Its SDK gives up a little later.
    pub answer: Duration,
    /// Spreads what would otherwise happen at the same moment everywhere: a random number in 0 – 1.
    pub jitter: fn() -> f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 4096,
            concurrent_issues: 32,
            concurrent_ahead: 8,
            node: Rate { burst: 250, interval: Duration::from_millis(100) },
            reserve: 200,
            pace: Rate { burst: 50, interval: Duration::from_millis(20) },
            pod: Rate { burst: 4, interval: Duration::from_secs(15) },
            answer: Duration::from_millis(800),
            jitter,
        }
    }
}

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
    /// Notifies the waiting requests that a fetch has ended.
    fetched: watch::Sender<()>,
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
                refresh_tasks.push(self.0.insert(&mut slots, session, entry, pod).1);
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
                    Some(slot.fetched.subscribe())
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
        let (fetched, refresh_task) =
            self.insert(&mut slots, Arc::clone(session), Entry::asked(now), pod.clone());
        // A runtime that shuts down drops the refresh task at once, and the drop takes the lock.
        drop(slots);
        self.tasks.spawn(refresh_task);
        (Answer::Wait(None), Some(fetched))
    }

    fn insert(
        self: &Arc<Self>,
        slots: &mut HashMap<Arc<RoleSession>, Slot>,
        session: Arc<RoleSession>,
        entry: Entry,
        pod: PodUid,
    ) -> (watch::Receiver<()>, impl Future<Output = ()> + Send + 'static) {
        let (wake, fetched) = (Arc::default(), watch::Sender::new(()));
        let task =
            RefreshTask { cache: Arc::clone(self), session: Arc::clone(&session), wake: Arc::clone(&wake) };
        let refresh_task = task.run();
        let receiver = fetched.subscribe();
        slots.insert(session, Slot { entry, wake, fetched, pod, ticket: None });
        self.metrics.entries.inc();
        (receiver, refresh_task)
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

    fn last_failure(&self, session: &RoleSession) -> Option<Arc<IssueError>> {
        self.slots().get(session)?.entry.last_failure()
    }

    fn note(&self, session: &RoleSession, result: &Result<Credentials, IssueError>) {
        let (role, now) = (session.role.clone(), self.clock.now());
        let mut ended = self.ended();
        match result {
            Ok(_) => ended.succeeded = Some(Attempt { role, outcome: now }),
            Err(error) => ended.failed = Some(Attempt { role, outcome: Failure::of(error, now) }),
        }
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

/// The refresh task of an entry.
struct RefreshTask {
    cache: Arc<Shared>,
    session: Arc<RoleSession>,
    /// Of its own slot.
    wake: Arc<Notify>,
}

impl RefreshTask {
    async fn run(self) {
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
                slot.fetched.send_replace(());
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

/// Bounds one issue.
pub const ISSUE_DEADLINE: Duration = Duration::from_secs(10);
/// How many role sessions may outlive their last pod: pods with individual session names must not fill the
/// memory.
const MAX_LINGERING: usize = 128;
/// When a pod that was not answered in time should ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
