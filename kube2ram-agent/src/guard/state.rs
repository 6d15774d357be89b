//! How the guard stands, as people see it. Written by `guard` alone; read by `app`.

use std::sync::{Arc, Mutex, PoisonError};

/// What people see of the guard. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<Mutex<Standing>>);

/// How the guard stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether the rules for each of the metadata server's addresses are in force; `None` before the first
    /// check.
    pub is_in_force: Option<bool>,
    /// Whether rules for its IPv6 address are among them.
    pub has_ipv6: bool,
    /// Whether rules against IPVS are among them.
    pub has_ipvs: bool,
    /// How often they were found missing or changed, and made anew.
    pub repairs: u64,
    /// Why they are not in force, or not all.
    pub failure: Option<String>,
}

impl State {
    /// How the guard stands.
    pub fn read(&self) -> Standing {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn update(&self, update: impl FnOnce(&mut Standing)) {
        update(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
