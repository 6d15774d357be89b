//! The pods of the node, from two sources: the watch, and direct lists for pods that it has not shown yet.
//! Each gets the annotations of its ServiceAccount, once these are known. Pure; called by
//! `kubernetes::cluster`, `kubernetes::lookup`, `kubernetes::service_accounts` and
//! `kubernetes::token_request`.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use tokio::time::Instant;

use super::{
    accounts::Accounts,
    object::{Known, PodUpdate},
};
use crate::{identity::PodUid, pod::Pod};
use kube2ram_cloud::role::ServiceAccount;
use kube2ram_service::kubernetes::Store;

#[derive(Debug)]
pub(super) struct Pods {
    store: Store<PodUid, Known>,
    /// Deleted from the API server, possibly by force, while their processes may still run: they keep their
    /// role until their cgroups are removed.
    departed: HashMap<PodUid, Known>,
    /// Pods that have ended according to the relist in progress: they are removed at once, without departing.
    ended: HashSet<PodUid>,
    /// What the watch has seen end or go: a direct list may be older than that, one from a cache by any time.
    gone: Gone,
    /// Whether a relist has arrived since the direct list in flight was requested.
    relisted: bool,
    /// The ServiceAccounts of the pods; `None` where their annotations are not asked for.
    accounts: Option<Accounts>,
}

/// The last deleted UIDs, enough of them that no direct list has an earlier one. UIDs are not reused.
#[derive(Debug, Default)]
struct Gone {
    uids: HashSet<PodUid>,
    in_order: VecDeque<PodUid>,
}

impl Gone {
    fn tell(&mut self, uid: PodUid) {
        if !self.uids.insert(uid.clone()) {
            return;
        }
        self.in_order.push_back(uid);
        if self.in_order.len() > GONE_LIMIT
            && let Some(first) = self.in_order.pop_front()
        {
            self.uids.remove(&first);
        }
    }
}

/// Whom a cgroup's name means.
#[derive(Debug)]
pub(super) enum Found {
    Ambiguous,
    None,
    One(Arc<Pod>),
}

impl Pods {
    pub(super) fn new() -> Self {
        Self {
            store: Store::new(),
            departed: HashMap::new(),
            ended: HashSet::new(),
            gone: Gone::default(),
            relisted: false,
            accounts: None,
        }
    }

    /// From now on pods get the annotations of their ServiceAccounts.
    pub(super) fn with_accounts(&mut self) {
        self.accounts = Some(Accounts::default());
    }

    pub(super) fn accounts(&self) -> Option<&Accounts> {
        self.accounts.as_ref()
    }

    /// The ServiceAccounts, once they follow the present pods.
    pub(super) fn follow_accounts(&mut self, now: Instant) -> Option<&mut Accounts> {
        let accounts = self.accounts.as_mut()?;
        accounts.follow(self.store.known().values(), self.departed.values(), now);
        Some(accounts)
    }

    /// Gives the pods what is known of their ServiceAccounts. Returns whether that has changed any: only
    /// those become other objects.
    pub(super) fn fill(&mut self) -> bool {
        let Some(accounts) = &self.accounts else { return false };
        let pods = self.store.known_mut().chain(self.departed.values_mut());
        pods.filter_map(|known| accounts.fill(known).then_some(())).count() > 0
    }

    /// Whether each pod's ServiceAccount is known, or could not be read. Those of departed pods do not count:
    /// they are not read any more.
    pub(super) fn has_tried_accounts(&self) -> bool {
        let Some(accounts) = &self.accounts else { return true };
        let mut pods = self.store.known().values().map(|known| &known.pod);
        pods.all(|pod| pod.account_annotations.is_some() || accounts.error_of(pod).is_some())
    }

    /// The pods to which a token of the ServiceAccount can be bound, the newest first, so many at most. Those
    /// that terminate come last: they are about to be deleted, and keep their role until then. The API server
    /// has no departed pod any more, and a static pod's mirror has no ServiceAccount.
    pub(super) fn with_account(&self, account: &ServiceAccount, limit: usize) -> Vec<Arc<Pod>> {
        let is_bindable = |known: &&Known| {
            let pod = &known.pod;
            let has_account = pod.namespace == account.namespace && pod.service_account == account.name;
            has_account && !pod.is_mirror
        };
        let mut pods: Vec<_> = self.store.known().values().filter(is_bindable).collect();
        // The UID decides between pods of the same second, so that each attempt has the same order.
        let rank = |known: &Known| (!known.is_terminating, known.created_at);
        pods.sort_by(|a, b| (rank(b), &b.pod.uid).cmp(&(rank(a), &a.pod.uid)));
        pods.into_iter().take(limit).map(|known| Arc::clone(&known.pod)).collect()
    }

    pub(super) fn is_listed(&self) -> bool {
        self.store.is_listed()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Known> {
        self.store.known().values().chain(self.departed.values())
    }

    /// The same, each with whether it has departed.
    pub(super) fn pod_views(&self) -> impl Iterator<Item = (&Known, bool)> {
        let (known, departed) = (self.store.known().values(), self.departed.values());
        known.map(|known| (known, false)).chain(departed.map(|known| (known, true)))
    }

    pub(super) fn departed(&self) -> usize {
        self.departed.len()
    }

    /// Forgets departed pods whose cgroups were removed. Returns whether there were any.
    pub(super) fn forget_departed(&mut self, live: &HashSet<PodUid>) -> bool {
        let before = self.departed.len();
        self.departed.retain(|_, known| known.is_among(live));
        self.departed.len() < before
    }

    /// Adds the pods of a checkpoint, until a list replaces them.
    pub(super) fn restore(&mut self, pods: Vec<Known>) {
        for mut known in pods {
            if self.store.is_listed() || self.store.known().contains_key(&known.pod.uid) {
                continue;
            }
            match &mut self.accounts {
                Some(accounts) => {
                    accounts.restore(&known);
                    accounts.fill(&mut known);
                }
                // Of an agent that was configured otherwise.
                None if known.pod.account_annotations.is_some() => {
                    Arc::make_mut(&mut known.pod).account_annotations = None;
                }
                None => {}
            }
            self.store.insert(known.pod.uid.clone(), known);
        }
    }

    /// The pod whose cgroup is named after `uid`.
    pub(super) fn find(&self, uid: &PodUid) -> Found {
        if let Some(known) = self.store.known().get(uid).or_else(|| self.departed.get(uid)) {
            return Found::One(Arc::clone(&known.pod));
        }
        if !uid.is_config_hash() {
            return Found::None;
        }
        // Static pods are few and seldom ask, so a separate index would cost more than it saves.
        let of_hash = |known: &&Known| known.config_hash.as_ref() == Some(uid);
        match only(self.store.known().values().filter(of_hash)) {
            // A deleted mirror pod is created again, unless the static pod itself is removed.
            Found::None => only(self.departed.values().filter(of_hash)),
            found => found,
        }
    }

    pub(super) fn apply(&mut self, pod_update: PodUpdate) {
        match pod_update {
            PodUpdate::Ended(uid) => {
                self.remove(uid.clone());
                self.departed.remove(&uid);
            }
            PodUpdate::Live(known) => self.insert(known),
        }
    }

    fn insert(&mut self, mut known: Known) {
        if let Some(accounts) = &self.accounts {
            accounts.fill(&mut known);
        }
        self.departed.remove(&known.pod.uid);
        if known.config_hash.is_some() {
            self.departed.retain(|_, departed| departed.config_hash != known.config_hash);
        }
        self.store.insert(known.pod.uid.clone(), known);
    }

    pub(super) fn remove(&mut self, uid: PodUid) {
        if let Some(known) = self.store.remove(&uid) {
            self.depart(known);
        }
        self.gone.tell(uid);
    }

    fn depart(&mut self, known: Known) {
        // A static pod's cgroup outlives its mirrors: an existing mirror already stands for it.
        let is_replaced = known.config_hash.is_some()
            && self.store.known().values().any(|other| other.config_hash == known.config_hash);
        if !is_replaced && self.departed.len() < DEPARTED_LIMIT {
            self.departed.insert(known.pod.uid.clone(), known);
        }
    }

    pub(super) fn start_relist(&mut self) {
        self.ended.clear();
        self.store.start_list();
    }

    pub(super) fn relist(&mut self, pod_update: PodUpdate) {
        match pod_update {
            PodUpdate::Ended(uid) => drop(self.ended.insert(uid)),
            PodUpdate::Live(known) => self.store.list(known.pod.uid.clone(), known),
        }
    }

    pub(super) fn finish_relist(&mut self) {
        // Also those that were never known: in a cache that is behind they still run.
        for uid in &self.ended {
            self.gone.tell(uid.clone());
        }
        for (uid, known) in self.store.finish_list() {
            if self.store.known().contains_key(&uid) {
                continue;
            }
            if !self.ended.contains(&uid) {
                self.depart(known);
            }
            self.gone.tell(uid);
        }
        let known = self.store.known();
        let hashes: HashSet<_> = known.values().filter_map(|known| known.config_hash.as_ref()).collect();
        self.departed.retain(|uid, departed| {
            let is_replaced = departed.config_hash.as_ref().is_some_and(|hash| hashes.contains(hash));
            !is_replaced && !known.contains_key(uid)
        });
        self.ended.clear();
        self.relisted = true;
        self.fill();
    }

    /// A direct list is about to be asked for.
    pub(super) fn start_direct(&mut self) {
        self.relisted = false;
    }

    /// Adds what a direct list brought and the watch has neither shown nor seen go. `false` when the list is
    /// of no use, because a relist may have dropped pods that this list still has.
    pub(super) fn finish_direct(&mut self, listed: impl IntoIterator<Item = PodUpdate>) -> bool {
        if self.relisted {
            return false;
        }
        for pod_update in listed {
            let PodUpdate::Live(known) = pod_update else { continue };
            let uid = &known.pod.uid;
            if !self.gone.uids.contains(uid) && !self.store.known().contains_key(uid) {
                self.insert(known);
            }
        }
        true
    }
}

fn only<'k>(mut claims: impl Iterator<Item = &'k Known>) -> Found {
    match (claims.next(), claims.next()) {
        (None, _) => Found::None,
        (Some(known), None) => Found::One(Arc::clone(&known.pod)),
        _ => Found::Ambiguous,
    }
}

/// More than a node deletes at once.
const DEPARTED_LIMIT: usize = 1024;
/// More than a node ends while one API server's cache is behind.
const GONE_LIMIT: usize = 1024;

#[cfg(test)]
mod tests {
    use super::{
        super::{
            account_api::CallError,
            object::testing::{pod_update, uid},
        },
        *,
    };

    fn name(pods: &Pods, n: u8) -> Option<Box<str>> {
        match pods.find(&uid(n)) {
            Found::One(pod) => Some(pod.name.clone()),
            _ => None,
        }
    }

    #[test]
    fn a_direct_list_adds_what_the_watch_has_not_shown_and_overwrites_nothing() {
        let mut pods = Pods::new();
        pods.apply(pod_update(1, "from watch"));
        pods.start_direct();

        assert!(pods.finish_direct([pod_update(1, "from list"), pod_update(2, "from list")]));

        assert_eq!(name(&pods, 1).as_deref(), Some("from watch"));
        assert_eq!(name(&pods, 2).as_deref(), Some("from list"));
    }

    #[test]
    fn a_direct_list_does_not_bring_back_what_was_deleted_meanwhile() {
        let mut pods = Pods::new();
        pods.apply(pod_update(1, "a"));
        pods.start_direct();
        pods.remove(uid(1));
        pods.apply(PodUpdate::Ended(uid(2)));

        pods.finish_direct([pod_update(1, "a"), pod_update(2, "b"), pod_update(3, "c")]);
        pods.forget_departed(&HashSet::new());

        assert_eq!((name(&pods, 1), name(&pods, 2)), (None, None));
        assert_eq!(name(&pods, 3).as_deref(), Some("c"));
    }

    #[test]
    fn a_list_from_a_cache_that_is_behind_brings_back_nothing_that_was_deleted_before() {
        let mut pods = Pods::new();
        for n in 1..=4 {
            pods.apply(pod_update(n, "p"));
        }
        pods.apply(PodUpdate::Ended(uid(1)));
        pods.remove(uid(2));
        pods.start_relist();
        pods.relist(PodUpdate::Ended(uid(3)));
        pods.relist(PodUpdate::Ended(uid(6)));
        pods.finish_relist();
        pods.forget_departed(&HashSet::new());

        pods.start_direct();
        assert!(pods.finish_direct((1..=6).map(|n| pod_update(n, "cached"))));

        let is_known = [1, 2, 3, 4, 5, 6].map(|n| name(&pods, n).is_some());
        assert_eq!(is_known, [false, false, false, false, true, false], "pod 6 was never known");
        pods.apply(pod_update(4, "again"));
        assert_eq!(name(&pods, 4).as_deref(), Some("again"), "the watch is believed");
    }

    #[test]
    fn what_was_deleted_is_remembered_within_bounds() {
        let mut gone = Gone::default();
        let uid = |n: usize| PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap();

        (0..=GONE_LIMIT).for_each(|n| gone.tell(uid(n)));
        gone.tell(uid(GONE_LIMIT));

        assert_eq!((gone.uids.len(), gone.in_order.len()), (GONE_LIMIT, GONE_LIMIT));
        assert!(!gone.uids.contains(&uid(0)) && gone.uids.contains(&uid(1)));
    }

    #[test]
    fn a_direct_list_is_of_no_use_when_a_relist_came_in_between() {
        let mut pods = Pods::new();
        pods.start_direct();
        pods.start_relist();
        pods.finish_relist();

        assert!(!pods.finish_direct([pod_update(1, "a")]));
        assert_eq!(name(&pods, 1), None);
    }

    #[test]
    fn a_relist_shows_only_when_it_is_complete() {
        let mut pods = Pods::new();
        pods.apply(pod_update(1, "old"));

        pods.start_relist();
        pods.relist(pod_update(2, "new"));
        assert_eq!((name(&pods, 1).as_deref(), name(&pods, 2)), (Some("old"), None));

        pods.finish_relist();
        pods.forget_departed(&HashSet::new());
        assert_eq!((name(&pods, 1), name(&pods, 2).as_deref()), (None, Some("new")));
    }

    #[test]
    fn a_deleted_pod_is_known_until_its_cgroup_is_removed_and_one_that_has_ended_is_not() {
        let mut pods = Pods::new();
        for n in 1..=4 {
            pods.apply(pod_update(n, "p"));
        }

        pods.remove(uid(1));
        pods.apply(PodUpdate::Ended(uid(2)));
        pods.start_relist();
        pods.relist(PodUpdate::Ended(uid(3)));
        pods.finish_relist();

        assert_eq!([1, 2, 3, 4].map(|n| name(&pods, n).is_some()), [true, false, false, true]);
        assert!(!pods.forget_departed(&[uid(1), uid(4)].into()));
        assert!(pods.forget_departed(&[uid(4)].into()));
        assert_eq!([1, 4].map(|n| name(&pods, n).is_some()), [false, true]);
        pods.apply(pod_update(4, "again"));
        assert_eq!((pods.departed(), name(&pods, 4).as_deref()), (0, Some("again")));
    }

    fn mirror(n: u8, name: &str) -> PodUpdate {
        let PodUpdate::Live(known) = pod_update(n, name) else { unreachable!() };
        PodUpdate::Live(mirrored(known))
    }

    fn mirrored(mut known: Known) -> Known {
        Arc::make_mut(&mut known.pod).is_mirror = true;
        Known { config_hash: Some(hash()), ..known }
    }

    fn hash() -> PodUid {
        PodUid::parse("0123456789abcdef0123456789abcdef").unwrap()
    }

    fn of_hash(pods: &Pods) -> Option<Box<str>> {
        match pods.find(&hash()) {
            Found::One(pod) => Some(pod.name.clone()),
            _ => None,
        }
    }

    #[test]
    fn a_mirror_that_is_made_again_leaves_nothing_of_the_former_one() {
        for relists in [false, true] {
            let mut pods = Pods::new();
            pods.apply(mirror(1, "former"));
            pods.remove(uid(1));
            assert_eq!((pods.departed(), of_hash(&pods).as_deref()), (1, Some("former")), "it runs on");

            if relists {
                pods.start_relist();
                pods.relist(mirror(2, "anew"));
                pods.finish_relist();
            } else {
                pods.apply(mirror(2, "anew"));
            }

            assert_eq!((pods.departed(), of_hash(&pods).as_deref()), (0, Some("anew")));
            // The checkpoint does not contain two claims to one name.
            let checkpoint = pods.all().cloned().collect();
            let mut restarted = Pods::new();
            restarted.restore(checkpoint);
            assert_eq!(of_hash(&restarted).as_deref(), Some("anew"));
        }
    }

    #[test]
    fn a_second_mirror_of_a_static_pod_makes_it_nobodys_until_it_is_deleted() {
        let mut pods = Pods::new();
        pods.apply(mirror(1, "own"));

        pods.apply(mirror(2, "impostor"));
        assert!(matches!(pods.find(&hash()), Found::Ambiguous));
        pods.remove(uid(2));

        assert_eq!((pods.departed(), of_hash(&pods).as_deref()), (0, Some("own")));
        assert_eq!(name(&pods, 2), None);
    }

    #[test]
    fn of_two_mirrors_that_have_both_departed_none_counts() {
        let mut pods = Pods::new();
        pods.apply(mirror(1, "a"));
        pods.apply(mirror(2, "b"));
        pods.start_relist();
        pods.finish_relist();

        assert_eq!(pods.departed(), 2);
        assert!(matches!(pods.find(&hash()), Found::Ambiguous));
    }

    #[test]
    fn what_was_known_before_a_restart_gives_way_to_a_list() {
        let known = |n| match pod_update(n, "saved") {
            PodUpdate::Live(known) => known,
            PodUpdate::Ended(_) => unreachable!(),
        };
        let mut pods = Pods::new();
        pods.restore(vec![known(1), known(2)]);
        assert_eq!((name(&pods, 1).as_deref(), pods.is_listed()), (Some("saved"), false));

        pods.start_relist();
        pods.relist(pod_update(1, "listed"));
        pods.finish_relist();
        pods.forget_departed(&HashSet::new());
        pods.restore(vec![known(3)]);

        assert_eq!((name(&pods, 1).as_deref(), name(&pods, 2), name(&pods, 3)), (Some("listed"), None, None));
    }

    fn of_account(n: u8, created_at: Option<&str>) -> Known {
        let PodUpdate::Live(known) = pod_update(n, "p") else { unreachable!() };
        Known { created_at: created_at.map(|at| at.parse().unwrap()), ..known }
    }

    fn account(name: &str) -> ServiceAccount {
        ServiceAccount { namespace: "n".into(), name: name.into() }
    }

    #[test]
    fn tokens_are_bound_to_the_newest_pods_of_the_account_and_to_terminating_ones_last() {
        let mut pods = Pods::new();
        for known in [
            of_account(1, None),
            of_account(2, Some("2026-01-01T00:00:01Z")),
            of_account(3, Some("2026-01-01T00:00:03Z")),
            of_account(4, Some("2026-01-01T00:00:02Z")),
            Known { is_terminating: true, ..of_account(5, Some("2026-01-01T00:00:09Z")) },
            mirrored(of_account(6, Some("2026-01-01T00:00:09Z"))),
            of_account(7, Some("2026-01-01T00:00:09Z")),
        ] {
            pods.apply(PodUpdate::Live(known));
        }
        pods.remove(uid(7));
        assert_eq!(pods.departed(), 1);

        let chosen = |limit| -> Vec<_> {
            pods.with_account(&account("default"), limit).iter().map(|pod| pod.uid.clone()).collect()
        };
        assert_eq!(chosen(9), [3, 4, 2, 1, 5].map(uid));
        assert_eq!(chosen(3), [3, 4, 2].map(uid));
        assert!(pods.with_account(&account("other"), 9).is_empty());
        let elsewhere = ServiceAccount { namespace: "m".into(), name: "default".into() };
        assert!(pods.with_account(&elsewhere, 9).is_empty());
    }

    /// The annotations that are known of pod `n`'s account.
    fn annotations(pods: &Pods, n: u8) -> Option<String> {
        let Found::One(pod) = pods.find(&uid(n)) else { return None };
        pod.account_annotations.as_ref().map(|known| known["role"].to_string())
    }

    fn read(pods: &mut Pods, role: &str) {
        let now = Instant::now();
        let accounts = pods.follow_accounts(now).unwrap();
        let read = [("role".into(), role.into())].into();
        accounts.finish(&account("default"), Ok(read), (now, jiff::Timestamp::UNIX_EPOCH), 0.5);
    }

    #[test]
    fn pods_have_their_accounts_annotations_whichever_way_they_come() {
        let mut pods = Pods::new();
        pods.with_accounts();
        pods.apply(pod_update(1, "watched"));
        assert_eq!(annotations(&pods, 1), None);
        read(&mut pods, "one");
        assert!(pods.fill());

        pods.apply(pod_update(1, "watched again"));
        pods.start_direct();
        pods.finish_direct([pod_update(2, "listed")]);
        assert_eq!([1, 2].map(|n| annotations(&pods, n)), [Some("one".into()), Some("one".into())]);
        pods.start_relist();
        pods.relist(pod_update(2, "relisted"));
        pods.relist(pod_update(3, "relisted"));
        read(&mut pods, "two");
        pods.finish_relist();

        let all = [1, 2, 3].map(|n| annotations(&pods, n).unwrap());
        assert_eq!(all, ["two"; 3], "the departed one, too");
        assert!(!pods.fill(), "nothing is left to change");
    }

    #[test]
    fn accounts_are_tried_once_each_is_read_or_has_failed() {
        let mut pods = Pods::new();
        pods.apply(pod_update(1, "p"));
        assert!(pods.has_tried_accounts(), "none is asked for");
        pods.with_accounts();
        assert!(!pods.has_tried_accounts());

        let now = (Instant::now(), jiff::Timestamp::UNIX_EPOCH);
        let accounts = pods.follow_accounts(now.0).unwrap();
        accounts.finish(&account("default"), Err(CallError::Unreadable), now, 0.5);
        assert!(pods.has_tried_accounts());
        read(&mut pods, "r");
        assert!(!pods.has_tried_accounts(), "the pod does not have it yet");
        assert!(pods.fill() && pods.has_tried_accounts());
    }

    #[test]
    fn what_a_checkpoint_has_of_accounts_counts_where_they_are_asked_for_only() {
        let saved = || {
            let mut known = of_account(1, None);
            Arc::make_mut(&mut known.pod).account_annotations =
                Some(Arc::new([("role".into(), "saved".into())].into()));
            vec![known]
        };
        let (mut with, mut without) = (Pods::new(), Pods::new());
        with.with_accounts();

        with.restore(saved());
        without.restore(saved());
        assert_eq!([&with, &without].map(|pods| annotations(pods, 1)), [Some("saved".into()), None]);
        with.start_relist();
        with.relist(pod_update(1, "listed"));
        with.finish_relist();

        assert_eq!(name(&with, 1).as_deref(), Some("listed"));
        assert_eq!(annotations(&with, 1).as_deref(), Some("saved"), "until the account is read");
        read(&mut with, "read");
        assert!(with.fill());
        assert_eq!(annotations(&with, 1).as_deref(), Some("read"));
    }
}
