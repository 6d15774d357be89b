//! What roles refused, each for a while: bounded, in memory only. Called by the parent.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::role::RoleArn;

/// One value for each role.
pub(crate) struct Memory<T>(Mutex<HashMap<RoleArn, Noted<T>>>);

/// A value, until it is too old.
#[derive(Clone, Copy)]
pub(crate) struct Noted<T> {
    value: T,
    /// When the role last refused.
    pub(crate) since: Instant,
}

impl<T: Copy> Memory<T> {
    pub(super) fn known(&self, role: &RoleArn) -> Option<T> {
        self.roles().get(role).and_then(Noted::fresh)
    }

    /// Notes what `value` makes of the value that is known.
    pub(super) fn note(&self, role: &RoleArn, value: impl FnOnce(Option<T>) -> T) {
        let mut roles = self.roles();
        if roles.len() >= MAX_ROLES {
            roles.clear();
        }
        let value = value(roles.get(role).and_then(Noted::fresh));
        roles.insert(role.clone(), Noted { value, since: Instant::now() });
    }

    pub(super) fn forget(&self, role: &RoleArn) {
        self.roles().remove(role);
    }

    pub(crate) fn roles(&self) -> MutexGuard<'_, HashMap<RoleArn, Noted<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Default for Memory<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Copy> Noted<T> {
    fn fresh(&self) -> Option<T> {
        (self.since.elapsed() < MAX_AGE).then_some(self.value)
    }
}

/// After that time all that is wanted is requested for a role again: its limit may have been raised.
pub(crate) const MAX_AGE: Duration = Duration::from_hours(24);
const MAX_ROLES: usize = 1024;
