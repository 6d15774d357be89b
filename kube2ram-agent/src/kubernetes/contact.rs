//! When the API server was last heard on each watch: kube keeps to itself that a watch was opened, and its bookmarks, by which alone a watch with
//! nothing to tell differs from one that is dead. Depends on kube alone; called by `kubernetes::cluster`.

use std::{
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use kube::{Client, client::Body};
use prometheus_client::metrics::gauge::Gauge;
use tower_service::Service;

use super::{Metrics, metrics::RESOURCES};
use crate::clock::Clock;

/// Makes a client that notes what the API server sends on watches.
pub(super) fn noted(client: Client, metrics: Metrics, clock: Arc<dyn Clock>) -> Client {
    let namespace = client.default_namespace().to_owned();
    Client::new(Noted { client, metrics, clock }, namespace)
}

struct Noted {
    client: Client,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
}

impl Service<Request<Body>> for Noted {
    type Response = Response<UnsyncBoxBody<Bytes, kube::Error>>;
    type Error = kube::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let client = self.client.clone();
        let watched = watched(request.uri()).map(|resource| {
            let (open, message) = (self.metrics.watches(resource), self.metrics.watch_message(resource));
            (open, message, Arc::clone(&self.clock))
        });
        Box::pin(async move {
            let response = client.send(request).await?;
            let Some((open, message, clock)) = watched.filter(|_| response.status().is_success()) else {
                return Ok(response.map(BodyExt::boxed_unsync));
            };
            let watch = Watch::open(open, message, clock);
            let noting = move |frame| {
                watch.heard();
                frame
            };
            Ok(response.map(|body| body.map_frame(noting).boxed_unsync()))
        })
    }
}

/// The resource that a request watches.
fn watched(uri: &Uri) -> Option<&'static str> {
    let is_watch = uri.query()?.split('&').any(|term| term == "watch=true");
    RESOURCES.into_iter().find(|resource| is_watch && uri.path().ends_with(&format!("/{resource}")))
}

/// A watch as long as its response lasts.
struct Watch {
    open: Gauge,
    message: Gauge<f64, AtomicU64>,
    clock: Arc<dyn Clock>,
}

impl Watch {
    fn open(open: Gauge, message: Gauge<f64, AtomicU64>, clock: Arc<dyn Clock>) -> Self {
        open.inc();
        let watch = Self { open, message, clock };
        watch.heard();
        watch
    }

    fn heard(&self) {
        self.message.set(self.clock.now().as_duration().as_secs_f64());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.open.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_watches_from_lists() {
        for (uri, resource) in [
            ("/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3Dn", Some("pods")),
            ("/api/v1/namespaces?&watch=true&resourceVersion=1", Some("namespaces")),
            ("/api/v1/namespaces?limit=500", None),
            ("/api/v1/pods", None),
            ("/api/v1/nodes?watch=true", None),
            ("/apis/events.k8s.io/v1/namespaces/pods/events", None),
        ] {
            assert_eq!(watched(&uri.parse().unwrap()), resource, "{uri}");
        }
    }
}
