//! How the wire guard stands, as people see it. Written by `wire_guard` alone; read by `app`.

use std::sync::{Arc, Mutex, PoisonError};

/// What people see of the guard. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<Mutex<Standing>>);

/// How the guard stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether each device that is known to lead out has the program, before all others; `None` before the
    /// first check.
    pub is_active: Option<bool>,
    /// The node's devices that have it.
    pub node_devices: usize,
    /// Devices in pods' network namespaces that have it.
    pub pod_devices: usize,
    /// How often a program was found missing, or behind another one, and attached again.
    pub repairs: u64,
    /// Why it is not active.
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
