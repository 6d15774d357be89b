//! Remembers for a moment whose a cgroup is: a client that connects anew for each request does so thousands of times a second, and to ask the kernel took
//! an eighth of the agent's time for that. Depends on [`CgroupPods`]; made by `app`.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{CgroupId, CgroupPods, IdentityError, PodUid};

/// Ids are not reused and cgroups do not move, so that only the end of a cgroup can be noticed late, by this much.
const MAX_AGE: Duration = Duration::from_secs(1);
/// More containers than a node has.
const CGROUPS: usize = 1024;

/// What a [`CgroupPods`] has found lately. Errors are not remembered.
#[derive(Debug)]
pub struct Recent<P> {
    pods: P,
    found: Mutex<HashMap<CgroupId, (PodUid, Instant)>>,
}

impl<P: CgroupPods> Recent<P> {
    /// Knows nothing yet.
    pub fn new(pods: P) -> Self {
        Self { pods, found: Mutex::default() }
    }
}

impl<P: CgroupPods> CgroupPods for Recent<P> {
    fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError> {
        let now = Instant::now();
        let is_recent = |found_at: Instant| now - found_at < MAX_AGE;
        let lock = || self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().get(&cgroup).cloned();
        if let Some((uid, found_at)) = known
            && is_recent(found_at)
        {
            return Ok(uid);
        }
        let uid = self.pods.pod_of(cgroup)?;
        let mut found = lock();
        if found.len() >= CGROUPS {
            found.retain(|_, (_, found_at)| is_recent(*found_at));
        }
        if found.len() < CGROUPS {
            found.insert(cgroup, (uid.clone(), now));
        }
        Ok(uid)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::time::advance;

    use super::*;

    /// Knows those with an even id, and counts how often it is asked.
    #[derive(Debug, Default)]
    struct Even(AtomicU64);

    impl CgroupPods for Even {
        fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let uid = PodUid::parse(&format!("00000000-0000-4000-8000-{:012x}", cgroup.0));
            uid.filter(|_| cgroup.0.is_multiple_of(2)).ok_or(IdentityError::Gone(cgroup))
        }
    }

    impl Recent<Even> {
        fn asked(&self) -> u64 {
            self.pods.0.swap(0, Ordering::Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn asks_once_for_what_it_finds_until_that_is_old() {
        let recent = Recent::new(Even::default());
        let first = recent.pod_of(CgroupId(2)).unwrap();

        advance(MAX_AGE - Duration::from_millis(1)).await;
        assert_eq!(recent.pod_of(CgroupId(2)).unwrap(), first);
        assert_ne!(recent.pod_of(CgroupId(4)).unwrap(), first);
        assert_eq!(recent.asked(), 2, "one each");
        advance(Duration::from_millis(1)).await;
        assert_eq!(recent.pod_of(CgroupId(2)).unwrap(), first);
        assert_eq!(recent.asked(), 1, "being asked does not make it younger");
    }

    #[tokio::test(start_paused = true)]
    async fn asks_each_time_for_what_it_does_not_find() {
        let recent = Recent::new(Even::default());

        for _ in 0..3 {
            assert!(matches!(recent.pod_of(CgroupId(1)), Err(IdentityError::Gone(CgroupId(1)))));
        }
        assert_eq!(recent.asked(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn remembers_a_bounded_number() {
        let recent = Recent::new(Even::default());
        let remembered = || recent.found.lock().unwrap().len();
        for n in 0..2 * CGROUPS as u64 {
            assert!(recent.pod_of(CgroupId(2 * n)).is_ok());
        }
        assert_eq!(remembered(), CGROUPS);
        recent.asked();
        assert!(recent.pod_of(CgroupId(0)).is_ok());
        assert_eq!(recent.asked(), 0, "those that are known stay");

        advance(MAX_AGE).await;
        assert!(recent.pod_of(CgroupId(4 * CGROUPS as u64)).is_ok());
        assert_eq!(remembered(), 1);
    }
}
