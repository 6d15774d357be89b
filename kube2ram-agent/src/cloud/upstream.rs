//! The connection to the real metadata server: hyper's pooled client over sockets that carry the kernel's pass.
//! Called by `cloud::alibaba` for the agent's own needs and by `server` for pass-through.

use bytes::Bytes;
use http_body_util::Full;

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

/// Sends requests to the real metadata server.
#[async_trait::async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Sends `request` (origin-form target; `Host` is filled in) and returns the response as its head arrives.
    ///
    /// # Errors
    /// As named; a response of any status is no error.
    async fn send(
        &self,
        request: http::Request<Full<Bytes>>,
    ) -> Result<http::Response<hyper::body::Incoming>, UpstreamError>;
}
