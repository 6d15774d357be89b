//! Accepting and driving HTTP/1 connections within bounds: how many, how long, how large. The home of hyper's
//! server. Depends on nothing of ours; called by `server` and `admin`.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::AsFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use http::{HeaderValue, Request, Response, header};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::yield_now,
    time::{Instant, sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

mod head_timer;

use self::head_timer::HeadTimer;
use crate::{drain::Drain, telemetry::chain};

/// How long a request head may take to arrive; it starts when the previous response is done, so it also
/// bounds idleness.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How large a request head may be. SDKs send less than 1 KiB.
pub const HEAD_LIMIT_BYTES: usize = 8 * 1024;
/// How long a client may leave the kernel's buffer full. Then it does not read, and is disconnected.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may last, whatever the client does.
pub const CONNECTION_MAX_AGE: Duration = Duration::from_secs(300);
/// How many requests a connection may carry. SDKs send two to four.
pub const MAX_REQUESTS: usize = 1000;
/// The size of a connection's socket buffers in each direction; the kernel counts twice as much. A request's
/// head and the agent's own answers fit. Passed-through answers are sent in parts.
pub const BUFFER_BYTES: usize = 8 * 1024;
/// How long requests in flight may go on once a connection is to close.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a fresh connection may still send its first request once the listener is to close: the client's
/// connect(2) succeeded, and SDKs do not retry.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(500);
/// How long to wait when accept(2) fails, which is when descriptors or memory run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// The backlog of a listener: the kernel's default limit (net.core.somaxconn). A pod that connects in a loop
/// fills it. A SYN that finds it full is repeated after a second, which is when SDKs give up.
pub const MAX_BACKLOG: u32 = 4096;
/// The shortest time between two such log lines of one listener.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Sets what the kernel may keep of a connection's bytes, on a socket that is about to listen or already
/// does; what it accepts from then on has the same. That memory is the agent's: without a bound it is up to 4
/// MiB for a client that does not read.
///
/// # Errors
/// The kernel's.
pub fn bound_buffers(socket: &impl AsFd) -> io::Result<()> {
    sockopt::set_socket_send_buffer_size(socket, BUFFER_BYTES)?;
    Ok(sockopt::set_socket_recv_buffer_size(socket, BUFFER_BYTES)?)
}

/// Passes each accepted connection to `on_accept`, one after the other, until accepting ends; then also those
/// that are already in the backlog. Ends as well when the listener was destroyed: a process of its network
/// namespace can do that (`ss --kill`).
///
/// # Cancel safety
/// Dropping the future closes this handle of the listener; connections that were handed over go on.
pub async fn accept<F: Future<Output = ()>>(
    listener: Arc<TcpListener>,
    drain: &Drain,
    on_accept: impl Fn(TcpStream, SocketAddr) -> F,
) {
    let mut said_at: Option<Instant> = None;
    let pass = |(stream, peer)| {
        send_at_once(&stream);
        on_accept(stream, peer)
    };
    let mut end = pin!(drain.accepting().cancelled());
    // Polled by hand: two thousand listeners would each hold the futures of tokio, of which most is unused.
    while let Some(accepted) = poll_fn(|cx| match end.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(None),
        Poll::Pending => listener.poll_accept(cx).map(|accepted| Some(accepted.map(pass))),
    })
    .await
    {
        match accepted {
            Ok(passed) => {
                passed.await;
                // A burst must not be accepted faster than it is served, or it meets its caller's bound
                // without need: with several listeners, all of the runtime's threads could be accepting.
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
                Box::pin(sleep(ACCEPT_BACKOFF)).await;
            }
        }
    }
    // A client that keeps connecting must not prevent the end.
    for _ in 0..MAX_BACKLOG {
        // The runtime may yet have to learn of it.
        yield_now().await;
        let Some(Ok(accepted)) = poll_fn(|cx| listener.poll_accept(cx)).now_or_never() else { break };
        pass(accepted).await;
    }
}

/// Errors of accept(2) that are permanent: not a listening socket, or no socket. All others are temporary:
/// they concern a single connection, or a lack of descriptors or memory.
fn has_ended(error: &io::Error) -> bool {
    [libc::EINVAL, libc::EBADF, libc::ENOTSOCK].iter().any(|errno| error.raw_os_error() == Some(*errno))
}

fn send_at_once(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(error = %error, "cannot set TCP_NODELAY");
    }
}

/// Serves one connection until it ends, grows too old, has used up its requests, does not read, has `lost`
/// its permit or was drained. Once accepting has ended, the next response is the last one: it has
/// `Connection: close`, so a client that keeps connections alive loses no request on a closed connection.
/// Bodies of requests that `handle` does not read are not waited for: hyper closes the connection instead.
pub async fn drive<S, H, F, B>(stream: S, drain: &Drain, lost: &CancellationToken, handle: H)
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (begun, last) = (AtomicUsize::new(0), AtomicBool::new(false));
    let service = service_fn(|request| {
        let is_last = begun.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_REQUESTS;
        // With several codings the end of such a body is ambiguous: what follows it is not read.
        let is_coded = request.headers().contains_key(header::TRANSFER_ENCODING);
        // In a box, because hyper would move the future, which is large, several times.
        let response = Box::pin(handle(request));
        let last = &last;
        async move {
            let mut response = response.await;
            if is_coded || is_last || last.load(Ordering::Relaxed) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let stream = pin!(stream);
    let connection = http1::Builder::new()
        .timer(HeadTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_header_size(HEAD_LIMIT_BYTES)
        .max_buf_size(HEAD_LIMIT_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);

    let outside = async {
        let mut too_old = pin!(sleep(CONNECTION_MAX_AGE));
        tokio::select! {
            () = lost.cancelled() => return Outside::Lost,
            () = drain.accepting().cancelled() => {}
            () = too_old.as_mut() => {}
        }
        last.store(true, Ordering::Relaxed);
        if !too_old.is_elapsed() {
            tokio::select! {
                () = lost.cancelled() => return Outside::Lost,
                () = drain.draining().cancelled() => {}
                () = too_old => {}
            }
        }
        Outside::Drain
    };
    // A set of one, which is polled when it was woken itself, and not with each read of the connection: what
    // it waits for is behind locks that all connections share.
    let mut outside: FuturesUnordered<_> = std::iter::once(outside).collect();
    let ended = tokio::select! {
        biased;
        outside = outside.next() => match outside {
            Some(Outside::Lost) => {
                debug!("idle connection closed to make room for another one");
                return;
            }
            Some(Outside::Drain) | None => None,
        },
        ended = connection.as_mut() => Some(ended),
    };
    let last_moments = async {
        if begun.load(Ordering::Relaxed) == 0
            && let Ok(ended) = timeout(FIRST_REQUEST_GRACE, connection.as_mut()).await
        {
            return Some(ended);
        }
        connection.as_mut().graceful_shutdown();
        timeout(DRAIN_DEADLINE, connection).await.ok()
    };
    let ended = match ended {
        None => lost.run_until_cancelled(last_moments).await.flatten(),
        ended => ended,
    };
    match ended {
        Some(Ok(())) => {}
        Some(Err(error)) => debug!(error = chain(&error), "connection failed"),
        None => debug!("connection cut off"),
    }
}

/// Why a connection is to end that has not ended by itself.
enum Outside {
    Drain,
    Lost,
}
