//! Accepting and driving HTTP/1 connections within bounds: how many, how long, how large. The home of hyper's server.
//! Depends on nothing of ours; called by `server` and `admin`.

use std::{
    collections::HashMap,
    convert::Infallible,
    hash::Hash,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use http::{HeaderValue, Request, Response, header};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::yield_now,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use crate::{closing::Closing, telemetry::chain};

/// How long a request head may take to arrive; it starts when the previous response is done, so it also bounds idleness.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How large a request head may be. SDKs send less than 1 KiB.
pub(crate) const HEAD_LIMIT_BYTES: usize = 8 * 1024;
/// How long a connection may last, whatever the client does: also the bound for one that does not read its responses.
pub(crate) const CONNECTION_MAX_AGE: Duration = Duration::from_secs(300);
/// How long requests in flight may go on once a connection is to close.
pub(crate) const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a fresh connection may still send its first request once the listener is to close: the client's connect(2) succeeded, and
/// SDKs do not retry.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(500);
/// How long to wait when accept(2) fails, which is when descriptors or memory run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// How often that is said of one listener.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// The connection slots of one server, shared by all of its listeners; a caller cannot take those of the others.
#[derive(Debug)]
pub(crate) struct Slots<C: Eq + Hash> {
    total: usize,
    per_caller: usize,
    taken: Mutex<Taken<C>>,
}

#[derive(Debug)]
struct Taken<C> {
    total: usize,
    by_caller: HashMap<C, usize>,
}

/// One taken slot; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Slot<C: Eq + Hash> {
    slots: Arc<Slots<C>>,
    caller: C,
}

impl<C: Clone + Eq + Hash> Slots<C> {
    pub(crate) fn new(total: usize, per_caller: usize) -> Arc<Self> {
        let taken = Mutex::new(Taken { total: 0, by_caller: HashMap::new() });
        Arc::new(Self { total, per_caller, taken })
    }

    /// Takes a slot for `caller`. `None` when it or the server has no more.
    pub(crate) fn take(self: &Arc<Self>, caller: C) -> Option<Slot<C>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_caller = taken.by_caller.get(&caller).copied().unwrap_or_default();
        if taken.total >= self.total || of_caller >= self.per_caller {
            return None;
        }
        taken.total += 1;
        taken.by_caller.insert(caller.clone(), of_caller + 1);
        drop(taken);
        Some(Slot { slots: Arc::clone(self), caller })
    }
}

impl<C: Eq + Hash> Drop for Slot<C> {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.total -= 1;
        if let Some(of_caller) = taken.by_caller.get_mut(&self.caller) {
            *of_caller -= 1;
            if *of_caller == 0 {
                taken.by_caller.remove(&self.caller);
            }
        }
    }
}

/// Hands each accepted connection to `on_accept` until accepting ends; then also those that wait in the backlog already. Ends as well when the listener is none any
/// more: a process of its network namespace can destroy it (`ss --kill`).
///
/// # Cancel safety
/// Dropping the future closes this handle of the listener; connections that were handed over go on.
pub(crate) async fn accept(
    listener: Arc<TcpListener>,
    closing: &Closing,
    mut on_accept: impl FnMut(TcpStream, SocketAddr),
) {
    let mut said_at: Option<Instant> = None;
    while let Some(accepted) = closing.accepting().run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => {
                send_at_once(&stream);
                on_accept(stream, peer);
                // A burst must not be accepted faster than it is served, or it meets its caller's bound without need: with several listeners,
                // all of the runtime's threads could be accepting.
                yield_now().await;
            }
            Err(error) if has_ended(&error) => {
                debug!(%error, "a listener was destroyed");
                return;
            }
            Err(error) => {
                if said_at.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                    warn!(%error, "cannot accept a connection");
                    said_at = Some(Instant::now());
                }
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    while let Some(Ok((stream, peer))) = listener.accept().now_or_never() {
        send_at_once(&stream);
        on_accept(stream, peer);
    }
}

/// Of accept(2): not a listening socket, or none at all. All else passes: what a single connection met, or a lack of descriptors or memory.
fn has_ended(error: &std::io::Error) -> bool {
    [libc::EINVAL, libc::EBADF, libc::ENOTSOCK].iter().any(|errno| error.raw_os_error() == Some(*errno))
}

fn send_at_once(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(error = %error, "cannot set TCP_NODELAY");
    }
}

/// Serves one connection until it ends, grows too old or was drained. Once nothing more is accepted, the next response is its last one: a client that
/// keeps its connections alive is told so, and loses no request on a connection that is closed under it. Bodies of requests that `handle` does not read are
/// not waited for: hyper closes the connection instead.
pub(crate) async fn drive<S, H, F, B>(stream: S, closing: &Closing, handle: H)
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (begun, last) = (AtomicBool::new(false), AtomicBool::new(false));
    let service = service_fn(|request| {
        begun.store(true, Ordering::Relaxed);
        // Where such a body ends is a matter of opinion when there are several codings: what follows it is not heard.
        let is_coded = request.headers().contains_key(header::TRANSFER_ENCODING);
        let response = handle(request);
        let last = &last;
        async move {
            let mut response = response.await;
            if is_coded || last.load(Ordering::Relaxed) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_header_size(HEAD_LIMIT_BYTES)
        .max_buf_size(2 * HEAD_LIMIT_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);

    let outside = async {
        let mut too_old = pin!(sleep(CONNECTION_MAX_AGE));
        tokio::select! {
            () = closing.accepting().cancelled() => {}
            () = too_old.as_mut() => {}
        }
        last.store(true, Ordering::Relaxed);
        if !too_old.is_elapsed() {
            tokio::select! {
                () = closing.draining().cancelled() => {}
                () = too_old => {}
            }
        }
    };
    // A set of one, which is polled when it was woken itself, and not with each read of the connection: what it waits for is behind locks that all
    // connections share.
    let mut outside: FuturesUnordered<_> = std::iter::once(outside).collect();
    let ended = tokio::select! {
        biased;
        _ = outside.next() => None,
        ended = connection.as_mut() => Some(ended),
    };
    let ended = match ended {
        None if !begun.load(Ordering::Relaxed) => {
            timeout(FIRST_REQUEST_GRACE, connection.as_mut()).await.ok()
        }
        ended => ended,
    };
    let ended = match ended {
        None => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN_DEADLINE, connection).await.ok()
        }
        ended => ended,
    };
    match ended {
        Some(Ok(())) => {}
        Some(Err(error)) => debug!(error = chain(&error), "connection failed"),
        None => debug!("connection cut off"),
    }
}
