//! The ServiceAccounts of the node's pods: the annotations of each, and when it is to be read again. Pure
//! except for tokio's clock. Kept by `kubernetes::pods`, driven by `kubernetes::service_accounts`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    mem::take,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{account_api::CallError, object::Known};
use crate::{identity::PodUid, pod::Pod};
use kube2ram_cloud::role::ServiceAccount;

/// The annotations of one ServiceAccount: those that are asked for.
pub(super) type Annotations = BTreeMap<Box<str>, Box<str>>;

/// The ServiceAccounts that the node's pods use. Bounded by the number of pods.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    known: HashMap<ServiceAccount, Account>,
    /// The number of the last read of each of their namespaces that had one.
    turns: HashMap<Box<str>, u64>,
    last_turn: u64,
}

#[derive(Debug)]
struct Account {
    /// As they were last read; `None` before the first time.
    annotations: Option<Arc<Annotations>>,
    /// The pods that used it when the pods were last followed, without those that have departed.
    pods: HashSet<PodUid>,
    has_departed_pods: bool,
    /// When the last read with success by this agent started: a later change is not in it.
    read_at: Option<Instant>,
    /// When it is to be read next.
    due: Instant,
    /// When the read started that is under way.
    reading_since: Option<Instant>,
    /// A pod has appeared while a read was under way, which may be older than the pod.
    is_wanted_again: bool,
    /// How many reads in a row have failed.
    failures: u32,
    failure: Option<Failure>,
}

/// Why an account could not be read at the last attempt.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) at: Timestamp,
    pub(super) error: Arc<CallError>,
}

/// The time between two reads while pods use an account: it is read about when their credentials are renewed.
const INTERVAL: Duration = Duration::from_mins(26);
/// How much earlier or later a read may be, as a part of [`INTERVAL`]: agents that start at once do not ask
/// at once.
const SPREAD: f64 = 0.1;
/// The time from the start of a read to the one that a new pod causes, at least. So a Deployment's pods cause
/// two reads at most, and a changed annotation counts within this time after a pod is started.
const FRESH_FOR: Duration = Duration::from_secs(5);
/// The pause after a read that failed; doubled up to the limit.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(60);
/// The shortest pause when reading is forbidden: no repetition helps before someone grants the right. A Node
/// authorizer that does not know of a pod yet learns of it by itself.
const FORBIDDEN_PAUSE: Duration = Duration::from_secs(30);
/// The first failure of an account is no news: the Node authorizer does not know of a pod in its first
/// moments.
const FAILURES_REPORTED: u32 = 2;

impl Accounts {
    /// Notes which pods use which account. An account without pods is forgotten.
    pub(super) fn follow<'p>(
        &mut self,
        pods: impl Iterator<Item = &'p Known>,
        departed: impl Iterator<Item = &'p Known>,
        now: Instant,
    ) {
        let mut before: HashMap<ServiceAccount, HashSet<PodUid>> = HashMap::new();
        for (name, account) in &mut self.known {
            account.has_departed_pods = false;
            before.insert(name.clone(), take(&mut account.pods));
        }
        for known in pods.filter(has_account) {
            let (name, uid) = (name_of(&known.pod), &known.pod.uid);
            let is_new = !before.get(&name).is_some_and(|pods| pods.contains(uid));
            let account = self.known.entry(name).or_insert_with(|| Account::new(now));
            account.pods.insert(uid.clone());
            if is_new {
                account.want(now);
            }
        }
        for known in departed.filter(has_account) {
            if let Some(account) = self.known.get_mut(&name_of(&known.pod)) {
                account.has_departed_pods = true;
            }
        }
        self.known.retain(|_, account| {
            !account.pods.is_empty() || account.has_departed_pods || account.reading_since.is_some()
        });
        let namespaces: HashSet<_> = self.known.keys().map(|name| &name.namespace).collect();
        self.turns.retain(|namespace, _| namespaces.contains(namespace));
    }

    /// The account that is to be read now, if there is one. Namespaces take turns, so that one with many
    /// accounts does not delay the others' pods; within a namespace, the account that has waited longest is
    /// first. It counts as being read until [`Self::finish`].
    pub(super) fn start(&mut self, now: Instant) -> Option<ServiceAccount> {
        let turns = &self.turns;
        let due = self.known.iter_mut().filter(|(_, account)| account.is_wanted() && account.due <= now);
        let (name, account) = due
            .min_by_key(|(name, account)| (turns.get(&name.namespace).copied().unwrap_or(0), account.due))?;
        account.reading_since = Some(now);
        self.last_turn += 1;
        self.turns.insert(name.namespace.clone(), self.last_turn);
        Some(name.clone())
    }

    /// When the next read is due; `None` when no account waits for one.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.known.values().filter(|account| account.is_wanted()).map(|account| account.due).min()
    }

    /// Takes the result of a read. A failure leaves what was known of the account, also when the account does
    /// not exist any more: without its annotations, pods might get more than with them. `jitter` lies in
    /// 0 – 1.
    pub(super) fn finish(
        &mut self,
        name: &ServiceAccount,
        result: Result<Annotations, CallError>,
        (now, at): (Instant, Timestamp),
        jitter: f64,
    ) {
        let Some(account) = self.known.get_mut(name) else { return };
        let started_at = take(&mut account.reading_since).unwrap_or(now);
        let is_wanted_again = take(&mut account.is_wanted_again);
        match result {
            Ok(annotations) => {
                account.annotations = Some(Arc::new(annotations));
                account.read_at = Some(started_at);
                account.due = now + INTERVAL.mul_f64(1.0 - SPREAD + 2.0 * SPREAD * jitter);
                (account.failures, account.failure) = (0, None);
                if is_wanted_again {
                    account.want(now);
                }
            }
            Err(error) => {
                account.failures = account.failures.saturating_add(1);
                account.due = now + pause(&error, account.failures, jitter);
                account.failure = Some(Failure { at, error: Arc::new(error) });
            }
        }
    }

    /// Takes over what an earlier agent knew of a pod's account, until it is read.
    pub(super) fn restore(&mut self, known: &Known) {
        let Some(annotations) = known.pod.account_annotations.as_ref().filter(|_| has_account(&known)) else {
            return;
        };
        let account = self.known.entry(name_of(&known.pod)).or_insert_with(|| Account::new(Instant::now()));
        account.annotations.get_or_insert_with(|| Arc::clone(annotations));
    }

    /// Gives a pod what is known of its account. A new pod gets it at once, although the account may have
    /// been changed since the last read: the read that the pod causes follows within [`FRESH_FOR`]. The pod
    /// stays the same object unless that changes it. Returns whether it has.
    pub(super) fn fill(&self, known: &mut Known) -> bool {
        let annotations = match has_account(&&*known) {
            true => self.known.get(&name_of(&known.pod)).and_then(|account| account.annotations.clone()),
            false => Some(Arc::default()),
        };
        match annotations {
            // Not compared by identity: what is read again is mostly the same.
            Some(annotations) if known.pod.account_annotations.as_ref() != Some(&annotations) => {
                Arc::make_mut(&mut known.pod).account_annotations = Some(annotations);
                true
            }
            _ => false,
        }
    }

    /// Why the account of a pod could not be read, if the last attempt failed.
    pub(super) fn error_of(&self, pod: &Pod) -> Option<Arc<CallError>> {
        let failure = self.known.get(&name_of(pod))?.failure.as_ref()?;
        Some(Arc::clone(&failure.error))
    }

    /// The latest failure of an account that cannot be read, and is used. That an account does not exist is
    /// its namespace's own affair.
    pub(super) fn failure(&self) -> Option<Failure> {
        let failing =
            self.known.values().filter(|it| it.failures >= FAILURES_REPORTED && !it.pods.is_empty());
        let failures = failing.filter_map(|account| account.failure.clone());
        failures.filter(|failure| !failure.error.is_not_found()).max_by_key(|failure| failure.at)
    }
}

impl Account {
    fn new(now: Instant) -> Self {
        Self {
            annotations: None,
            pods: HashSet::new(),
            has_departed_pods: false,
            read_at: None,
            due: now,
            reading_since: None,
            is_wanted_again: false,
            failures: 0,
            failure: None,
        }
    }

    /// Of departed pods alone no account is read: the Node authorizer allows it for existing pods only.
    fn is_wanted(&self) -> bool {
        self.reading_since.is_none() && !self.pods.is_empty()
    }

    /// A pod has appeared: the account is to be read again soon. One that cannot be read keeps its pause.
    fn want(&mut self, now: Instant) {
        if self.reading_since.is_some() {
            self.is_wanted_again = true;
        } else if self.failures == 0 {
            let fresh_until = self.read_at.map_or(now, |at| at + FRESH_FOR);
            self.due = self.due.min(fresh_until.max(now));
        }
    }
}

/// A static pod's mirror has no ServiceAccount, and the API server would not let a node read the one that it
/// seems to have. A pod whose owner annotates it as a mirror has none either, which only its owner can want.
fn has_account(known: &&Known) -> bool {
    !known.pod.is_mirror
}

fn name_of(pod: &Pod) -> ServiceAccount {
    ServiceAccount { namespace: pod.namespace.clone(), name: pod.service_account.clone() }
}

/// How long to wait after a read that failed, the last of so many.
fn pause(error: &CallError, failures: u32, jitter: f64) -> Duration {
    let doubled = BACK_OFF.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(BACK_OFF_LIMIT);
    let pause = doubled.mul_f64(0.5 + 0.5 * jitter).max(BACK_OFF);
    match error {
        CallError::Refused(refusal)
            if refusal.code == 403 && !refusal.is_unrelated() && failures >= FAILURES_REPORTED =>
        {
            pause.max(FORBIDDEN_PAUSE.mul_f64(1.0 + 0.5 * jitter))
        }
        CallError::Refused(refusal) => pause.max(refusal.retry_after.unwrap_or_default()),
        _ => pause,
    }
}

#[cfg(test)]
mod tests;
