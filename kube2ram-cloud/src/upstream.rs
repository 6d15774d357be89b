//! The connection to the real metadata server: hyper's client over sockets that carry the kernel's pass.
//! Called by the clouds for the agent's own needs and by the agent's `server` for pass-through.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, Uri, header::HOST};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Body;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

mod activity;
mod pool;

use self::pool::{Connection, Pool};
pub use self::{activity::UpstreamActivity, pool::ResponseBody};
use crate::MetadataAddr;

/// Why the real metadata server did not answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Connecting (or granting the pass) failed.
    #[error("cannot connect to the metadata server")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The exchange failed midway.
    #[error("the exchange with the metadata server failed")]
    Exchange(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No response head within the deadline.
    #[error("the metadata server did not answer in time")]
    Timeout,
}

/// Marks sockets of the agent itself, so that the eBPF programs let them reach the real metadata server.
/// Implemented by whoever has the maps.
pub trait PassGrant: Send + Sync + 'static {
    /// Grants the pass; call it before connect(2).
    ///
    /// # Errors
    /// The map write's error; the connect would then be redirected to the agent itself, so the caller must
    /// give up.
    fn grant(&self, socket: BorrowedFd<'_>) -> io::Result<()>;
}

/// Sends requests to the real metadata server.
#[async_trait::async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Sends `request` (origin-form target; `Host` is filled in) and returns the response as its head
    /// arrives.
    ///
    /// # Errors
    /// As named; a response of any status is no error.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError>;
}

/// Reads a whole body of at most `limit_bytes` within `deadline`.
///
/// # Errors
/// [`UpstreamError::Exchange`] when the body is longer or breaks off, [`UpstreamError::Timeout`].
pub async fn read_bounded<B>(body: B, limit_bytes: usize, deadline: Duration) -> Result<Bytes, UpstreamError>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
{
    match timeout(deadline, Limited::new(body, limit_bytes).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(source)) => Err(UpstreamError::Exchange(source)),
        Err(_elapsed) => Err(UpstreamError::Timeout),
    }
}

/// The real metadata server, always at its fixed addresses.
pub struct MetadataServer {
    connector: Connector,
    pool: Arc<Pool>,
    host: String,
    activity: UpstreamActivity,
}

impl MetadataServer {
    /// Prepares the client; connects on first use only.
    pub fn new(metadata: MetadataAddr, pass: Arc<dyn PassGrant>) -> Self {
        let address = metadata.v4;
        let host = match address.port() {
            80 => address.ip().to_string(),
            _ => address.to_string(),
        };
        let connector = Connector { metadata, pass };
        Self { connector, pool: Arc::default(), host, activity: UpstreamActivity::default() }
    }

    /// When it last answered.
    pub fn activity(&self) -> UpstreamActivity {
        self.activity.clone()
    }

    /// Tries once more what is safe to repeat: the server may close a kept connection at the moment it is
    /// used.
    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError> {
        let again = matches!(*request.method(), Method::GET | Method::HEAD).then(|| request.clone());
        match (self.try_exchange(request).await, again) {
            (Err(UpstreamError::Exchange(_)), Some(again)) => self.try_exchange(again).await,
            (result, _) => result,
        }
    }

    async fn try_exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let connection = match self.pool.take().await {
            Some(connection) => connection,
            None => Box::pin(self.connector.open()).await?,
        };
        connection.exchange(request, Arc::clone(&self.pool)).await
    }
}

#[async_trait::async_trait]
impl Upstream for MetadataServer {
    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError> {
        let bad = |error: http::Error| UpstreamError::Exchange(error.into());
        // In origin-form, whatever it names as its server.
        let target = request.uri().path_and_query().cloned();
        *request.uri_mut() = target.map_or_else(|| Uri::from_static("/"), Uri::from);
        let host = HeaderValue::try_from(&self.host).map_err(|error| bad(error.into()))?;
        request.headers_mut().insert(HOST, host);

        let attempt = self.activity.attempt();
        let outcome =
            timeout(HEAD_DEADLINE, self.exchange(request)).await.unwrap_or(Err(UpstreamError::Timeout));
        attempt.ended(&outcome);
        outcome
    }
}

/// Dials only the metadata server, over sockets with the pass.
struct Connector {
    metadata: MetadataAddr,
    pass: Arc<dyn PassGrant>,
}

impl Connector {
    async fn open(&self) -> Result<Connection, UpstreamError> {
        let stream = self.connect().await.map_err(|error| UpstreamError::Connect(error.into()))?;
        Connection::over(stream).await
    }

    /// Connects over IPv4. IPv6 is used only while the node has no route to the IPv4 address, which the
    /// kernel reports at once. The node's routes decide which server answers at the IPv6 address, while the
    /// IPv4 address belongs to the platform. So a moment without an answer over IPv4 must not lead to another
    /// server, and a moment without a route only for that moment.
    async fn connect(&self) -> io::Result<TcpStream> {
        match (self.connect_to(self.metadata.v4.into()).await, self.metadata.socket_v6()) {
            (Err(error), Some(v6)) if error.kind() == io::ErrorKind::NetworkUnreachable => {
                self.connect_to(v6.into()).await
            }
            (outcome, _) => outcome,
        }
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A client that reads slowly holds up what is passed to it, and so does not fill the agent's memory.
        socket.set_send_buffer_size(BUFFER_BYTES)?;
        socket.set_recv_buffer_size(BUFFER_BYTES)?;
        // Without the pass the connect hook would send us to ourselves: never connect without it.
        self.pass.grant(socket.as_fd())?;
        let stream = timeout(CONNECT_TIMEOUT, socket.connect(address)).await??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Bounds connecting to one address. The server is one hop away, on the hypervisor.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(400);
/// Bounds waiting for a response's head, connecting included: SDKs give up at 1 s.
const HEAD_DEADLINE: Duration = Duration::from_millis(900);
/// The size of a connection's socket buffers in each direction; the kernel counts twice as much. Answers have
/// some KiB.
pub const BUFFER_BYTES: u32 = 16 * 1024;

#[cfg(test)]
mod tests;
