//! When the API server last answered: each answer to a watch or list counts, and each piece of a watch's
//! body, including bookmarks. Only bookmarks distinguish a watch without changes from a dead one, and kube
//! does not pass them on. Depends on kube's client; made by `kubernetes::client`, read by
//! `kubernetes::cluster`.

use std::{
    error::Error,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    task::{self, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use kube::client::{Body, DynBody};
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

use super::Metrics;
use kube2ram_service::clock::Clock;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// All namespaces of the cluster; only where they are restricted.
    Namespaces,
    /// The pods of this node.
    Pods,
}

/// How one watch stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchState {
    /// How long ago the API server last answered; `None` before the first answer.
    pub answered: Option<Duration>,
    /// Since when the API server has failed, if it has not answered since, and the last error.
    pub failing: Option<(Duration, Box<str>)>,
}

/// When each watch last received something, and failed. Clones share it.
#[derive(Clone)]
pub(super) struct ApiActivity {
    /// `None` where it is not watched.
    namespaces: Option<Arc<WatchActivity>>,
    pods: Arc<WatchActivity>,
}

/// The activity of one resource's watch.
struct WatchActivity {
    times: Mutex<Times>,
    open_watches: Gauge,
    /// When something last came on a watch, in Unix seconds.
    watch_message: Gauge<f64, AtomicU64>,
    clock: Arc<dyn Clock>,
}

#[derive(Debug, Default)]
struct Times {
    answered_at: Option<Instant>,
    /// The first failure since then, and the last one's text.
    failing: Option<(Instant, Box<str>)>,
}

/// A list, or a watch for as long as its response lasts.
struct Answer {
    watch: Arc<WatchActivity>,
    is_watch: bool,
}

impl Resource {
    /// What is watched where namespaces are restricted.
    pub const ALL: &[Self] = &[Self::Pods, Self::Namespaces];
    /// What is watched always.
    pub const UNRESTRICTED: &[Self] = &[Self::Pods];

    /// Its name in the API's paths.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
        }
    }
}

impl ApiActivity {
    pub(super) fn new(metrics: &Metrics, resources: &[Resource], clock: &Arc<dyn Clock>) -> Self {
        let watch = |resource| {
            Arc::new(WatchActivity {
                times: Mutex::default(),
                open_watches: metrics.watches(resource),
                watch_message: metrics.watch_message(resource),
                clock: Arc::clone(clock),
            })
        };
        let namespaces = resources.contains(&Resource::Namespaces).then(|| watch(Resource::Namespaces));
        Self { namespaces, pods: watch(Resource::Pods) }
    }

    pub(super) fn failed(&self, resource: Resource, error: &str) {
        let Some(watch) = self.of(resource) else { return };
        let mut times = watch.times();
        let since = times.failing.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        times.failing = Some((since, error.into()));
    }

    pub(super) fn read(&self, resource: Resource) -> WatchState {
        let Some(watch) = self.of(resource) else { return WatchState::default() };
        let times = watch.times();
        WatchState {
            answered: times.answered_at.map(|at| at.elapsed()),
            failing: times.failing.as_ref().map(|(since, error)| (since.elapsed(), error.clone())),
        }
    }

    fn of(&self, resource: Resource) -> Option<&Arc<WatchActivity>> {
        match resource {
            Resource::Namespaces => self.namespaces.as_ref(),
            Resource::Pods => Some(&self.pods),
        }
    }

    /// The resource of a request; `None` for Events and nodes.
    fn of_path(&self, path: &str) -> Option<&Arc<WatchActivity>> {
        let asked = path.rsplit('/').next();
        let resource = Resource::ALL.iter().find(|resource| asked == Some(resource.as_str()))?;
        self.of(*resource)
    }
}

impl WatchActivity {
    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    fn begin(watch: Arc<WatchActivity>, is_watch: bool) -> Self {
        if is_watch {
            watch.open_watches.inc();
        }
        let answer = Self { watch, is_watch };
        answer.note_answer();
        answer
    }

    fn note_answer(&self) {
        *self.watch.times() = Times { answered_at: Some(Instant::now()), failing: None };
    }

    /// A piece of the body.
    fn note_message(&self) {
        self.note_answer();
        // Of watches alone: lists are answered although the watch is dead. So is the head of a watch that
        // starts from a version of the future, and brings nothing.
        if self.is_watch {
            self.watch.watch_message.set(self.watch.clock.now().as_duration().as_secs_f64());
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.is_watch {
            self.watch.open_watches.dec();
        }
    }
}

/// Whether a request is for a watch.
pub(super) fn is_watch(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|term| term == "watch=true"))
}

impl<S> Layer<S> for ApiActivity {
    type Service = ActivityClient<S>;

    fn layer(&self, inner: S) -> ActivityClient<S> {
        ActivityClient { inner, activity: self.clone() }
    }
}

/// A client that notes when it is answered.
#[derive(Clone)]
pub(super) struct ActivityClient<S> {
    inner: S,
    activity: ApiActivity,
}

impl<S> Service<Request<Body>> for ActivityClient<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>>,
    S::Future: Send + 'static,
{
    type Response = Response<UnsyncBoxBody<Bytes, Box<dyn Error + Send + Sync>>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let watch = self.activity.of_path(request.uri().path()).cloned();
        let is_watch = is_watch(request.uri());
        let answer = self.inner.call(request);
        let listen =
            move |answer: Response<Box<DynBody>>| match watch.filter(|_| answer.status().is_success()) {
                Some(watch) => {
                    let answered = Answer::begin(watch, is_watch);
                    answer.map(|body| {
                        let note = move |frame| {
                            answered.note_message();
                            frame
                        };
                        body.map_frame(note).boxed_unsync()
                    })
                }
                None => answer.map(BodyExt::boxed_unsync),
            };
        answer.map(|answer| answer.map(listen)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube2ram_service::clock::SystemClock;

    fn activity() -> ApiActivity {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        ApiActivity::new(&Metrics::default(), Resource::ALL, &clock)
    }

    fn begin(activity: &ApiActivity, uri: &'static str) -> Answer {
        let uri = Uri::from_static(uri);
        Answer::begin(Arc::clone(activity.of_path(uri.path()).unwrap()), is_watch(&uri))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_lasts_until_the_api_server_answers_again() {
        let activity = activity();
        let second = Duration::from_secs(1);
        assert_eq!(activity.read(Resource::Pods), WatchState::default());

        drop(begin(&activity, "/api/v1/pods"));
        tokio::time::advance(second).await;
        activity.failed(Resource::Pods, "first");
        tokio::time::advance(second).await;
        activity.failed(Resource::Pods, "second");

        let failing = Some((second, "second".into()));
        assert_eq!(activity.read(Resource::Pods), WatchState { answered: Some(2 * second), failing });
        assert_eq!(activity.read(Resource::Namespaces), WatchState::default());
        drop(begin(&activity, "/api/v1/pods"));
        let state = WatchState { answered: Some(Duration::ZERO), failing: None };
        assert_eq!(activity.read(Resource::Pods), state);
    }

    #[test]
    fn knows_watches_by_their_paths() {
        let activity = activity();
        let is = |path, resource: Resource| {
            let watches = activity.of_path(path).zip(activity.of(resource));
            watches.is_some_and(|(found, expected)| Arc::ptr_eq(found, expected))
        };

        assert!(is("/api/v1/pods", Resource::Pods) && is("/api/v1/namespaces", Resource::Namespaces));
        assert!(is("/api/v1/namespaces/shop/pods", Resource::Pods));
        for other in ["/apis/events.k8s.io/v1/namespaces/shop/events", "/api/v1/nodes/pods-1", "/version"] {
            assert!(activity.of_path(other).is_none(), "{other}");
        }
    }

    #[test]
    fn distinguishes_watches_from_lists() {
        for (uri, expected) in [
            ("/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3Dn", true),
            ("/api/v1/namespaces?&watch=true&resourceVersion=1", true),
            ("/api/v1/namespaces?limit=500", false),
            ("/api/v1/pods?fieldSelector=metadata.name%3Dwatch%3Dtrue", false),
            ("/api/v1/pods", false),
        ] {
            assert_eq!(is_watch(&Uri::from_static(uri)), expected, "{uri}");
        }
    }

    #[test]
    fn only_watches_set_the_gauges() {
        let activity = activity();
        let gauges = || (activity.pods.open_watches.get(), activity.pods.watch_message.get() > 0.0);

        let list = begin(&activity, "/api/v1/pods");
        assert_eq!(gauges(), (0, false));
        let watches = ["/api/v1/pods?watch=true"; 2].map(|uri| begin(&activity, uri));
        assert_eq!(gauges(), (2, false), "the head of an answer is no message");
        list.note_message();
        assert_eq!(gauges(), (2, false));
        watches[0].note_message();
        assert_eq!(gauges(), (2, true));

        drop((list, watches));
        assert_eq!(gauges(), (0, true));
        assert_eq!(activity.namespaces.unwrap().open_watches.get(), 0);
    }
}
