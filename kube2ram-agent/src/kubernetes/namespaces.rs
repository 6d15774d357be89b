//! The namespaces from the watch: the used parts of each, within a bound. Pure; called by
//! `kubernetes::cluster`.

use std::{
    collections::{HashMap, HashSet},
    mem::take,
    sync::Arc,
};

use kube::core::ObjectMeta;

use super::{AllowLists, object::bounded_annotation};

/// What is kept of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    /// Its allow-list annotation.
    pub(super) allow_list: Option<Arc<str>>,
    /// Whether it has the annotation that gives a pod its role. It has no effect there, which people do not
    /// expect.
    pub(super) has_role: bool,
}

/// The namespaces of the cluster. If there is no room for all, those with the longest lists are not kept:
/// they are not known, so their pods wait and get nothing. So a list never displaces a shorter one.
#[derive(Debug)]
pub(super) struct Namespaces {
    known: Kept,
    /// What a relist has brought so far.
    incoming: Kept,
    is_listed: bool,
    /// For people: the names of some that have no room.
    without_room: HashSet<Box<str>>,
}

/// As many as there is room for.
#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Box<str>, Namespace>,
    bytes: usize,
}

/// 5,000 namespaces with lists of 700 bytes. A relist may take the same again while it lasts.
pub(crate) const LIMIT_BYTES: usize = 4 * 1024 * 1024;
/// How many namespaces without room are counted.
const WITHOUT_ROOM_LIMIT: usize = 1024;
/// The size of an entry without its texts, so that the limit also bounds the number of entries.
const ENTRY_BYTES: usize = 128;
/// A longer list that cannot be read is not kept: it allows nothing anyway. A shorter one is, for what is
/// wrong with it.
const UNREADABLE_LIMIT_BYTES: usize = 4096;
const UNREADABLE: &str = "the annotation is long and cannot be read";

impl Namespace {
    pub(super) fn of(metadata: ObjectMeta, keys: &AllowLists) -> Self {
        let has_role =
            metadata.annotations.as_ref().is_some_and(|all| all.contains_key(&*keys.role_annotation));
        let is_kept = |text: &Arc<str>| text.len() <= UNREADABLE_LIMIT_BYTES || (keys.check)(text).is_ok();
        let allow_list = bounded_annotation(metadata, &keys.annotation);
        Self {
            allow_list: allow_list.map(|text| if is_kept(&text) { text } else { UNREADABLE.into() }),
            has_role,
        }
    }

    fn bytes(&self, name: &str) -> usize {
        ENTRY_BYTES + name.len() + self.allow_list.as_ref().map_or(0, |text| text.len())
    }
}

impl Namespaces {
    pub(super) fn new() -> Self {
        let (known, incoming) = (Kept::default(), Kept::default());
        Self { known, incoming, is_listed: false, without_room: HashSet::new() }
    }

    /// Whether a first list is complete.
    pub(super) fn is_listed(&self) -> bool {
        self.is_listed
    }

    pub(super) fn known(&self) -> &HashMap<Box<str>, Namespace> {
        &self.known.entries
    }

    /// Stores a namespace's latest state, and returns the names of the namespaces that have no room because
    /// of it, possibly its own. They are forgotten: their earlier lists may allow too much.
    pub(super) fn apply(&mut self, name: Box<str>, namespace: Namespace) -> Vec<Box<str>> {
        self.without_room.remove(&name);
        let left_out = self.known.put(name, namespace);
        self.note(left_out)
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.without_room.remove(name);
        self.known.remove(name);
    }

    pub(super) fn start_list(&mut self) {
        self.incoming = Kept::default();
        self.without_room.clear();
    }

    /// As [`Self::apply`], for a namespace of a relist: look-ups do not see it before the list is complete.
    pub(super) fn list(&mut self, name: Box<str>, namespace: Namespace) -> Vec<Box<str>> {
        let left_out = self.incoming.put(name, namespace);
        self.note(left_out)
    }

    pub(super) fn finish_list(&mut self) {
        self.is_listed = true;
        self.known = take(&mut self.incoming);
    }

    /// How many have no room, as far as they are counted.
    pub(super) fn without_room(&self) -> usize {
        self.without_room.len()
    }

    fn note(&mut self, left_out: Vec<Box<str>>) -> Vec<Box<str>> {
        let room = WITHOUT_ROOM_LIMIT.saturating_sub(self.without_room.len());
        self.without_room.extend(left_out.iter().take(room).cloned());
        left_out
    }
}

impl Kept {
    /// Replaces a namespace's entry. Returns the names of the namespaces that were removed for it; its own,
    /// if removing all longer ones is not enough.
    fn put(&mut self, name: Box<str>, namespace: Namespace) -> Vec<Box<str>> {
        self.remove(&name);
        let needed = namespace.bytes(&name);
        let Some(left_out) = self.in_the_way_of(needed) else { return vec![name] };
        for longer in &left_out {
            self.remove(longer);
        }
        self.bytes += needed;
        self.entries.insert(name, namespace);
        left_out
    }

    fn remove(&mut self, name: &str) {
        if let Some(namespace) = self.entries.remove(name) {
            self.bytes -= namespace.bytes(name);
        }
    }

    /// The longest entries that must be removed for this many bytes; `None` when removing all longer ones is
    /// not enough.
    fn in_the_way_of(&self, needed: usize) -> Option<Vec<Box<str>>> {
        let mut excess = (self.bytes + needed).saturating_sub(LIMIT_BYTES);
        if excess == 0 {
            return Some(Vec::new());
        }
        let entries = self.entries.iter().map(|(name, namespace)| (namespace.bytes(name), name));
        let mut longer: Vec<_> = entries.filter(|(bytes, _)| *bytes > needed).collect();
        longer.sort_unstable();
        let mut left_out = Vec::new();
        while excess > 0 {
            let (bytes, name) = longer.pop()?;
            left_out.push(name.clone());
            excess = excess.saturating_sub(bytes);
        }
        Some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(length: usize) -> Namespace {
        Namespace { allow_list: Some("x".repeat(length).into()), has_role: false }
    }

    fn names(left_out: Vec<Box<str>>) -> Vec<String> {
        left_out.into_iter().map(String::from).collect()
    }

    #[test]
    fn the_longest_lists_have_no_room_and_what_they_were_before_does_not_stay() {
        let mut namespaces = Namespaces::new();
        let quarter = LIMIT_BYTES / 4 - 2 * ENTRY_BYTES;
        assert!(namespaces.apply("short".into(), listed(1)).is_empty());
        for name in ["a", "b", "c"] {
            assert!(namespaces.apply(name.into(), listed(quarter)).is_empty());
        }
        assert!(namespaces.apply("long".into(), listed(quarter + 2)).is_empty());

        assert_eq!(
            names(namespaces.apply("short".into(), listed(2048))),
            ["long"],
            "not the one that came last"
        );
        assert_eq!(names(namespaces.apply("d".into(), listed(quarter))), ["d"], "as long as the longest");
        assert_eq!(
            names(namespaces.apply("a".into(), listed(2 * quarter))),
            ["a"],
            "what it was is forgotten"
        );

        assert!(!namespaces.known().contains_key("a") && namespaces.known().contains_key("short"));
        assert_eq!(namespaces.without_room(), 3);
        assert!(namespaces.apply("long".into(), listed(1024)).is_empty(), "it has become short");
        namespaces.remove("b");
        assert!(namespaces.apply("a".into(), listed(quarter)).is_empty(), "the room of the one that is gone");
        assert_eq!(namespaces.without_room(), 1);
        let taken: usize = namespaces.known().iter().map(|(name, namespace)| namespace.bytes(name)).sum();
        assert_eq!(namespaces.known.bytes, taken);
    }

    #[test]
    fn a_list_is_bounded_by_itself_whatever_its_order_and_counted_again() {
        let mut namespaces = Namespaces::new();
        let (long, longer) = (LIMIT_BYTES / 4, LIMIT_BYTES / 4 + 1);
        for (round, order) in
            [["longer", "b", "b", "c", "d"], ["d", "c", "b", "b", "longer"]].iter().enumerate()
        {
            namespaces.start_list();
            let left_out: Vec<_> = order
                .iter()
                .flat_map(|name| {
                    namespaces.list((*name).into(), listed(if *name == "longer" { longer } else { long }))
                })
                .collect();
            namespaces.finish_list();

            assert_eq!(names(left_out), ["longer"], "round {round}");
            assert_eq!(namespaces.known().len(), 3, "b came twice and was counted once");
            assert_eq!(namespaces.without_room(), 1);
        }
        assert!(namespaces.apply("e".into(), listed(LIMIT_BYTES / 8)).is_empty());
    }

    #[test]
    fn a_long_list_that_cannot_be_read_is_not_kept_and_allows_nothing() {
        let keys = AllowLists {
            annotation: "k".into(),
            role_annotation: "r".into(),
            check: Arc::new(|text| if text.starts_with('[') { Ok(()) } else { Err("no list".into()) }),
        };
        let of = |text: String| {
            let annotations = Some([("k".to_owned(), text)].into());
            Namespace::of(ObjectMeta { annotations, ..ObjectMeta::default() }, &keys).allow_list
        };

        assert_eq!(of("x".repeat(5000)).as_deref(), Some(UNREADABLE));
        assert!((keys.check)(UNREADABLE).is_err());
        assert_eq!(of("x".repeat(4000)).map(|text| text.len()), Some(4000), "for what is wrong with it");
        assert_eq!(of(format!("[{:5000}]", "")).map(|text| text.len()), Some(5002));
    }

    #[test]
    fn the_bound_is_one_on_the_number_too() {
        let mut namespaces = Namespaces::new();

        let refused = (0..LIMIT_BYTES / ENTRY_BYTES)
            .filter(|n| !namespaces.apply(n.to_string().into(), Namespace::default()).is_empty());

        assert!(refused.count() > 0);
        assert!(namespaces.known().len() > 30_000);
    }
}
