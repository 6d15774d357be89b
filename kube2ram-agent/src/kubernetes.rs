//! The API server's data: the pods of this node and, where they are restricted, the namespaces' allow-lists,
//! kept by watches; where roles are given to ServiceAccounts, these, read one by one, and their tokens; and
//! Events to it. The only module that uses kube and k8s-openapi. Called by `server` (look-ups), `app`
//! (watches), and the issuer of credentials (tokens).

mod account_api;
mod accounts;
mod cluster;
mod events;
mod api_activity;
mod lookup;
mod metrics;
mod namespaces;
mod object;
mod own_node;
mod pods;
mod projection;
mod checkpoint;
mod pod_view;
mod service_accounts;
mod taint;
mod token_failures;
mod token_request;

use std::sync::Arc;

use async_trait::async_trait;

pub use self::{
    api_activity::{Resource, WatchState},
    checkpoint::Checkpoint,
    cluster::{AllowLists, Cluster, ClusterConfig},
    metrics::Metrics,
    own_node::OwnNode,
    pod_view::{Elsewhere, PodView, Presence},
    service_accounts::ServiceAccountConfig,
    taint::{StartupTaint, TaintError},
    token_request::{CODES_OF_API_SERVER, TokenRequester, TokenState},
};
use crate::{identity::PodUid, pod::Pod};

/// How much is kept of the namespaces' allow-lists.
#[cfg(test)]
pub(crate) const ALLOW_LISTS_BYTES: usize = namespaces::LIMIT_BYTES;

/// What the API server's answers take while they are read: the pods' list or watch, the namespaces', a direct
/// list and ServiceAccounts.
#[cfg(test)]
pub(crate) const ANSWERS_BYTES: usize = (3 + service_accounts::READS_AT_ONCE) * projection::READER_BYTES;

/// Why a pod is not known.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// More than one pod claims the UID (possible only for static pods' config hashes).
    #[error("more than one pod claims {0}")]
    Ambiguous(PodUid),
    /// Not known within the deadline although the API server could not be asked: it may exist.
    #[error("pod {uid} is not known and the API server cannot be asked")]
    Unavailable {
        /// The pod.
        uid: PodUid,
        /// The API server's error, if it answered in time.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// According to the API server, this node has no such pod.
    #[error("no pod {0} on this node")]
    Unknown(PodUid),
}

/// The pods and namespaces, as the rest of the agent sees them.
#[async_trait]
pub trait Directory: Send + Sync + 'static {
    /// The pod with this UID, when it is known already, with its ServiceAccount's annotations where these
    /// count. Nearly always it is, and nothing has to be waited for.
    fn known_pod(&self, uid: &PodUid) -> Option<Arc<Pod>>;

    /// The pod with this UID. A pod that is not known yet is waited for (event-driven, within the directory's
    /// deadline) and asked for once.
    ///
    /// # Errors
    /// Every error must end in a denial, never in the default role.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    async fn pod(&self, uid: &PodUid) -> Result<Arc<Pod>, PodError>;

    /// The namespace's allow-list annotation: `None` when the namespace is not known, or namespaces are not
    /// watched; `Some(None)` when it has no annotation.
    fn allow_list(&self, namespace: &str) -> Option<Option<Arc<str>>>;

    /// Whether the namespace is known to carry the annotation that gives a pod its role, and has no effect
    /// there. For people.
    fn has_misplaced_role(&self, namespace: &str) -> bool;
}

/// What the pod's owner or the cluster's operator should read in `kubectl describe`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// The object it is about.
    pub about: About,
    /// `UpperCamelCase`, for machines: `AssumeRoleDenied`, `CredentialsUnavailable`, `DatapathBroken`,
    /// `DatapathRepaired`, `MalformedAllowList`, `MalformedAnnotation`, `MisplacedAnnotation`,
    /// `OutsidePodsCgroup`, `RoleDenied`, `TokensUnavailable`.
    pub reason: &'static str,
    /// The text for people: the problem and the remedy. Names no secret and no other pod.
    pub message: String,
}

/// The object of a [`Notice`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum About {
    /// A namespace, by name.
    Namespace(Box<str>),
    /// This node.
    Node,
    /// A pod: namespace, name, UID.
    Pod(Box<str>, Box<str>, PodUid),
}

/// Accepts notices; never blocks, drops what does not fit its queue, and posts each one once per period.
pub trait Notices: Send + Sync + 'static {
    /// Queues a warning Event.
    fn warn(&self, notice: Notice);
}

#[cfg(test)]
mod tests;
