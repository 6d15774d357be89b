//! What the agent still waits for before it is ready. Depends on nothing of ours; `app` registers, `admin` reads.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// The conditions that readiness still waits for. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    conditions: Mutex<BTreeMap<&'static str, usize>>,
    one_met: Notify,
}

/// A condition that is not met yet. Dropping it does not meet it, so that a task that fails leaves the agent unready.
#[derive(Debug)]
#[must_use = "readiness waits for it until `ready` is called"]
pub struct Pending {
    readiness: Readiness,
    condition: &'static str,
}

impl Readiness {
    /// Adds a condition, even after the agent was ready.
    pub fn wait_for(&self, condition: &'static str) -> Pending {
        *self.0.lock().entry(condition).or_default() += 1;
        Pending { readiness: self.clone(), condition }
    }

    /// Waits until every condition is met.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn met(&self) {
        loop {
            let one_met = self.0.one_met.notified();
            if self.0.lock().is_empty() {
                return;
            }
            one_met.await;
        }
    }

    /// The conditions that are not met, in alphabetical order; none when the agent is ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.lock().keys().copied().collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// Declares the condition met.
    pub fn ready(self) {
        let mut conditions = self.readiness.0.lock();
        if let Some(count) = conditions.get_mut(self.condition) {
            *count -= 1;
            if *count == 0 {
                conditions.remove(self.condition);
            }
        }
        drop(conditions);
        self.readiness.0.one_met.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_ready_once_every_condition_is_met() {
        let readiness = Readiness::default();
        let pods = readiness.wait_for("pods");
        let links = readiness.wait_for("links");

        assert_eq!(readiness.pending(), ["links", "pods"]);
        pods.ready();
        assert_eq!(readiness.pending(), ["links"]);
        links.ready();
        assert!(readiness.pending().is_empty());
    }

    #[tokio::test]
    async fn whoever_waits_hears_when_the_last_condition_is_met() {
        let readiness = Readiness::default();
        let (pods, links) = (readiness.wait_for("pods"), readiness.wait_for("links"));
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.met().await }
        });

        pods.ready();
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        links.ready();

        waiting.await.unwrap();
    }

    #[test]
    fn a_dropped_condition_stays_pending() {
        let readiness = Readiness::default();

        drop(readiness.wait_for("pods"));

        assert_eq!(readiness.pending(), ["pods"]);
    }
}
