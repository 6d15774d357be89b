//! What one watch has said: the last value of each object, with a relist that replaces the whole at once.
//! Pure; called by `kubernetes::pods`.

use std::{collections::HashMap, hash::Hash};

#[derive(Debug)]
pub(super) struct Store<K, V> {
    known: HashMap<K, V>,
    /// What a relist has brought so far. Look-ups do not see it, so that no pod is missing for as long as the list takes.
    incoming: HashMap<K, V>,
    listed: bool,
}

impl<K: Eq + Hash, V> Store<K, V> {
    pub(super) fn new() -> Self {
        Self { known: HashMap::new(), incoming: HashMap::new(), listed: false }
    }

    /// Whether a first list is complete.
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    pub(super) fn known(&self) -> &HashMap<K, V> {
        &self.known
    }

    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.known.insert(key, value)
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        self.known.remove(key)
    }

    pub(super) fn start_list(&mut self) {
        self.incoming = HashMap::new();
    }

    pub(super) fn list(&mut self, key: K, value: V) {
        self.incoming.insert(key, value);
    }

    /// Gives what was known before.
    pub(super) fn finish_list(&mut self) -> HashMap<K, V> {
        self.listed = true;
        std::mem::replace(&mut self.known, std::mem::take(&mut self.incoming))
    }
}
