//! Requests that the real metadata server answers: the headers that are passed in each direction, and a body
//! that may not stall. Depends on `cloud::upstream` and `route`; called by `connection`. Adds no header: the
//! real server refuses to issue tokens to clients that look like a proxy.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, header};
use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::{pass_through_limiter::Share, route::UpstreamTarget};
use kube2ram_cloud::upstream::{ResponseBody, Upstream, UpstreamError};
use kube2ram_service::connection_limiter::Busy;

/// What is read as a whole: nearly every item has less than 1 KiB.
const SMALL_BYTES: u64 = 4096;
/// How long the real server may be silent in the middle of a body.
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a whole body may take: the items have some KiB, from one hop away.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// Hop-by-hop headers (RFC 9110 §7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: &[&str] = &["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];

/// Request headers that are passed on: those that describe the client, and the answer that it accepts.
/// Nothing else is passed: no proxy's name, no session token of the pod, which only the agent checks, and no
/// header that makes some servers use another path or method than the request line's.
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

/// Sends the request to the real metadata server. A small answer is read as a whole, so that head and body
/// are sent in one write, and an error can still set the status. For an answer that is larger, or of unknown
/// length, the head is returned as it arrives. The `share` is given back when the body has ended.
///
/// # Errors
/// As [`Upstream::send`]; informational responses are errors too, for nothing here may switch protocols.
///
/// # Cancel safety
/// Dropping the future abandons the request.
pub(super) async fn relay(
    upstream: &dyn Upstream,
    request: &Request<()>,
    target: &UpstreamTarget,
    share: Share,
) -> Result<Response<Either<Full<Bytes>, Relayed>>, UpstreamError> {
    let mut passed = Request::new(Full::new(Bytes::new()));
    request.method().clone_into(passed.method_mut());
    *passed.uri_mut() = target
        .as_str()
        .parse()
        .map_err(|error| UpstreamError::Exchange(Box::<http::uri::InvalidUri>::new(error)))?;
    *passed.headers_mut() = end_to_end(request.headers(), |name| PASSED.contains(name));

    let response = upstream.send(passed).await?;
    if response.status().is_informational() {
        return Err(UpstreamError::Exchange("unexpected informational response".into()));
    }
    let (mut head, body) = response.into_parts();
    head.headers = end_to_end(&head.headers, |_| true);
    head.version = http::Version::default();
    let body = match body.size_hint().exact() {
        Some(0..=SMALL_BYTES) => {
            let whole = body.collect().await.map_err(|error| UpstreamError::Exchange(error.into()))?;
            Either::Left(Full::new(whole.to_bytes()))
        }
        _ => Either::Right(Relayed::new(body, share)),
    };
    Ok(Response::from_parts(head, body))
}

fn end_to_end(headers: &HeaderMap, is_wanted: impl Fn(&HeaderName) -> bool) -> HeaderMap {
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
pub(super) struct Relayed(Box<Exchange>);

/// In a box, because most responses have another body, and all are moved several times.
struct Exchange {
    body: ResponseBody,
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
    fn new(body: ResponseBody, share: Share) -> Self {
        let deadline = Instant::now() + BODY_DEADLINE;
        let stalled = Box::pin(sleep(BODY_IDLE_TIMEOUT));
        Self(Box::new(Exchange { body, deadline, stalled, _share: share, busy: None }))
    }

    /// Keeps the client's connection from being idle until this body has ended.
    pub(super) fn keep_busy(&mut self, busy: Option<Busy>) {
        self.0.busy = busy;
    }
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = RelayError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RelayError>>> {
        let Exchange { body, deadline, stalled, .. } = &mut *self.0;
        match Pin::new(body).poll_frame(cx) {
            Poll::Ready(Some(_)) if Instant::now() >= *deadline => {
                Poll::Ready(Some(Err(RelayError::Stalled)))
            }
            Poll::Ready(frame) => {
                stalled.as_mut().reset((*deadline).min(Instant::now() + BODY_IDLE_TIMEOUT));
                Poll::Ready(frame.map(|frame| frame.map_err(RelayError::Read)))
            }
            Poll::Pending => {
                ready!(stalled.as_mut().poll(cx));
                Poll::Ready(Some(Err(RelayError::Stalled)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.body.size_hint()
    }
}
