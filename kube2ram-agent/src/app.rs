//! The composition root: makes every part of what it needs, spawns the long-running ones, and stops when one of them does.
//! Depends on all other modules; called by `main`.

mod discovery;
mod prefetch;
mod snapshot;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    path::Path,
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::SetOnce,
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    admin::{Admin, Readiness},
    args::{ApiServer, Config, ForwardGuardMode},
    clock::{Clock, SystemClock},
    cloud::{
        alibaba::{
            base::{Base, BaseCredentials, BaseError},
            metadata::{HardenedMode, Metadata},
        },
        upstream::MetadataServer,
    },
    credentials,
    datapath::{AgentAddr, Datapath, DatapathError, MetadataAddr, Settings},
    guard::ForwardGuard,
    identity::{CgroupTree, MountError, find_cgroup_root, find_pods_cgroup, live_pods, own_cgroup},
    kubernetes::{ClientConfig, ClientError, Cluster, ClusterConfig},
    listeners::{self, PodListeners},
    policy::check_allow_list,
    preflight::Preflight,
    reconcile::{self, Reconciler},
    server::{self, Pipeline, Server, token::Tokens},
    state_dir::{StateDir, StateDirError},
};

/// Connections in progress get this long to end before the process does.
const DRAIN_DEADLINE: Duration = Duration::from_secs(8);

/// As many as the kernel takes by default (net.core.somaxconn). A pod that connects in a loop fills the queue, and whose SYN then finds it
/// full is only heard a second later, which is when SDKs give up.
const BACKLOG: u32 = 4096;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The static keys in the environment are incomplete or malformed.
    #[error("cannot use the static keys in the environment")]
    BaseCredentials(#[source] BaseError),
    /// A listener could not be bound.
    #[error("cannot listen on {address} ({flag})")]
    Bind {
        /// What was tried.
        address: SocketAddr,
        /// The flag to change.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A part that the agent cannot do without ended.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
    /// The cgroups are not where they should be.
    #[error("cannot find the pods' cgroups")]
    Cgroups(#[source] MountError),
    /// The kernel half is not in force.
    #[error("cannot bring the kernel half in force")]
    Datapath(#[source] DatapathError),
    /// The node's address is not known.
    #[error("cannot tell this node's IPv4 address: set --host-ip")]
    HostIp(#[source] Option<io::Error>),
    /// The API server's address or credentials are unusable.
    #[error("cannot make a client for the API server")]
    Kubernetes(#[source] ClientError),
    /// The node lacks something; each condition with its remedy.
    #[error("this node is not ready for the agent: {0}")]
    Preflight(String),
    /// The directory that agents share is unusable.
    #[error("cannot use the state directory")]
    StateDir(#[source] StateDirError),
    /// A part panicked.
    #[error("a part of the agent panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

/// Runs the agent until `shutdown`, then drains. `environment` looks a variable up.
///
/// The API server, the metadata server and STS may all be away: what they are needed for is then answered with 503.
///
/// # Errors
/// [`AppError`]: something without which no pod could be served.
///
/// # Cancel safety
/// Dropping the future stops serving at once. The kernel half stays in force either way.
pub async fn run(
    config: Config,
    environment: impl Fn(&str) -> Option<String>,
    shutdown: CancellationToken,
) -> Result<(), AppError> {
    for notice in &config.notices {
        warn!("{notice}");
    }
    raise_descriptor_limit();
    // An error means that somebody did it before us, in a test.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let tasks = TaskTracker::new();
    let mut registry = Registry::with_prefix("kube2ram");
    let mut parts = Parts::default();
    let readiness = Readiness::default();

    // Listening comes before attaching: a pod is never sent to a port on which nobody listens.
    let host_ip = host_ip(config.host_ip)?;
    let agent = SocketAddrV4::new(host_ip, config.app_port);
    let app_listener = bind(agent.into(), "--app-port")?;
    let admin_listener = bind((Ipv4Addr::UNSPECIFIED, config.metrics_port).into(), "--metrics-port")?;

    let cgroup_root = find_cgroup_root(config.cgroup_root.as_deref()).map_err(AppError::Cgroups)?;
    let pods_cgroup =
        find_pods_cgroup(&cgroup_root, config.pods_cgroup.as_deref()).map_err(AppError::Cgroups)?;
    let cgroups = CgroupTree::open(&cgroup_root, &pods_cgroup).map_err(AppError::Cgroups)?;
    let unmet: Vec<_> = Preflight::of_node(&config.node_paths()).failures().collect();
    if !unmet.is_empty() {
        return Err(AppError::Preflight(unmet.join("; ")));
    }
    let state_dir = StateDir::open(&config.state_dir).map_err(AppError::StateDir)?;
    let tokens = tokens(&state_dir)?;
    let settings = Settings {
        bpf_dir: config.bpf_dir.clone(),
        cgroup_root: cgroup_root.clone(),
        own_cgroup: own_cgroup(&cgroup_root).map_err(AppError::Cgroups)?,
        pods_cgroup: pods_cgroup.clone(),
        metadata: MetadataAddr(config.metadata_addr),
        agent: AgentAddr(agent),
        debug: config.debug,
    };
    let mut datapath = Datapath::attach(&settings).map_err(AppError::Datapath)?;
    let origins = datapath.origins().map_err(AppError::Datapath)?;
    let targets = datapath.targets();
    let pass = datapath.pass().map_err(AppError::Datapath)?;
    registry.register_collector(Box::new(datapath.counters().map_err(AppError::Datapath)?));
    if let Some(log) = datapath.log() {
        parts.spawn("the kernel half's log", log);
    }
    let reconciler = Reconciler::new(datapath, reconcile::Metrics::new(&mut registry), readiness.clone());
    parts.spawn("the kernel half", reconciler.run());
    match config.forward_guard {
        ForwardGuardMode::Auto => {
            let mut guard = ForwardGuard::new(*config.metadata_addr.ip(), &mut registry);
            guard.check();
            parts.spawn("the forward guard", guard.run());
        }
        ForwardGuardMode::Off => warn!(
            "--forward-guard=off: packet sockets, TUN devices and Services that point at the metadata server get through"
        ),
    }

    let upstream = Arc::new(HardenedMode::new(MetadataServer::new(config.metadata_addr, Arc::new(pass))));
    let base = match BaseCredentials::from_env(environment).map_err(AppError::BaseCredentials)? {
        Some(keys) => Base::of_keys(keys),
        None => Base::of_node_role(Metadata::new(Arc::clone(&upstream)), Arc::clone(&clock)),
    };

    let cluster = Cluster::connect(
        client_config(&config),
        cluster_config(&config, &cgroup_root, &pods_cgroup),
        Arc::clone(&clock),
        registry.sub_registry_with_prefix("kubernetes"),
    )
    .await
    .map_err(AppError::Kubernetes)?;
    let snapshot = snapshot::Keeper::new(&state_dir, &config.node, &mut registry);
    let known_before = snapshot::offer(snapshot.left(), &cluster);
    let discovered = Arc::clone(&snapshot.discovered);
    parts.spawn("the snapshot", snapshot.run(Arc::clone(&cluster), shutdown.clone()));
    parts.spawn("watching the API server", Arc::clone(&cluster).run(shutdown.clone()));
    parts.spawn("readiness", {
        let (cluster, pending) = (Arc::clone(&cluster), readiness.wait_for("pods and namespaces"));
        let shutdown = shutdown.clone();
        async move {
            if shutdown.run_until_cancelled(cluster.synced()).await.is_some() {
                pending.ready();
            }
            shutdown.cancelled().await;
        }
    });

    let entitlements = Arc::new(SetOnce::new());
    let pipeline = Pipeline {
        clock: Arc::clone(&clock),
        cgroups: Arc::new(cgroups),
        directory: Arc::clone(&cluster) as _,
        entitlements: Arc::clone(&entitlements),
        notices: Arc::clone(&cluster) as _,
        tokens: Arc::new(tokens),
        upstream: Arc::clone(&upstream) as _,
    };
    let server_config = server::Config {
        metadata: MetadataAddr(config.metadata_addr),
        metadata_policy: config.metadata_policy,
        host_network_pods: config.host_network_pods,
        pass_through_rate: config.pass_through_rate,
        require_token: config.require_token,
    };
    let server = Server::new(server_config, pipeline, tasks.clone(), &mut registry);
    let pod_listeners = PodListeners::new(
        &cgroup_root,
        &pods_cgroup,
        targets,
        origins.clone(),
        listeners::Metrics::new(&mut registry),
        Box::new({
            let (server, tasks) = (Arc::clone(&server), tasks.clone());
            move |listener, origins, closing| {
                tasks.spawn(Arc::clone(&server).serve(listener, origins, closing));
            }
        }),
    );
    parts.spawn("the metadata service", server.serve(app_listener, Arc::new(origins), shutdown.clone()));
    parts.spawn("listeners in pods", pod_listeners.run(shutdown.clone()));

    let prefetch =
        prefetch::Prefetch { cluster: Arc::clone(&cluster), entitlements: Arc::clone(&entitlements) };
    parts.spawn("prefetch", prefetch.run(shutdown.clone()));

    let discovery = discovery::Discovery {
        metadata: Metadata::new(upstream),
        clock,
        base,
        tasks: tasks.clone(),
        shutdown: shutdown.clone(),
        cache_metrics: credentials::Metrics::new(&mut registry),
        known_before,
        discovered,
        pending: readiness.wait_for("account and region"),
    };
    if let Some(taint) = config.startup_taint.clone() {
        parts.spawn("the start-up taint", {
            let (cluster, readiness, shutdown) = (Arc::clone(&cluster), readiness.clone(), shutdown.clone());
            async move {
                let remove = async {
                    readiness.ready().await;
                    cluster.remove_taint(&taint).await;
                };
                shutdown.run_until_cancelled(remove).await;
                shutdown.cancelled().await;
            }
        });
    }
    let debug_store = config.debug.then(|| debug_store(&cluster));
    let shown = Arc::new(Admin { readiness, registry, debug_store });
    parts.spawn("the admin service", shown.serve(admin_listener, tasks.clone(), shutdown.clone()));
    info!(%agent, metadata = %config.metadata_addr, node = config.node, "serving");
    parts.spawn("discovery", discovery.run(config, entitlements));

    parts.until(&shutdown).await?;
    tasks.close();
    if timeout(DRAIN_DEADLINE, tasks.wait()).await.is_err() {
        warn!(connections = tasks.len(), "not everything ended in time");
    }
    Ok(())
}

/// The long-running parts, none of which may end before the shutdown.
#[derive(Default)]
struct Parts(JoinSet<&'static str>);

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            part.await;
            name
        });
    }

    async fn until(&mut self, shutdown: &CancellationToken) -> Result<(), AppError> {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            ended = self.0.join_next() => match ended {
                Some(Ok(name)) => Err(AppError::Ended(name)),
                Some(Err(error)) => Err(AppError::Panicked(error)),
                None => Err(AppError::Ended("everything")),
            },
        }
    }
}

/// The key outlives the agent, so that what it issued does too.
fn tokens(state_dir: &StateDir) -> Result<Tokens, AppError> {
    if !state_dir.is_volatile() {
        warn!(path = %state_dir.path().display(), "--state-dir is on no tmpfs: session tokens of pods end with this agent");
    }
    state_dir.secret("token-key").map(Tokens::new).map_err(AppError::StateDir)
}

/// Each connection takes a descriptor, and some runtimes give 1,024 to whoever does not ask for more: the server's own bound is to be
/// reached first, because without descriptors nothing else works either.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "cannot raise the limit of open files");
    }
}

fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, AppError> {
    let listen = || {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|source| AppError::Bind { address, flag, source })
}

/// The configured address, or the one from which this node would send to the outside. Nothing is sent.
fn host_ip(configured: Option<IpAddr>) -> Result<Ipv4Addr, AppError> {
    /// TEST-NET-1: somewhere outside.
    const OUTSIDE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);
    let found = match configured {
        Some(address) => address,
        None => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
            .and_then(|socket| socket.connect(OUTSIDE).and_then(|()| socket.local_addr()))
            .map_err(|error| AppError::HostIp(Some(error)))?
            .ip(),
    };
    match found {
        IpAddr::V4(address) if !address.is_unspecified() => Ok(address),
        _ => Err(AppError::HostIp(None)),
    }
}

fn client_config(config: &Config) -> ClientConfig {
    match &config.api_server {
        ApiServer::InCluster => ClientConfig::InCluster,
        ApiServer::Kubeconfig(path) => ClientConfig::Kubeconfig(path.clone()),
        ApiServer::Url { url, token, insecure } => {
            ClientConfig::Server { url: url.to_string(), token: token.clone(), insecure: *insecure }
        }
    }
}

fn cluster_config(config: &Config, cgroup_root: &Path, pods_cgroup: &Path) -> ClusterConfig {
    let format = config.namespace_restrictions;
    let (cgroup_root, pods_cgroup) = (cgroup_root.to_owned(), pods_cgroup.to_owned());
    ClusterConfig {
        node: config.node.as_str().into(),
        pod_annotations: config.annotation_keys.all().map(Into::into).into(),
        allow_list_annotation: config.namespace_key.clone(),
        // Without restrictions nobody reads the lists.
        check_allow_list: Arc::new(move |text| {
            format.map_or(Ok(()), |format| check_allow_list(text, format))
        }),
        live_pods: Arc::new(move || live_pods(&cgroup_root, &pods_cgroup)),
    }
}

/// What `/debug/store` shows: who is known, and by which annotations. No secrets are among them.
fn debug_store(cluster: &Arc<Cluster>) -> Box<dyn Fn() -> serde_json::Value + Send + Sync> {
    let cluster = Arc::clone(cluster);
    Box::new(move || {
        let mut pods = cluster.pods();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let pods: Vec<_> = pods
            .iter()
            .map(|pod| {
                serde_json::json!({
                    "namespace": pod.namespace, "name": pod.name, "uid": pod.uid.as_str(), "serviceAccount": pod.service_account,
                    "hostNetwork": pod.host_network, "annotations": pod.annotations,
                })
            })
            .collect();
        serde_json::json!({ "synced": cluster.is_synced(), "pods": pods })
    })
}
