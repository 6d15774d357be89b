//! The identities of clients, counted once per connection. Depends on the errors of `datapath` and
//! `identity`; called by `server` and `connection`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::{datapath::OriginError, identity::IdentityError};

/// Who connected: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identified {
    /// Two sockets claim to be the caller's.
    Ambiguous,
    /// Its cgroup was removed.
    Gone,
    /// Its cgroup belongs to no pod.
    NoPod,
    /// A pod.
    Pod,
    /// The kernel did not provide it.
    Unreadable,
    /// The kernel has no record of the caller.
    Unvouched,
}

/// How many there were of each.
#[derive(Clone, Debug)]
pub(super) struct Identities([Counter; Identified::ALL.len()]);

impl Identified {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Ambiguous, "ambiguous"),
        (Self::Gone, "gone"),
        (Self::NoPod, "no_pod"),
        (Self::Pod, "pod"),
        (Self::Unreadable, "unreadable"),
        (Self::Unvouched, "unvouched"),
    ];
}

impl From<&OriginError> for Identified {
    fn from(error: &OriginError) -> Self {
        match error {
            OriginError::Ambiguous => Self::Ambiguous,
            OriginError::Read(_) => Self::Unreadable,
            OriginError::Unvouched => Self::Unvouched,
        }
    }
}

impl From<&IdentityError> for Identified {
    fn from(error: &IdentityError) -> Self {
        match error {
            IdentityError::Gone(_) => Self::Gone,
            IdentityError::NoPod { .. } => Self::NoPod,
            IdentityError::Open { .. } => Self::Unreadable,
        }
    }
}

impl Identities {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let family = Family::<[(&'static str, &'static str); 1], Counter>::default();
        let help = "Connections by how the caller was identified (pod; ambiguous or unvouched: no usable record of the connect hook; gone: its cgroup was removed; no_pod: its cgroup belongs to no pod; unreadable: its cgroup cannot be read)";
        registry.register("connection_identities", help, family.clone());
        Self(Identified::ALL.map(|(_, label)| family.get_or_create_owned(&[("outcome", label)])))
    }

    pub(super) fn count(&self, identified: Identified) {
        self.0[identified as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_numbered_by_position() {
        for (position, (identified, _)) in Identified::ALL.into_iter().enumerate() {
            assert_eq!(identified as usize, position);
        }
    }
}
