//! The transport to STS: its endpoints in their order, its clock, bounded answers. Depends on `endpoint`,
//! `refusal`, `resolve`, `wire`; called by `base` and `issuer`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use secrecy::zeroize::Zeroizing;
use tokio::time::{Instant, timeout};
use tracing::warn;
use url::Url;

use super::{
    refusal::{self, Refusal, Table},
    resolve::Absolute,
};
use crate::{endpoint::Endpoint, wire::BODY_LIMIT_BYTES};
use kube2ram_service::{clock::Clock, telemetry::chain};

/// Makes connections to STS.
#[derive(Clone, Debug)]
pub struct StsClient(reqwest::Client);

impl StsClient {
    /// Prepares it; connects on first use only. `is_https`: only `https://` endpoints may be asked. Otherwise
    /// no certificate is checked, and none need be there to check by.
    ///
    /// # Errors
    /// When no certificates are found by which STS's could be checked, or they cannot be read.
    ///
    /// # Panics
    /// When no process-wide rustls provider is installed, which is a bug of `app`.
    pub fn try_new(is_https: bool) -> Result<Self, StsClientError> {
        let client = reqwest::Client::builder()
            // A proxy or a redirect target would see the agent's signed requests and its token.
            .no_proxy()
            .dns_resolver(Absolute)
            .redirect(reqwest::redirect::Policy::none())
            .https_only(is_https)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS);
        let client = if is_https { client } else { client.tls_certs_only([]) };
        client.build().map(Self).map_err(StsClientError)
    }
}

/// There is nothing to know STS by.
#[derive(Debug, thiserror::Error)]
#[error(
    "no usable CA certificates to verify STS with: check SSL_CERT_FILE and SSL_CERT_DIR, or the image's /etc/ssl/certs"
)]
pub struct StsClientError(#[source] reqwest::Error);

/// Sends to STS. Connects on first use only.
pub(crate) struct Transport {
    client: reqwest::Client,
    endpoints: Box<[Endpoint]>,
    clock: Arc<dyn Clock>,
    /// Which endpoint answered last, after the first had not.
    detour: Mutex<Option<Detour>>,
    /// How far STS's clock is ahead of ours; 0 until it complained.
    clock_offset_seconds: AtomicI64,
}

/// Another endpoint than the first, which may cost more or leave the VPC: the first is tried again after a
/// while.
#[derive(Clone, Copy)]
pub(crate) struct Detour {
    pub(crate) endpoint: usize,
    pub(crate) until: Instant,
}

impl Transport {
    /// Tries `endpoints` in order.
    pub(crate) fn new(client: StsClient, endpoints: Vec<Endpoint>, clock: Arc<dyn Clock>) -> Self {
        Self {
            client: client.0,
            endpoints: endpoints.into(),
            clock,
            detour: Mutex::default(),
            clock_offset_seconds: AtomicI64::new(0),
        }
    }

    /// Sends to the endpoint `first`, or to the one that recently had to replace it, and to the next one when
    /// an endpoint is unreachable or silent, but to none before `first`. A repeated request is harmless: each
    /// answer is another set of credentials.
    pub(crate) async fn send(
        &self,
        first: usize,
        request: impl Fn(&reqwest::Client, &Endpoint) -> Result<reqwest::RequestBuilder, Refusal>,
    ) -> Result<reqwest::Response, Refusal> {
        let detour = self.detour().filter(|detour| Instant::now() < detour.until).map_or(0, |d| d.endpoint);
        let start = first.max(detour);
        let mut failure = refusal::nonsense("no endpoint", None);
        for index in (start..self.endpoints.len()).chain(first..start) {
            let Some(endpoint) = self.endpoints.get(index) else { break };
            let sending = timeout(ANSWER_TIMEOUT, request(&self.client, endpoint)?.send());
            failure = match sending.await {
                Ok(Ok(response)) => {
                    // A call that must not go to the first endpoint reports nothing of it.
                    if index != start && first == 0 {
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

    /// STS's time, as far as it is known.
    pub(crate) fn now(&self) -> Timestamp {
        let now = self.clock.now();
        let offset = SignedDuration::from_secs(self.clock_offset_seconds.load(Ordering::Relaxed));
        now.checked_add(offset).unwrap_or(now)
    }

    /// Adopts the time of STS's answer; returns whether it has one.
    pub(crate) fn adopt_time(&self, server_time: Option<Timestamp>) -> bool {
        let Some(server_time) = server_time else { return false };
        let offset = server_time.duration_since(self.clock.now()).as_secs();
        warn!(offset_seconds = offset, "the node's clock differs from that of STS");
        self.clock_offset_seconds.store(offset, Ordering::Relaxed);
        true
    }

    /// Reads an answer to its end, into memory that is zeroised; an error's becomes a refusal. What TLS and
    /// HTTP have buffered of it is out of reach.
    pub(crate) async fn read(
        &self,
        mut response: reqwest::Response,
        refusals: &Table,
    ) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        // All of it at once: a vector that grows leaves copies behind.
        let mut body = Zeroizing::new(Vec::with_capacity(BODY_LIMIT_BYTES));
        let reading = async {
            while let Some(chunk) = response.chunk().await.map_err(refusal::transport)? {
                if body.len() + chunk.len() > BODY_LIMIT_BYTES {
                    return Err(refusal::nonsense("answer too long", None));
                }
                body.extend_from_slice(&chunk);
            }
            Ok(())
        };
        timeout(ANSWER_TIMEOUT, reading).await.unwrap_or_else(|_elapsed| Err(refusal::silence()))?;
        if !response.status().is_success() {
            let mut refusal = refusals.refusal(response.status(), response.headers(), &body);
            refusal.endpoint = self.index_of(response.url());
            return Err(refusal);
        }
        Ok(body)
    }

    /// The endpoint after the one that refused, if there is one.
    pub(crate) fn after(&self, refused: Option<u8>) -> Option<usize> {
        refused.map(|index| usize::from(index) + 1).filter(|&next| next < self.endpoints.len())
    }

    /// The host of an endpoint.
    pub(crate) fn host(&self, index: usize) -> &str {
        self.endpoints.get(index).map_or("", Endpoint::host)
    }

    /// Moves all calls to the endpoint after the one that refused, as when that one could not be reached;
    /// whether there is one. Only for a refusal that is about the agent's own account.
    pub(crate) fn leave(&self, refused: Option<u8>) -> bool {
        let Some(next) = self.after(refused) else { return false };
        warn!(endpoint = self.host(next), "STS is off in the region of the endpoint before this one");
        *self.detour() = Some(Detour { endpoint: next, until: Instant::now() + DETOUR });
        true
    }

    /// The endpoints, in their order.
    pub(crate) fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint that has answered.
    pub(crate) fn endpoint_of(&self, response: &reqwest::Response) -> Option<&Endpoint> {
        self.endpoints.get(usize::from(self.index_of(response.url())?))
    }

    fn index_of(&self, url: &Url) -> Option<u8> {
        let index = self.endpoints.iter().position(|endpoint| endpoint.url().origin() == url.origin())?;
        u8::try_from(index).ok()
    }

    pub(crate) fn detour(&self) -> MutexGuard<'_, Option<Detour>> {
        self.detour.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bounds name look-up, TCP and TLS together, so that a second endpoint fits into the deadline. With the
/// manifests' `dnsConfig` the resolver repeats a query within it.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Bounds the wait for an answer's head, connecting included, so that a second and a third endpoint fit into
/// the deadline; and that for its body. STS takes some 50 ms.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_millis(1900);
/// How long the first endpoint is skipped after another one had to replace it.
const DETOUR: Duration = Duration::from_mins(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_IDLE_CONNECTIONS: usize = 4;
