//! Session tokens of the metadata server: adds the agent's own to every request. The header names come from
//! the cloud's dialect. An `Upstream` over another: `server` passes pods' requests through it too. Made by
//! each cloud's `metadata`.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use tokio::time::{Instant, timeout};

use crate::{
    dialect::TokenHeaders,
    upstream::{ResponseBody, Upstream, UpstreamError, read_bounded},
};

/// What becomes of a request while the server issues no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Without {
    /// It fails.
    Fail,
    /// It is sent without.
    Pass,
}

/// An [`Upstream`] that sends the agent's token with every request.
pub struct SessionTokens {
    upstream: Box<dyn Upstream>,
    headers: &'static TokenHeaders,
    without: Without,
    session: Mutex<Option<Session>>,
}

/// Whether the server issues tokens, and when to ask again.
#[derive(Clone)]
struct Session {
    /// `None` when the server issues none (it refuses, or is too old).
    token: Option<HeaderValue>,
    until: Instant,
}

impl SessionTokens {
    /// Wraps `upstream`; asks for a token on first use only.
    pub(crate) fn new(upstream: impl Upstream, headers: &'static TokenHeaders, without: Without) -> Self {
        Self { upstream: Box::new(upstream), headers, without, session: Mutex::new(None) }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError> {
        let token = self.token().await?;
        let response = self.upstream.send(self.with_token(request.clone(), token.as_ref())).await?;
        let outdated = match response.status() {
            StatusCode::UNAUTHORIZED => true,
            // Tokens may have become required since the server refused to issue one.
            StatusCode::FORBIDDEN => token.is_none(),
            _ => false,
        };
        if !outdated {
            return Ok(response);
        }

        self.forget(token.as_ref());
        match self.token().await? {
            None => Ok(response),
            token => self.upstream.send(self.with_token(request, token.as_ref())).await,
        }
    }

    async fn token(&self) -> Result<Option<HeaderValue>, UpstreamError> {
        let session = self.session().clone();
        if let Some(session) = session.filter(|session| session.until > Instant::now()) {
            return Ok(session.token);
        }

        // Concurrent first requests fetch a token each, which is harmless: all of them are valid.
        let request = Request::builder()
            .method(Method::PUT)
            .uri("/latest/api/token")
            .header(&self.headers.ttl, TTL.as_secs())
            .body(Full::default())
            .map_err(|error| UpstreamError::Exchange(error.into()))?;
        let response = self.upstream.send(request).await?;
        let token = match response.status() {
            StatusCode::OK => {
                let body = read_bounded(response.into_body(), TOKEN_LIMIT_BYTES, BODY_DEADLINE).await?;
                let token = body.trim_ascii();
                if token.is_empty() {
                    return match self.without {
                        Without::Fail => Err(UpstreamError::Exchange(NoToken::Empty.into())),
                        // A temporary failure, as below.
                        Without::Pass => Ok(None),
                    };
                }
                let mut token =
                    HeaderValue::from_bytes(token).map_err(|error| UpstreamError::Exchange(error.into()))?;
                token.set_sensitive(true);
                Some(token)
            }
            status if self.without == Without::Fail => {
                return Err(UpstreamError::Exchange(NoToken::Refused(status).into()));
            }
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => None,
            // A temporary failure: this request is sent without a token, the next one asks again.
            _ => return Ok(None),
        };
        *self.session() = Some(Session { token: token.clone(), until: Instant::now() + TTL * 4 / 5 });
        Ok(token)
    }

    /// Drops the session, unless another request has already renewed it.
    fn forget(&self, token: Option<&HeaderValue>) {
        self.session().take_if(|session| session.token.as_ref() == token);
    }

    /// A token that came with the request is a pod's: it is the agent's own, and means nothing upstream.
    fn with_token(
        &self,
        mut request: Request<Full<Bytes>>,
        token: Option<&HeaderValue>,
    ) -> Request<Full<Bytes>> {
        let headers = request.headers_mut();
        headers.remove(&self.headers.token);
        if let Some(token) = token {
            headers.insert(&self.headers.token, token.clone());
        }
        request
    }

    fn session(&self) -> std::sync::MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl Upstream for SessionTokens {
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError> {
        timeout(HEAD_DEADLINE, self.exchange(request)).await.unwrap_or(Err(UpstreamError::Timeout))
    }
}

/// The server was asked for a token, and issued none.
#[derive(Debug, thiserror::Error)]
enum NoToken {
    #[error("the metadata server answers with an empty session token")]
    Empty,
    #[error("the metadata server answers {0} instead of a session token")]
    Refused(StatusCode),
}

/// The longest that is allowed.
const TTL: Duration = Duration::from_secs(21_600);
const TOKEN_LIMIT_BYTES: usize = 4096;
const BODY_DEADLINE: Duration = Duration::from_millis(500);
/// Bounds the whole exchange up to the response's head, token included: SDKs give up at 1 s.
const HEAD_DEADLINE: Duration = Duration::from_millis(900);
