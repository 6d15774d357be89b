//! A pod, as far as it matters to its role. Made by `kubernetes`, read by `role`, `policy` and `server`.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::identity::PodUid;

/// A pod of this node, trimmed to what is used.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.uid`. A mirror pod's differs from its cgroup's name, which is then its config hash.
    pub uid: PodUid,
    /// `metadata.namespace`.
    pub namespace: Box<str>,
    /// `metadata.name`.
    pub name: Box<str>,
    /// `spec.serviceAccountName`; `default` when unset.
    pub service_account: Box<str>,
    /// Those of the ServiceAccount's annotations that the agent is configured to keep; `None` when they are
    /// not asked for, or not known yet. A pod's own take precedence. All pods of an account share them, so a
    /// checkpoint has them once, and not here.
    #[serde(skip)]
    pub account_annotations: Option<Arc<BTreeMap<Box<str>, Box<str>>>>,
    /// Whether it stands for a static pod, which has no ServiceAccount, whatever its object says.
    pub is_mirror: bool,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Those of `metadata.annotations` that the agent is configured to keep.
    pub annotations: BTreeMap<Box<str>, Box<str>>,
}
