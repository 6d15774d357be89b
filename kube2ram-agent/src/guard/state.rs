//! How the guard stands, as people see it. Written by `guard` alone; read by `app`.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Found, GuardError, ruleset::Target};
use crate::telemetry::chain;

/// What people see of the guard. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct State(Arc<Mutex<Standing>>);

/// How the guard stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether the table is in force; `None` before the first check.
    pub is_in_force: Option<bool>,
    /// Whether it has rules against IPVS.
    pub has_ipvs: bool,
    /// How often it was found missing or changed, and made anew.
    pub repairs: u64,
    /// Why it is not in force.
    pub failure: Option<String>,
}

impl State {
    /// How the guard stands.
    pub fn read(&self) -> Standing {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn write(
        &self,
        outcome: &Result<Found, GuardError>,
        target: Option<Target>,
        before: Option<bool>,
    ) {
        let mut standing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        standing.is_in_force = Some(outcome.is_ok());
        standing.has_ipvs = target.is_some_and(|target| target.has_ipvs);
        standing.failure = outcome.as_ref().err().map(|error| chain(error));
        standing.repairs += u64::from(before == Some(true) && matches!(outcome, Ok(Found::MissingOrChanged)));
    }
}
