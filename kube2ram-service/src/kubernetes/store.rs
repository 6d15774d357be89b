//! What one watch has shown: the last value of each object, with a relist that replaces the whole at once.
//! Pure; called by whatever follows a watch.

use std::{collections::HashMap, hash::Hash};

/// The objects of one watch.
#[derive(Debug)]
pub struct Store<K, V> {
    known: HashMap<K, V>,
    /// What a relist has brought so far. Look-ups do not see it, so that no pod is missing for as long as the
    /// list takes.
    incoming: HashMap<K, V>,
    listed: bool,
}

impl<K: Eq + Hash, V> Store<K, V> {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self { known: HashMap::new(), incoming: HashMap::new(), listed: false }
    }

    /// Whether a first list is complete.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// All objects that are known.
    pub fn known(&self) -> &HashMap<K, V> {
        &self.known
    }

    /// The same, to change what the watch does not show. A relist replaces it.
    pub fn known_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.known.values_mut()
    }

    /// Keeps the latest value of an object; gives the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.known.insert(key, value)
    }

    /// Forgets an object; gives what was known of it.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.known.remove(key)
    }

    /// A list begins.
    pub fn start_list(&mut self) {
        self.incoming = HashMap::new();
    }

    /// An item of the list.
    pub fn list(&mut self, key: K, value: V) {
        self.incoming.insert(key, value);
    }

    /// The list is complete: it replaces what was known, which this gives.
    pub fn finish_list(&mut self) -> HashMap<K, V> {
        self.listed = true;
        std::mem::replace(&mut self.known, std::mem::take(&mut self.incoming))
    }
}

impl<K: Eq + Hash, V> Default for Store<K, V> {
    fn default() -> Self {
        Self::new()
    }
}
