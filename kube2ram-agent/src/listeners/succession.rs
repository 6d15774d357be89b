//! Listeners in pods that pass from one agent to the next, which goes on with them as they are. Called by `listeners`, which owns them.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use tokio::{net::TcpListener, sync::oneshot};
use tracing::warn;

use super::{NetnsId, Open, PodListeners};
use crate::{closing::Closing, datapath::ListenerId, identity::CgroupId, telemetry::chain};

/// A pod's open listener, as one agent hands it to the next.
#[derive(Clone, Debug)]
pub struct PodListener {
    /// The pod's cgroup.
    pub pod: CgroupId,
    /// What the kernel half calls it.
    pub id: ListenerId,
    /// The namespace that it is in.
    pub netns: NetnsId,
    /// The listener itself.
    pub listener: Arc<TcpListener>,
}

/// Asks for all open listeners. From the answer on none is opened or closed any more: they are another agent's.
pub type HandOver = oneshot::Sender<Vec<PodListener>>;

impl PodListeners {
    /// Serves what a former agent had open, from now on. The kernel half sends the pods there already.
    pub fn inherit(&mut self, listeners: Vec<PodListener>, closing: &Closing) {
        for PodListener { pod, id, netns, listener } in listeners {
            let Ok(SocketAddr::V4(addr)) = listener.local_addr() else { continue };
            let open = Open { id, addr, netns, listener, closing: closing.child() };
            self.serve(pod, &open);
            self.inherited.insert(pod, open);
        }
    }

    /// Closes what a former agent had open for pods that are gone by now.
    pub(super) fn close_inherited_of_others(&mut self, living: &HashSet<CgroupId>) {
        let gone: Vec<_> = self.inherited.keys().filter(|pod| !living.contains(pod)).copied().collect();
        for pod in gone {
            match self.targets.remove(pod) {
                Ok(()) => drop(self.inherited.remove(&pod).map(|open| open.closing.close())),
                Err(error) => {
                    self.metrics.failed("close");
                    warn!(cgroup.id = %pod, error = chain(&error), "cannot forget a pod's listener");
                }
            }
        }
    }

    pub(super) fn handed_over(&self) -> Vec<PodListener> {
        let of_pods = self.pods.iter().filter_map(|(pod, state)| Some((pod, state.open.as_ref()?)));
        of_pods
            .chain(&self.inherited)
            .map(|(pod, open)| PodListener {
                pod: *pod,
                id: open.id,
                netns: open.netns,
                listener: Arc::clone(&open.listener),
            })
            .collect()
    }
}
