//! How the guard stands, as people see it. Written by `guard` alone; read by `app`.

use std::sync::Arc;

use tokio::sync::watch;

/// What people see of the guard. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<watch::Sender<Standing>>);

/// How the guard stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether the rules for each of the metadata server's addresses are active; `None` before the first
    /// check.
    pub is_active: Option<bool>,
    /// Whether rules for its IPv6 address are among them.
    pub has_ipv6: bool,
    /// Whether rules against IPVS are among them.
    pub has_ipvs: bool,
    /// How often they were found missing or changed, and were restored.
    pub repairs: u64,
    /// Why they, or some of them, are not active.
    pub failure: Option<String>,
}

impl State {
    /// How the guard stands.
    pub fn read(&self) -> Standing {
        self.0.borrow().clone()
    }

    /// Waits for the end of the first check.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn checked(&self) {
        // Never an error: the sender is `self`'s.
        drop(self.0.subscribe().wait_for(|standing| standing.is_active.is_some()).await);
    }

    /// Each check is a change.
    #[cfg(test)]
    pub(super) fn subscribe(&self) -> watch::Receiver<Standing> {
        self.0.subscribe()
    }

    pub(super) fn update(&self, update: impl FnOnce(&mut Standing)) {
        self.0.send_modify(update);
    }
}
