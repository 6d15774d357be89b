//! Pods that connect before the watch has shown them: the waiting requests of each pod, and the answers of
//! direct lists. Pure except for tokio's clock; called by `kubernetes::cluster`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    object::PodUpdate,
    pods::{Found, Pods},
};
use crate::{identity::PodUid, pod::Pod};

/// Between the starts of two direct lists: a node asks 4 times a second at most, whatever its pods do.
pub(super) const LIST_INTERVAL: Duration = Duration::from_millis(250);

/// The deadline of one direct list. It is longer than a request waits: a slow list answers the pod's next
/// request, and ending it would only start another one.
pub(super) const LIST_DEADLINE: Duration = Duration::from_secs(10);

/// The longest pause after lists that failed; it doubles from [`LIST_INTERVAL`].
const LIST_PAUSE_LIMIT: Duration = Duration::from_secs(30);

/// More pods than the watch is ever late with; a list that has more proves nothing absent.
pub(super) const LIST_LIMIT: usize = 1_000;

/// How long the API server's answer that a pod does not exist is used.
const ABSENT_FOR: Duration = Duration::from_secs(1);

/// The largest number of remembered look-ups; others end at their deadline.
const LOOKUPS_LIMIT: usize = 4_096;

/// Why a direct list brought nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListError {
    #[error("cannot list the pods of this node")]
    Request(#[source] kube2ram_service::kubernetes::ListError),
    #[error("listing the pods of this node timed out")]
    Timeout(#[source] tokio::time::error::Elapsed),
    #[error("the list of this node's pods has more than {LIST_LIMIT} that are not known")]
    Truncated,
}

#[derive(Debug)]
pub(super) struct Lookups {
    pub(super) pods: Pods,
    /// For the next direct list.
    wanted: HashSet<PodUid>,
    /// The list in flight. A pod's object is older than its cgroup, so a list answers all requests that wait
    /// for the same pod.
    asked: HashSet<PodUid>,
    absent: HashMap<PodUid, Instant>,
    last_error: Option<Arc<ListError>>,
    /// How many lists in a row have failed.
    failures: u32,
}

pub(super) enum Look {
    /// According to the API server's last answer it does not exist.
    Absent,
    Ambiguous,
    Found(Arc<Pod>),
    /// Needed from the direct list in flight, or from the next one.
    Wanted,
}

impl Lookups {
    pub(super) fn new() -> Self {
        Self {
            pods: Pods::new(),
            wanted: HashSet::new(),
            asked: HashSet::new(),
            absent: HashMap::new(),
            last_error: None,
            failures: 0,
        }
    }

    pub(super) fn look(&mut self, uid: &PodUid) -> Look {
        match self.pods.find(uid) {
            Found::Ambiguous => return Look::Ambiguous,
            Found::One(pod) => return Look::Found(pod),
            Found::None => {}
        }
        if self.absent.get(uid).is_some_and(|since| since.elapsed() < ABSENT_FOR) {
            return Look::Absent;
        }
        if !self.asked.contains(uid) && self.wanted.len() < LOOKUPS_LIMIT {
            self.wanted.insert(uid.clone());
        }
        Look::Wanted
    }

    /// Whether a direct list is wanted; if so, it has to be made now and given to [`Self::finish_list`].
    pub(super) fn start_list(&mut self) -> bool {
        let pods = &self.pods;
        self.asked = self.wanted.drain().filter(|uid| matches!(pods.find(uid), Found::None)).collect();
        if self.asked.is_empty() {
            return false;
        }
        self.pods.start_direct();
        true
    }

    /// Applies a list from the API server's cache, which is enough for pods that are in it. Returns whether
    /// it was enough for all waiting requests: otherwise the committed state must be listed, because the
    /// cache may be behind.
    pub(super) fn finish_cached(&mut self, listed: Vec<PodUpdate>) -> bool {
        let asked = &self.asked;
        // No other pods: the cache may still have a pod whose deletion the watch has already shown.
        let is_asked = |pod_update: &PodUpdate| match pod_update {
            PodUpdate::Live(known) => {
                asked.contains(&known.pod.uid)
                    || known.config_hash.as_ref().is_some_and(|it| asked.contains(it))
            }
            PodUpdate::Ended(_) => false,
        };
        self.pods.finish_direct(listed.into_iter().filter(is_asked));
        let pods = &self.pods;
        self.asked.retain(|uid| matches!(pods.find(uid), Found::None));
        if self.asked.is_empty() {
            (self.last_error, self.failures) = (None, 0);
            return true;
        }
        self.pods.start_direct();
        false
    }

    /// How long to wait after a list. `jitter` lies in 0 – 1.
    pub(super) fn pause(&self, jitter: f64) -> Duration {
        let doubled = LIST_INTERVAL.saturating_mul(1 << self.failures.min(16)).min(LIST_PAUSE_LIMIT);
        if self.failures == 0 { LIST_INTERVAL } else { doubled.mul_f64(0.5 + 0.5 * jitter) }
    }

    pub(super) fn finish_list(&mut self, listed: Result<Vec<PodUpdate>, ListError>) {
        let asked = std::mem::take(&mut self.asked);
        let listed = match listed {
            Ok(listed) => listed,
            Err(error) => {
                self.last_error = Some(Arc::new(error));
                self.failures = self.failures.saturating_add(1);
                return;
            }
        };
        (self.last_error, self.failures) = (None, 0);
        self.absent.retain(|_, since| since.elapsed() < ABSENT_FOR);
        if !self.pods.finish_direct(listed) {
            return;
        }
        for uid in asked {
            if matches!(self.pods.find(&uid), Found::None) && self.absent.len() < LOOKUPS_LIMIT {
                self.absent.insert(uid, Instant::now());
            }
        }
    }

    pub(super) fn last_error(&self) -> Option<Arc<ListError>> {
        self.last_error.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::object::testing::{self, uid},
        *,
    };

    fn pod_update(n: u8) -> PodUpdate {
        testing::pod_update(n, "p")
    }

    #[test]
    fn a_list_under_way_answers_later_waiters_for_the_same_pod_but_not_for_others() {
        let mut lookups = Lookups::new();
        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
        assert!(lookups.start_list());

        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
        assert!(matches!(lookups.look(&uid(2)), Look::Wanted));
        lookups.finish_list(Ok(vec![]));

        assert!(matches!(lookups.look(&uid(1)), Look::Absent));
        assert!(matches!(lookups.look(&uid(2)), Look::Wanted));
        assert!(lookups.start_list());
        lookups.finish_list(Ok(vec![pod_update(2)]));
        assert!(matches!(lookups.look(&uid(2)), Look::Found(_)));
        assert!(!lookups.start_list());
    }

    #[test]
    fn no_list_is_made_for_a_pod_that_has_come_meanwhile() {
        let mut lookups = Lookups::new();
        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));

        lookups.pods.apply(pod_update(1));

        assert!(!lookups.start_list());
    }

    #[test]
    fn a_failed_list_proves_nothing_absent() {
        let mut lookups = Lookups::new();
        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
        assert!(lookups.start_list());

        lookups.finish_list(Err(ListError::Truncated));

        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
        assert!(lookups.last_error().is_some());
        assert!(lookups.start_list());
    }

    #[test]
    fn the_cache_finds_pods_and_proves_none_absent() {
        let mut lookups = Lookups::new();
        for n in [1, 2] {
            assert!(matches!(lookups.look(&uid(n)), Look::Wanted));
        }
        assert!(lookups.start_list());

        assert!(!lookups.finish_cached(vec![pod_update(1), pod_update(3)]), "pod 2 may be too new for it");
        assert!(matches!(lookups.look(&uid(1)), Look::Found(_)));
        assert!(matches!(lookups.look(&uid(2)), Look::Wanted));
        assert!(matches!(lookups.look(&uid(3)), Look::Wanted), "nobody asked for it, and it may be gone");
        lookups.finish_list(Ok(vec![pod_update(1)]));

        assert!(matches!(lookups.look(&uid(2)), Look::Absent));
        assert!(lookups.start_list(), "pod 3");
        assert!(lookups.finish_cached(vec![pod_update(3)]));
        assert!(matches!(lookups.look(&uid(3)), Look::Found(_)));
    }

    #[test]
    fn lists_that_fail_are_made_less_and_less_often() {
        let mut lookups = Lookups::new();
        let mut pauses = vec![lookups.pause(1.0)];
        for _ in 0..9 {
            lookups.finish_list(Err(ListError::Truncated));
            pauses.push(lookups.pause(1.0));
        }

        let expected = [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000];
        assert_eq!(pauses, expected.map(Duration::from_millis));
        assert_eq!(lookups.pause(0.0), Duration::from_secs(15));
        lookups.finish_list(Ok(vec![]));
        assert_eq!(lookups.pause(1.0), LIST_INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn an_absence_is_believed_for_a_while_only() {
        let mut lookups = Lookups::new();
        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
        assert!(lookups.start_list());
        lookups.finish_list(Ok(vec![]));
        assert!(matches!(lookups.look(&uid(1)), Look::Absent));

        tokio::time::advance(ABSENT_FOR).await;

        assert!(matches!(lookups.look(&uid(1)), Look::Wanted));
    }

    #[test]
    fn the_look_ups_that_are_remembered_are_bounded() {
        let mut lookups = Lookups::new();
        for n in 0..LOOKUPS_LIMIT + 1 {
            let uid = PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap();
            assert!(matches!(lookups.look(&uid), Look::Wanted));
        }

        assert_eq!(lookups.wanted.len(), LOOKUPS_LIMIT);
    }
}
