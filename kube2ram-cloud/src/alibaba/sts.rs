//! AssumeRole at STS: the production [`Issuer`], with the error table of STS and its single retries.
//! Source: STS API 2015-04-01, AssumeRole. Depends on `base`, `transport`, `sign`, `wire`; called by
//! `credentials`, composed by `app`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

pub use super::transport::{StsClient, StsClientError};
use super::{
    base::{Base, BaseCredentials},
    endpoint::Endpoint,
    refusal::{self, Refusal, Remedy},
    sign::{RpcCall, canonical_query},
    transport::{Transport, read},
    wire::parse_assume_role,
};
use crate::{
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    role::{Grant, RoleArn, RoleSession},
};
use kube2ram_service::clock::Clock;

/// What a role is asked for next that refused a longer session.
#[derive(Clone, Copy, Debug)]
struct Shorter {
    seconds: u64,
    /// When it last refused a longer one.
    since: Instant,
}

/// Issues credentials through AssumeRole.
pub struct StsIssuer {
    transport: Transport,
    base: Base,
    clock: Arc<dyn Clock>,
    /// Roles that refused a session as long as was asked for, and what they are asked for next.
    shorter: Mutex<HashMap<RoleArn, Shorter>>,
}

impl StsIssuer {
    /// Connects on first use only. Tries `endpoints` in order.
    pub fn new(client: StsClient, endpoints: Vec<Endpoint>, base: Base, clock: Arc<dyn Clock>) -> Self {
        let transport = Transport::new(client, endpoints, Arc::clone(&clock));
        Self { transport, base, clock, shorter: Mutex::default() }
    }

    /// Calls, and once for each remedy that STS's refusals ask for, again.
    async fn assume_role(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let mut base = self.base.current(&self.transport).await.map_err(refusal::no_base)?;
        let mut tried = Vec::new();
        let mut seconds = self.seconds_of(session);
        loop {
            let refusal = match self.call(session, seconds, &base).await {
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
                Remedy::ShorterSession => {
                    let is_shorter = self.shorten(session, seconds);
                    seconds = SHORTEST_SECONDS;
                    is_shorter
                }
                Remedy::ServerTime => self.transport.adopt_time(refusal.server_time),
            };
            if !applied {
                return Err(refusal.error);
            }
            tried.push(remedy);
        }
    }

    async fn call(
        &self,
        session: &RoleSession,
        seconds: u64,
        base: &BaseCredentials,
    ) -> Result<Credentials, Refusal> {
        let query = query(session, seconds);
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

    /// When STS answered, by its own `Date`, so that a wrong local clock neither lengthens nor shortens the
    /// lifetime of credentials; the local time if `Date` is missing or impossible.
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

    /// How long a session to ask for: what is wanted, or what the role was last known to allow.
    fn seconds_of(&self, session: &RoleSession) -> u64 {
        let wanted = session.duration.as_secs();
        let known = self.shorter().get(&session.role).copied().filter(Shorter::is_fresh);
        known.map_or(wanted, |known| known.seconds.min(wanted))
    }

    /// The role refused a session of so many seconds. Whether there is a shorter one to ask for: now the
    /// shortest, which every role allows, and at the next refresh the next one down, so that no fetch takes
    /// more than two calls.
    fn shorten(&self, session: &RoleSession, refused: u64) -> bool {
        let Some(next) = LADDER_SECONDS.into_iter().find(|&seconds| seconds < refused) else {
            return false;
        };
        let mut shorter = self.shorter();
        if shorter.len() >= MAX_SHORTER {
            shorter.clear();
        }
        let known = shorter.get(&session.role).copied().filter(Shorter::is_fresh);
        // Another session of the role may have got further down meanwhile.
        let seconds = known.map_or(next, |known| known.seconds.min(next));
        shorter.insert(session.role.clone(), Shorter { seconds, since: Instant::now() });
        true
    }

    fn shorter(&self) -> MutexGuard<'_, HashMap<RoleArn, Shorter>> {
        self.shorter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shorter {
    fn is_fresh(&self) -> bool {
        self.since.elapsed() < SHORTER_MEMORY
    }
}

fn query(session: &RoleSession, seconds: u64) -> String {
    let seconds = seconds.to_string();
    let mut parameters = vec![
        ("DurationSeconds", &*seconds),
        // The default is XML.
        ("Format", "JSON"),
        ("RoleArn", session.role.as_str()),
        ("RoleSessionName", session.session_name.as_str()),
    ];
    let Grant::AssumeRole { external_id } = &session.grant;
    parameters.extend(external_id.as_ref().map(|id| ("ExternalId", id.as_str())));
    parameters.extend(session.policy.as_ref().map(|policy| ("Policy", policy.as_str())));
    canonical_query(&parameters)
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

/// Bounds one issue with all its retries. No pod waits that long: the cache answers earlier and lets this go
/// on.
const CALL_DEADLINE: Duration = Duration::from_secs(6);
/// How much longer than asked for credentials may seem to live by STS's own `Date`, which is in whole
/// seconds.
const DATE_TOLERANCE: Duration = Duration::from_secs(5);
/// The sessions that a role is asked for, from refresh to refresh, which refuses a longer one.
const LADDER_SECONDS: [u64; 5] = [8 * 3600, 6 * 3600, 4 * 3600, 2 * 3600, SHORTEST_SECONDS];
/// What every role allows: the smallest `MaxSessionDuration`.
const SHORTEST_SECONDS: u64 = 3600;
/// After that time the full session duration is requested for a role again: its limit may have been raised.
const SHORTER_MEMORY: Duration = Duration::from_hours(24);
const MAX_SHORTER: usize = 1024;

#[cfg(test)]
mod tests;
