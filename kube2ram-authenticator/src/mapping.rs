//! Who becomes whom: an identity of STS → a user of the cluster. Each backend has an [`Index`], made of its
//! entries; the first backend that names an identity decides. Pure: no I/O, no clock, no logs. `backend`
//! replaces the indexes, `webhook` asks.

use std::sync::{Arc, PoisonError, RwLock};

use crate::identity::{Identity, Map, Mapped};

mod arn;
mod entry;
mod glob;
mod index;
mod template;
#[cfg(test)]
pub(crate) mod testing;

pub use self::{
    arn::{ArnError, Pattern},
    entry::{Entry, EntryError, Restrictions},
    index::{Account, Decision, Index, MAPPINGS_MAX, Report, State},
    template::TemplateError,
};

/// The mappings of all backends, in their order.
#[derive(Debug)]
pub struct Mappings {
    /// Replaced as a whole, so that a look-up sees one state of all backends. `None` before a backend was
    /// read for the first time.
    indexes: RwLock<Arc<[Option<Arc<Index>>]>>,
}

impl Mappings {
    /// Of this many backends, none of which was read yet.
    pub fn new(backends: usize) -> Self {
        Self { indexes: RwLock::new(vec![None; backends].into()) }
    }

    /// Replaces what the backend number `backend` has, from 0.
    pub fn replace(&self, backend: usize, index: Arc<Index>) {
        let mut indexes = self.indexes.write().unwrap_or_else(PoisonError::into_inner);
        let mut replaced = indexes.to_vec();
        if let Some(place) = replaced.get_mut(backend) {
            *place = Some(index);
        }
        *indexes = replaced.into();
    }

    /// What each backend has now.
    pub fn indexes(&self) -> Arc<[Option<Arc<Index>>]> {
        Arc::clone(&self.indexes.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Map for Mappings {
    /// The first backend that names the identity decides, a conflict included. A backend that was not read
    /// yet could name it, so those after it are not asked.
    fn map(&self, identity: &Identity) -> Mapped {
        let indexes = self.indexes();
        let loaded = indexes.iter().map_while(Option::as_ref);
        let mut decided = loaded.map(|index| index.decide(identity).mapped);
        decided.find(|mapped| *mapped != Mapped::Nobody).unwrap_or(Mapped::Nobody)
    }

    fn is_loaded(&self) -> bool {
        self.indexes().iter().all(Option::is_some)
    }
}

#[cfg(test)]
mod tests;
