//! Notices → Kubernetes Events: bounded, each one said once per while, posted by one worker.
//! Depends on kube and the clock; called by `kubernetes::cluster`.
//!
//! Not kube's `Recorder`: it merges notices that differ only in their text, and needs the right to patch Events.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tracing::warn;

use super::{About, Metrics, Notice};
use crate::{clock::Clock, telemetry::chain};

pub(super) struct Events {
    said: Mutex<Said>,
    queued: Notify,
    clock: Arc<dyn Clock>,
    node: Box<str>,
    metrics: Metrics,
}

#[derive(Default)]
struct Said {
    queue: VecDeque<Notice>,
    recent: HashMap<Notice, Instant>,
}

const QUEUE_LIMIT: usize = 64;
const RECENT_LIMIT: usize = 1_024;

/// Texts may contain what a pod asked for, so one pod must not use up everybody's share.
const PER_OBJECT_LIMIT: usize = 8;

const SAID_FOR: Duration = Duration::from_mins(10);
const POST_TIMEOUT: Duration = Duration::from_secs(5);

/// `events.k8s.io/v1` limits, pkg/apis/core/validation/events.go.
const NOTE_LIMIT_BYTES: usize = 1_024;
const INSTANCE_LIMIT_BYTES: usize = 128;

impl Events {
    pub(super) fn new(node: Box<str>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        Self { said: Mutex::default(), queued: Notify::new(), clock, node, metrics }
    }

    pub(super) fn warn(&self, notice: Notice) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.recent.get(&notice).is_some_and(|at| at.elapsed() < SAID_FOR) {
            return self.metrics.event("duplicate");
        }
        said.recent.retain(|_, at| at.elapsed() < SAID_FOR);
        let same_object = said.recent.keys().filter(|recent| recent.about == notice.about).count();
        if said.queue.len() >= QUEUE_LIMIT
            || said.recent.len() >= RECENT_LIMIT
            || same_object >= PER_OBJECT_LIMIT
        {
            return self.metrics.event("dropped");
        }
        said.recent.insert(notice.clone(), Instant::now());
        said.queue.push_back(notice);
        drop(said);
        self.queued.notify_one();
    }

    /// Posts what is queued, for ever. An Event that cannot be posted is lost: it is advice, and the log has the same.
    pub(super) async fn post_all(&self, client: &Client) {
        loop {
            let next = self.said.lock().unwrap_or_else(PoisonError::into_inner).queue.pop_front();
            let Some(notice) = next else {
                self.queued.notified().await;
                continue;
            };
            let (namespace, event) = self.event(notice);
            let events = Api::<Event>::namespaced(client.clone(), &namespace);
            let result = match timeout(POST_TIMEOUT, events.create(&PostParams::default(), &event)).await {
                Ok(Ok(_)) => "posted",
                Ok(Err(error)) => {
                    warn!(error = chain(&error), "cannot post an Event");
                    "failed"
                }
                Err(error) => {
                    warn!(error = chain(&error), "posting an Event timed out");
                    "failed"
                }
            };
            self.metrics.event(result);
        }
    }

    fn event(&self, notice: Notice) -> (Box<str>, Event) {
        let (kind, namespace, name, uid) = match notice.about {
            // An Event's namespace must be its object's; kubectl shows it with `get events -n <namespace>`.
            About::Namespace(name) => ("Namespace", name.clone(), name, None),
            About::Pod(namespace, name, uid) => ("Pod", namespace, name, Some(uid.to_string())),
        };
        let event = Event {
            metadata: ObjectMeta {
                namespace: Some(namespace.clone().into()),
                generate_name: Some("kube2ram-".into()),
                ..Default::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some(kind.into()),
                namespace: Some(namespace.clone().into()),
                name: Some(name.into()),
                uid,
                ..Default::default()
            }),
            event_time: Some(MicroTime(self.clock.now())),
            type_: Some("Warning".into()),
            reason: Some(notice.reason.into()),
            action: Some("IssueCredentials".into()),
            note: Some(cut(&notice.message, NOTE_LIMIT_BYTES)),
            reporting_controller: Some("kube2ram".into()),
            reporting_instance: Some(cut(&self.node, INSTANCE_LIMIT_BYTES)),
            ..Default::default()
        };
        (namespace, event)
    }
}

fn cut(text: &str, limit_bytes: usize) -> String {
    text[..text.floor_char_boundary(limit_bytes)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    fn notice(object: usize, message: &str) -> Notice {
        Notice {
            about: About::Namespace(format!("team-{object}").into()),
            reason: "RoleDenied",
            message: message.into(),
        }
    }

    fn events() -> Events {
        Events::new("node".into(), Arc::new(SystemClock), Metrics::default())
    }

    fn queued(events: &Events) -> usize {
        events.said.lock().unwrap().queue.len()
    }

    #[tokio::test(start_paused = true)]
    async fn says_the_same_again_only_after_a_while() {
        let events = events();
        events.warn(notice(1, "a"));
        events.warn(notice(1, "a"));
        events.warn(notice(1, "b"));
        assert_eq!(queued(&events), 2);

        tokio::time::advance(SAID_FOR).await;
        events.warn(notice(1, "a"));

        assert_eq!(queued(&events), 3);
    }

    #[test]
    fn one_object_cannot_take_the_others_share() {
        let events = events();
        for text in 0..2 * PER_OBJECT_LIMIT {
            events.warn(notice(1, &text.to_string()));
        }
        assert_eq!(queued(&events), PER_OBJECT_LIMIT);

        events.warn(notice(2, "a"));

        assert_eq!(queued(&events), PER_OBJECT_LIMIT + 1);
    }

    #[test]
    fn drops_and_counts_what_does_not_fit_the_queue() {
        let events = events();
        for object in 0..QUEUE_LIMIT + 3 {
            events.warn(notice(object, "a"));
        }

        assert_eq!(queued(&events), QUEUE_LIMIT);
        assert_eq!(events.metrics.events.get_or_create(&[("result", "dropped")]).get(), 3);
    }

    #[test]
    fn cuts_a_text_between_characters() {
        assert_eq!(cut("aéz", 2), "a");
        assert_eq!(cut("aéz", 3), "aé");
        assert_eq!(cut("ab", 1_024), "ab");
    }
}
