//! The composition of the server: makes all parts, spawns the long-running ones, and stops when one of them
//! ends. Depends on all other modules but `client`; called by the command `server`, which brings the
//! mappings.

use std::{future::ready, io, net::SocketAddr, sync::Arc, time::Duration};

use http::Request;
use hyper::body::Incoming;
use kube2ram_cloud::{Endpoint, StsClient, StsClientError, alibaba::caller_identity::CallerIdentityClient};
use prometheus_client::registry::Registry;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::JoinError,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error, info, warn};

#[cfg(test)]
mod budget;
mod listeners;

pub use self::listeners::Listeners;
use self::listeners::{AdminPort, Webhook as WebhookPort};
use crate::{
    identity::Map,
    tls::{self, Tls, TlsError},
    token::ClusterId,
    verify::{self, Verifier},
    webhook::{self, Webhook},
};
use kube2ram_service::{
    admin::{Admin, Pending, Readiness},
    clock::Clock,
    connection_limiter::{ConnectionLimiter, ConnectionPermit},
    drain::Drain,
    listener,
    named_tasks::{Ended, NamedTasks},
    probe::Probe,
    telemetry::chain,
};

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster that tokens must be for.
    pub cluster: ClusterId,
    /// The endpoints of STS, to try in their order.
    pub sts: Vec<Endpoint>,
    /// The certificate.
    pub tls: tls::Settings,
    /// What is to be made at the start for the API server; `None` when it was made before.
    pub init: Option<tls::Init>,
    /// How tokens are verified.
    pub verify: verify::Settings,
    /// How reviews are answered.
    pub webhook: webhook::Settings,
    /// How long logins may go on once the server is to stop.
    pub grace: Duration,
}

/// What the command brings.
pub struct Parts {
    /// Identities → users.
    pub map: Arc<dyn Map>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// What readiness waits for.
    pub readiness: Readiness,
    /// All metrics.
    pub registry: Registry,
    /// Tasks without which the server must not go on, such as those that read mappings, by name.
    pub background: NamedTasks,
    /// The sockets.
    pub listeners: Listeners,
    /// Where the commands `live` and `ready` ask, if there is a directory for it.
    pub probe: Option<Probe>,
}

/// Why the server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A task has ended.
    #[error("the task for {0} has ended")]
    Ended(&'static str),
    /// A task has panicked.
    #[error("a task has panicked")]
    Panicked(#[source] JoinError),
    /// STS cannot be known by its certificate.
    #[error("cannot make a client for STS")]
    Sts(#[source] StsClientError),
    /// There is no certificate.
    #[error("cannot serve TLS")]
    Tls(#[source] TlsError),
}

/// Serves until `shutdown`, and then drains: it reports that it is not ready, accepts no more, and lets
/// logins end that have begun.
///
/// # Errors
/// See [`ServeError`].
///
/// # Cancel safety
/// Dropping the future stops serving at once.
pub async fn run(settings: Settings, parts: Parts, shutdown: CancellationToken) -> Result<(), ServeError> {
    let Parts { map, clock, readiness, mut registry, mut background, listeners, probe } = parts;
    // An error means that a test has installed it already.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let starting = readiness.wait_for("the start");
    let is_https = settings.sts.iter().all(Endpoint::is_https);
    let client = StsClient::try_new(is_https).map_err(ServeError::Sts)?;
    // The API server reads these files at its start, which may come before that of the mappings.
    if let Some(init) = &settings.init {
        let report = tls::init(init, clock.now()).map_err(ServeError::Tls)?;
        if report.made_authority || report.wrote_kubeconfig {
            warn!("{report}");
        }
    }
    let tls = Tls::load(settings.tls, Arc::clone(&clock), &mut registry).map_err(ServeError::Tls)?;
    let tasks = TaskTracker::new();
    let sts = CallerIdentityClient::new(client, settings.sts, Arc::clone(&clock));
    let verifier = Verifier::new(settings.cluster, settings.verify, sts, clock, tasks.clone(), &mut registry);
    let webhook = Webhook::new(settings.webhook, verifier, Arc::clone(&map), &mut registry);
    registry.register_collector(Box::new(readiness.clone()));

    let (drain, admin_drain) = (Drain::new(), Drain::new());
    let server = Server { webhook, tls: Arc::clone(&tls), tasks: tasks.clone(), drain: drain.clone() };
    let (webhook_port, admin_port) = listeners.split();
    let (loaded, listens) = (readiness.wait_for("mappings"), readiness.wait_for("the webhook's port"));
    background.spawn("the certificate", tls.keep(readiness.clone()));
    background.spawn("mappings", await_mappings(Arc::clone(&map), loaded));
    background.spawn("the webhook", serve_webhook(Arc::new(server), webhook_port, map, listens));
    let admin_service =
        Arc::new(Admin { readiness: readiness.clone(), registry, serving: Handle::current() });
    background.spawn("the admin listener", serve_admin(admin_service, admin_port, admin_drain));
    if let Some(probe) = probe {
        background.spawn("the probe", probe.run(readiness.clone()));
    }
    starting.ready();
    info!("serving");

    tokio::select! {
        biased;
        () = shutdown.cancelled() => {}
        Some(ended) = background.ended() => return Err(why(ended)),
    }
    // It stays pending.
    drop(readiness.wait_for("the shutdown"));
    tasks.close();
    // The API server may be about to use a connection that it has kept: one that is closed now could lose its
    // request. So each such connection gets a moment for one more request, which is answered as its last.
    drain.hand_over();
    let _ended_or_late = timeout(LAST_REQUESTS, tasks.wait()).await;
    drain.close();
    if timeout(settings.grace, tasks.wait()).await.is_err() {
        warn!("connections are cut off: their logins took longer than the grace period");
    }
    info!("drained");
    background.shutdown().await;
    Ok(())
}

/// What every connection needs.
struct Server {
    webhook: Webhook,
    tls: Arc<Tls>,
    tasks: TaskTracker,
    drain: Drain,
}

/// Listens when it is this server's turn, and serves.
async fn serve_webhook(server: Arc<Server>, port: WebhookPort, map: Arc<dyn Map>, listens: Pending) {
    let can_answer = || map.is_loaded() && server.tls.is_valid();
    match port.listen(can_answer).await {
        Ok(listening) => {
            listens.ready();
            accept(server, listening).await;
        }
        Err(error) => error!(error = chain(&error), "cannot listen on the webhook's port"),
    }
}

/// Serves liveness, readiness and metrics.
async fn serve_admin(admin: Arc<Admin>, port: AdminPort, drain: Drain) {
    match port.listen().await {
        Ok(listening) => admin.serve(listening, TaskTracker::new(), drain).await,
        Err(error) => error!(error = chain(&error), "cannot listen on the admin port"),
    }
}

/// Accepts until the drain, and then waits for the end: the task must not end before the server.
async fn accept(server: Arc<Server>, listening: Arc<TcpListener>) {
    // API servers share few addresses, so one address may have all connections.
    let limiter = ConnectionLimiter::new(CONNECTIONS, CONNECTIONS, QUIET);
    // The drain is not over before the connections in the backlog are accepted, also if none is open.
    let accepting = server.tasks.token();
    listener::accept(listening, &server.drain, |stream, peer| {
        match limiter.take(peer.ip()) {
            Some(permit) => {
                let connection = Arc::clone(&server).connection(stream, permit);
                drop(server.tasks.spawn(Box::pin(connection)));
            }
            None => debug!(%peer, "too many connections"),
        }
        ready(())
    })
    .await;
    drop(accepting);
    if server.drain.accepting().is_cancelled() {
        std::future::pending::<()>().await;
    }
}

impl Server {
    async fn connection(self: Arc<Self>, stream: TcpStream, permit: ConnectionPermit<std::net::IpAddr>) {
        let accepting = timeout(HANDSHAKE_DEADLINE, self.tls.acceptor().accept(stream));
        let stream = match permit.lost().run_until_cancelled(accepting).await {
            Some(Ok(Ok(stream))) => stream,
            Some(Ok(Err(error))) => {
                debug!(error = chain(&error), "no TLS handshake");
                return;
            }
            Some(Err(_)) | None => return,
        };
        let webhook = &self.webhook;
        let answer = |request: Request<Incoming>| {
            let busy = permit.busy();
            async move {
                let response = webhook.answer(request).await;
                drop(busy);
                response
            }
        };
        listener::drive(stream, &self.drain, permit.lost(), answer).await;
    }
}

/// Until mappings were read, nobody can log in; after that the tasks that read them report what is wrong.
async fn await_mappings(map: Arc<dyn Map>, loaded: Pending) {
    while !map.is_loaded() {
        sleep(LOOK_AGAIN).await;
    }
    loaded.ready();
    std::future::pending::<()>().await;
}

fn why(ended: Ended) -> ServeError {
    match ended {
        Ended::Panicked(error) => ServeError::Panicked(error),
        Ended::Returned(name) => ServeError::Ended(name),
    }
}

/// How many connections of API servers are served at once. Each carries one login at a time.
const CONNECTIONS: usize = 256;
/// How long a connection must be idle before it may be closed for another one.
const QUIET: Duration = Duration::from_secs(1);
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// How long connections may carry one more request once the server is to stop.
const LAST_REQUESTS: Duration = Duration::from_secs(2);
/// How often it is looked whether mappings were read.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;
