//! AssumeRole at STS: the production [`Issuer`], with the error table of STS and its single retries.
//! Source: STS API 2015-04-01, AssumeRole. Depends on `base`, `endpoint`, `sign`, `wire`; called by `credentials`, composed by `app`.

mod refusal;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use secrecy::zeroize::Zeroizing;
use tokio::time::{Instant, timeout};
use tracing::warn;

use self::refusal::{Refusal, Remedy};
use super::{
    base::{Base, BaseCredentials},
    endpoint::Endpoint,
    sign::{RpcCall, canonical_query},
    wire::{BODY_LIMIT_BYTES, parse_assume_role},
};
use crate::{
    clock::Clock,
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    role::{RoleArn, RoleSession},
    telemetry::chain,
};

/// Issues credentials through AssumeRole.
pub struct StsIssuer {
    client: reqwest::Client,
    endpoints: Box<[Endpoint]>,
    base: Base,
    clock: Arc<dyn Clock>,
    /// Which endpoint answered last, after the first had not.
    detour: Mutex<Option<Detour>>,
    /// How far STS's clock is ahead of ours; 0 until it complained.
    clock_offset_seconds: AtomicI64,
    /// Roles that refused more than an hour, for the life of the process.
    one_hour_roles: Mutex<HashSet<RoleArn>>,
}

/// Another endpoint than the first, which may cost more or leave the VPC: the first is tried again after a while.
#[derive(Clone, Copy)]
struct Detour {
    endpoint: usize,
    until: Instant,
}

impl StsIssuer {
    /// Prepares the client; connects on first use only. Tries `endpoints` in order.
    ///
    /// # Errors
    /// When the TLS client cannot be built: no system certificates are found.
    ///
    /// # Panics
    /// When no process-wide rustls provider is installed, which is a bug of `app`.
    pub fn try_new(endpoints: Vec<Endpoint>, base: Base, clock: Arc<dyn Clock>) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            // A proxy or a redirect target would see the agent's signed requests.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .https_only(endpoints.iter().all(Endpoint::is_https))
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .build()?;
        Ok(Self {
            client,
            endpoints: endpoints.into(),
            base,
            clock,
            detour: Mutex::default(),
            clock_offset_seconds: AtomicI64::new(0),
            one_hour_roles: Mutex::default(),
        })
    }

    /// Calls, and once for each remedy that STS's refusals ask for, again.
    async fn assume_role(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let mut base = self.base.current().await.map_err(refusal::no_base)?;
        let mut tried = Vec::new();
        loop {
            let refusal = match self.call(session, &base).await {
                Ok(credentials) => return Ok(credentials),
                Err(refusal) => refusal,
            };
            let Some(remedy) = refusal.remedy().filter(|remedy| !tried.contains(remedy)) else {
                return Err(refusal.error);
            };
            let applied = match remedy {
                Remedy::FreshBase => match self.base.refresh(&base).await.map_err(refusal::no_base)? {
                    Some(fresh) => {
                        base = fresh;
                        true
                    }
                    None => false,
                },
                Remedy::FreshNonce => true,
                Remedy::OneHour => self.remember_one_hour(session),
                Remedy::ServerTime => self.adopt_time(refusal.server_time),
            };
            if !applied {
                return Err(refusal.error);
            }
            tried.push(remedy);
        }
    }

    async fn call(&self, session: &RoleSession, base: &BaseCredentials) -> Result<Credentials, Refusal> {
        let query = self.query(session);
        let response = self.send(&query, base).await?;
        let date = response.headers().get(http::header::DATE).cloned();
        let body = read(response).await?;
        let issued = parse_assume_role(&body)
            .map_err(|error| refusal::nonsense("answer not understood", Some(error.into())))?;
        let issued_at = self.issued_at(issued.expires_at, date.as_ref(), session);
        if issued.expires_at <= issued_at {
            return Err(refusal::nonsense("credentials that have already expired", None));
        }
        Ok(Credentials {
            access_key_id: issued.access_key_id,
            access_key_secret: issued.access_key_secret,
            security_token: issued.security_token,
            issued_at,
            expires_at: issued.expires_at,
            document: Default::default(),
        })
    }

    /// When STS says that it answered, so that a clock of ours that is wrong neither lengthens nor shortens what it issued; our own time when
    /// it does not say so, or what it says cannot be.
    fn issued_at(
        &self,
        expires_at: Timestamp,
        date: Option<&http::HeaderValue>,
        session: &RoleSession,
    ) -> Timestamp {
        let lifetime = |issued_at: &Timestamp| expires_at.duration_since(*issued_at);
        let longest = session.duration + DATE_TOLERANCE;
        date.and_then(refusal::parse_date)
            .filter(|date| Duration::try_from(lifetime(date)).is_ok_and(|lifetime| lifetime <= longest))
            .unwrap_or_else(|| self.clock.now())
    }

    fn query(&self, session: &RoleSession) -> String {
        let mut seconds = session.duration.as_secs();
        if seconds > ONE_HOUR_SECONDS && self.one_hour_roles().contains(&session.role) {
            seconds = ONE_HOUR_SECONDS;
        }
        let seconds = seconds.to_string();
        let mut parameters = vec![
            ("DurationSeconds", &*seconds),
            // The default is XML.
            ("Format", "JSON"),
            ("RoleArn", session.role.as_str()),
            ("RoleSessionName", session.session_name.as_str()),
        ];
        parameters.extend(session.external_id.as_ref().map(|id| ("ExternalId", id.as_str())));
        parameters.extend(session.policy.as_ref().map(|policy| ("Policy", policy.as_str())));
        canonical_query(&parameters)
    }

    /// Sends to the first endpoint, or to the one that had to take its place not long ago; on to the next when one cannot be connected to
    /// or is silent. Asking twice is harmless: each answer is another set of credentials.
    async fn send(&self, query: &str, base: &BaseCredentials) -> Result<reqwest::Response, Refusal> {
        let first = self.detour().filter(|detour| Instant::now() < detour.until).map_or(0, |d| d.endpoint);
        let mut failure = refusal::nonsense("no endpoint", None);
        for step in 0..self.endpoints.len() {
            let index = (first + step) % self.endpoints.len();
            let endpoint = &self.endpoints[index];
            let sending = timeout(ANSWER_TIMEOUT, self.request(endpoint, query, base)?.send());
            failure = match sending.await {
                Ok(Ok(response)) => {
                    if step > 0 {
                        let until = Instant::now() + DETOUR;
                        *self.detour() = (index > 0).then_some(Detour { endpoint: index, until });
                    }
                    return Ok(response);
                }
                Ok(Err(error)) if error.is_connect() => refusal::transport(error),
                Ok(Err(error)) => return Err(refusal::transport(error)),
                Err(_elapsed) => refusal::silence(),
            };
            warn!(endpoint = endpoint.host(), error = chain(&failure.error), "STS endpoint out of reach");
        }
        Err(failure)
    }

    fn request(
        &self,
        endpoint: &Endpoint,
        query: &str,
        base: &BaseCredentials,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let headers = RpcCall {
            host: endpoint.host(),
            action: "AssumeRole",
            version: "2015-04-01",
            canonical_query: query,
            date: self.server_now(),
            nonce: &uuid::Uuid::new_v4().to_string(),
        }
        .headers(base)
        .map_err(refusal::unsendable)?;
        let mut url = endpoint.url().clone();
        url.set_query(Some(query));
        Ok(self.client.post(url).headers(headers).header("accept", "application/json"))
    }

    fn detour(&self) -> MutexGuard<'_, Option<Detour>> {
        self.detour.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn server_now(&self) -> Timestamp {
        let now = self.clock.now();
        let offset = SignedDuration::from_secs(self.clock_offset_seconds.load(Ordering::Relaxed));
        now.checked_add(offset).unwrap_or(now)
    }

    fn adopt_time(&self, server_time: Option<Timestamp>) -> bool {
        let Some(server_time) = server_time else { return false };
        let offset = server_time.duration_since(self.clock.now()).as_secs();
        warn!(offset_seconds = offset, "clock differs from that of STS");
        self.clock_offset_seconds.store(offset, Ordering::Relaxed);
        true
    }

    /// Whether that changes the next request.
    fn remember_one_hour(&self, session: &RoleSession) -> bool {
        if session.duration.as_secs() <= ONE_HOUR_SECONDS {
            return false;
        }
        let mut roles = self.one_hour_roles();
        if roles.len() >= MAX_ONE_HOUR_ROLES {
            roles.clear();
        }
        roles.insert(session.role.clone());
        true
    }

    fn one_hour_roles(&self) -> MutexGuard<'_, HashSet<RoleArn>> {
        self.one_hour_roles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads an answer to its end, into memory that is zeroised; an error's becomes a refusal. What TLS and HTTP have buffered of it is out of reach.
async fn read(mut response: reqwest::Response) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    // All of it at once: a vector that grows leaves copies behind.
    let mut body = Zeroizing::new(Vec::with_capacity(BODY_LIMIT_BYTES));
    while let Some(chunk) = response.chunk().await.map_err(refusal::transport)? {
        if body.len() + chunk.len() > BODY_LIMIT_BYTES {
            return Err(refusal::nonsense("answer too long", None));
        }
        body.extend_from_slice(&chunk);
    }
    if !response.status().is_success() {
        return Err(Refusal::parse(response.status(), response.headers(), &body));
    }
    Ok(body)
}

#[async_trait]
impl Issuer for StsIssuer {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        timeout(CALL_DEADLINE, self.assume_role(session)).await.unwrap_or_else(|_elapsed| {
            Err(IssueError {
                kind: IssueErrorKind::Unavailable,
                code: "Timeout".into(),
                message: "no answer from STS in time".into(),
                request_id: None,
                retry_after: None,
                source: None,
            })
        })
    }
}

/// Bounds name look-up, TCP and TLS together, so that a second endpoint fits into the deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Bounds the wait for an answer's head, connecting included, so that a second and a third endpoint fit into the deadline. STS takes some 50 ms.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1900);
/// Bounds one issue with all its retries. No pod waits that long: the cache answers earlier and lets this go on.
const CALL_DEADLINE: Duration = Duration::from_secs(6);
/// How long the first endpoint is left alone when another had to take its place.
const DETOUR: Duration = Duration::from_mins(10);
/// How much longer than asked for credentials may seem to live by STS's own `Date`, which is in whole seconds.
const DATE_TOLERANCE: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_IDLE_CONNECTIONS: usize = 4;
/// What every role allows: the smallest `MaxSessionDuration`.
const ONE_HOUR_SECONDS: u64 = 3600;
const MAX_ONE_HOUR_ROLES: usize = 1024;

#[cfg(test)]
mod tests;
