//! The operator's listener: liveness, readiness and metrics. Pods are never redirected to it, but every
//! client that reaches the node's address can connect. Depends on `listener` and
//! `connection_limiter` for bounded connections; called by `app`.

use std::{future::ready, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::Full;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, runtime::Handle, time::timeout};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::{connection_limiter::ConnectionLimiter, drain::Drain, listener};

mod exposition;
mod readiness;
mod thread;

pub use self::exposition::Exposition;
pub use self::readiness::{Pending, Readiness};
pub use self::thread::AdminThread;

/// How many connections are served at once.
pub const CONNECTIONS: usize = 64;
/// How many of them one address may have. Pods reach this listener, too, and all clients on the node's
/// network, among them the kubelet, share one address. [`ConnectionLimiter`] prevents that they lock others
/// out. Liveness uses the socket of `probe`, so clients of this listener cannot get the agent restarted.
const CONNECTIONS_PER_ADDRESS: usize = 8;
/// How long the other runtime may take to run a task before its threads count as blocked. A saturated node
/// delays a task as well, but not by this much.
const BLOCKED_AFTER: Duration = Duration::from_secs(2);

/// What the admin listener shows.
pub struct Admin {
    /// The answer of `/readyz`.
    pub readiness: Readiness,
    /// What `/metrics` encodes.
    pub registry: Registry,
    /// The runtime that does the program's work. `/healthz` and `/readyz` answer 503 while all of its threads
    /// are blocked, although this listener may have a thread of its own ([`AdminThread`]).
    pub serving: Handle,
}

impl Admin {
    /// Serves until accepting ends; connections are tasks of `tasks`, which drain by themselves.
    ///
    /// # Cancel safety
    /// Dropping the future closes its handle of the listener only.
    pub async fn serve(self: Arc<Self>, listener: Arc<TcpListener>, tasks: TaskTracker, drain: Drain) {
        let limiter = ConnectionLimiter::new(CONNECTIONS, CONNECTIONS_PER_ADDRESS, Duration::ZERO);
        listener::accept(listener, &drain, |stream, peer| {
            // All connections are idle here: there is always one that can be closed.
            if let Some(permit) = limiter.take(peer.ip()) {
                let (admin, drain) = (Arc::clone(&self), drain.clone());
                tasks.spawn(async move {
                    listener::drive(stream, &drain, permit.lost(), |request| {
                        let (admin, (head, _body)) = (Arc::clone(&admin), request.into_parts());
                        async move { admin.answer(&head.method, head.uri.path(), &head.headers).await }
                    })
                    .await;
                });
            }
            ready(())
        })
        .await;
    }

    async fn answer(&self, method: &Method, path: &str, headers: &HeaderMap) -> Response<Full<Bytes>> {
        const TEXT: &str = "text/plain; charset=utf-8";
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut refused = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "method not allowed\n".into());
            refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        if matches!(path, "/healthz" | "/readyz") && self.is_blocked().await {
            let blocked = "all threads that serve are blocked\n".into();
            return reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, blocked);
        }
        match path {
            // For manifests of kube2iam and the Go kube2ram; kube2ram's own use `kube2ram live`. The answer
            // means only that the agent's threads run: a check of the cloud would restart agents for the
            // cloud's failures.
            "/healthz" => reply(StatusCode::OK, TEXT, "ok\n".into()),
            "/readyz" => {
                let (status, mut text) = match self.readiness.pending().as_slice() {
                    [] => (StatusCode::OK, "ready\n".to_owned()),
                    pending => {
                        (StatusCode::SERVICE_UNAVAILABLE, format!("pending: {}\n", pending.join(", ")))
                    }
                };
                text.extend(self.readiness.notes().iter().map(|note| format!("note: {note}\n")));
                reply(status, TEXT, text)
            }
            "/metrics" => {
                let exposition = Exposition::asked_for(headers);
                match exposition.encode(&self.registry) {
                    Ok(metrics) => reply(StatusCode::OK, exposition.content_type(), metrics),
                    Err(_) => {
                        reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "cannot encode the metrics\n".into())
                    }
                }
            }
            _ => reply(StatusCode::NOT_FOUND, TEXT, "not found\n".into()),
        }
    }

    /// Whether no thread of the other runtime runs a new task in time.
    async fn is_blocked(&self) -> bool {
        let task = AbortOnDropHandle::new(self.serving.spawn(ready(())));
        !matches!(timeout(BLOCKED_AFTER, task).await, Ok(Ok(())))
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests;
