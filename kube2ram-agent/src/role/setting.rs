//! What holds a value that makes up a role session: an annotation of the pod or of its ServiceAccount, or a
//! flag. Pure; called by the parent.

use std::fmt;

use crate::pod::Pod;
use kube2ram_cloud::role::ServiceAccount;

/// What holds a value, for people: the annotation's key or the flag, and the ServiceAccount if the annotation
/// is one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    key: Box<str>,
    account: Option<ServiceAccount>,
}

impl Setting {
    /// The annotation's key, or the flag.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The ServiceAccount that has the annotation; `None` if it is the pod's own, or a flag.
    pub fn account(&self) -> Option<&ServiceAccount> {
        self.account.as_ref()
    }
}

/// An annotation of the pod, or a flag.
impl From<&str> for Setting {
    fn from(key: &str) -> Self {
        Self { key: key.into(), account: None }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.account {
            Some(ServiceAccount { namespace, name }) => {
                write!(f, "{} of ServiceAccount {namespace}/{name}", self.key)
            }
            None => f.write_str(&self.key),
        }
    }
}

/// A value, and what holds it.
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    pub(super) key: &'a str,
    pub(super) text: &'a str,
    /// The pod whose ServiceAccount has the annotation.
    of_account: Option<&'a Pod>,
}

impl<'a> Found<'a> {
    /// The value of a flag.
    pub(super) fn in_flag(flag: &'a str, text: &'a str) -> Self {
        Self { key: flag, text, of_account: None }
    }

    /// The annotation of `pod` itself.
    pub(super) fn on_pod(pod: &'a Pod, key: &'a str) -> Option<Self> {
        Some(Self { key, text: pod.annotations.get(key)?, of_account: None })
    }

    /// The annotation of the ServiceAccount of `pod`.
    pub(super) fn on_account(pod: &'a Pod, key: &'a str) -> Option<Self> {
        let annotations = pod.account_annotations.as_ref()?;
        Some(Self { key, text: annotations.get(key)?, of_account: Some(pod) })
    }

    pub(super) fn setting(self) -> Setting {
        Setting { key: self.key.into(), account: self.of_account.map(account_of) }
    }
}

/// The ServiceAccount of a pod.
pub fn account_of(pod: &Pod) -> ServiceAccount {
    ServiceAccount { namespace: pod.namespace.clone(), name: pod.service_account.clone() }
}
