//! The service behind the frontend: prepared first, opened when this agent takes over, and ended without
//! failed requests. Called by `app`.

use std::{future, sync::Arc, time::Duration};

use futures::FutureExt as _;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    sync::{SetOnce, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::{
    AppError,
    background_tasks::BackgroundTasks,
    cluster::{client_config, cluster_config},
    discovery::Discovery,
    frontend::{Frontend, ListenerSet},
    host_port::HostPort,
    log_level::LogLevel,
    metrics,
    node::{HostAddress, Node},
    node_name,
    operator::{Kernel, Operator, duration_notice, is_chained, pod_name},
    outside::Outside,
    prefetch::Prefetch,
    snapshot,
    warm_up::warm_up,
};
use crate::{
    args::{Config, CredentialsFrom, ForwardGuardMode, WireGuardMode},
    audit::{self, Trail},
    boot_guard, credentials,
    datapath::{Datapath, PassMark, Settings, Targets, WireHook},
    guard::{self, ForwardGuard},
    handover::Standbys,
    identity::PodUid,
    kubernetes::{Cluster, Directory as _},
    listeners::{self, Ended, PodListeners, Release},
    reconcile::{self, Reconciler},
    self_test::{self, SelfTest},
    server::{self, Entitlements, Pipeline, Server, token::Tokens},
    wire_guard::{self, WireGuard},
};
use kube2ram_cloud::{
    Base, CloudSettings, StsClient,
    dialect::Dialect,
    upstream::{MetadataServer, UpstreamActivity},
};
use kube2ram_service::{
    admin::{Admin, AdminThread, Readiness},
    clock::{Clock, SystemClock},
    drain::Drain,
    state_dir::StateDir,
    telemetry::{Log, chain},
};

/// Connections in progress get this long to end before the process does.
const DRAIN_DEADLINE: Duration = Duration::from_secs(8);
/// How long in-pod listeners may take to release what is to be handed over: a pass over the pods takes
/// milliseconds, and 20 ms more for a namespace that does not answer.
const RELEASE: Duration = Duration::from_secs(5);
/// From the connect hook to the SYN there are a few microseconds of one processor, which may run other tasks
/// in between.
const ON_THEIR_WAY: Duration = Duration::from_millis(500);
/// If another agent serves already, clients may end their connections themselves first: longer than an idle
/// connection lives (15 s).
const DRAIN_AFTER_HANDOVER: Duration = Duration::from_secs(16);

/// What the names of our own metrics begin with.
const PREFIX: &str = "kube2ram";

/// Everything between an accepted connection and its answer.
pub(super) struct Service {
    config: Arc<Config>,
    server: Arc<Server>,
    cluster: Arc<Cluster>,
    entitlements: Arc<SetOnce<Entitlements>>,
    trail: Arc<Trail>,
    base: Base,
    /// With the metadata server.
    activity: UpstreamActivity,
    clock: Arc<dyn Clock>,
    /// Written only while this agent serves.
    snapshot: Option<snapshot::SnapshotWriter>,
    /// Of all metrics. Taken by the admin service.
    registry: Registry,
    /// Kept until connections have ended.
    admin_thread: Arc<AdminThread>,
    drain: Drain,
    connections: TaskTracker,
    /// Other tasks that the drain waits for.
    tasks: TaskTracker,
}

/// How the agent asks STS.
pub(super) struct StsAccess {
    pub(super) client: StsClient,
    /// What it signs with, and where.
    pub(super) settings: CloudSettings,
}

/// What may be handed over.
pub(super) struct Holdings {
    listeners: ListenerSet,
    pods: mpsc::Sender<Release>,
}

/// What [`Service::open`] leaves to its caller.
pub(super) struct Opened {
    pub(super) holdings: Holdings,
    pub(super) operator: Arc<Operator>,
    /// Told when the pods that there were have their listeners.
    pub(super) are_open: oneshot::Receiver<()>,
    pub(super) targets: Targets,
}

impl Service {
    /// Gets to know pods, account and region. Pods notice nothing of it.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub(super) async fn prepare(
        config: Config,
        sts: StsAccess,
        node: &Node,
        state: &StateDir,
        pass: Arc<PassMark>,
        readiness: &Readiness,
        background: &mut BackgroundTasks,
    ) -> Result<Self, AppError> {
        let config = Arc::new(config);
        let admin_thread = Arc::new(AdminThread::start().map_err(AppError::AdminThread)?);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (connections, tasks) = (TaskTracker::new(), TaskTracker::new());
        let drain = Drain::new();
        let shutdown = drain.draining();
        let mut root = Registry::default();
        metrics::of_process(&mut root, &clock);
        let registry = root.sub_registry_with_prefix(PREFIX);
        metrics::of_build(registry);
        let failure = boot_guard::installation_failure(&config.pod_dir);
        if let Some(failure) = &failure {
            warn!(
                failure,
                "the boot guard could not be installed on this node: from the next boot on, pods that start before the agent reach the node's role"
            );
        }
        metrics::of_boot_guard(registry, failure.as_deref());

        let metadata = MetadataServer::new(config.metadata, pass);
        let activity = metadata.activity();
        let provider = sts.settings.connect(metadata, &clock);
        let base = provider.base().clone();
        let (rules, is_chained) = (&config.cloud.dialect().sessions, is_chained(&config, &base));
        if let Some(notice) = duration_notice(rules, config.session_duration, is_chained) {
            warn!("{notice}");
        }
        let cluster = Cluster::connect(
            client_config(&config),
            cluster_config(&config, node),
            Arc::clone(&clock),
            registry.sub_registry_with_prefix("kubernetes"),
        )
        .await
        .map_err(AppError::Kubernetes)?;
        let snapshot = snapshot::SnapshotWriter::new(state, &config, registry);
        let known_before = snapshot::offer(snapshot.left(), &cluster);
        let discovered = Arc::clone(&snapshot.discovered);
        background.spawn("watching the API server", Arc::clone(&cluster).run(shutdown.clone()));
        for resource in cluster.resources() {
            let (cluster, pending) = (Arc::clone(&cluster), readiness.wait_for(resource.as_str()));
            let shutdown = shutdown.clone();
            background.spawn("readiness", async move {
                if shutdown.run_until_cancelled(cluster.listed(*resource)).await.is_some() {
                    pending.ready();
                }
                shutdown.cancelled().await;
            });
        }

        let trail = Arc::new(trail(&config, &clock, &cluster, registry)?);
        let entitlements = Arc::new(SetOnce::new());
        let signs_with = (config.credentials_from == CredentialsFrom::Node).then_some(&base);
        metrics::of_credentials(registry, &entitlements, signs_with, &clock);
        let pipeline = Pipeline {
            clock: Arc::clone(&clock),
            cgroups: Arc::clone(&node.cgroups) as _,
            directory: Arc::clone(&cluster) as _,
            entitlements: Arc::clone(&entitlements),
            notices: Arc::clone(&cluster) as _,
            tokens: Arc::new(tokens(state, config.cloud.dialect())?),
            upstream: provider.upstream(),
        };
        let server_config = server::Config {
            allow_list_annotation: config.namespace_key.clone(),
            metadata: config.metadata,
            metadata_policy: config.metadata_policy,
            host_network_pods: config.host_network_pods,
            pass_through_rate: config.pass_through_rate,
            request_rate: config.request_rate,
            require_token: config.require_token,
            dialect: config.cloud.dialect(),
        };
        let server = Server::new(server_config, pipeline, connections.clone(), registry);
        let discovery = Discovery {
            provider,
            clock: Arc::clone(&clock),
            sts: sts.client,
            tokens: Arc::clone(&cluster) as _,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
            cache_metrics: credentials::Metrics::new(registry),
            trail: Arc::clone(&trail),
            known_before,
            discovered,
            pending: readiness.wait_for("account and region"),
        };
        let prefetch = Prefetch { cluster: Arc::clone(&cluster), entitlements: Arc::clone(&entitlements) };
        background.spawn("prefetch", prefetch.run(shutdown.clone()));
        background.spawn("discovery", discovery.run(Arc::clone(&config), Arc::clone(&entitlements)));
        let snapshot = Some(snapshot);
        Ok(Self {
            config,
            server,
            cluster,
            entitlements,
            trail,
            base,
            activity,
            clock,
            snapshot,
            registry: root,
            admin_thread,
            drain,
            connections,
            tasks,
        })
    }

    /// Resolves with the reason when the machine's host name, which the agent has taken for its node's name,
    /// is not that. Otherwise never.
    pub(super) fn wrong_node_name(&self, readiness: &Readiness) -> impl Future<Output = AppError> + use<> {
        let node = self.config.node.clone();
        let guess = self
            .config
            .node_is_host_name
            .then(|| (Arc::clone(&self.cluster), readiness.wait_for("the node's name")));
        async move {
            if let Some((cluster, unconfirmed)) = guess {
                if !node_name::is_confirmed(&cluster).await {
                    return AppError::NodeName(node);
                }
                unconfirmed.ready();
            }
            future::pending().await
        }
    }

    /// Gets pods' credentials before they ask, as an agent can that need not serve yet.
    pub(super) fn warm_up(&self, readiness: &Readiness, background: &mut BackgroundTasks) {
        let pending = readiness.wait_for("credentials of this node's pods");
        let fetching = warm_up(Arc::clone(&self.cluster), Arc::clone(&self.entitlements), pending);
        let shutdown = self.drain.draining().clone();
        background.spawn("fetching credentials ahead", async move {
            shutdown.run_until_cancelled(Box::pin(fetching)).await;
            shutdown.cancelled().await;
        });
    }

    /// Serves behind a frontend. `is_first`: no other agent serves meanwhile.
    ///
    /// # Errors
    /// When the maps of the eBPF programs cannot be opened.
    pub(super) async fn open(
        &mut self,
        frontend: Frontend,
        node: &Node,
        readiness: Readiness,
        is_first: bool,
        log: &Log,
        background: &mut BackgroundTasks,
    ) -> Result<Opened, AppError> {
        let Frontend { mut datapath, listeners } = frontend;
        let mut root = std::mem::take(&mut self.registry);
        let registry = root.sub_registry_with_prefix(PREFIX);
        log.register(registry);
        let origins = datapath.origins().map_err(AppError::Datapath)?;
        let targets = datapath.targets();
        let counters = datapath.counters().map_err(AppError::Datapath)?;
        registry.register_collector(Box::new(datapath.counters().map_err(AppError::Datapath)?));
        registry.register_collector(Box::new(datapath.fill_levels().map_err(AppError::Datapath)?));
        let kernel = listeners::Kernel {
            cookies: datapath.netns_cookies().map_err(AppError::Datapath)?,
            pass: Arc::new(datapath.pass().map_err(AppError::Datapath)?),
            targets: targets.clone(),
        };
        let pod_listeners = PodListeners::new(
            &node.settings.cgroup_root,
            node.settings.pods_cgroups(),
            kernel,
            listeners::Metrics::new(registry),
            Box::new({
                let (server, connections) = (Arc::clone(&self.server), self.connections.clone());
                move |listener, origins, drain, ending| {
                    let serving = Arc::clone(&server).serve(listener, origins, drain);
                    // An async block would hold the future twice, before it is awaited and while.
                    connections.spawn(serving.map(|()| drop(ending)));
                }
            }),
        );
        let self_test = self.self_test(node, registry);
        if datapath.is_first() {
            self.server.expect_former_answers();
        }
        if datapath.has_cut_connections() {
            let settings = node.settings.clone();
            drop(self.tasks.spawn_blocking(move || end_cut_connections(&settings)));
        }
        let (moved, agent) = watch::channel(datapath.agent());
        if self.config.answers_health_checks {
            self.server.answer_health_checks(agent.clone());
        }
        let app = {
            let (server, drain) = (Arc::clone(&self.server), self.drain.clone());
            let (listener, here) = (self.claim(&listeners.app, &readiness), node.agent);
            let address = HostAddress::new(&self.config);
            async move {
                let Some(listener) = listener.await else { return };
                // Pods are sent here from now on, if they were not before.
                moved.send_replace(here);
                tokio::select! {
                    () = server.serve(listener, Arc::new(origins), drain) => {}
                    () = address.follow(moved) => {}
                }
            }
        };
        // Tracked as well: what it has accepted it has handed on before it ends.
        background.spawn("the metadata service", self.connections.track_future(app));
        let ((pods, releases), (opened, are_open)) = (mpsc::channel(1), oneshot::channel());
        background.spawn("listeners in pods", pod_listeners.run(self.drain.clone(), releases, opened));
        if let Some(log) = datapath.log() {
            background.spawn("the eBPF programs' log", log);
        }
        let wire_guard = self.wire_guard(&datapath, node, &readiness, registry, background)?;
        let metrics = reconcile::Metrics::new(registry);
        let notices = Arc::clone(&self.cluster) as _;
        let reconciler = Reconciler::new(datapath, agent, metrics, notices, readiness.clone());
        let state = reconciler.state();
        background.spawn_blocking_writer("the eBPF programs", |stop| reconciler.run(stop));
        let guard = self.guard(registry, background).await;
        // The outgoing agent has shown that connections arrive; this agent is ready by then, and must not
        // become unready for a moment.
        let pending = is_first.then(|| readiness.wait_for(self_test::CONDITION));
        let probing = {
            let (app, self_test) = (Arc::clone(&listeners.app), Arc::clone(&self_test));
            let readiness = readiness.clone();
            async move {
                app.is_open().await;
                self_test.run(readiness, pending).await;
            }
        };
        // Before a handover the self-test ends as well: its connections would arrive at the other agent.
        background.spawn_writer("the self-test", probing);
        if let Some(snapshot) = self.snapshot.take() {
            let shutdown = self.drain.draining().clone();
            let snapshot = snapshot.run(Arc::clone(&self.cluster), shutdown);
            // Tracked as well: the drain waits for its last write.
            background.spawn_writer("the snapshot", self.tasks.track_future(snapshot));
        }

        self.keep_taint_off(&readiness, background);
        let outside = Outside::new(Arc::clone(&self.cluster), &node.settings, registry);
        let outside_state = outside.state();
        background.spawn("pods outside of the pods' cgroup", {
            let shutdown = self.drain.draining().clone();
            async move {
                outside.run(shutdown.clone()).await;
                shutdown.cancelled().await;
            }
        });
        registry.register_collector(Box::new(readiness.clone()));
        let operator = Arc::new(Operator {
            config: Arc::clone(&self.config),
            settings: node.settings.clone(),
            kernel: Kernel { state, counters, guard, wire_guard, targets: targets.clone(), self_test },
            outside: outside_state,
            ports: [Arc::clone(&listeners.app), Arc::clone(&listeners.admin)],
            cluster: Arc::clone(&self.cluster),
            entitlements: Arc::clone(&self.entitlements),
            trail: Arc::clone(&self.trail),
            base: self.base.clone(),
            activity: self.activity.clone(),
            clock: Arc::clone(&self.clock),
            readiness: readiness.clone(),
            log_level: LogLevel::new(log.verbosity().clone()),
            drain: self.drain.clone(),
            started: Instant::now(),
        });
        let shown = Arc::new(Admin { readiness, registry: root, serving: Handle::current() });
        let admin = {
            let listener = self.claim(&listeners.admin, &shown.readiness);
            let (connections, drain) = (self.connections.clone(), self.drain.clone());
            let thread = Arc::clone(&self.admin_thread);
            async move {
                let Some(listener) = listener.await else { return };
                match thread.serve(shown, &listener, connections, drain) {
                    Ok(accepting) => drop(accepting.await),
                    Err(error) => error!(%error, "the admin service cannot use its port"),
                }
            }
        };
        background.spawn("the admin service", self.connections.track_future(admin));
        Ok(Opened { holdings: Holdings { listeners, pods }, operator, are_open, targets })
    }

    /// A port's listener, once no other process has the port; `None` at the shutdown.
    fn claim(
        &self,
        port: &Arc<HostPort>,
        readiness: &Readiness,
    ) -> impl Future<Output = Option<Arc<TcpListener>>> + use<> {
        let (port, readiness, drain) = (Arc::clone(port), readiness.clone(), self.drain.clone());
        let cluster = Arc::clone(&self.cluster);
        async move {
            let claimed = port.claim(&readiness, |uid| pod_name(&cluster, uid));
            drain.accepting().run_until_cancelled(claimed).await.cloned()
        }
    }

    fn self_test(&self, node: &Node, registry: &mut Registry) -> Arc<SelfTest> {
        let own = node.settings.own_cgroup.starts_with(&node.settings.pods_cgroup).then_some(node.own_cgroup);
        let self_test = SelfTest::new(node.settings.clone(), own, registry);
        self.server.await_own(Arc::clone(&self_test));
        self_test
    }

    /// `None` where there is to be none.
    async fn guard(&self, registry: &mut Registry, background: &mut BackgroundTasks) -> Option<guard::State> {
        match self.config.forward_guard {
            ForwardGuardMode::Auto => {
                let guard = ForwardGuard::new(self.config.metadata, registry);
                let state = guard.state();
                background.spawn_blocking_writer("the netfilter rules", |stop| guard.run(stop));
                state.checked().await;
                Some(state)
            }
            ForwardGuardMode::Off => {
                warn!(
                    "--forward-guard=off: packet sockets, TUN devices, Kata and gVisor pods, and Services that point at the metadata server reach it"
                );
                None
            }
        }
    }

    /// `None` where there is to be none; then what an earlier agent has attached is removed.
    fn wire_guard(
        &self,
        datapath: &Datapath,
        node: &Node,
        readiness: &Readiness,
        registry: &mut Registry,
        background: &mut BackgroundTasks,
    ) -> Result<Option<wire_guard::State>, AppError> {
        let mut wire = datapath.wire(WireHook::of_kernel()).map_err(AppError::Datapath)?;
        let readiness = match self.config.wire_guard {
            WireGuardMode::Auto => None,
            WireGuardMode::On => Some(readiness.clone()),
            WireGuardMode::Off => {
                warn!(
                    "--wire-guard=off: packet sockets of hostNetwork pods, and of pods on ipvlan, with their own network card or routed in eBPF, reach the metadata server"
                );
                wire.detach_links().map_err(AppError::Datapath)?;
                wire_guard::remove_filters().map_err(AppError::WireGuard)?;
                return Ok(None);
            }
        };
        let pods = &node.settings.pods_cgroup;
        let mut guard = WireGuard::new(wire, self.config.metadata, pods, readiness, registry)
            .map_err(AppError::Namespace)?;
        guard.look();
        let state = guard.state();
        background.spawn_writer("the wire guard", guard.run());
        Ok(Some(state))
    }

    /// Removes the start-up taint whenever the agent is ready. A standby agent need not: the serving agent
    /// does.
    fn keep_taint_off(&self, readiness: &Readiness, background: &mut BackgroundTasks) {
        let Some(taint) = self.config.startup_taint.clone() else { return };
        let (cluster, readiness) = (Arc::clone(&self.cluster), readiness.clone());
        let shutdown = self.drain.draining().clone();
        background.spawn("the start-up taint", async move {
            let keep_off = cluster.keep_taint_off(&taint, || readiness.ready());
            shutdown.run_until_cancelled(Box::pin(keep_off)).await;
            shutdown.cancelled().await;
        });
    }

    /// Hands over to a standby agent, if there is one, and drains connections.
    pub(super) async fn end(self, standbys: Standbys, holdings: Holdings, background: &mut BackgroundTasks) {
        let release = async || {
            let released = async {
                background.stop_writing().await;
                holdings.listeners.handover_state(&holdings.pods).await
            };
            timeout(RELEASE, released).await.unwrap_or(Err(AppError::Release))
        };
        let is_handed_over = standbys.hand_over(release).await.unwrap_or_else(|error| {
            error!(error = chain(&error), "cannot hand over");
            false
        });
        self.connections.close();
        self.tasks.close();
        if is_handed_over {
            info!("another agent serves; waiting for connections to end");
            // Who was redirected to a listener of ours a moment ago has yet to arrive there.
            sleep(ON_THEIR_WAY).await;
            self.drain.hand_over();
        }
        // Clients that cannot be served must be refused and not kept waiting. The lock is dropped as well, if
        // it was handed over: if the other agent ends, too, the next start must not wait for this one.
        drop(holdings);
        if is_handed_over {
            // Connections that have not ended are drained below.
            let _is_done = timeout(DRAIN_AFTER_HANDOVER, self.connections.wait()).await.is_ok();
        } else {
            info!("draining: new connections are refused until the next start");
        }
        self.drain.close();
        let drained = timeout(DRAIN_DEADLINE, async {
            self.connections.wait().await;
            self.tasks.wait().await;
        });
        if drained.await.is_err() {
            warn!(
                connections = self.connections.len(),
                "drain deadline reached: the remaining connections are closed"
            );
        }
        self.trail.flush().await;
    }
}

/// Nothing depends on it: where it fails, clients wait for their timeouts.
fn end_cut_connections(settings: &Settings) {
    match listeners::end_cut_connections(settings) {
        Ok(ended) if ended == Ended::default() => {}
        Ok(Ended { connections, failures }) => info!(
            connections,
            failures,
            "closed pods' connections to the metadata server that were opened before the agent started: their clients reconnect, to the agent"
        ),
        Err(error) => {
            warn!(%error, "cannot close pods' connections that were opened before the agent started: their clients wait for a timeout")
        }
    }
}

fn trail(
    config: &Config,
    clock: &Arc<dyn Clock>,
    cluster: &Arc<Cluster>,
    registry: &mut Registry,
) -> Result<Trail, AppError> {
    let (clock, cluster) = (Arc::clone(clock), Arc::clone(cluster));
    let (pods, metrics) = (move |uid: &PodUid| cluster.known_pod(uid), audit::Metrics::new(registry));
    Trail::start(&config.node, clock, pods, config.audit_file.clone(), metrics).map_err(AppError::Audit)
}

/// The key outlives the agent, so that what it issued does too.
fn tokens(state_dir: &StateDir, dialect: &'static Dialect) -> Result<Tokens, AppError> {
    if !state_dir.is_volatile() {
        warn!(path = %state_dir.path().display(), "--state-dir is not on a tmpfs: pods' session tokens become invalid when this agent ends");
    }
    let key = state_dir.secret(Tokens::KEY_FILE);
    key.map(|key| Tokens::new(key, dialect)).map_err(AppError::StateDir)
}
