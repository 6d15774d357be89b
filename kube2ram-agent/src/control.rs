//! The agent's control socket: `kube2ram status`, `explain`, `store` and `log-level` ask it. Root's alone, in
//! the state directory, of the agent that serves. Depends on `state_dir`; served by `app` ([`Control`]),
//! asked by `main` ([`ask`]).
//!
//! One request a connection, a line of JSON; one answer, a line of JSON, and the end. The name leads to one
//! agent at any moment: the incoming agent replaces the socket in one step.

mod client;
mod serving;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::{
    client::{ControlError, Shown, ask, show},
    serving::Control,
};

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Why a pod gets what it gets: an [`Explanation`](crate::status::Explanation).
    Explain {
        /// The pod's namespace.
        namespace: String,
        /// The pod's name.
        name: String,
    },
    /// Which pods were given the credentials with an AccessKeyId: an
    /// [`AccessKeyReport`](crate::status::AccessKeyReport).
    ExplainAccessKey {
        /// The AccessKeyId.
        access_key_id: String,
    },
    /// What is logged, perhaps from now on: a [`LogLevel`].
    LogLevel(Option<ChangeLogLevel>),
    /// All that the agent knows of itself: a [`Status`](crate::status::Status).
    Status,
    /// All that the agent knows of pods and namespaces: an object of no fixed form, but for its `schema`.
    Store,
}

/// How the log is to change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeLogLevel {
    /// Back to the level of the flags.
    Reset,
    /// This level, for a while.
    To {
        /// `trace`, `debug`, `info`, `warn` or `error`.
        level: String,
        /// For how long; then the flags count again.
        seconds: u64,
    },
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevel {
    /// [`SCHEMA`](crate::status::SCHEMA).
    pub schema: u32,
    /// The level.
    pub level: String,
    /// When it is reset to the level of the flags.
    pub until: Option<jiff::Timestamp>,
}

impl std::fmt::Display for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.until {
            Some(until) => writeln!(f, "{} until {until}, then the level of the flags", self.level),
            None => writeln!(f, "{}, as set by the flags", self.level),
        }
    }
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// The document.
    Document(serde_json::Value),
    /// Why there is no answer.
    Refused(String),
}

/// The socket's name in the state directory.
pub const SOCKET: &str = "control";
/// Its name until it replaces another socket. Only the agent that has the lock of the pins creates it.
pub const DRAFT: &str = "control-draft";
/// The longest that a request lasts, from connecting to the end of the answer, on either side.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request.
const MAX_REQUEST_BYTES: usize = 4 * 1024;
/// The longest answer: a pod takes some 600 bytes.
const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// How many requests are answered at once. Who comes then waits in the socket's queue.
pub(crate) const MAX_CONNECTIONS: usize = 6;

#[cfg(test)]
mod tests;
