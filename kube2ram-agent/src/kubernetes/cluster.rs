//! The agent's view of the API server: watches, direct lists for pods that the watch has not shown yet, and
//! Events. Combines the other parts of `kubernetes`; created and run by `app`, queried by `server`.

use std::{
    collections::{BTreeMap, HashSet},
    error::Error,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Namespace as ApiNamespace;
use kube::{
    Api, Client,
    api::{ListParams, PartialObjectMeta},
    client::ClientBuilder,
    runtime::watcher::{self, Event},
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    About, Directory, Metrics, Notice, Notices, PodError, ServiceAccountConfig,
    account_api::AccountApi,
    api_activity::{ApiActivity, Resource, WatchState},
    checkpoint::Checkpoint,
    events::Events,
    lookup::{LIST_DEADLINE, LIST_LIMIT, ListError, Look, Lookups},
    namespaces::{LIMIT_BYTES, Namespace, Namespaces},
    object::{ApiPod, MIRROR_ANNOTATIONS, PodUpdate, is_sound, pod_resource, pod_update, uid_of},
    pod_view::{Elsewhere, PodView, Presence},
    projection::Projection,
    taint::{self, StartupTaint},
};
use crate::{identity::PodUid, pod::Pod};
use kube2ram_service::{
    clock::{Clock, jitter},
    kubernetes::{ClientConfig, ClientError, client_config, follow},
    telemetry::chain,
};

/// What to watch, and what to keep of it.
pub struct ClusterConfig {
    /// The node whose pods are watched.
    pub node: Box<str>,
    /// The keys of the pod annotations to keep, and how many bytes of each.
    pub pod_annotations: Vec<(Box<str>, usize)>,
    /// What counts of namespaces; `None` where they are not restricted. Then none is asked for, and the right
    /// to is not needed.
    pub allow_lists: Option<AllowLists>,
    /// What is asked about ServiceAccounts; `None` where they give no roles. Then none is asked for, and no
    /// pod waits for one.
    pub service_accounts: Option<ServiceAccountConfig>,
    /// Returns the pods that have a cgroup now: only they are believed when the API server does not know
    /// them, or cannot be asked.
    pub live_pods: Arc<dyn Fn() -> io::Result<HashSet<PodUid>> + Send + Sync>,
    /// How long to wait for a pod that is not known yet. Its SDK gives up a little later.
    pub lookup: Duration,
}

/// What counts of namespaces.
pub struct AllowLists {
    /// The key of the annotation that is the allow-list.
    pub annotation: Box<str>,
    /// The key of the annotation that gives a pod its role. On a namespace it has no effect, which its owner
    /// should read.
    pub role_annotation: Box<str>,
    /// Returns what is wrong with an allow-list, for its authors. Grants nothing.
    #[expect(clippy::type_complexity, reason = "written out only here")]
    pub check: Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>,
}

/// The pods and namespaces that the API server knows, and the queue of Events for it.
pub struct Cluster {
    pub(super) client: Client,
    /// Of the API server.
    address: Box<str>,
    pub(super) config: ClusterConfig,
    pub(super) clock: Arc<dyn Clock>,
    lookups: Mutex<Lookups>,
    namespaces: Mutex<Namespaces>,
    /// `None` where nothing is asked about ServiceAccounts.
    pub(super) account_api: Option<AccountApi>,
    /// Marked at each change of pods and namespaces, and after each direct list.
    pub(super) changed: watch::Sender<()>,
    list_wanted: Notify,
    events: Events,
    /// The checkpoint of an earlier agent, used if the API server is unavailable.
    offered: Mutex<Option<Checkpoint>>,
    /// Whether it is used.
    restored: AtomicBool,
    has_been_known: AtomicBool,
    activity: ApiActivity,
    pub(super) metrics: Metrics,
}

impl Cluster {
    /// Prepares everything; nothing is asked of the API server before [`Self::run`].
    ///
    /// # Errors
    /// Problems of `client`'s files and flags. An unavailable API server is no error.
    pub async fn connect(
        client: ClientConfig,
        config: ClusterConfig,
        clock: Arc<dyn Clock>,
        registry: &mut Registry,
    ) -> Result<Arc<Self>, ClientError> {
        let resources = resources(&config);
        let metrics = Metrics::new(registry, resources);
        let activity = ApiActivity::new(&metrics, resources, &clock);
        let annotations = config.pod_annotations.iter().map(|(key, _)| key.clone());
        let annotations = annotations.chain(MIRROR_ANNOTATIONS.map(Box::from));
        let of_namespaces = config.allow_lists.iter();
        let of_namespaces =
            of_namespaces.flat_map(|lists| [lists.annotation.clone(), lists.role_annotation.clone()]);
        let projection = Projection::new(annotations.chain(of_namespaces));
        let client = client_config(client).await?;
        let address = client.cluster_url.to_string().trim_end_matches('/').into();
        let mut lookups = Lookups::new();
        let mut account_api = None;
        if let Some(accounts) = &config.service_accounts {
            lookups.pods.with_accounts();
            account_api = Some(AccountApi::connect(client.clone(), &config.node, accounts)?);
        }
        let client = ClientBuilder::try_from(client).map_err(ClientError::Client)?;
        let client = client.with_layer(&activity).with_layer(&projection).build();
        Ok(Arc::new(Self {
            client,
            address,
            events: Events::new(config.node.clone(), Arc::clone(&clock), metrics.clone()),
            config,
            clock,
            lookups: Mutex::new(lookups),
            account_api,
            namespaces: Mutex::new(Namespaces::new()),
            changed: watch::Sender::new(()),
            list_wanted: Notify::new(),
            offered: Mutex::default(),
            restored: AtomicBool::new(false),
            has_been_known: AtomicBool::new(false),
            activity,
            metrics,
        }))
    }

    /// Watches, lists and posts Events until `shutdown`. Call it once.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let all = async {
            tokio::join!(
                self.watch_pods(),
                self.watch_namespaces(),
                self.list_wanted_pods(),
                self.read_accounts(),
                self.check_own_node(),
                self.forget_departed_pods(),
                self.restore_late(),
                self.events.post_all(&self.client)
            )
        };
        shutdown.run_until_cancelled(Box::pin(all)).await;
    }

    /// Removes a taint from this node whenever it is there, for ever, while the agent is ready: `ready`
    /// resolves when it is.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the node with the taint or without.
    pub async fn keep_taint_off<F: Future<Output = ()>>(&self, taint: &StartupTaint, ready: impl Fn() -> F) {
        taint::keep_off(&self.client, &self.config.node, taint, &taint::PACE, ready).await;
    }

    /// Whether all that is watched has been listed once.
    pub fn is_synced(&self) -> bool {
        self.resources().iter().all(|resource| self.is_listed(*resource))
    }

    fn is_listed(&self, resource: Resource) -> bool {
        match resource {
            Resource::Namespaces => self.namespaces().is_listed(),
            Resource::Pods => self.lookups().pods.is_listed(),
        }
    }

    /// What is watched.
    pub fn resources(&self) -> &'static [Resource] {
        resources(&self.config)
    }

    /// Whether [`Self::pods`] returns all existing pods, but those whose ServiceAccount cannot be read. Once
    /// it is so, it stays so: pods that wait for their account then are new ones.
    pub fn is_known(&self) -> bool {
        if self.has_been_known.load(Ordering::Relaxed) {
            return true;
        }
        let is_listed = self.is_synced() || self.restored.load(Ordering::Relaxed);
        let is_known = is_listed && self.lookups().pods.has_tried_accounts();
        self.has_been_known.fetch_or(is_known, Ordering::Relaxed);
        is_known
    }

    /// Resolves when [`Self::is_known`].
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn known(&self) {
        let mut changed = self.changed.subscribe();
        while !self.is_known() && changed.changed().await.is_ok() {}
    }

    /// Offers the checkpoint of an earlier agent. It is used when the API server fails to answer, or has not
    /// answered after five seconds, and only until it does: an allow-list that was narrowed meanwhile counts
    /// as soon as the API server answers. Call it before [`Self::run`].
    pub fn offer(&self, checkpoint: Checkpoint) {
        *self.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpoint);
    }

    /// The checkpoint for the next agent; `None` before the API server's lists are complete.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        self.is_synced().then(|| Checkpoint::of(self.lookups().pods.all(), |name| self.allow_list(name)))
    }

    fn restore(&self) {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(checkpoint) = offered.filter(|_| !self.is_synced()) else { return };
        let live = match (self.config.live_pods)() {
            Ok(live) => live,
            Err(error) => {
                warn!(%error, "cannot read the pods' cgroups: nothing is restored");
                *self.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpoint);
                return;
            }
        };
        let (pods, namespaces) = checkpoint.restore(&live);
        self.metrics.restored_pods.set(i64::try_from(pods.len()).unwrap_or(i64::MAX));
        warn!(pods = pods.len(), "API server unavailable: only the pods of the snapshot are known");
        self.lookups().pods.restore(pods);
        let mut store = self.namespaces();
        if self.config.allow_lists.is_some() && !store.is_listed() {
            for (name, allow_list) in namespaces {
                let namespace = Namespace { allow_list: allow_list.map(Arc::from), has_role: false };
                // A snapshot is larger only if an agent with another bound wrote it: the pods beyond the
                // bound wait.
                let _left_out = store.apply(name, namespace);
            }
        }
        drop(store);
        self.restored.store(true, Ordering::Relaxed);
        self.changed.send_replace(());
    }

    async fn restore_late(&self) {
        sleep(RESTORE_PATIENCE).await;
        self.restore();
        self.synced().await;
        self.metrics.restored_pods.set(0);
    }

    async fn forget_departed_pods(&self) {
        let mut changed = self.changed.subscribe();
        loop {
            let departed = self.lookups().pods.departed();
            self.metrics.departed_pods.set(i64::try_from(departed).unwrap_or(i64::MAX));
            if departed == 0 {
                if changed.changed().await.is_err() {
                    return;
                }
                continue;
            }
            match (self.config.live_pods)() {
                Ok(live) if self.lookups().pods.forget_departed(&live) => {
                    self.changed.send_replace(());
                }
                Ok(_) => sleep(DEPARTED_INTERVAL).await,
                Err(error) => {
                    warn!(error = chain(&error), "cannot read the pods' cgroups");
                    sleep(DEPARTED_INTERVAL).await;
                }
            }
        }
    }

    /// Whether all is known that decides on the pod's role: its ServiceAccount and its namespace, if they are
    /// needed. Without its account it would get another role; without its namespace every rule would deny,
    /// and SDKs treat a 403 as final.
    fn knows_all_of(&self, pod: &Pod) -> bool {
        if !self.knows_account_of(pod) {
            return false;
        }
        if self.config.allow_lists.is_none() {
            return true;
        }
        let namespaces = self.namespaces();
        namespaces.is_listed() || namespaces.known().contains_key(&pod.namespace)
    }

    fn knows_account_of(&self, pod: &Pod) -> bool {
        self.config.service_accounts.is_none() || pod.account_annotations.is_some()
    }

    /// Resolves when [`Self::is_synced`].
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn synced(&self) {
        for resource in self.resources() {
            self.listed(*resource).await;
        }
    }

    /// Resolves when a resource has been listed once.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn listed(&self, resource: Resource) {
        let mut changed = self.changed.subscribe();
        while !self.is_listed(resource) && changed.changed().await.is_ok() {}
    }

    /// The pods of this node that are known, in no order. Where ServiceAccounts give roles, those whose
    /// account is not known yet are left out.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        let lookups = self.lookups();
        let pods = lookups.pods.all().map(|known| &known.pod);
        pods.filter(|pod| self.knows_account_of(pod)).map(Arc::clone).collect()
    }

    /// The same pods with what only people ask for, in no order.
    pub fn pod_views(&self) -> Vec<PodView> {
        let lookups = self.lookups();
        let is_listed = lookups.pods.is_listed();
        let view = lookups.pods.pod_views().map(|(known, has_departed)| PodView {
            pod: Arc::clone(&known.pod),
            config_hash: known.config_hash.clone(),
            ip: known.ip,
            is_running: known.is_running,
            presence: match () {
                () if has_departed => Presence::Departed,
                () if known.is_terminating => Presence::Terminating,
                () if is_listed => Presence::Known,
                () => Presence::Restored,
            },
        });
        view.collect()
    }

    /// The namespaces that are known, with their allow-list annotations.
    pub fn allow_lists(&self) -> BTreeMap<Box<str>, Option<Arc<str>>> {
        let namespaces = self.namespaces();
        let lists = namespaces.known().iter().map(|(name, it)| (name.clone(), it.allow_list.clone()));
        lists.collect()
    }

    /// The API server's URL.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How a watch stands.
    pub fn watch_state(&self, resource: Resource) -> WatchState {
        self.activity.read(resource)
    }

    /// Asks the API server about a pod that is not known here, for people. Within a second.
    ///
    /// # Cancel safety
    /// Dropping the future loses the answer only.
    pub async fn elsewhere(&self, namespace: &str, name: &str) -> Elsewhere {
        let api: Api<ApiPod> = Api::namespaced_with(self.client.clone(), namespace, &pod_resource());
        // The agent may list pods, and need not be allowed to get one.
        let params = ListParams::default().fields(&format!("metadata.name={name}")).limit(1);
        match timeout(ELSEWHERE_DEADLINE, api.list(&params)).await {
            Ok(Ok(list)) => Elsewhere::of(list.items.into_iter().next(), &self.config.node),
            Ok(Err(error)) => Elsewhere::Unanswered(chain(&error).into()),
            Err(_) => Elsewhere::Unanswered("no answer in time".into()),
        }
    }

    /// Marked whenever [`Self::pods`] or an allow-list may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(super) fn lookups(&self) -> MutexGuard<'_, Lookups> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn namespaces(&self) -> MutexGuard<'_, Namespaces> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pod_api(&self) -> Api<ApiPod> {
        Api::all_with(self.client.clone(), &pod_resource())
    }

    fn of_this_node(&self) -> String {
        format!("spec.nodeName={}", self.config.node)
    }

    /// An object that cannot be read is counted, and named without anything of its contents.
    fn pod_update(&self, object: ApiPod) -> Option<PodUpdate> {
        if !is_sound(&object) {
            self.metrics.unreadable_pods.inc();
            let (namespace, name) = (&object.metadata.namespace, &object.metadata.name);
            warn!(?namespace, ?name, "the API server sent a pod that cannot be read; it gets no role");
            return uid_of(&object.metadata).map(PodUpdate::Ended);
        }
        pod_update(object, &self.config.pod_annotations)
    }

    async fn watch_pods(&self) {
        // From the API server's cache, as the kubelet does: when a thousand agents start at once, etcd does
        // not notice. The list may be a little old, but the watch starts where it ends. A page size would
        // make kube ask etcd after all (`ListParams::populate_qp`).
        let config = watcher::Config::default().fields(&self.of_this_node()).any_semantic();
        let config = watcher::Config { page_size: None, ..config };
        let take = |event| {
            let mut lookups = self.lookups();
            let pods = &mut lookups.pods;
            match event {
                Event::Init => pods.start_relist(),
                Event::InitApply(object) => {
                    self.pod_update(object).into_iter().for_each(|pod| pods.relist(pod))
                }
                Event::InitDone => {
                    pods.finish_relist();
                    self.metrics.synced(Resource::Pods);
                }
                Event::Apply(object) => self.pod_update(object).into_iter().for_each(|pod| pods.apply(pod)),
                Event::Delete(object) => {
                    uid_of(&object.metadata).into_iter().for_each(|uid| pods.remove(uid))
                }
            }
            self.metrics.pods.set(i64::try_from(pods.all().count()).unwrap_or(i64::MAX));
            drop(lookups);
            self.changed.send_replace(());
        };
        let failed = |error: &str| {
            self.activity.failed(Resource::Pods, error);
            self.metrics.watch_error(Resource::Pods);
            self.restore();
        };
        follow(self.pod_api(), config, take, failed).await;
    }

    /// Returns at once where namespaces are not restricted.
    async fn watch_namespaces(&self) {
        let Some(lists) = &self.config.allow_lists else { return };
        let api = Api::<PartialObjectMeta<ApiNamespace>>::all(self.client.clone());
        let take = |event| {
            match event {
                Event::Init => self.namespaces().start_list(),
                Event::InitApply(object) => self.take_namespace(object, lists, Namespaces::list),
                Event::InitDone => {
                    self.namespaces().finish_list();
                    self.metrics.synced(Resource::Namespaces);
                }
                Event::Apply(object) => self.take_namespace(object, lists, Namespaces::apply),
                Event::Delete(object) => {
                    self.namespaces().remove(&object.metadata.name.unwrap_or_default());
                }
            }
            let namespaces = self.namespaces();
            for (gauge, count) in [
                (&self.metrics.namespaces, namespaces.known().len()),
                (&self.metrics.namespaces_without_room, namespaces.without_room()),
            ] {
                gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
            }
            drop(namespaces);
            self.changed.send_replace(());
        };
        // Not from a cache: an allow-list that was narrowed must not widen again because the agent restarts.
        let failed = |error: &str| {
            self.activity.failed(Resource::Namespaces, error);
            self.metrics.watch_error(Resource::Namespaces);
            self.restore();
        };
        follow(api, watcher::Config::default(), take, failed).await;
    }

    fn take_namespace(
        &self,
        object: PartialObjectMeta<ApiNamespace>,
        lists: &AllowLists,
        put: impl FnOnce(&mut Namespaces, Box<str>, Namespace) -> Vec<Box<str>>,
    ) {
        let mut metadata = object.metadata;
        let Some(name) = metadata.name.take().map(Box::<str>::from) else { return };
        let namespace = Namespace::of(metadata, lists);
        let allow_list = namespace.allow_list.clone();
        let mut namespaces = self.namespaces();
        let is_new = namespaces.known().get(&name).is_none_or(|known| known.allow_list != allow_list);
        let left_out = put(&mut namespaces, name.clone(), namespace);
        drop(namespaces);
        for namespace in left_out {
            warn!(
                namespace,
                limit_bytes = LIMIT_BYTES,
                "no room for this namespace's allow-list, which is among the longest: its pods get no role that needs it"
            );
        }
        // All agents of the cluster see it; those with pods in the namespace raise the Event. For a later pod
        // the denial raises it.
        if let Some(allow_list) = allow_list.filter(|_| is_new)
            && self.pods().iter().any(|pod| pod.namespace == name)
            && let Err(message) = (lists.check)(&allow_list)
        {
            self.warn(Notice { about: About::Namespace(name), reason: "MalformedAllowList", message });
        }
    }

    /// Makes the direct lists: one at a time, for all waiting requests, and not too often.
    async fn list_wanted_pods(&self) {
        let api = self.pod_api();
        let of_this_node = ListParams::default().fields(&self.of_this_node());
        // First from the cache, which costs etcd nothing and has nearly all pods that the watch is late with.
        let cached = of_this_node.clone().match_any();
        // Without a resource version: what the API server has committed, not what its cache has seen.
        let params = of_this_node.limit(LIST_LIMIT);
        loop {
            self.list_wanted.notified().await;
            if !self.lookups().start_list() {
                continue;
            }
            let started = Instant::now();
            let listed = match self.list_pods(&api, &cached).await {
                Ok(listed) => {
                    let is_enough = self.lookups().finish_cached(listed);
                    self.changed.send_replace(());
                    if is_enough { None } else { Some(self.list_pods(&api, &params).await) }
                }
                Err(error) => Some(Err(error)),
            };
            let is_ok = listed.as_ref().is_none_or(Result::is_ok);
            self.metrics.pod_list(if is_ok { "ok" } else { "error" });
            let pause = {
                let mut lookups = self.lookups();
                listed.into_iter().for_each(|listed| lookups.finish_list(listed));
                lookups.pause(jitter())
            };
            self.changed.send_replace(());
            sleep_until(if is_ok { started } else { Instant::now() } + pause).await;
        }
    }

    async fn list_pods(&self, api: &Api<ApiPod>, params: &ListParams) -> Result<Vec<PodUpdate>, ListError> {
        let list = timeout(LIST_DEADLINE, api.list(params)).await.map_err(ListError::Timeout)?;
        let list = list.map_err(ListError::Request)?;
        if list.metadata.continue_.as_deref().is_some_and(|token| !token.is_empty()) {
            return Err(ListError::Truncated);
        }
        Ok(list.items.into_iter().filter_map(|object| self.pod_update(object)).collect())
    }

    /// What kept a pod waiting: its ServiceAccount, if the pod was found and that could not be read; else the
    /// last direct list.
    fn reason_for_waiting(&self, found: Option<&Pod>) -> Option<Box<dyn Error + Send + Sync>> {
        let lookups = self.lookups();
        let of_account = found.filter(|pod| !self.knows_account_of(pod)).and_then(|pod| {
            let error = lookups.pods.accounts()?.error_of(pod)?;
            Some(Box::new(error) as Box<dyn Error + Send + Sync>)
        });
        of_account.or_else(|| lookups.last_error().map(|error| Box::new(error) as _))
    }

    /// Looks once, and wants the pod from a direct list if it is not there.
    fn look(&self, uid: &PodUid) -> Look {
        let look = self.lookups().look(uid);
        if matches!(look, Look::Wanted) {
            self.list_wanted.notify_one();
        }
        look
    }

    async fn wait_for(&self, uid: &PodUid, mut changed: watch::Receiver<()>) -> Result<Arc<Pod>, PodError> {
        let deadline = Instant::now() + self.config.lookup;
        let mut absent = false;
        let mut found = None;
        loop {
            match self.look(uid) {
                Look::Found(pod) if self.knows_all_of(&pod) => return Ok(pod),
                Look::Found(pod) => found = Some(pod),
                Look::Wanted => {}
                Look::Ambiguous => return Err(PodError::Ambiguous(uid.clone())),
                // A kubelet makes a pod's cgroup after it has the pod from the API server, except a static
                // pod's: its mirror is made later, and may still come.
                Look::Absent if uid.is_config_hash() => absent = true,
                Look::Absent => return Err(PodError::Unknown(uid.clone())),
            }
            match timeout_at(deadline, changed.changed()).await {
                Ok(Ok(())) => {}
                _ if absent => return Err(PodError::Unknown(uid.clone())),
                _ => {
                    let source = self.reason_for_waiting(found.as_deref());
                    return Err(PodError::Unavailable { uid: uid.clone(), source });
                }
            }
        }
    }
}

fn resources(config: &ClusterConfig) -> &'static [Resource] {
    if config.allow_lists.is_some() { Resource::ALL } else { Resource::UNRESTRICTED }
}

/// How long the API server may take before what was known before the restart is used.
const RESTORE_PATIENCE: Duration = Duration::from_secs(5);
/// Bounds a question of people's.
const ELSEWHERE_DEADLINE: Duration = Duration::from_secs(1);
/// The time between two checks whether the cgroups of deleted pods were removed.
const DEPARTED_INTERVAL: Duration = Duration::from_secs(5);

#[async_trait]
impl Directory for Cluster {
    fn known_pod(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        match self.look(uid) {
            Look::Found(pod) if self.knows_all_of(&pod) => Some(pod),
            _ => None,
        }
    }

    async fn pod(&self, uid: &PodUid) -> Result<Arc<Pod>, PodError> {
        // Before the first check, so that no change is lost between the two.
        let changed = self.changed.subscribe();
        if let Some(pod) = self.known_pod(uid) {
            return Ok(pod);
        }
        let result = self.wait_for(uid, changed).await;
        self.metrics.pod_wait(match &result {
            Ok(_) => "found",
            Err(PodError::Ambiguous(_)) => "ambiguous",
            Err(PodError::Unavailable { .. }) => "unavailable",
            Err(PodError::Unknown(_)) => "unknown",
        });
        result
    }

    fn allow_list(&self, namespace: &str) -> Option<Option<Arc<str>>> {
        self.namespaces().known().get(namespace).map(|known| known.allow_list.clone())
    }

    fn has_misplaced_role(&self, namespace: &str) -> bool {
        self.namespaces().known().get(namespace).is_some_and(|known| known.has_role)
    }
}

impl Notices for Cluster {
    fn warn(&self, notice: Notice) {
        self.events.warn(notice);
    }
}
