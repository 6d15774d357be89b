//! The HTTP server under every stand-in: one thread, one address or two, which can refuse connections and
//! come back on the same ports. Knows nothing of what is served. Called by the three stand-ins.

use std::{
    convert::Infallible,
    fmt, future, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use socket2::Socket;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::locked;

/// An answer's body: whole or streamed.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Opens a listener at an address (port 0: any); an argument because the metadata server listens in another
/// network namespace.
pub struct Bind {
    addr: SocketAddr,
    open: Box<dyn Fn(SocketAddr) -> io::Result<TcpListener> + Send + Sync>,
    also: Option<Box<Bind>>,
}

impl Bind {
    /// A free port of this network namespace's loopback.
    pub fn loopback() -> Self {
        Self::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), TcpListener::bind)
    }

    /// This address, opened by `open`.
    pub fn new(
        addr: SocketAddr,
        open: impl Fn(SocketAddr) -> io::Result<TcpListener> + Send + Sync + 'static,
    ) -> Self {
        Self { addr, open: Box::new(open), also: None }
    }

    /// Both: the server answers the same at the other one, too. The first one is its address.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.also = Some(Box::new(other));
        self
    }

    fn open(&self) -> Result<Vec<TcpListener>> {
        let open =
            |bind: &Self| (bind.open)(bind.addr).with_context(|| format!("cannot listen on {}", bind.addr));
        [self].into_iter().chain(self.also.as_deref()).map(open).collect()
    }
}

/// What a stand-in answers.
pub(super) trait Handler: Send + Sync + 'static {
    /// Answers one request, whose body has been read whole.
    fn answer(
        self: Arc<Self>,
        peer: SocketAddr,
        request: Request<Bytes>,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// As an extension of an answer: how many hops its packets may make. With 1, a client in another network
/// namespace than the next hop's never gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HopLimit(pub(super) u8);

impl HopLimit {
    /// Bounds all that is sent on a connection from now on.
    fn apply(self, socket: &Socket, peer: SocketAddr) -> io::Result<()> {
        match peer {
            SocketAddr::V4(_) => socket.set_ttl_v4(self.0.into()),
            SocketAddr::V6(_) => socket.set_unicast_hops_v6(self.0.into()),
        }
    }
}

/// As an extension of an answer: what becomes of it instead of being sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The connection is cut.
    Cut,
    /// The client waits until it gives up.
    Silence,
}

/// An answer that is never sent.
pub(super) fn withheld(fate: Fate) -> Response<Body> {
    let mut response = reply(StatusCode::OK, "text/plain", "");
    response.extensions_mut().insert(fate);
    response
}

/// A running (or refusing) server and its handler.
pub(super) struct Server<H> {
    bind: Bind,
    pub(super) addr: SocketAddr,
    pub(super) handler: Arc<H>,
    running: Mutex<Option<Running>>,
}

struct Running {
    stop: CancellationToken,
    thread: thread::JoinHandle<()>,
}

/// No stand-in is ever sent more than this by a well-behaved client.
const BODY_LIMIT_BYTES: usize = 64 * 1024;

impl<H: Handler> Server<H> {
    pub(super) fn start(mut bind: Bind, handler: Arc<H>) -> Result<Self> {
        let listeners = bind.open()?;
        let addr = listeners.first().context("no listener")?.local_addr()?;
        // The same port when it comes back.
        bind.addr = addr;
        let running = Mutex::new(Some(Running::start(listeners, Arc::clone(&handler))?));

        Ok(Self { bind, addr, handler, running })
    }

    /// Closes the listeners and cuts every connection: clients are refused from here on.
    pub(super) fn down(&self) {
        let running = locked(&self.running).take();
        if let Some(running) = running {
            running.stop.cancel();
            // A panic of the server's thread has been printed by the panic hook.
            drop(running.thread.join());
        }
    }

    /// Listens again on the same addresses.
    pub(super) fn up(&self) -> Result<()> {
        let mut running = locked(&self.running);
        if running.is_none() {
            *running = Some(Running::start(self.bind.open()?, Arc::clone(&self.handler))?);
        }

        Ok(())
    }
}

impl<H> fmt::Debug for Server<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl<H> Drop for Server<H> {
    fn drop(&mut self) {
        let running = locked(&self.running).take();
        if let Some(running) = running {
            running.stop.cancel();
        }
    }
}

impl Running {
    fn start<H: Handler>(listeners: Vec<TcpListener>, handler: Arc<H>) -> Result<Self> {
        for listener in &listeners {
            listener.set_nonblocking(true)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("stand-in".into()).spawn(move || {
            // Dropping the connections with the runtime is what cuts them.
            runtime.block_on(stopped.run_until_cancelled_owned(async {
                let mut accepting = JoinSet::new();
                for listener in listeners {
                    // Within the set, as are its connections: cancelling drops all of them.
                    accepting.spawn(accept(listener, Arc::clone(&handler)));
                }
                while accepting.join_next().await.is_some() {}
            }));
        })?;

        Ok(Self { stop, thread })
    }
}

async fn accept<H: Handler>(listener: TcpListener, handler: Arc<H>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut connections = JoinSet::new();

    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let handler = Arc::clone(&handler);
                // The same socket once more, which goes with the connection.
                let Ok(socket) = stream.as_fd().try_clone_to_owned() else { continue };
                let socket = Arc::new(Socket::from(socket));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (handler, socket) = (Arc::clone(&handler), Arc::clone(&socket));
                    async move {
                        let response = answer(handler, &socket, peer, request).await;
                        match response.extensions().get::<Fate>().copied() {
                            None => Ok(response),
                            Some(Fate::Cut) => Err(io::Error::from(io::ErrorKind::ConnectionAborted)),
                            Some(Fate::Silence) => future::pending().await,
                        }
                    }
                });
                connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
                while connections.try_join_next().is_some() {}
            }
            // Out of file descriptors, or a client that has ended already: neither may spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn answer<H: Handler>(
    handler: Arc<H>,
    socket: &Socket,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let response = match Limited::new(body, BODY_LIMIT_BYTES).collect().await {
        Ok(body) => handler.answer(peer, Request::from_parts(head, body.to_bytes())).await,
        Err(error) => reply(StatusCode::PAYLOAD_TOO_LARGE, "text/plain", error.to_string()),
    };
    match response.extensions().get::<HopLimit>().map(|limit| limit.apply(socket, peer)) {
        None | Some(Ok(())) => response,
        Some(Err(error)) => reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
    }
}

/// A whole answer.
pub(super) fn reply(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}
