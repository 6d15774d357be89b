//! Connections to the real metadata server, kept for the next request. Each is driven by the task whose
//! request it carries, so no other task has to be woken for a request, its response and its body. Depends on
//! hyper; called by the parent.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::Instant};

use super::UpstreamError;

/// How long an idle connection may be used again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many are kept.
const MAX_IDLE: usize = 16;
/// How much of a response is read ahead, its head included.
const READ_AHEAD_BYTES: usize = 16 * 1024;

/// The idle connections, the latest last. No task watches them: connections that the server has closed, or
/// that are too old, are dropped when the pool is next used.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Idle>>);

#[derive(Debug)]
struct Idle {
    connection: Connection,
    until: Instant,
}

impl Pool {
    /// One that the server has not closed.
    pub(super) async fn take(&self) -> Option<Connection> {
        loop {
            let mut connection = self.idle().pop()?.connection;
            if poll_fn(|cx| Poll::Ready(connection.is_usable(cx))).await {
                return Some(connection);
            }
        }
    }

    fn put(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(Idle { connection, until: Instant::now() + IDLE_TIMEOUT });
        }
    }

    /// Those that are not too old.
    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let too_old = idle.iter().take_while(|idle| idle.until <= now).count();
        idle.drain(..too_old);
        idle
    }
}

/// A connection that carries one request at a time.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Reads and writes. In a box, because it is large and the connection is moved.
    driver: Pin<Box<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>>,
    has_ended: bool,
}

impl Connection {
    pub(super) async fn over(stream: TcpStream) -> Result<Self, UpstreamError> {
        let handshake =
            http1::Builder::new().max_buf_size(READ_AHEAD_BYTES).handshake(TokioIo::new(stream)).await;
        let (sender, driver) = handshake.map_err(|error| UpstreamError::Exchange(error.into()))?;
        Ok(Self { sender, driver: Box::pin(driver), has_ended: false })
    }

    /// Sends a request and returns the response as its head arrives.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the request; the connection cannot be used any longer, and is dropped
    /// with it.
    pub(super) async fn exchange(
        mut self,
        request: Request<Full<Bytes>>,
        pool: Arc<Pool>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let mut answer = pin!(self.sender.send_request(request));
        let response = poll_fn(|cx| {
            self.drive(cx);
            match answer.as_mut().poll(cx) {
                Poll::Ready(answer) => {
                    Poll::Ready(answer.map_err(|error| UpstreamError::Exchange(error.into())))
                }
                // hyper reports the reason, as long as the connection has not ended.
                Poll::Pending if self.has_ended => {
                    Poll::Ready(Err(UpstreamError::Exchange("the connection has ended".into())))
                }
                Poll::Pending => Poll::Pending,
            }
        })
        .await?;
        Ok(response.map(|body| ResponseBody { body, has_ended: false, carrier: Some((self, pool)) }))
    }

    /// Reads and writes what can be read and written now.
    fn drive(&mut self, cx: &mut Context<'_>) {
        // The code that waits for the response or the body reports why it ended.
        self.has_ended = self.has_ended || self.driver.as_mut().poll(cx).is_ready();
    }

    fn is_usable(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        !self.has_ended && self.sender.is_ready()
    }
}

/// The body of a response. While it is read, it drives its connection, which returns to the pool at the
/// body's end.
#[derive(Debug)]
pub struct ResponseBody {
    body: Incoming,
    has_ended: bool,
    /// `None` when another task drives it.
    carrier: Option<(Connection, Arc<Pool>)>,
}

impl From<Incoming> for ResponseBody {
    fn from(body: Incoming) -> Self {
        Self { body, has_ended: false, carrier: None }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some((connection, _)) = &mut self.carrier {
            connection.drive(cx);
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.has_ended = frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some((connection, pool)) = self.carrier.take()
            && !connection.has_ended
            && (self.has_ended || self.body.is_end_stream())
        {
            pool.put(connection);
        }
    }
}
