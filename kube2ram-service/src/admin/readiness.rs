//! What the agent still waits for before it is ready, and notes on what is wrong although it is ready.
//! Depends on nothing of ours; `app` registers, `admin` reads.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, gauge::ConstGauge},
};
use tokio::sync::Notify;

/// The conditions that readiness still waits for, and notes. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<BTreeMap<&'static str, usize>>,
    met: Notify,
    notes: Mutex<BTreeMap<&'static str, String>>,
}

/// A condition that is not met yet. Dropping it does not meet it, so that a task that fails leaves the agent
/// unready.
#[derive(Debug)]
#[must_use = "readiness waits for it until `ready` is called"]
pub struct Pending {
    readiness: Readiness,
    condition: &'static str,
}

impl Readiness {
    /// Adds a condition, even after the agent was ready.
    pub fn wait_for(&self, condition: &'static str) -> Pending {
        *self.0.pending.lock().unwrap_or_else(PoisonError::into_inner).entry(condition).or_default() += 1;
        Pending { readiness: self.clone(), condition }
    }

    /// Sets the note about something; `None` removes it. Notes are shown in `/readyz` and change nothing: for
    /// what a person must repair, and what neither a restart nor less traffic would.
    pub fn note(&self, about: &'static str, note: Option<String>) {
        let mut notes = self.0.notes.lock().unwrap_or_else(PoisonError::into_inner);
        match note {
            Some(note) => drop(notes.insert(about, note)),
            None => drop(notes.remove(about)),
        }
    }

    /// The notes, in alphabetical order of what they are about, which they begin with.
    pub fn notes(&self) -> Vec<String> {
        let notes = self.0.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.iter().map(|(about, note)| format!("{about}: {note}")).collect()
    }

    /// Resolves when every condition is met.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn ready(&self) {
        loop {
            // Subscribed before the check, so that no change is missed between the check and the wait.
            let met = self.0.met.notified();
            let mut met = std::pin::pin!(met);
            met.as_mut().enable();
            if self.pending().is_empty() {
                return;
            }
            met.await;
        }
    }

    /// The conditions that are not met, in alphabetical order; none when the agent is ready.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }
}

impl Collector for Readiness {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let pending = self.pending();
        let help = "Whether the agent is ready, as in /readyz.";
        let ready = encoder.encode_descriptor("ready", help, None, MetricType::Gauge)?;
        ConstGauge::new(u32::from(pending.is_empty())).encode(ready)?;
        if pending.is_empty() {
            return Ok(());
        }
        let help = "Conditions that readiness waits for; none when the agent is ready.";
        let mut family = encoder.encode_descriptor("pending_conditions", help, None, MetricType::Gauge)?;
        for condition in pending {
            ConstGauge::new(1_u32).encode(family.encode_family(&[("condition", condition)])?)?;
        }
        Ok(())
    }
}

impl Pending {
    /// Declares the condition met.
    pub fn ready(self) {
        let mut conditions = self.readiness.0.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = conditions.get_mut(self.condition) {
            *count -= 1;
            if *count == 0 {
                conditions.remove(self.condition);
            }
        }
        drop(conditions);
        self.readiness.0.met.notify_waiters();
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

    #[tokio::test(start_paused = true)]
    async fn a_waiter_is_woken_by_the_last_one() {
        let readiness = Readiness::default();
        let (pods, links) = (readiness.wait_for("pods"), readiness.wait_for("links"));
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });

        pods.ready();
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        links.ready();

        tokio::time::timeout(std::time::Duration::from_secs(1), waiting).await.unwrap().unwrap();
        readiness.ready().await;
    }

    #[test]
    fn a_note_is_replaced_and_removed_and_keeps_nobody_from_being_ready() {
        let readiness = Readiness::default();
        readiness.note("pods", Some("half of them".into()));
        readiness.note("links", Some("one".into()));

        assert_eq!(readiness.notes(), ["links: one", "pods: half of them"]);
        assert!(readiness.pending().is_empty());
        readiness.clone().note("pods", Some("none of them".into()));
        readiness.note("links", None);
        assert_eq!(readiness.notes(), ["pods: none of them"]);
        readiness.note("pods", None);
        assert!(readiness.notes().is_empty());
    }

    #[test]
    fn a_dropped_condition_stays_pending() {
        let readiness = Readiness::default();

        drop(readiness.wait_for("pods"));

        assert_eq!(readiness.pending(), ["pods"]);
    }
}
