//! Requests that the real metadata server answers: which headers go there and back, and a body that may not stall.
//! Depends on `cloud::upstream` and `route`; called by `connection`. Adds no header of its own: the real server refuses to issue tokens
//! to what looks like a proxy.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, header, request};
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::{places::Busy, quota::Share, route::UpstreamTarget};
use crate::cloud::upstream::{Upstream, UpstreamError};

/// How long the real server may be silent in the middle of a body.
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a whole body may take: the items have some KiB, from one hop away.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// Headers that speak of one connection only (RFC 9110 §7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: &[&str] = &["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];

/// Request headers that are passed on: what a client says of itself, and of the answer that it would like. Nothing else is, be it a name for a proxy, the
/// pod's session token, which is the agent's affair, or a header by which some servers take another path or method than the request line's.
const PASSED: [HeaderName; 13] = [
    header::ACCEPT,
    header::ACCEPT_CHARSET,
    header::ACCEPT_ENCODING,
    header::ACCEPT_LANGUAGE,
    header::CACHE_CONTROL,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::PRAGMA,
    header::RANGE,
    header::USER_AGENT,
];

/// Asks the real metadata server and returns its response as the head arrives. The `share` is given back when the body has ended.
///
/// # Errors
/// As [`Upstream::send`]; informational responses are errors too, for nothing here may switch protocols.
///
/// # Cancel safety
/// Dropping the future abandons the request.
pub(super) async fn relay(
    upstream: &dyn Upstream,
    request: request::Parts,
    target: &UpstreamTarget,
    share: Share,
) -> Result<Response<Relayed>, UpstreamError> {
    let mut passed = Request::new(Full::new(Bytes::new()));
    *passed.method_mut() = request.method;
    *passed.uri_mut() = target
        .as_str()
        .parse()
        .map_err(|error| UpstreamError::Exchange(Box::<http::uri::InvalidUri>::new(error)))?;
    *passed.headers_mut() = end_to_end(request.headers, |name| PASSED.contains(name));

    let mut response = upstream.send(passed).await?.map(|body| Relayed::new(body, share));
    if response.status().is_informational() {
        return Err(UpstreamError::Exchange("unexpected informational response".into()));
    }
    *response.headers_mut() = end_to_end(std::mem::take(response.headers_mut()), |_| true);
    *response.version_mut() = http::Version::default();
    Ok(response)
}

fn end_to_end(headers: HeaderMap, is_wanted: impl Fn(&HeaderName) -> bool) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let is_end_to_end = |name: &HeaderName| {
        !HOP_BY_HOP.contains(&name.as_str())
            && !named.contains(name)
            && is_wanted(name)
            && !["proxy-", "x-forwarded-"].iter().any(|prefix| name.as_str().starts_with(prefix))
    };
    let mut kept = HeaderMap::with_capacity(headers.len());
    for name in headers.keys().filter(|name| is_end_to_end(name)) {
        for value in headers.get_all(name) {
            kept.append(name, value.clone());
        }
    }
    kept
}

/// The real server's response body; fails when it stalls or does not end.
pub(super) struct Relayed {
    body: Incoming,
    deadline: Instant,
    stalled: Pin<Box<Sleep>>,
    _share: Share,
    /// The client's connection is not idle while this body is sent.
    busy: Option<Busy>,
}

/// Why a relayed body ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    /// Reading failed.
    #[error("cannot read the metadata server's response")]
    Read(#[source] hyper::Error),
    /// Nothing came for [`BODY_IDLE_TIMEOUT`], or no end within [`BODY_DEADLINE`].
    #[error("the metadata server stalled")]
    Stalled,
}

impl Relayed {
    fn new(body: Incoming, share: Share) -> Self {
        let deadline = Instant::now() + BODY_DEADLINE;
        Self { body, deadline, stalled: Box::pin(sleep(BODY_IDLE_TIMEOUT)), _share: share, busy: None }
    }

    /// Keeps the client's connection from being idle until this body has ended.
    pub(super) fn keep_busy(&mut self, busy: Busy) {
        self.busy = Some(busy);
    }
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = RelayError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RelayError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(_)) if Instant::now() >= self.deadline => {
                Poll::Ready(Some(Err(RelayError::Stalled)))
            }
            Poll::Ready(frame) => {
                let deadline = self.deadline.min(Instant::now() + BODY_IDLE_TIMEOUT);
                self.stalled.as_mut().reset(deadline);
                Poll::Ready(frame.map(|frame| frame.map_err(RelayError::Read)))
            }
            Poll::Pending => {
                ready!(self.stalled.as_mut().poll(cx));
                Poll::Ready(Some(Err(RelayError::Stalled)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
