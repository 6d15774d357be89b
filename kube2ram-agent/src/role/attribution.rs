//! What a session carries of its pod besides its name, which the pod's author can choose: session tags and
//! the source identity. Pure; called by the parent, and by `args` for the types.

use std::str::FromStr;

use super::RoleError;
use crate::pod::Pod;
use kube2ram_cloud::role::{SessionRules, SourceIdentity, Tag, TagKeys, TagValue, ValueError};

/// Which session tags a pod's session has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionTags {
    /// None.
    #[default]
    None,
    /// Those of the workload, the pod's name and the pod's UID. Each pod then has a session of its own, and
    /// costs its own calls to STS.
    Pod,
    /// The cluster's name if it is given, the namespace, the service account. The pods of a service account
    /// share sessions as they do without tags.
    Workload,
}

impl FromStr for SessionTags {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            "pod" => Ok(Self::Pod),
            "workload" => Ok(Self::Workload),
            _ => Err("give none, workload or pod"),
        }
    }
}

/// What every session carries of its pod. The default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attribution {
    tagging: Option<Tagging>,
    has_source_identity: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tagging {
    keys: TagKeys,
    cluster: Option<TagValue>,
    names_pod: bool,
}

/// Why sessions cannot carry it: an error of the flags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttributionError {
    /// The cluster's name can be no tag.
    #[error("--cluster-name {name:?} {reason}")]
    ClusterName {
        /// As it was given.
        name: Box<str>,
        /// What is wrong.
        reason: ValueError,
    },
    /// The cloud's sessions have no tags.
    #[error("--session-tags does not work on this cloud: drop the flag, or check --cloud")]
    NoSessionTags,
    /// The cloud's sessions have no source identity.
    #[error("--source-identity does not work on this cloud: drop the flag, or check --cloud")]
    NoSourceIdentity,
}

impl Attribution {
    /// Makes it of the flags `--session-tags`, `--cluster-name` and `--source-identity`, for a cloud with
    /// these rules. A cluster's name without session tags is checked, and has no effect.
    ///
    /// # Errors
    /// See [`AttributionError`]. What the cloud does not have is never left out in silence: policies may
    /// depend on it.
    pub fn try_new(
        rules: &SessionRules,
        tags: SessionTags,
        cluster_name: Option<&str>,
        has_source_identity: bool,
    ) -> Result<Self, AttributionError> {
        let parse = |name: &str| {
            TagValue::parse(name)
                .map_err(|reason| AttributionError::ClusterName { name: name.into(), reason })
        };
        let cluster = cluster_name.map(parse).transpose()?;
        if has_source_identity && !rules.has_source_identity {
            return Err(AttributionError::NoSourceIdentity);
        }
        let tagging = match (tags, rules.tags) {
            (SessionTags::None, _) => None,
            (_, None) => return Err(AttributionError::NoSessionTags),
            (_, Some(keys)) => Some(Tagging { keys, cluster, names_pod: tags == SessionTags::Pod }),
        };
        Ok(Self { tagging, has_source_identity })
    }

    /// The session tags of a pod.
    ///
    /// # Errors
    /// [`RoleError::Malformed`] about a tag. Kubernetes' own names are all legal values.
    pub(super) fn tags_of(&self, pod: &Pod) -> Result<Box<[Tag]>, RoleError> {
        let Some(Tagging { keys, cluster, names_pod }) = &self.tagging else { return Ok(Box::default()) };
        let tag = |key: &'static str, text: &str| match TagValue::parse(text) {
            Ok(value) => Ok(Tag { key, value }),
            Err(reason) => Err(RoleError::Malformed { key: key.into(), reason }),
        };
        let mut tags = Vec::with_capacity(5);
        tags.extend(cluster.clone().map(|value| Tag { key: keys.cluster, value }));
        tags.push(tag(keys.namespace, &pod.namespace)?);
        tags.push(tag(keys.service_account, &pod.service_account)?);
        if *names_pod {
            tags.push(tag(keys.pod_name, &pod.name)?);
            tags.push(tag(keys.pod_uid, pod.uid.as_str())?);
        }
        Ok(tags.into())
    }

    /// The source identity of the workload `workload`, if sessions have one.
    pub(super) fn source_identity_of(&self, workload: &str) -> Option<SourceIdentity> {
        self.has_source_identity.then(|| SourceIdentity::fit(workload))
    }
}
