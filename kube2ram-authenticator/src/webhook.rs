//! The webhook that the API server calls for each bearer token that nobody else knows: `POST /authenticate`
//! with a TokenReview. Verifies, maps and answers. Depends on `verify`, on a mapping and on `review`; called
//! by
//! `serve`.
//!
//! What is answered decides what the API server does next (`plugin/pkg/authenticator/token/webhook`): it
//! remembers a denial without `status.error` for 2 minutes, repeats 429 and 503 with `Retry-After`, and takes
//! everything else as an error, which it does not remember.

mod answer;
mod metrics;
mod review;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Body;
use kube2ram_cloud::upstream::{UpstreamError, read_bounded};
use prometheus_client::registry::Registry;
use secrecy::zeroize::Zeroize as _;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use self::{
    answer::{Refusal, Said},
    metrics::Metrics,
    review::{Review, Version},
};
use crate::{
    identity::{Identity, Map, Mapped, User},
    token::TokenError,
    verify::{Source, Verified, Verifier, VerifyError},
};
use kube2ram_service::{
    rate_limiter::{Rate, RateLimiter, RateLimiters},
    telemetry::chain,
};

/// What the operator decides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Whether a denial has its reason in `status.error`, as the predecessor's have. The API server logs
    /// it, takes the denial as an error, and so asks again for each attempt of the client.
    pub deny_with_error: bool,
    /// Whether `extra` also has the access key id and the principal id.
    pub extended_extra: bool,
}

/// The webhook.
pub struct Webhook {
    settings: Settings,
    verifier: Arc<Verifier>,
    map: Arc<dyn Map>,
    metrics: Metrics,
    /// Lines about denials, which anybody can cause.
    lines: Arc<RateLimiter>,
}

/// What came of a review.
#[derive(Debug)]
enum Outcome {
    Granted { user: User, identity: Arc<Identity>, source: Source },
    Refused(Refusal),
}

impl Webhook {
    /// Maps by `map` whom `verifier` names.
    pub fn new(
        settings: Settings,
        verifier: Arc<Verifier>,
        map: Arc<dyn Map>,
        registry: &mut Registry,
    ) -> Self {
        let lines = RateLimiters::<()>::new(Some(LINES)).of(None);
        Self { settings, verifier, map, metrics: Metrics::new(registry), lines }
    }

    /// Answers one request.
    ///
    /// # Cancel safety
    /// Dropping the future loses the answer only.
    pub async fn answer<B>(&self, request: Request<B>) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        if request.uri().path() == "/authenticate" && *request.method() == Method::POST {
            return self.authenticate(request.into_body()).await;
        }
        match (request.uri().path(), request.method()) {
            ("/authenticate", _) => not_allowed("POST", "expected POST\n"),
            // For manifests of the predecessor. It reports that the process answers, and nothing else.
            ("/healthz", &Method::GET | &Method::HEAD) => plain(StatusCode::OK, "ok"),
            ("/healthz", _) => not_allowed("GET, HEAD", "expected GET\n"),
            _ => plain(StatusCode::NOT_FOUND, "not found\n"),
        }
    }

    async fn authenticate<B>(&self, body: B) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        let begun = Instant::now();
        let body = match read_bounded(body, BODY_LIMIT_BYTES, BODY_DEADLINE).await {
            Ok(body) => body,
            Err(UpstreamError::Timeout) => {
                return self.malformed(StatusCode::REQUEST_TIMEOUT, "the body is late\n", begun);
            }
            Err(UpstreamError::Connect(_) | UpstreamError::Exchange(_)) => {
                return self.malformed(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n", begun);
            }
        };
        let review = Review::parse(&body);
        // Nobody else holds it.
        if let Ok(mut body) = body.try_into_mut() {
            body.zeroize();
        }
        let Some(review) = review else {
            let text = "expected a request body to be a TokenReview\n";
            return self.malformed(StatusCode::BAD_REQUEST, text, begun);
        };
        let outcome = self.decide(&review).await;
        self.log(&outcome);
        self.metrics.observe(outcome.label(), begun.elapsed());
        match &outcome {
            Outcome::Granted { user, identity, .. } => {
                review::granted(review.version, user, identity, self.settings.extended_extra)
                    .map_or_else(|_| plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot write\n"), json)
            }
            Outcome::Refused(refusal) => self.refuse(review.version, refusal),
        }
    }

    /// Any error on the way is a refusal.
    async fn decide(&self, review: &Review) -> Outcome {
        let Verified { identity, source } = match self.verifier.verify(review.token()).await {
            Ok(verified) => verified,
            Err(error) => return Outcome::Refused(Refusal::Unverified(error)),
        };
        // Asked first: what is loaded in between has nobody denied. A source of mappings that is not there
        // yet keeps those from no login whom a source before it maps.
        let is_loaded = self.map.is_loaded();
        match self.map.map(&identity) {
            Mapped::User(user) => {
                self.verifier.trust(&identity.access_key_id);
                Outcome::Granted { user, identity, source }
            }
            Mapped::Nobody if !is_loaded => Outcome::Refused(Refusal::NotLoaded(identity)),
            Mapped::Nobody => Outcome::Refused(Refusal::NotMapped(identity)),
            Mapped::Conflict(why) => Outcome::Refused(Refusal::Conflict { identity, why }),
        }
    }

    fn refuse(&self, version: Version, refusal: &Refusal) -> Response<Full<Bytes>> {
        match refusal.said() {
            Said::Denied(reason) => {
                let reason = self.settings.deny_with_error.then_some(reason);
                review::denied(version, reason.as_deref())
                    .map_or_else(|_| plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot write\n"), json)
            }
            Said::Later { status, text, retry_after } => {
                let mut response = plain(status, text);
                if let Some(retry_after) = retry_after {
                    response.headers_mut().insert(header::RETRY_AFTER, retry_after.as_secs().into());
                }
                response
            }
        }
    }

    fn malformed(&self, status: StatusCode, text: &'static str, begun: Instant) -> Response<Full<Bytes>> {
        self.metrics.observe("malformed_request", begun.elapsed());
        debug!(status = status.as_u16(), "not a TokenReview");
        plain(status, text)
    }

    /// One line for each login, none for the tokens of other authenticators, and few for what strangers
    /// cause.
    fn log(&self, outcome: &Outcome) {
        let refusal = match outcome {
            Outcome::Granted { user: User { username, groups }, identity, source } => {
                let (arn, access_key_id) = (&*identity.arn, Shortened(&identity.access_key_id));
                let (username, cache) = (&**username, source.as_str());
                info!(username, ?groups, arn, %access_key_id, cache, "access granted");
                return;
            }
            Outcome::Refused(Refusal::Unverified(VerifyError::Token(TokenError::Foreign))) => return,
            Outcome::Refused(refusal) => refusal,
        };
        let Ok(suppressed) = self.lines.admit(Instant::now()) else { return };
        let kind = refusal.label();
        match refusal {
            Refusal::Unverified(error) => {
                let request_id = match error {
                    VerifyError::Sts(error) => error.request_id.as_deref(),
                    VerifyError::Identity(_) | VerifyError::Limited { .. } | VerifyError::Token(_) => None,
                };
                let (is_definite, error) = (error.is_definite(), chain(error));
                if is_definite {
                    warn!(kind, request_id, suppressed, error, "access denied");
                } else {
                    warn!(kind, request_id, suppressed, error, "no decision on a login");
                }
            }
            Refusal::Conflict { identity, why } => {
                warn!(kind, arn = &*identity.arn, suppressed, error = &**why, "access denied");
            }
            Refusal::NotLoaded(identity) => {
                warn!(kind, arn = &*identity.arn, suppressed, "no decision on a login");
            }
            Refusal::NotMapped(identity) => {
                warn!(kind, arn = &*identity.arn, suppressed, "access denied");
            }
        }
    }
}

impl Outcome {
    fn label(&self) -> &'static str {
        match self {
            Self::Granted { .. } => "success",
            Self::Refused(refusal) => refusal.label(),
        }
    }
}

/// The beginning and the end of an access key id: enough to find a key by, for its owner.
struct Shortened<'a>(&'a str);

impl fmt::Display for Shortened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Ids are ASCII.
        let (first, last) = (self.0.get(..4), self.0.len().checked_sub(4).and_then(|at| self.0.get(at..)));
        match (first, last) {
            (Some(first), Some(last)) if self.0.len() > 12 => write!(f, "{first}…{last}"),
            _ => f.write_str("…"),
        }
    }
}

fn json(body: Vec<u8>) -> Response<Full<Bytes>> {
    with_type("application/json", body.into(), StatusCode::OK)
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    with_type("text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()), status)
}

fn not_allowed(allow: &'static str, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, text);
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    response
}

fn with_type(content_type: &'static str, body: Bytes, status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A token of the longest kind, and what stands around it.
pub(crate) const BODY_LIMIT_BYTES: usize = 64 * 1024;
/// The API server sends a body at once.
const BODY_DEADLINE: Duration = Duration::from_secs(5);
/// How many lines about denials are logged: ten a second, and a hundred at once.
const LINES: Rate = Rate { burst: 100, interval: Duration::from_millis(100) };

#[cfg(test)]
mod tests;
