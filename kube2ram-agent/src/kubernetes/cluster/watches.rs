//! The watches of this node's pods and of the namespaces. They feed what the cluster knows, and restore the
//! checkpoint when they fail. Depends on kube; run by the parent.

use std::sync::PoisonError;

use k8s_openapi::api::core::v1::Namespace as ApiNamespace;
use kube::{Api, api::PartialObjectMeta, runtime::watcher::Event};
use tracing::warn;

use super::{AllowLists, Cluster, PAGE_SIZE, POD_PAGE_LIMIT_BYTES};
use crate::kubernetes::{
    About, Notice, Notices as _, Resource,
    namespaces::{LIMIT_BYTES, Namespace, Namespaces},
    object::uid_of,
};
use kube2ram_service::kubernetes::{FirstList, FollowConfig, follow};

/// Bounds a page of namespaces, as [`POD_PAGE_LIMIT_BYTES`] one of pods.
const NAMESPACE_PAGE_LIMIT_BYTES: usize = 96 * 1024 * 1024;

impl Cluster {
    pub(super) async fn watch_pods(&self) {
        // Pods that have ended are listed, too: a watch with `status.phase!=…` would show a pod that ends as
        // deleted, and a deleted pod keeps its role until its cgroup is removed. They take no memory, because
        // a list is read pod by pod.
        let config = FollowConfig {
            fields: Some(self.of_this_node()),
            first: self.first_pods(),
            page_size: PAGE_SIZE,
            page_limit_bytes: POD_PAGE_LIMIT_BYTES,
        };
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
        let reached = |version: &str| {
            *self.version.lock().unwrap_or_else(PoisonError::into_inner) = Some(version.into());
        };
        follow(self.pod_api(), config, take, reached, failed).await;
    }

    /// Returns at once where namespaces are not restricted.
    pub(super) async fn watch_namespaces(&self) {
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
        let config = FollowConfig {
            fields: None,
            first: FirstList::MostRecent,
            page_size: PAGE_SIZE,
            page_limit_bytes: NAMESPACE_PAGE_LIMIT_BYTES,
        };
        follow(api, config, take, |_| {}, failed).await;
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
}
