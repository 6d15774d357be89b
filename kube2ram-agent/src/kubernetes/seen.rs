//! Pods as people ask for them: with where they stand, or where else they are. Pure; made by `kubernetes::cluster`, read by `app`.

use std::{net::IpAddr, sync::Arc};

use super::object::{ApiPod, Lenient};
use crate::{identity::PodUid, pod::Pod};

/// A pod of this node, and how it is known.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The pod.
    pub pod: Arc<Pod>,
    /// The other name of its cgroup, if it is a static pod's mirror.
    pub config_hash: Option<PodUid>,
    /// `status.podIP`.
    pub ip: Option<IpAddr>,
    /// How it is known.
    pub presence: Presence,
    /// Whether one of its containers runs, by the API server's last word.
    pub is_running: bool,
}

/// How a pod is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Deleted from the API server; its cgroup was still there when that was last looked at.
    Departed,
    /// From the API server.
    Known,
    /// From before the agent's restart: the API server has not been heard since.
    Restored,
    /// From the API server, and about to end: it keeps its role until then.
    Terminating,
}

/// Where a pod is that is not known to be on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// Nowhere: there is no such pod.
    Absent,
    /// It has ended, in this phase.
    Ended(Box<str>),
    /// It is on this node, and the agent is about to hear of it.
    Here,
    /// On another node.
    OnNode(Box<str>),
    /// The API server did not say.
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
