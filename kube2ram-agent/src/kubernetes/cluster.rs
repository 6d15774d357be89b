//! The API server as the agent sees it: two watches, direct lists for what they have not shown yet, and Events.
//! Puts the other parts of `kubernetes` together; made and run by `app`, asked by `server`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{ListParams, PartialObjectMeta},
    runtime::watcher::{self, Event},
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    About, ClientConfig, ClientError, Directory, Metrics, Notice, Notices, Pod, PodError,
    client::connect,
    events::Events,
    lookup::{LIST_INTERVAL, LIST_LIMIT, LOOKUP_DEADLINE, ListError, Look, Lookups},
    object::{ApiPod, Sighting, bounded_annotation, pod_resource, sighting, uid_of},
    store::Store,
    taint::{self, StartupTaint},
    watch::follow,
};
use crate::{clock::Clock, identity::PodUid};

/// What to watch, and what to keep of it.
pub struct ClusterConfig {
    /// The node whose pods are watched.
    pub node: Box<str>,
    /// The keys of the pod annotations to keep.
    pub pod_annotations: Vec<Box<str>>,
    /// The key of the namespace annotation that is the allow-list.
    pub allow_list_annotation: Box<str>,
    /// Tells what is wrong with an allow-list, for the people who wrote it. Grants nothing.
    #[expect(clippy::type_complexity, reason = "written out only here")]
    pub check_allow_list: Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>,
}

/// The pods and namespaces that the API server knows, and the way back to it for Events.
pub struct Cluster {
    client: Client,
    config: ClusterConfig,
    lookups: Mutex<Lookups>,
    namespaces: Mutex<Store<Box<str>, Option<Arc<str>>>>,
    /// Marked at each change of the two above, and after each direct list.
    changed: watch::Sender<()>,
    list_wanted: Notify,
    events: Events,
    pub(super) metrics: Metrics,
}

impl Cluster {
    /// Prepares everything; nothing is asked of the API server before [`Self::run`].
    ///
    /// # Errors
    /// Whatever is wrong with `client`'s files and flags. An API server that is away is no error.
    pub async fn connect(
        client: ClientConfig,
        config: ClusterConfig,
        clock: Arc<dyn Clock>,
        registry: &mut Registry,
    ) -> Result<Arc<Self>, ClientError> {
        let client = connect(client).await?;
        let metrics = Metrics::new(registry);
        Ok(Arc::new(Self {
            client,
            events: Events::new(config.node.clone(), clock, metrics.clone()),
            config,
            lookups: Mutex::new(Lookups::new()),
            namespaces: Mutex::new(Store::new()),
            changed: watch::Sender::new(()),
            list_wanted: Notify::new(),
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
                self.events.post_all(&self.client)
            )
        };
        shutdown.run_until_cancelled(Box::pin(all)).await;
    }

    /// Removes a taint from this node, however long that takes, and never again.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the node with the taint or without.
    pub async fn remove_taint(&self, taint: &StartupTaint) {
        taint::remove(&self.client, &self.config.node, taint).await;
    }

    /// Whether pods and namespaces have each been listed once.
    pub fn is_synced(&self) -> bool {
        self.lookups().pods.is_listed() && self.namespaces().is_listed()
    }

    /// Resolves when [`Self::is_synced`].
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn synced(&self) {
        let mut changed = self.changed.subscribe();
        while !self.is_synced() && changed.changed().await.is_ok() {}
    }

    /// The pods of this node that are known, in no order.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.lookups().pods.all().cloned().collect()
    }

    /// Marked whenever [`Self::pods`] or an allow-list may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn lookups(&self) -> MutexGuard<'_, Lookups> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn namespaces(&self) -> MutexGuard<'_, Store<Box<str>, Option<Arc<str>>>> {
        self.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pod_api(&self) -> Api<ApiPod> {
        Api::all_with(self.client.clone(), &pod_resource())
    }

    fn of_this_node(&self) -> String {
        format!("spec.nodeName={}", self.config.node)
    }

    fn sighting(&self, object: ApiPod) -> Option<Sighting> {
        sighting(object, &self.config.pod_annotations)
    }

    async fn watch_pods(&self) {
        // From the API server's cache, as the kubelet does: when a thousand agents start at once, etcd does not notice. The list
        // may be a little old, but the watch starts where it ends.
        // A page size would make kube ask etcd after all (`ListParams::populate_qp`).
        let config = watcher::Config::default().fields(&self.of_this_node()).any_semantic();
        let config = watcher::Config { page_size: None, ..config };
        let take = |event| {
            let mut lookups = self.lookups();
            let pods = &mut lookups.pods;
            match event {
                Event::Init => pods.start_relist(),
                Event::InitApply(object) => {
                    self.sighting(object).into_iter().for_each(|pod| pods.relist(pod))
                }
                Event::InitDone => pods.finish_relist(),
                Event::Apply(object) => self.sighting(object).into_iter().for_each(|pod| pods.apply(pod)),
                Event::Delete(object) => {
                    uid_of(&object.metadata).into_iter().for_each(|uid| pods.remove(uid))
                }
            }
            self.metrics.pods.set(i64::try_from(pods.all().len()).unwrap_or(i64::MAX));
            drop(lookups);
            self.changed.send_replace(());
        };
        follow(self.pod_api(), config, take, || self.metrics.watch_error("pods")).await;
    }

    async fn watch_namespaces(&self) {
        let api = Api::<PartialObjectMeta<Namespace>>::all(self.client.clone());
        let take = |event| {
            match event {
                Event::Init => self.namespaces().start_list(),
                Event::InitApply(object) => self.take_namespace(object, Store::list),
                Event::InitDone => self.namespaces().finish_list(),
                Event::Apply(object) => self.take_namespace(object, |store, name, allow_list| {
                    store.insert(name, allow_list);
                }),
                Event::Delete(object) => {
                    let name = object.metadata.name.unwrap_or_default().into();
                    self.namespaces().remove(&name);
                }
            }
            let known = self.namespaces().known().len();
            self.metrics.namespaces.set(i64::try_from(known).unwrap_or(i64::MAX));
            self.changed.send_replace(());
        };
        // Not from a cache: an allow-list that was narrowed must not widen again because the agent restarts.
        follow(api, watcher::Config::default(), take, || self.metrics.watch_error("namespaces")).await;
    }

    fn take_namespace(
        &self,
        object: PartialObjectMeta<Namespace>,
        put: impl FnOnce(&mut Store<Box<str>, Option<Arc<str>>>, Box<str>, Option<Arc<str>>),
    ) {
        let mut metadata = object.metadata;
        let Some(name) = metadata.name.take().map(Box::<str>::from) else { return };
        let allow_list = bounded_annotation(metadata, &self.config.allow_list_annotation);
        let mut namespaces = self.namespaces();
        let is_new = namespaces.known().get(&name).is_none_or(|known| *known != allow_list);
        put(&mut namespaces, name.clone(), allow_list.clone());
        drop(namespaces);
        // All agents of the cluster hear of it; the one that has pods there speaks. A pod that comes later makes its denial say it.
        if let Some(allow_list) = allow_list.filter(|_| is_new)
            && self.pods().iter().any(|pod| pod.namespace == name)
            && let Err(message) = (self.config.check_allow_list)(&allow_list)
        {
            self.warn(Notice { about: About::Namespace(name), reason: "MalformedAllowList", message });
        }
    }

    /// Makes the direct lists: one at a time, for everybody who waits, and not too often.
    async fn list_wanted_pods(&self) {
        let api = self.pod_api();
        // Without a resource version: what the API server has committed, not what its cache has seen.
        let params = ListParams::default().fields(&self.of_this_node()).limit(LIST_LIMIT);
        loop {
            self.list_wanted.notified().await;
            if !self.lookups().start_list() {
                continue;
            }
            let started = Instant::now();
            let listed = match timeout(LOOKUP_DEADLINE, api.list(&params)).await {
                Ok(Ok(list)) if list.metadata.continue_.as_deref().is_some_and(|token| !token.is_empty()) => {
                    Err(ListError::Truncated)
                }
                Ok(Ok(list)) => {
                    Ok(list.items.into_iter().filter_map(|object| self.sighting(object)).collect())
                }
                Ok(Err(error)) => Err(ListError::Request(error)),
                Err(elapsed) => Err(ListError::Timeout(elapsed)),
            };
            self.metrics.pod_list(if listed.is_ok() { "ok" } else { "error" });
            self.lookups().finish_list(listed);
            self.changed.send_replace(());
            sleep_until(started + LIST_INTERVAL).await;
        }
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
        let deadline = Instant::now() + LOOKUP_DEADLINE;
        let mut absent = false;
        loop {
            match self.look(uid) {
                // Without namespaces every rule would deny, and a pod would take a 403 for the last word.
                Look::Found(pod) if self.namespaces().is_listed() => return Ok(pod),
                Look::Found(_) | Look::Wanted => {}
                Look::Ambiguous => return Err(PodError::Ambiguous(uid.clone())),
                // A kubelet makes a pod's cgroup after it has the pod from the API server, except a static pod's: its mirror is
                // made later, and may still come.
                Look::Absent if uid.is_config_hash() => absent = true,
                Look::Absent => return Err(PodError::Unknown(uid.clone())),
            }
            match timeout_at(deadline, changed.changed()).await {
                Ok(Ok(())) => {}
                _ if absent => return Err(PodError::Unknown(uid.clone())),
                _ => {
                    let source = self.lookups().last_error().map(|error| Box::new(error) as _);
                    return Err(PodError::Unavailable { uid: uid.clone(), source });
                }
            }
        }
    }
}

#[async_trait]
impl Directory for Cluster {
    async fn pod(&self, uid: &PodUid) -> Result<Arc<Pod>, PodError> {
        // Before the first look, so that no change is lost between the two.
        let changed = self.changed.subscribe();
        if let Look::Found(pod) = self.look(uid)
            && self.namespaces().is_listed()
        {
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
        self.namespaces().known().get(namespace).cloned()
    }
}

impl Notices for Cluster {
    fn warn(&self, notice: Notice) {
        self.events.warn(notice);
    }
}
