//! Role session → [`Permit`] or [`Denial`]: the namespace rules and the requested role. Pure: no I/O, no clock, no logs.
//! Called by `server`. Only this module can make a [`Permit`], and `credentials` takes nothing else.

use crate::role::RoleSession;

/// The proof that policy was asked: what `credentials` takes, and only `policy` can make.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit(RoleSession);

impl Permit {
    /// What is permitted.
    pub fn session(&self) -> &RoleSession {
        &self.0
    }

    /// What is permitted, by value.
    pub fn into_session(self) -> RoleSession {
        self.0
    }
}
