//! The agent's view of the API server: what is known of pods and namespaces, from watches, direct lists or a
//! checkpoint, and Events. Combines the other parts of `kubernetes`; created and run by `app`, queried by
//! `server`.

mod directory;
mod restore;
mod watches;

use std::{
    collections::{BTreeMap, HashSet},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kube::{Api, Client, api::ListParams, client::ClientBuilder};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::restore::Offered;
use super::{
    Metrics, Notice, Notices, ServiceAccountConfig,
    account_api::AccountApi,
    api_activity::{ApiActivity, Resource, WatchState},
    events::Events,
    lookup::Lookups,
    namespaces::Namespaces,
    object::{ApiPod, PodUpdate, VALUE_LIMIT_BYTES, is_sound, pod_resource, pod_update, uid_of},
    pod_view::{Elsewhere, PodView, Presence},
    projection::Projection,
    taint::{self, StartupTaint},
};
use crate::{identity::PodUid, pod::Pod};
use kube2ram_service::{
    clock::Clock,
    kubernetes::{ClientConfig, ClientError, client_config},
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
    /// The resourceVersion up to which the pods are known, or a slightly later one.
    version: Mutex<Option<Box<str>>>,
    offered: Offered,
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
        let of_namespaces = config.allow_lists.iter().flat_map(|lists| {
            // Of a role only whether there is one.
            [(lists.annotation.clone(), VALUE_LIMIT_BYTES), (lists.role_annotation.clone(), 0)]
        });
        let projection = Projection::new(config.pod_annotations.iter().cloned(), of_namespaces);
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
            version: Mutex::default(),
            offered: Offered::default(),
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
        let is_listed = self.is_synced() || self.offered.is_used();
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
}

fn resources(config: &ClusterConfig) -> &'static [Resource] {
    if config.allow_lists.is_some() { Resource::ALL } else { Resource::UNRESTRICTED }
}

/// How many objects the API server sends at once, where it reads them from etcd.
const PAGE_SIZE: u32 = 500;
/// Bounds an answer, not the memory it takes: one item is read at a time. More than a page of pods all of
/// whose annotations are as long as they may be, with their escapes. A list from the cache is one page; when
/// it is longer, the committed state is asked for in pages.
const POD_PAGE_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// Bounds a question of people's.
const ELSEWHERE_DEADLINE: Duration = Duration::from_secs(1);
/// The time between two checks whether the cgroups of deleted pods were removed.
const DEPARTED_INTERVAL: Duration = Duration::from_secs(5);

impl Notices for Cluster {
    fn warn(&self, notice: Notice) {
        self.events.warn(notice);
    }
}
