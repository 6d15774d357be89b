//! Notices → Kubernetes Events: each is posted once, its repetitions are counted, by one worker at a bounded
//! rate. Depends on kube, the clock and `series`; called by `kubernetes::cluster`.
//!
//! Not kube's `Recorder`: it merges notices that differ only in their text, knows no bounds, and fails
//! without the right to patch Events.

mod series;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::Status,
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};
use uuid::Uuid;

use self::series::{Count, Heard, Said, SeriesTable};
use super::{About, Metrics, Notice, token_request::TOKENS_UNAVAILABLE};
use kube2ram_service::{
    clock::Clock,
    rate_limiter::{Rate, TokenBucket},
    telemetry::chain,
};

pub(super) struct Events {
    table: Mutex<SeriesTable>,
    queued: Notify,
    clock: Arc<dyn Clock>,
    node: Box<str>,
    metrics: Metrics,
}

/// How a post ended.
enum Posted {
    /// The service account may not.
    Forbidden(kube::Error),
    /// It makes no sense to try again.
    Lost,
    /// The API server may accept it later.
    Later,
    Yes,
}

/// All nodes of a large cluster may be in the same trouble at once: 5,000 of them then make 170 Events a
/// second, after their bursts.
const RATE: Rate = Rate { burst: 25, interval: Duration::from_secs(30) };
/// How often series are checked for counts that are to be patched.
const LOOK_EVERY: Duration = Duration::from_secs(30);
const POST_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts while the API server is away; doubled up to the limit.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(60);
/// Without the right to post, one attempt is made this often.
const FORBIDDEN_FOR: Duration = Duration::from_mins(10);

/// `events.k8s.io/v1` limits, pkg/apis/core/validation/events.go.
const NOTE_LIMIT_BYTES: usize = 1_024;
const INSTANCE_LIMIT_BYTES: usize = 128;

impl Events {
    pub(super) fn new(node: Box<str>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        Self { table: Mutex::default(), queued: Notify::new(), clock, node, metrics }
    }

    pub(super) fn warn(&self, notice: Notice) {
        let name = format!("kube2ram.{}", Uuid::new_v4().simple());
        let heard = self.table().hear(notice, &name, self.clock.now(), Instant::now());
        match heard {
            Heard::Counted => self.metrics.event("duplicate"),
            Heard::Dropped => self.metrics.event("dropped"),
            Heard::Queued => self.queued.notify_one(),
        }
    }

    /// Posts what is queued, and the counts of what was repeated, for ever.
    pub(super) async fn post_all(&self, client: &Client) {
        let mut bucket = TokenBucket::full(RATE, Instant::now());
        let (mut may_create, mut may_count) = (true, true);
        let mut back_off = BACK_OFF;
        loop {
            sleep_until(bucket.ready_at(RATE, 0, Instant::now())).await;
            let next = self.table().next(Instant::now());
            let Some(said) = next else {
                if may_count {
                    self.count(client, &mut may_count, &mut bucket).await;
                }
                let _look = timeout(LOOK_EVERY, self.queued.notified()).await;
                continue;
            };
            bucket.take();
            let posted = self.create(client, &said).await;
            match &posted {
                Posted::Forbidden(error) if may_create => {
                    may_create = false;
                    warn!(error = chain(error), "no right to create Events: pods' owners are not notified");
                }
                Posted::Yes if !may_create => {
                    may_create = true;
                    info!("Events are posted again");
                }
                _ => {}
            }
            let now = Instant::now();
            self.metrics.event(posted.result());
            match posted {
                Posted::Forbidden(_) => {
                    self.table().refuse_until(now + FORBIDDEN_FOR);
                }
                Posted::Lost => self.table().forget(&said.notice),
                Posted::Later => {
                    self.table().put_back(said.notice);
                    sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF_LIMIT);
                }
                Posted::Yes => {
                    back_off = BACK_OFF;
                    self.table().posted(&said.notice, now);
                }
            }
        }
    }

    /// Patches the counts that are due. Without the right to patch, only the counts are lost: a continuing
    /// problem is posted again from time to time.
    async fn count(&self, client: &Client, may_count: &mut bool, bucket: &mut TokenBucket) {
        loop {
            sleep_until(bucket.ready_at(RATE, 0, Instant::now())).await;
            let due = self.table().due(Instant::now());
            let Some(count) = due else { return };
            bucket.take();
            match self.update(client, &count).await {
                Posted::Yes => self.metrics.event("counted"),
                // If it was lost, the next count includes it.
                Posted::Later => self.metrics.event("failed"),
                // Events live for an hour: the next repetition is posted as a new Event.
                Posted::Lost => self.table().forget(&count.said.notice),
                Posted::Forbidden(error) => {
                    *may_count = false;
                    self.table().stop_counting();
                    warn!(error = chain(&error), "no right to patch Events: repetitions are not counted");
                    return;
                }
            }
        }
    }

    async fn create(&self, client: &Client, said: &Said) -> Posted {
        let events = Api::<Event>::namespaced(client.clone(), namespace_of(&said.notice.about));
        let event = self.event(said);
        let result = timeout(POST_TIMEOUT, events.create(&PostParams::default(), &event)).await;
        outcome(result.map(|result| result.map(drop)), "cannot post an Event")
    }

    async fn update(&self, client: &Client, count: &Count) -> Posted {
        let events = Api::<Event>::namespaced(client.clone(), namespace_of(&count.said.notice.about));
        let series = serde_json::json!({
            "series": { "count": count.times, "lastObservedTime": MicroTime(count.last) }
        });
        let patch = Patch::Merge(series);
        let params = PatchParams::default();
        let result = timeout(POST_TIMEOUT, events.patch(&count.said.name, &params, &patch)).await;
        outcome(result.map(|result| result.map(drop)), "cannot count an Event")
    }

    fn event(&self, said: &Said) -> Event {
        let Said { notice, name: event_name } = said;
        let (kind, name, uid) = match &notice.about {
            About::Namespace(name) => ("Namespace", name.clone(), None),
            // As the kubelet does, and `kubectl describe node` expects: the UID is the name.
            About::Node => ("Node", self.node.clone(), Some(self.node.to_string())),
            About::Pod(_, name, uid) => ("Pod", name.clone(), Some(uid.to_string())),
        };
        let namespace = namespace_of(&notice.about);
        let (of_object, action) = match notice.about {
            About::Node if notice.reason == TOKENS_UNAVAILABLE => (None, "RequestToken"),
            About::Node => (None, "RepairDatapath"),
            About::Namespace(_) | About::Pod(..) => (Some(namespace.to_owned()), "IssueCredentials"),
        };
        Event {
            metadata: ObjectMeta {
                namespace: Some(namespace.to_owned()),
                name: Some(event_name.to_string()),
                ..Default::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some(kind.into()),
                namespace: of_object,
                name: Some(name.into()),
                uid,
                ..Default::default()
            }),
            event_time: Some(MicroTime(self.clock.now())),
            type_: Some("Warning".into()),
            reason: Some(notice.reason.into()),
            action: Some(action.into()),
            note: Some(cut(&notice.message, NOTE_LIMIT_BYTES)),
            reporting_controller: Some("kube2ram".into()),
            reporting_instance: Some(cut(&self.node, INSTANCE_LIMIT_BYTES)),
            ..Default::default()
        }
    }

    fn table(&self) -> MutexGuard<'_, SeriesTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Posted {
    fn result(&self) -> &'static str {
        match self {
            Self::Forbidden(_) => "forbidden",
            Self::Lost | Self::Later => "failed",
            Self::Yes => "posted",
        }
    }
}

/// An Event's namespace must be its object's; for an object without a namespace it must be `default`.
fn namespace_of(about: &About) -> &str {
    match about {
        About::Namespace(name) => name,
        About::Node => "default",
        About::Pod(namespace, ..) => namespace,
    }
}

fn outcome(
    result: Result<Result<(), kube::Error>, tokio::time::error::Elapsed>,
    failed: &'static str,
) -> Posted {
    let error = match result {
        Ok(Ok(())) => return Posted::Yes,
        Ok(Err(error)) => error,
        Err(elapsed) => {
            debug!(error = chain(&elapsed), "{failed}: no answer");
            return Posted::Later;
        }
    };
    let kube::Error::Api(status) = &error else {
        debug!(error = chain(&error), "{failed}");
        return Posted::Later;
    };
    match status.code {
        // It arrived before an answer got lost.
        409 => Posted::Yes,
        // Also the error for a namespace that is terminating.
        403 if !is_terminating(status) => Posted::Forbidden(error),
        429 | 500.. => Posted::Later,
        _ => {
            warn!(error = chain(&error), "{failed}");
            Posted::Lost
        }
    }
}

fn is_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

fn cut(text: &str, limit_bytes: usize) -> String {
    text[..text.floor_char_boundary(limit_bytes)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_a_text_between_characters() {
        assert_eq!(cut("aéz", 2), "a");
        assert_eq!(cut("aéz", 3), "aé");
        assert_eq!(cut("ab", 1_024), "ab");
    }
}
