//! When the API server was last heard: each answer to a watch or list counts, and each piece of a watch's body, a bookmark included.
//! Depends on kube's client; made by `kubernetes::client`, read by `kubernetes::cluster`.

use std::{
    error::Error,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{self, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use kube::client::{Body, DynBody};
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// All namespaces of the cluster.
    Namespaces,
    /// The pods of this node.
    Pods,
}

/// How one watch stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    /// How long ago the API server was heard; `None` before it ever was.
    pub heard: Option<Duration>,
    /// Since when, if the API server has not been heard since it last failed, and the last error.
    pub failing: Option<(Duration, Box<str>)>,
}

/// When each watch was heard and failed. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Contacts {
    namespaces: Shared,
    pods: Shared,
}

type Shared = Arc<Mutex<Times>>;

#[derive(Debug, Default)]
struct Times {
    heard_at: Option<Instant>,
    /// The first failure since then, and the last one's text.
    failing: Option<(Instant, Box<str>)>,
}

impl Resource {
    /// Its name in the API's paths.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
        }
    }
}

impl Contacts {
    pub(super) fn failed(&self, resource: Resource, error: &str) {
        let mut times = lock(self.of(resource));
        let since = times.failing.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        times.failing = Some((since, error.into()));
    }

    pub(super) fn read(&self, resource: Resource) -> Contact {
        let times = lock(self.of(resource));
        Contact {
            heard: times.heard_at.map(|at| at.elapsed()),
            failing: times.failing.as_ref().map(|(since, error)| (since.elapsed(), error.clone())),
        }
    }

    fn of(&self, resource: Resource) -> &Shared {
        match resource {
            Resource::Namespaces => &self.namespaces,
            Resource::Pods => &self.pods,
        }
    }

    /// Which watch a request belongs to; Events and nodes are none.
    fn of_path(&self, path: &str) -> Option<&Shared> {
        [Resource::Namespaces, Resource::Pods]
            .into_iter()
            .find(|resource| path.rsplit('/').next() == Some(resource.as_str()))
            .map(|resource| self.of(resource))
    }
}

fn lock(times: &Shared) -> MutexGuard<'_, Times> {
    times.lock().unwrap_or_else(PoisonError::into_inner)
}

fn heard(times: &Shared) {
    *lock(times) = Times { heard_at: Some(Instant::now()), failing: None };
}

impl<S> Layer<S> for Contacts {
    type Service = Listening<S>;

    fn layer(&self, inner: S) -> Listening<S> {
        Listening { inner, contacts: self.clone() }
    }
}

/// A client that notes when it is answered.
#[derive(Clone, Debug)]
pub(super) struct Listening<S> {
    inner: S,
    contacts: Contacts,
}

impl<S> Service<Request<Body>> for Listening<S>
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
        let watched = self.contacts.of_path(request.uri().path()).cloned();
        let answer = self.inner.call(request);
        let listen = |answer: Response<Box<DynBody>>| match watched.filter(|_| answer.status().is_success()) {
            Some(times) => {
                heard(&times);
                answer.map(|body| {
                    let note = move |frame| {
                        heard(&times);
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

    #[tokio::test(start_paused = true)]
    async fn a_failure_lasts_until_the_api_server_is_heard_again() {
        let contacts = Contacts::default();
        let second = Duration::from_secs(1);
        assert_eq!(contacts.read(Resource::Pods), Contact::default());

        heard(contacts.of_path("/api/v1/pods").unwrap());
        tokio::time::advance(second).await;
        contacts.failed(Resource::Pods, "first");
        tokio::time::advance(second).await;
        contacts.failed(Resource::Pods, "second");

        let failing = Some((second, "second".into()));
        assert_eq!(contacts.read(Resource::Pods), Contact { heard: Some(2 * second), failing });
        assert_eq!(contacts.read(Resource::Namespaces), Contact::default());
        heard(contacts.of_path("/api/v1/pods").unwrap());
        let contact = Contact { heard: Some(Duration::ZERO), failing: None };
        assert_eq!(contacts.read(Resource::Pods), contact);
    }

    #[test]
    fn knows_watches_by_their_paths() {
        let contacts = Contacts::default();
        let is = |path, resource: Resource| {
            contacts.of_path(path).is_some_and(|times| Arc::ptr_eq(times, contacts.of(resource)))
        };

        assert!(is("/api/v1/pods", Resource::Pods) && is("/api/v1/namespaces", Resource::Namespaces));
        assert!(is("/api/v1/namespaces/shop/pods", Resource::Pods));
        for other in ["/apis/events.k8s.io/v1/namespaces/shop/events", "/api/v1/nodes/pods-1", "/version"] {
            assert!(contacts.of_path(other).is_none(), "{other}");
        }
    }
}
