//! Session tags: values with the alphabet and the length of AssumeRole's reference (STS API 2011-06-15), and
//! the keys that name a pod. Depends on the parent's error and on the checks of `session`; used through the
//! parent.

use std::{fmt, sync::Arc};

use super::{
    ValueError,
    session::{check_alphabet, check_length},
};

/// The keys of the session tags that name a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagKeys {
    /// Of the cluster's name.
    pub cluster: &'static str,
    /// Of the pod's namespace.
    pub namespace: &'static str,
    /// Of the pod's service account.
    pub service_account: &'static str,
    /// Of the pod's name.
    pub pod_name: &'static str,
    /// Of the pod's UID.
    pub pod_uid: &'static str,
}

impl TagKeys {
    /// Those of EKS Pod Identity, so that policies that were written for it fit (EKS user guide, "Grant Pods
    /// access to AWS resources based on tags").
    pub const EKS: Self = Self {
        cluster: "eks-cluster-name",
        namespace: "kubernetes-namespace",
        service_account: "kubernetes-service-account",
        pod_name: "kubernetes-pod-name",
        pod_uid: "kubernetes-pod-uid",
    };
}

/// A session tag. Each is transitive: a session that this one opens has it, too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// One of [`TagKeys`].
    pub key: &'static str,
    /// What policies compare.
    pub value: TagValue,
}

/// A tag's value: 1–256 characters of `[A-Za-z0-9 _.:/=+@-]`. STS also accepts an empty value, and letters,
/// digits and blanks of other scripts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TagValue(Arc<str>);

impl TagValue {
    /// Parses a value. It is never made fit: two values that differ must not become equal to policies.
    ///
    /// # Errors
    /// What is wrong, as the rest of a sentence that names the value.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        check_length(text, 1, TAG_VALUE_MAX)?;
        check_alphabet(text, " _.:/=+@-", "letters, digits, blanks and any of _.:/=+@-")?;
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TagValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The most memory that the tags of one session use. All sessions share the cluster's name.
pub const TAGS_MAX_BYTES: usize = KEYS * size_of::<Tag>() + (KEYS - 1) * (ARC_HEADER + TAG_VALUE_MAX);

/// In characters, which are ASCII.
const TAG_VALUE_MAX: usize = 256;
/// How many [`TagKeys`] there are.
const KEYS: usize = 5;
/// The two counters of an [`Arc`].
const ARC_HEADER: usize = 2 * size_of::<usize>();
