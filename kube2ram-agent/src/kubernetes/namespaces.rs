//! What the watch of namespaces has said: what counts of each one, within a bound. Pure; called by `kubernetes::cluster`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use kube::core::ObjectMeta;

use super::{AllowLists, object::bounded_annotation, store::Store};

/// What is kept of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    /// Its allow-list annotation.
    pub(super) allow_list: Option<Arc<str>>,
    /// Whether it has the annotation that gives a pod its role. It has no effect there, which people do not expect.
    pub(super) has_role: bool,
}

/// The namespaces of the cluster. What has no room is not known, so that its pods wait and get nothing.
#[derive(Debug)]
pub(super) struct Namespaces {
    store: Store<Box<str>, Namespace>,
    known_bytes: usize,
    /// Of those that a relist has brought so far.
    incoming_bytes: usize,
    /// For people: the names of some that have no room.
    without_room: HashSet<Box<str>>,
}

/// 5,000 namespaces with lists of 700 bytes. A relist may take the same again while it lasts.
pub(crate) const LIMIT_BYTES: usize = 4 * 1024 * 1024;
/// How many of those without room are counted.
const WITHOUT_ROOM_LIMIT: usize = 1024;
/// What an entry takes beside its texts, so that the limit is one on the number as well.
const ENTRY_BYTES: usize = 128;

impl Namespace {
    pub(super) fn of(metadata: ObjectMeta, keys: &AllowLists) -> Self {
        let has_role =
            metadata.annotations.as_ref().is_some_and(|all| all.contains_key(&*keys.role_annotation));
        Self { allow_list: bounded_annotation(metadata, &keys.annotation), has_role }
    }

    fn bytes(&self, name: &str) -> usize {
        ENTRY_BYTES + name.len() + self.allow_list.as_ref().map_or(0, |text| text.len())
    }
}

impl Namespaces {
    pub(super) fn new() -> Self {
        Self { store: Store::new(), known_bytes: 0, incoming_bytes: 0, without_room: HashSet::new() }
    }

    /// Whether a first list is complete.
    pub(super) fn is_listed(&self) -> bool {
        self.store.is_listed()
    }

    pub(super) fn known(&self) -> &HashMap<Box<str>, Namespace> {
        self.store.known()
    }

    /// Takes the latest of one. Without room for it, nothing is known of it any more: what it was before may allow too much.
    pub(super) fn apply(&mut self, name: Box<str>, namespace: Namespace) -> Result<(), NoRoom> {
        self.remove(&name);
        let Some(bytes) = sum(self.known_bytes, namespace.bytes(&name)) else { return self.refuse(name) };
        self.known_bytes = bytes;
        self.store.insert(name, namespace);
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.without_room.remove(name);
        if let Some(namespace) = self.store.remove(name) {
            self.known_bytes -= namespace.bytes(name);
        }
    }

    pub(super) fn start_list(&mut self) {
        self.store.start_list();
        self.incoming_bytes = 0;
        self.without_room.clear();
    }

    pub(super) fn list(&mut self, name: Box<str>, namespace: Namespace) -> Result<(), NoRoom> {
        let Some(bytes) = sum(self.incoming_bytes, namespace.bytes(&name)) else { return self.refuse(name) };
        self.incoming_bytes = bytes;
        self.store.list(name, namespace);
        Ok(())
    }

    /// How many have no room, as far as they are counted.
    pub(super) fn without_room(&self) -> usize {
        self.without_room.len()
    }

    fn refuse(&mut self, name: Box<str>) -> Result<(), NoRoom> {
        if self.without_room.len() < WITHOUT_ROOM_LIMIT {
            self.without_room.insert(name);
        }
        Err(NoRoom)
    }

    pub(super) fn finish_list(&mut self) {
        drop(self.store.finish_list());
        // Not `incoming_bytes`: a list of several pages may bring one twice.
        self.known_bytes = self.known().iter().map(|(name, namespace)| namespace.bytes(name)).sum();
    }
}

/// There is no room for a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRoom;

/// `None` when it is more than there is room for.
fn sum(taken: usize, more: usize) -> Option<usize> {
    Some(taken + more).filter(|sum| *sum <= LIMIT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(length: usize) -> Namespace {
        Namespace { allow_list: Some("x".repeat(length).into()), has_role: false }
    }

    #[test]
    fn what_has_no_room_is_not_known_and_what_it_was_before_does_not_stay() {
        let mut namespaces = Namespaces::new();
        let long = LIMIT_BYTES / 2 - 2 * ENTRY_BYTES;
        assert_eq!(namespaces.apply("a".into(), listed(1)), Ok(()));
        assert_eq!(namespaces.apply("b".into(), listed(long)), Ok(()));
        assert_eq!(namespaces.apply("c".into(), listed(long)), Ok(()));

        assert_eq!(namespaces.apply("a".into(), listed(1024)), Err(NoRoom));

        assert!(!namespaces.known().contains_key("a"));
        assert_eq!(namespaces.without_room(), 1);
        namespaces.remove("b");
        assert_eq!(namespaces.apply("a".into(), listed(1024)), Ok(()), "the room of the one that is gone");
        assert_eq!((namespaces.known().len(), namespaces.without_room()), (2, 0));
    }

    #[test]
    fn a_list_is_bounded_by_itself_and_counted_anew() {
        let mut namespaces = Namespaces::new();
        for round in 0..3 {
            namespaces.start_list();
            let long = LIMIT_BYTES / 4;
            let taken: Vec<_> =
                ["a", "b", "b", "c"].map(|name| namespaces.list(name.into(), listed(long))).into();
            assert_eq!(taken, [Ok(()), Ok(()), Ok(()), Err(NoRoom)], "round {round}");
            namespaces.finish_list();
            assert_eq!(namespaces.known().len(), 2);
        }
        assert_eq!(namespaces.apply("c".into(), listed(LIMIT_BYTES / 4)), Ok(()), "b was counted once");
    }

    #[test]
    fn the_bound_is_one_on_the_number_too() {
        let mut namespaces = Namespaces::new();

        let refused = (0..LIMIT_BYTES / ENTRY_BYTES)
            .filter(|n| namespaces.apply(n.to_string().into(), Namespace::default()).is_err());

        assert!(refused.count() > 0);
        assert!(namespaces.known().len() > 30_000);
    }
}
