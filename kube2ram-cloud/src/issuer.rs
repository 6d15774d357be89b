//! AssumeRole, with each refusal's remedy tried once: the loop that is the same in all clouds.
//! Depends on `base`, `sts` and a cloud's [`Protocol`]; called by each cloud's `sts`.

pub(crate) mod memory;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::timeout;
use tracing::warn;

use self::memory::Memory;
use crate::{
    base::{Base, BaseCredentials, BaseError},
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    endpoint::Endpoint,
    role::RoleSession,
    sts::{
        StsClient,
        refusal::{self, Refusal, Remedy, Table},
        transport::Transport,
    },
    wire::{Issued, WireError},
};
use kube2ram_service::clock::Clock;

/// What a cloud's STS is sent, and how its answers are read.
pub(crate) trait Protocol: Send + Sync + 'static {
    /// The signed call.
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_>,
    ) -> Result<reqwest::RequestBuilder, Refusal>;

    /// Reads the answer.
    fn read(&self, body: &[u8]) -> Result<Issued, WireError>;

    /// The table of errors.
    fn refusals(&self) -> &Table;
}

/// One call of AssumeRole.
pub(crate) struct Call<'a> {
    pub(crate) session: &'a RoleSession,
    /// `DurationSeconds`.
    pub(crate) seconds: u64,
    /// What to sign with.
    pub(crate) base: &'a BaseCredentials,
    /// STS's time.
    pub(crate) now: Timestamp,
}

/// Issues credentials through AssumeRole.
pub(crate) struct AssumeRole {
    protocol: Box<dyn Protocol>,
    pub(crate) transport: Transport,
    base: Base,
    clock: Arc<dyn Clock>,
    /// Roles that refused a session as long as was asked for, and the seconds they are asked for next.
    pub(crate) shorter: Memory<u64>,
    /// Roles in whose account STS is off in the regions of the first endpoints, and the first endpoint where
    /// it is not. An account of others must not move the calls for all other roles.
    first_endpoints: Memory<usize>,
}

impl AssumeRole {
    /// Connects on first use only. Tries `endpoints` in order.
    pub(crate) fn new(
        protocol: impl Protocol,
        client: StsClient,
        endpoints: Vec<Endpoint>,
        base: Base,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let transport = Transport::new(client, endpoints, Arc::clone(&clock));
        let (shorter, first_endpoints) = (Memory::default(), Memory::default());
        Self { protocol: Box::new(protocol), transport, base, clock, shorter, first_endpoints }
    }

    /// Calls, and remembers at which endpoint the role could be assumed. An endpoint that does not answer is
    /// not remembered: STS may have been activated in the region meanwhile.
    async fn assume_role(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let known = self.first_endpoints.known(&session.role);
        let mut first = known.unwrap_or_default();
        let outcome = self.assume_role_from(&mut first, session).await;
        match &outcome {
            Ok(_) if Some(first) != known && first > 0 => {
                let (role, endpoint) = (session.role.as_str(), self.transport.host(first));
                warn!(role, endpoint, "STS is off in a region for the role; calling another endpoint for it");
                self.first_endpoints.note(&session.role, |_| first);
            }
            Err(error) if error.kind == IssueErrorKind::Unavailable => {
                self.first_endpoints.forget(&session.role);
            }
            Ok(_) | Err(_) => {}
        }
        outcome
    }

    /// Calls, and once for each remedy that STS's refusals ask for, again. Leaves in `first` the first
    /// endpoint that it may call.
    async fn assume_role_from(
        &self,
        first: &mut usize,
        session: &RoleSession,
    ) -> Result<Credentials, IssueError> {
        let mut base = self.base.current(&self.transport).await.map_err(BaseError::into_issue_error)?;
        let mut tried = Vec::new();
        let mut seconds = self.seconds_of(session);
        loop {
            let refusal = match self.call(*first, session, seconds, &base).await {
                Ok(credentials) => return Ok(credentials),
                Err(refusal) => refusal,
            };
            let Some(remedy) = refusal.remedy().filter(|remedy| !tried.contains(remedy)) else {
                return Err(refusal.error);
            };
            let applied = match remedy {
                Remedy::FreshBase => {
                    match self
                        .base
                        .refresh(&base, &self.transport)
                        .await
                        .map_err(BaseError::into_issue_error)?
                    {
                        Some(fresh) => {
                            base = fresh;
                            true
                        }
                        None => false,
                    }
                }
                Remedy::FreshNonce => true,
                Remedy::NextEndpoint => match self.transport.after(refusal.endpoint) {
                    Some(next) => {
                        *first = next;
                        true
                    }
                    None => false,
                },
                Remedy::OneHour => {
                    let is_shorter = seconds > SHORTEST_SECONDS;
                    if is_shorter {
                        self.remember(session, SHORTEST_SECONDS);
                    }
                    seconds = SHORTEST_SECONDS;
                    is_shorter
                }
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
        first: usize,
        session: &RoleSession,
        seconds: u64,
        base: &BaseCredentials,
    ) -> Result<Credentials, Refusal> {
        let request = |client: &reqwest::Client, endpoint: &Endpoint| {
            let call = Call { session, seconds, base, now: self.transport.now() };
            self.protocol.request(client, endpoint, &call)
        };
        let response = self.transport.send(first, request).await?;
        let date = response.headers().get(http::header::DATE).cloned();
        let body = self.transport.read(response, self.protocol.refusals()).await?;
        let issued = self.protocol.read(&body);
        let issued =
            issued.map_err(|error| refusal::nonsense("answer not understood", Some(error.into())))?;
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
            request_id: issued.request_id,
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

    /// How long a session to ask for: what is wanted, or what the role was last known to allow.
    fn seconds_of(&self, session: &RoleSession) -> u64 {
        let wanted = session.duration.as_secs();
        self.shorter.known(&session.role).map_or(wanted, |known| known.min(wanted))
    }

    /// The role refused a session of so many seconds. Whether there is a shorter one to ask for: now the
    /// shortest, which every role allows, and at the next refresh the next one down, so that no fetch takes
    /// more than two calls.
    fn shorten(&self, session: &RoleSession, refused: u64) -> bool {
        let Some(next) = LADDER_SECONDS.into_iter().find(|&seconds| seconds < refused) else {
            return false;
        };
        self.remember(session, next);
        true
    }

    fn remember(&self, session: &RoleSession, next: u64) {
        // Another session of the role may have got further down meanwhile.
        self.shorter.note(&session.role, |known| known.map_or(next, |known| known.min(next)));
    }
}

#[async_trait]
impl Issuer for AssumeRole {
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
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(6);
/// How much longer than asked for credentials may seem to live by STS's own `Date`, which is in whole
/// seconds.
const DATE_TOLERANCE: Duration = Duration::from_secs(5);
/// The sessions that a role is asked for, from refresh to refresh, which refuses a longer one.
const LADDER_SECONDS: [u64; 5] = [8 * 3600, 6 * 3600, 4 * 3600, 2 * 3600, SHORTEST_SECONDS];
/// What every role allows: the smallest `MaxSessionDuration`.
const SHORTEST_SECONDS: u64 = 3600;
