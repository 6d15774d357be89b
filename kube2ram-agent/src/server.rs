//! The metadata service that pods reach instead of the real one: each request goes `Origin → PodUid → Pod →
//! RoleSession → Permit → Credentials → response`, or is passed through to the real server. Depends on the
//! interfaces of all earlier modules; called by `app`. Uses hyper, as `admin` does.

use std::{
    net::SocketAddr,
    os::fd::AsFd,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::Request;
use hyper::body::Incoming;
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{SetOnce, watch},
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

mod connection;
mod error;
mod identities;
mod metrics;
mod node_role;
mod notices;
mod pass_through;
pub mod path;
pub(crate) mod pass_through_limiter;
mod reply;
pub mod route;
pub mod token;

use self::{
    connection::Connection, metrics::Metrics, pass_through_limiter::PassThroughLimiter, token::Tokens,
};
pub(crate) use self::{error::RequestError, node_role::NodeRole};
pub use self::{node_role::HostNetworkPods, route::MetadataPolicy};
use crate::{
    credentials::Cache,
    datapath::{AgentAddr, Origin, OriginError, Origins},
    identity::{CgroupPods, PodUid},
    kubernetes::{Directory, Notices},
    policy::Policy,
    role::Roles,
    self_test::SelfTest,
};
use kube2ram_cloud::{MetadataAddr, dialect::Dialect, upstream::Upstream};
use kube2ram_service::{
    clock::Clock,
    connection_limiter::{ConnectionLimiter, ConnectionPermit},
    drain::Drain,
    listener,
    rate_limiter::{Rate, RateLimiters},
    telemetry::chain,
};

/// How many connections are served at once, over all listeners.
pub(crate) const CONNECTIONS: usize = 1024;
/// How many of them one pod may have, however many cgroups it creates. Callers that are not pods share one
/// such limit.
const CONNECTIONS_PER_POD: usize = 64;
/// How many of the node's own are served at once, besides.
pub(crate) const CONNECTIONS_OF_NODE: usize = 8;
/// How long a connection must be idle before it may be closed for another one: its next request may be on its
/// way.
const QUIET: Duration = Duration::from_secs(1);
/// How long a connection waits for a permit: no request is answered later.
const PERMIT_PATIENCE: Duration = Duration::from_secs(1);
/// How often it asks for one meanwhile.
const PERMIT_RETRY: Duration = Duration::from_millis(2);
/// How long pods may still use answers that the real server gave before the first agent of a boot: an SDK
/// lists roles, and requests the credentials of that role in the next moment.
const FORMER_ANSWERS: Duration = Duration::from_mins(1);
/// How many lines of the log one pod may cause: far more than any SDK does, which asks again after minutes. A
/// pod in a tight loop would drown the others' lines and fill the disk. Callers that are no pod share one
/// such limiter.
const LOG_LINES: Rate = Rate { burst: 200, interval: Duration::from_millis(50) };

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Config {
    /// The key of the annotation by which namespaces allow roles: for Events.
    pub allow_list_annotation: Box<str>,
    /// Where the real metadata server is.
    pub metadata: MetadataAddr,
    /// Which items of the real server pods may read.
    pub metadata_policy: MetadataPolicy,
    /// How many requests per second each pod may send to the real server; zero means no limit.
    pub pass_through_rate: u32,
    /// How many requests per second each pod may send in all; zero means no limit.
    pub request_rate: u32,
    /// Whether requests without a session token are refused.
    pub require_token: bool,
    /// How hostNetwork pods without their own role are treated.
    pub host_network_pods: HostNetworkPods,
    /// How the cloud's metadata service speaks.
    pub dialect: &'static Dialect,
}

/// The steps that a request goes through.
#[derive(Clone)]
pub struct Pipeline {
    /// For the expiry of tokens.
    pub clock: Arc<dyn Clock>,
    /// Cgroup → pod UID.
    pub cgroups: Arc<dyn CgroupPods>,
    /// Pod UID → pod; namespace → allow-list.
    pub directory: Arc<dyn Directory>,
    /// Pod → credentials; empty until account and region are known.
    pub entitlements: Arc<SetOnce<Entitlements>>,
    /// What pods' owners should read.
    pub notices: Arc<dyn Notices>,
    /// Pods' session tokens.
    pub tokens: Arc<Tokens>,
    /// The real metadata server.
    pub upstream: Arc<dyn Upstream>,
}

/// The steps that need to know the account and the region.
pub struct Entitlements {
    /// Pod → role session.
    pub roles: Roles,
    /// Role session → permit.
    pub policy: Policy,
    /// Permit → credentials.
    pub credentials: Cache,
}

/// The metadata service.
pub struct Server {
    config: Config,
    pipeline: Pipeline,
    metrics: Metrics,
    log: RateLimiters<PodUid>,
    pass_through_limiter: PassThroughLimiter,
    rates: RateLimiters<PodUid>,
    limiter: Arc<ConnectionLimiter<Option<PodUid>>>,
    /// Of the node's own connections, which check the agent's health: clients that nobody vouches for, some
    /// of them pods, take nothing from them.
    node_limiter: Arc<ConnectionLimiter<Option<PodUid>>>,
    /// Until when a pod may ask for another role because of that.
    former_answers_until: OnceLock<Instant>,
    /// Awaits connections of the agent itself.
    self_test: OnceLock<Arc<SelfTest>>,
    /// The host listener's address, if the node checks health there.
    checked_at: OnceLock<watch::Receiver<AgentAddr>>,
    tasks: TaskTracker,
}

impl Server {
    /// Makes the service. Its connections become tasks of `tasks`.
    pub fn new(config: Config, pipeline: Pipeline, tasks: TaskTracker, registry: &mut Registry) -> Arc<Self> {
        let limiter = ConnectionLimiter::new(CONNECTIONS, CONNECTIONS_PER_POD, QUIET);
        let node_limiter = ConnectionLimiter::new(CONNECTIONS_OF_NODE, CONNECTIONS_OF_NODE, Duration::ZERO);
        let pass_through_limiter = PassThroughLimiter::new(config.pass_through_rate);
        let rates = RateLimiters::new(Rate::per_second(config.request_rate));
        let (metrics, log) = (Metrics::new(registry), RateLimiters::new(Some(LOG_LINES)));
        Arc::new(Self {
            config,
            pipeline,
            metrics,
            log,
            pass_through_limiter,
            rates,
            limiter,
            node_limiter,
            former_answers_until: OnceLock::new(),
            self_test: OnceLock::new(),
            checked_at: OnceLock::new(),
            tasks,
        })
    }

    /// Notes that pods could reach the real server until now. For a moment they may use its answers: they are
    /// refused without an Event, and list again. Clients that keep requesting another role are reported.
    pub fn expect_former_answers(&self) {
        self.former_answers_until.get_or_init(|| Instant::now() + FORMER_ANSWERS);
    }

    fn expects_former_answers(&self) -> bool {
        self.former_answers_until.get().is_some_and(|until| Instant::now() < *until)
    }

    /// From now on connections of the agent's self-test are reported to `self_test` and not served.
    pub fn await_own(&self, self_test: Arc<SelfTest>) {
        // The first one stays: there is one for each agent.
        drop(self.self_test.set(self_test));
    }

    /// From now on `GET /healthz` is answered where the host listener is, if it comes from there: to the
    /// kubelet, for manifests of kube2iam. The connect hook records each pod that dials this address, also on
    /// the host's network. A pod whose record is lost learns that the agent answers, and nothing else.
    pub fn answer_health_checks(&self, host_listener: watch::Receiver<AgentAddr>) {
        drop(self.checked_at.set(host_listener));
    }

    /// Whether a connection without a record comes from the address of the host listener to that address.
    fn is_of_node(&self, stream: &TcpStream, peer: SocketAddr) -> bool {
        let Some(host_listener) = self.checked_at.get() else { return false };
        let AgentAddr(address) = *host_listener.borrow();
        peer.ip() == *address.ip() && stream.local_addr().is_ok_and(|local| local == SocketAddr::V4(address))
    }

    /// Serves one of the listeners to which pods are redirected, until accepting ends or the listener does.
    /// Its connections then drain by themselves: within 6 s, or, while another agent accepts, within 16 s.
    /// `origins` identifies their clients.
    ///
    /// # Cancel safety
    /// Dropping the future closes its handle of the listener only.
    pub async fn serve(self: Arc<Self>, listener: Arc<TcpListener>, origins: Arc<dyn Origins>, drain: Drain) {
        // In a box, which lasts for a moment: there are two thousand such listeners, which would each hold as
        // much for nothing.
        let begin = |stream, peer| Box::pin(self.begin(&*origins, stream, peer, &drain));
        listener::accept(listener, &drain, begin).await;
    }

    /// Starts serving an accepted connection, if it gets a permit. Its origin is read before its first byte:
    /// nothing that the caller sends can influence its identity.
    async fn begin(
        self: &Arc<Self>,
        origins: &dyn Origins,
        stream: TcpStream,
        peer: SocketAddr,
        drain: &Drain,
    ) {
        let connection = match origins.origin_of(stream.as_fd()) {
            Ok(origin) => {
                if self.self_test.get().is_some_and(|self_test| self_test.takes(peer, &origin)) {
                    return;
                }
                Connection::new(Arc::clone(self), peer, Some(origin))
            }
            // Its request decides.
            Err(OriginError::Unvouched) if self.is_of_node(&stream, peer) => {
                Connection::of_node(Arc::clone(self), peer)
            }
            Err(error) => {
                self.count_unvouched(peer, &error);
                Connection::new(Arc::clone(self), peer, None)
            }
        };
        let Some(permit) = self.permit_for(&connection, drain).await else {
            self.metrics.connections_refused.inc();
            debug!(%peer, "too many connections");
            return;
        };
        if permit.displaced {
            self.metrics.connections_displaced.inc();
        }
        let (gauge, drain) = (self.metrics.connections.clone(), drain.clone());
        // In a box, because the runtime would move the future, which is large, several times.
        self.tasks.spawn(Box::pin(async move {
            gauge.inc();
            let answer = |request: Request<Incoming>| connection.answer(request.map(drop), Some(&permit));
            listener::drive(stream, &drain, permit.lost(), answer).await;
            gauge.dec();
        }));
    }

    /// The permit of a connection. A pod with a request on each of its connections waits on its in-pod
    /// listener, where it delays no other pod. On the host listener it would.
    async fn permit_for(
        &self,
        connection: &Connection,
        drain: &Drain,
    ) -> Option<ConnectionPermit<Option<PodUid>>> {
        let pod = connection.pod_uid();
        let limiter = if connection.checks_health() { &self.node_limiter } else { &self.limiter };
        let deadline = Instant::now() + PERMIT_PATIENCE;
        loop {
            let permit = limiter.take(pod.clone());
            let may_wait = connection.has_own_listener() && !drain.accepting().is_cancelled();
            if permit.is_some() || !may_wait || Instant::now() > deadline {
                return permit;
            }
            sleep(PERMIT_RETRY).await;
        }
    }

    /// Serves one connection whose caller is already known, until it ends or is drained. `origin` is trusted:
    /// it must be the result of an [`Origins`] for this connection, or a test's value.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub async fn serve_stream<S>(
        self: Arc<Self>,
        stream: S,
        peer: SocketAddr,
        origin: Option<Origin>,
        drain: &Drain,
    ) where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let connection = Connection::new(self, peer, origin);
        let kept = CancellationToken::new();
        let answer = |request: Request<Incoming>| connection.answer(request.map(drop), None);
        listener::drive(stream, drain, &kept, answer).await;
    }

    /// Once for a connection.
    fn count_unvouched(&self, peer: SocketAddr, error: &OriginError) {
        self.metrics.unvouched_connections.inc();
        self.metrics.identities.count(error.into());
        if self.log.of(None).admit(Instant::now()).is_ok() {
            warn!(%peer, error = chain(error), "connection without origin");
        }
    }
}

/// Registers what is counted here, for the table of all metrics.
#[cfg(test)]
pub(crate) fn register_metrics(registry: &mut Registry) {
    drop(Metrics::new(registry));
}

#[cfg(test)]
mod tests;
