//! Views of pods for status: their state, or where else they are. Pure; created by `kubernetes::cluster`,
//! read by `app`.

use std::{net::IpAddr, sync::Arc};

use super::object::{ApiPod, Lenient};
use crate::{identity::PodUid, pod::Pod};

/// A pod of this node, and how it is known.
#[derive(Clone, Debug)]
pub struct PodView {
    /// The pod.
    pub pod: Arc<Pod>,
    /// The other name of its cgroup, if it is a static pod's mirror.
    pub config_hash: Option<PodUid>,
    /// `status.podIP`.
    pub ip: Option<IpAddr>,
    /// How it is known.
    pub presence: Presence,
    /// Whether one of its containers runs, according to the API server.
    pub is_running: bool,
}

/// How a pod is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Deleted from the API server; its cgroup existed at the last check.
    Departed,
    /// From the API server.
    Known,
    /// From the snapshot: the API server has not answered since the agent's restart.
    Restored,
    /// From the API server, and about to end: it keeps its role until then.
    Terminating,
}

/// Where a pod is that is not known to be on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// The pod does not exist.
    Absent,
    /// It has ended, in this phase.
    Ended(Box<str>),
    /// It is on this node, and the watch is about to show it.
    Here,
    /// On another node.
    OnNode(Box<str>),
    /// The API server did not answer.
    Unanswered(Box<str>),
    /// On no node yet.
    Unscheduled,
}

impl Elsewhere {
    pub(super) fn of(pod: Option<ApiPod>, this_node: &str) -> Self {
        let Some(pod) = pod else { return Self::Absent };
        let phase = pod.status.and_then(Lenient::sound).and_then(|status| status.phase);
        let spec = pod.spec.sound().unwrap_or_default();
        match (phase, spec.node_name.filter(|node| !node.is_empty())) {
            (Some(phase), _) if matches!(&*phase, "Failed" | "Succeeded") => Self::Ended(phase),
            (_, None) => Self::Unscheduled,
            (_, Some(node)) if *node == *this_node => Self::Here,
            (_, Some(node)) => Self::OnNode(node),
        }
    }
}
