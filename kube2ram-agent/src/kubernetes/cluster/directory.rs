//! Answers which pod has a UID, for requests: waits for a pod that the watch has not shown yet, and makes the
//! direct lists that look for it. Depends on kube and `lookup`; run by the parent, queried by `server`.

use std::{
    error::Error,
    sync::{Arc, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use kube::{
    Api,
    api::{ListParams, VersionMatch},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

use super::{Cluster, PAGE_SIZE, POD_PAGE_LIMIT_BYTES};
use crate::{
    identity::PodUid,
    kubernetes::{
        Directory, PodError,
        lookup::{LIST_DEADLINE, LIST_LIMIT, ListError, Look},
        object::{ApiPod, PodUpdate},
        pods::Found,
    },
    pod::Pod,
};
use kube2ram_service::{clock::jitter, kubernetes::list_page};

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

impl Cluster {
    /// Makes the direct lists: one at a time, for all waiting requests, and not too often.
    pub(super) async fn list_wanted_pods(&self) {
        let api = self.pod_api();
        let of_this_node = ListParams::default().fields(&self.of_this_node());
        // Without a resource version: what the API server has committed, not what its cache has seen.
        let params = of_this_node.clone().limit(PAGE_SIZE);
        loop {
            self.list_wanted.notified().await;
            if !self.lookups().start_list() {
                continue;
            }
            let started = Instant::now();
            // First from the cache, which costs etcd nothing and has nearly all pods that the watch is late
            // with. It may be another API server's, so it must have what is known already.
            let version = self.version.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let cached = match version {
                Some(version) => of_this_node.clone().matching(VersionMatch::NotOlderThan).at(&version),
                None => of_this_node.clone().match_any(),
            };
            let listed = match self.list_pods(&api, &cached).await {
                Ok(listed) => {
                    let is_enough = self.lookups().finish_cached(listed);
                    self.changed.send_replace(());
                    if is_enough { None } else { Some(self.list_pods(&api, &params).await) }
                }
                // The cache is behind, or its list is too long: it has no pages.
                Err(ListError::Request(error)) if error.is_of_the_cache() => {
                    Some(self.list_pods(&api, &params).await)
                }
                Err(error) => Some(Err(error)),
            };
            let is_ok = listed.as_ref().is_none_or(Result::is_ok);
            let retry_after = match &listed {
                Some(Err(ListError::Request(error))) => error.retry_after().unwrap_or_default(),
                _ => Duration::ZERO,
            };
            self.metrics.pod_list(if is_ok { "ok" } else { "error" });
            let pause = {
                let mut lookups = self.lookups();
                listed.into_iter().for_each(|listed| lookups.finish_list(listed));
                lookups.pause(jitter()).max(retry_after)
            };
            self.changed.send_replace(());
            sleep_until(if is_ok { started } else { Instant::now() } + pause).await;
        }
    }

    async fn list_pods(&self, api: &Api<ApiPod>, params: &ListParams) -> Result<Vec<PodUpdate>, ListError> {
        let deadline = Instant::now() + LIST_DEADLINE;
        let mut params = params.clone();
        let mut listed = Vec::new();
        loop {
            let mut is_full = false;
            let page = list_page(api, &params, POD_PAGE_LIMIT_BYTES, |object| {
                let new = self.new_pod(object);
                is_full |= new.is_some() && listed.len() == LIST_LIMIT;
                listed.extend(new.filter(|_| !is_full));
            });
            let page = timeout_at(deadline, page).await.map_err(ListError::Timeout)?;
            params.continue_token = page.map_err(ListError::Request)?.next;
            if is_full {
                return Err(ListError::Truncated);
            }
            if params.continue_token.is_none() {
                return Ok(listed);
            }
        }
    }

    /// Of a direct list: a pod that is not known yet, and has not ended.
    fn new_pod(&self, object: ApiPod) -> Option<PodUpdate> {
        let PodUpdate::Live(known) = self.pod_update(object)? else { return None };
        let found = self.lookups().pods.find(&known.pod.uid);
        matches!(found, Found::None).then_some(PodUpdate::Live(known))
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

    /// Looks once, and wants the pod from a direct list if it is not there.
    fn look(&self, uid: &PodUid) -> Look {
        let look = self.lookups().look(uid);
        if matches!(look, Look::Wanted) {
            self.list_wanted.notify_one();
        }
        look
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
}
