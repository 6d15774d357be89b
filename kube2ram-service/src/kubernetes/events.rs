//! Notices → Kubernetes Events: each is posted once, its repetitions are counted, by one worker at a bounded
//! rate. Depends on kube, the clock and `series`; used by the agent's `kubernetes` and the authenticator's
//! `backend`, which say what an Event looks like.
//!
//! Not kube's `Recorder`: it merges notices that differ only in their text, knows no bounds, and fails
//! without the right to patch Events.

mod series;

use std::{
    fmt::{self, Debug},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{api::events::v1::Event, apimachinery::pkg::apis::meta::v1::MicroTime};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::Status,
};
use serde_json::json;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};
use uuid::Uuid;

use self::series::{Count, Heard, Said, SeriesTable};
use crate::{
    clock::Clock,
    rate_limiter::{Rate, TokenBucket},
    telemetry::chain,
};

/// One text about one object. Two that are equal are one Event.
pub trait Notice: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// The object. One object has a bounded number of Events.
    type About: PartialEq;

    /// The object it is about.
    fn about(&self) -> &Self::About;
}

/// The notices that wait, and the Events of those that were posted lately.
pub struct Events<N> {
    table: Mutex<SeriesTable<N>>,
    queued: Notify,
    clock: Arc<dyn Clock>,
    /// What the names of Events begin with.
    prefix: &'static str,
    /// Is told the result of each notice, for a metric.
    observe: Box<dyn Fn(&'static str) + Send + Sync>,
}

/// The results that [`Events::new`]'s closure is told: a closed set.
pub const RESULTS: [&str; 6] = ["counted", "dropped", "duplicate", "failed", "forbidden", "posted"];

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

impl<N> Debug for Events<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl<N: Notice> Events<N> {
    /// None yet. `observe` is told a result of [`RESULTS`] for each notice.
    pub fn new(
        prefix: &'static str,
        clock: Arc<dyn Clock>,
        observe: impl Fn(&'static str) + Send + Sync + 'static,
    ) -> Self {
        Self { table: Mutex::default(), queued: Notify::new(), clock, prefix, observe: Box::new(observe) }
    }

    /// Queues a notice; never blocks, and drops what does not fit.
    pub fn warn(&self, notice: N) {
        let name = format!("{}.{}", self.prefix, Uuid::new_v4().simple());
        let heard = self.table().hear(notice, &name, self.clock.now(), Instant::now());
        match heard {
            Heard::Counted => (self.observe)("duplicate"),
            Heard::Dropped => (self.observe)("dropped"),
            Heard::Queued => self.queued.notify_one(),
        }
    }

    /// Posts what is queued, and the counts of what was repeated, for ever. `write` makes the Event of a
    /// notice, without name and time.
    ///
    /// # Cancel safety
    /// Dropping the future may lose the notice that is being posted.
    pub async fn post_all(&self, client: &Client, write: impl Fn(&N) -> Event) {
        let mut bucket = TokenBucket::full(RATE, Instant::now());
        let (mut may_create, mut may_count) = (true, true);
        let mut back_off = BACK_OFF;
        loop {
            sleep_until(bucket.ready_at(RATE, 0, Instant::now())).await;
            let next = self.table().next(Instant::now());
            let Some(said) = next else {
                if may_count {
                    self.count(client, &write, &mut may_count, &mut bucket).await;
                }
                let _look = timeout(LOOK_EVERY, self.queued.notified()).await;
                continue;
            };
            bucket.take();
            let posted = self.create(client, &write, &said).await;
            match &posted {
                Posted::Forbidden(error) if may_create => {
                    may_create = false;
                    warn!(
                        error = chain(error),
                        "no right to create Events: owners of objects are not notified"
                    );
                }
                Posted::Yes if !may_create => {
                    may_create = true;
                    info!("Events are posted again");
                }
                _ => {}
            }
            let now = Instant::now();
            (self.observe)(posted.result());
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
    async fn count(
        &self,
        client: &Client,
        write: &impl Fn(&N) -> Event,
        may_count: &mut bool,
        bucket: &mut TokenBucket,
    ) {
        loop {
            sleep_until(bucket.ready_at(RATE, 0, Instant::now())).await;
            let due = self.table().due(Instant::now());
            let Some(count) = due else { return };
            bucket.take();
            match self.update(client, write, &count).await {
                Posted::Yes => (self.observe)("counted"),
                // If it was lost, the next count includes it.
                Posted::Later => (self.observe)("failed"),
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

    async fn create(&self, client: &Client, write: &impl Fn(&N) -> Event, said: &Said<N>) -> Posted {
        let mut event = write(&said.notice);
        let events = of_namespace(client, &event);
        event.metadata.name = Some(said.name.to_string());
        event.event_time = Some(MicroTime(self.clock.now()));
        event.note = event.note.map(|note| cut(&note, NOTE_LIMIT_BYTES));
        event.reporting_instance = event.reporting_instance.map(|name| cut(&name, INSTANCE_LIMIT_BYTES));
        let result = timeout(POST_TIMEOUT, events.create(&PostParams::default(), &event)).await;
        outcome(result.map(|result| result.map(drop)), "cannot post an Event")
    }

    async fn update(&self, client: &Client, write: &impl Fn(&N) -> Event, count: &Count<N>) -> Posted {
        let events = of_namespace(client, &write(&count.said.notice));
        let series = json!({
            "series": { "count": count.times, "lastObservedTime": MicroTime(count.last) }
        });
        let patch = Patch::Merge(series);
        let params = PatchParams::default();
        let result = timeout(POST_TIMEOUT, events.patch(&count.said.name, &params, &patch)).await;
        outcome(result.map(|result| result.map(drop)), "cannot count an Event")
    }

    fn table(&self) -> MutexGuard<'_, SeriesTable<N>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An Event's namespace must be its object's; for an object without a namespace it must be `default`.
fn of_namespace(client: &Client, event: &Event) -> Api<Event> {
    Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"))
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
