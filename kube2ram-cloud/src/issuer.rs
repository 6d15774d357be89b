//! Sessions of roles from STS, with each refusal's remedy tried once: the loop that is the same in all clouds
//! and for each right by which a role is assumed. Depends on `sts` and a cloud's [`Protocol`]; called by each
//! cloud's `sts` and `exchange`.

mod assume_role;
mod exchange;
pub(crate) mod memory;
mod skew;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::timeout;
use tracing::warn;

use self::memory::Memory;
pub(crate) use self::{
    assume_role::AssumeRole,
    exchange::{ProvenAccount, TokenExchange},
};
use crate::{
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

/// What a cloud's STS is sent, and how its answers are read. `Proof` is what proves the right to the role.
pub(crate) trait Protocol<Proof>: Send + Sync + 'static {
    /// The call.
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_, Proof>,
    ) -> Result<reqwest::RequestBuilder, Refusal>;

    /// Reads the answer.
    fn read(&self, body: &[u8]) -> Result<Issued, WireError>;

    /// The table of errors.
    fn refusals(&self) -> &Table;
}

/// One call.
pub(crate) struct Call<'a, Proof> {
    pub(crate) session: &'a RoleSession,
    /// `DurationSeconds`.
    pub(crate) seconds: u64,
    pub(crate) proof: &'a Proof,
    /// STS's time.
    pub(crate) now: Timestamp,
}

/// By what right roles are assumed. An issuer has one, and never uses another.
#[async_trait]
pub(crate) trait Right: Send + Sync + 'static {
    /// What proves the right in a call.
    type Proof: Send + Sync + 'static;

    /// A proof for a session, which must be by this right.
    async fn proof(&self, session: &RoleSession, sts: &Transport) -> Result<Self::Proof, IssueError>;

    /// Another proof than the one that STS `refused` with `error`; `None` when there is none.
    async fn another(
        &self,
        session: &RoleSession,
        refused: &Self::Proof,
        error: &IssueError,
        sts: &Transport,
    ) -> Result<Option<Self::Proof>, IssueError>;

    /// STS answered a call with this proof, at that time by its own clock.
    fn answered(&self, _proof: &Self::Proof, _date: Timestamp) {}

    /// Fails with what is wrong when the answer is to another call.
    fn check(&self, _session: &RoleSession, _issued: &Issued) -> Result<(), &'static str> {
        Ok(())
    }

    /// Removes from an error what it repeats of the proof.
    fn withhold(&self, _proof: &Self::Proof, _error: &mut IssueError) {}
}

/// Issues credentials of roles through a protocol, by a right.
pub(crate) struct RoleIssuer<P, R> {
    protocol: P,
    right: R,
    pub(crate) transport: Transport,
    clock: Arc<dyn Clock>,
    /// Roles that refused a session as long as was asked for, and the seconds they are asked for next.
    pub(crate) shorter: Memory<u64>,
    /// Roles in whose account STS is off in the regions of the first endpoints, and the first endpoint where
    /// it is not. An account of others must not move the calls for all other roles.
    first_endpoints: Memory<usize>,
}

impl<P: Protocol<R::Proof>, R: Right> RoleIssuer<P, R> {
    /// Connects on first use only. Tries `endpoints` in order.
    pub(crate) fn new(
        protocol: P,
        right: R,
        client: StsClient,
        endpoints: Vec<Endpoint>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let transport = Transport::new(client, endpoints, Arc::clone(&clock));
        let (shorter, first_endpoints) = (Memory::default(), Memory::default());
        Self { protocol, right, transport, clock, shorter, first_endpoints }
    }

    /// Calls, and remembers at which endpoint the role could be assumed. An endpoint that does not answer is
    /// not remembered: STS may have been activated in the region meanwhile.
    async fn assume(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let known = self.first_endpoints.known(&session.role);
        let mut first = known.unwrap_or_default();
        let outcome = self.assume_from(&mut first, session).await;
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
    async fn assume_from(&self, first: &mut usize, session: &RoleSession) -> Result<Credentials, IssueError> {
        let mut proof = self.right.proof(session, &self.transport).await?;
        let mut tried = Vec::new();
        let mut seconds = self.seconds_of(session);
        loop {
            let mut refusal = match self.call(*first, session, seconds, &proof).await {
                Ok(credentials) => return Ok(credentials),
                Err(refusal) => refusal,
            };
            self.right.withhold(&proof, &mut refusal.error);
            let Some(remedy) = refusal.remedy().filter(|remedy| !tried.contains(remedy)) else {
                return Err(refusal.error);
            };
            let applied = match remedy {
                Remedy::FreshBase => {
                    match self.right.another(session, &proof, &refusal.error, &self.transport).await? {
                        Some(another) => {
                            proof = another;
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
        proof: &R::Proof,
    ) -> Result<Credentials, Refusal> {
        let request = |client: &reqwest::Client, endpoint: &Endpoint| {
            let call = Call { session, seconds, proof, now: self.transport.now() };
            self.protocol.request(client, endpoint, &call)
        };
        let response = self.transport.send(first, request).await?;
        let date = response.headers().get(http::header::DATE).and_then(refusal::parse_date);
        if let Some(date) = date {
            self.right.answered(proof, date);
        }
        let body = self.transport.read(response, self.protocol.refusals()).await?;
        let issued = self.protocol.read(&body);
        let issued =
            issued.map_err(|error| refusal::nonsense("answer not understood", Some(error.into())))?;
        self.right.check(session, &issued).map_err(|wrong| refusal::nonsense(wrong, None))?;
        let issued_at = self.issued_at(issued.expires_at, date, session);
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
    fn issued_at(&self, expires_at: Timestamp, date: Option<Timestamp>, session: &RoleSession) -> Timestamp {
        let lifetime = |issued_at: &Timestamp| expires_at.duration_since(*issued_at);
        let longest = session.duration + DATE_TOLERANCE;
        date.filter(|date| Duration::try_from(lifetime(date)).is_ok_and(|lifetime| lifetime <= longest))
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
impl<P: Protocol<R::Proof>, R: Right> Issuer for RoleIssuer<P, R> {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        timeout(CALL_DEADLINE, self.assume(session)).await.unwrap_or_else(|_elapsed| {
            Err(refusal::ours(IssueErrorKind::Unavailable, "Timeout", "no answer from STS in time", None))
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
