//! What the agent still waits for before it is ready. Depends on nothing of ours; `app` registers, `admin` reads.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The conditions that readiness still waits for. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

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
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(condition).or_default() += 1;
        Pending { readiness: self.clone(), condition }
    }

    /// The conditions that are not met, in alphabetical order; none when the agent is ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Pending {
    /// Declares the condition met.
    pub fn ready(self) {
        let mut conditions = self.readiness.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = conditions.get_mut(self.condition) {
            *count -= 1;
            if *count == 0 {
                conditions.remove(self.condition);
            }
        }
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

    #[test]
    fn a_dropped_condition_stays_pending() {
        let readiness = Readiness::default();

        drop(readiness.wait_for("pods"));

        assert_eq!(readiness.pending(), ["pods"]);
    }
}
