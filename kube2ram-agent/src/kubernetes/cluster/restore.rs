//! What outlives the agent: takes up the checkpoint of an earlier agent while the API server is unavailable,
//! and makes the one for the next agent. Called by the parent and `watches`.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;
use tracing::warn;

use super::Cluster;
use crate::kubernetes::{Checkpoint, Directory as _, namespaces::Namespace};
use kube2ram_service::kubernetes::FirstList;

/// The checkpoint of an earlier agent, used if the API server is unavailable.
#[derive(Default)]
pub(super) struct Offered {
    checkpoint: Mutex<Option<Checkpoint>>,
    /// Whether it is used.
    is_used: AtomicBool,
}

/// How long the API server may take before what was known before the restart is used.
const RESTORE_PATIENCE: Duration = Duration::from_secs(5);

impl Offered {
    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }

    fn put(&self, checkpoint: Checkpoint) {
        *self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(checkpoint);
    }

    fn version(&self) -> Option<String> {
        let checkpoint = self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
        checkpoint.as_ref().and_then(Checkpoint::version).map(str::to_owned)
    }

    fn take(&self) -> Option<Checkpoint> {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Cluster {
    /// Offers the checkpoint of an earlier agent. It is used when the API server fails to answer, or has not
    /// answered after five seconds, and only until it does: an allow-list that was narrowed meanwhile counts
    /// as soon as the API server answers. Call it before [`Self::run`].
    pub fn offer(&self, checkpoint: Checkpoint) {
        self.offered.put(checkpoint);
    }

    /// The checkpoint for the next agent; `None` before the API server's lists are complete.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        if !self.is_synced() {
            return None;
        }
        let checkpoint = Checkpoint::of(self.lookups().pods.all(), |name| self.allow_list(name));
        // Read after the pods, so that it is not older than these.
        let version = self.version.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some(checkpoint.at(version))
    }

    /// From the API server's cache, as the kubelet does: when a thousand agents start at once, etcd does not
    /// notice. The list may be a little old, but the watch starts where it ends. It is not older than what an
    /// agent before knew: another API server's cache may be behind, and would bring back deleted pods and
    /// former roles.
    pub(super) fn first_pods(&self) -> FirstList {
        self.offered.version().map_or(FirstList::Any, FirstList::NotOlderThan)
    }

    /// Uses what was offered, unless the API server has answered.
    pub(super) fn restore(&self) {
        let Some(checkpoint) = self.offered.take().filter(|_| !self.is_synced()) else { return };
        let live = match (self.config.live_pods)() {
            Ok(live) => live,
            Err(error) => {
                warn!(%error, "cannot read the pods' cgroups: nothing is restored");
                self.offered.put(checkpoint);
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
        self.offered.is_used.store(true, Ordering::Relaxed);
        self.changed.send_replace(());
    }

    /// Restores if the API server has not answered in time, and resolves when it has.
    pub(super) async fn restore_late(&self) {
        sleep(RESTORE_PATIENCE).await;
        self.restore();
        self.synced().await;
        self.metrics.restored_pods.set(0);
    }
}
