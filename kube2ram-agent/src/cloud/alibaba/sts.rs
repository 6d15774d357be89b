//! AssumeRole at STS: the production [`Issuer`], with the error table of STS and its single retries.
//! Source: STS API 2015-04-01, AssumeRole. Depends on `base`, `transport`, `sign`, `wire`; called by `credentials`, composed by `app`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use super::{
    base::{Base, BaseCredentials},
    endpoint::Endpoint,
    refusal::{self, Refusal, Remedy},
    sign::{RpcCall, canonical_query},
    transport::{Transport, read},
    wire::parse_assume_role,
};
use crate::{
    clock::Clock,
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    role::{RoleArn, RoleSession},
};

/// Issues credentials through AssumeRole.
pub struct StsIssuer {
    transport: Transport,
    base: Base,
    clock: Arc<dyn Clock>,
    /// Roles that refused more than an hour, and when.
    one_hour_roles: Mutex<HashMap<RoleArn, Instant>>,
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
        let transport = Transport::try_new(endpoints, Arc::clone(&clock))?;
        Ok(Self { transport, base, clock, one_hour_roles: Mutex::default() })
    }

    /// Calls, and once for each remedy that STS's refusals ask for, again.
    async fn assume_role(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let mut base = self.base.current(&self.transport).await.map_err(refusal::no_base)?;
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
                Remedy::FreshBase => {
                    match self.base.refresh(&base, &self.transport).await.map_err(refusal::no_base)? {
                        Some(fresh) => {
                            base = fresh;
                            true
                        }
                        None => false,
                    }
                }
                Remedy::FreshNonce => true,
                Remedy::OneHour => self.remember_one_hour(session),
                Remedy::ServerTime => self.transport.adopt_time(refusal.server_time),
            };
            if !applied {
                return Err(refusal.error);
            }
            tried.push(remedy);
        }
    }

    async fn call(&self, session: &RoleSession, base: &BaseCredentials) -> Result<Credentials, Refusal> {
        let query = self.query(session);
        let response =
            self.transport.send(|client, endpoint| self.request(client, endpoint, &query, base)).await?;
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
        if seconds > ONE_HOUR_SECONDS
            && self.one_hour_roles().get(&session.role).is_some_and(|since| since.elapsed() < ONE_HOUR_MEMORY)
        {
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

    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        query: &str,
        base: &BaseCredentials,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let headers = RpcCall {
            host: endpoint.host(),
            action: "AssumeRole",
            version: "2015-04-01",
            canonical_query: query,
            date: self.transport.now(),
            nonce: &uuid::Uuid::new_v4().to_string(),
        }
        .headers(base)
        .map_err(refusal::unsendable)?;
        let mut url = endpoint.url().clone();
        url.set_query(Some(query));
        Ok(client.post(url).headers(headers).header("accept", "application/json"))
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
        roles.insert(session.role.clone(), Instant::now());
        true
    }

    fn one_hour_roles(&self) -> MutexGuard<'_, HashMap<RoleArn, Instant>> {
        self.one_hour_roles.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

/// Bounds one issue with all its retries. No pod waits that long: the cache answers earlier and lets this go on.
const CALL_DEADLINE: Duration = Duration::from_secs(6);
/// How much longer than asked for credentials may seem to live by STS's own `Date`, which is in whole seconds.
const DATE_TOLERANCE: Duration = Duration::from_secs(5);
/// What every role allows: the smallest `MaxSessionDuration`.
const ONE_HOUR_SECONDS: u64 = 3600;
/// After that a role is asked for longer sessions again: somebody may have raised its limit.
const ONE_HOUR_MEMORY: Duration = Duration::from_hours(24);
const MAX_ONE_HOUR_ROLES: usize = 1024;

#[cfg(test)]
mod tests;
