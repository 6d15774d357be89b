//! The cache's state for status and explain: the result of issuing, and the state of each role session. Its
//! types cannot hold secrets. Created by `cache` and `entry`; read by `app`.

use std::time::Duration;

use jiff::Timestamp;

use kube2ram_cloud::{
    credentials::{IssueError, IssueErrorKind},
    role::RoleArn,
};
use kube2ram_service::telemetry::chain;

/// Why issuing failed, without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// What kind of failure.
    pub kind: IssueErrorKind,
    /// STS's own error code, or one of ours.
    pub code: Box<str>,
    /// STS's words, with what caused them.
    pub message: String,
    /// STS's request id.
    pub request_id: Option<Box<str>>,
}

/// One call for credentials that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt<T> {
    /// The role.
    pub role: RoleArn,
    /// How it ended.
    pub outcome: T,
}

/// The state of issuing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Issues {
    /// The last success, and when.
    pub succeeded: Option<Attempt<Timestamp>>,
    /// The last failure.
    pub failed: Option<Attempt<Failure>>,
    /// Whether STS throttled at the last opportunity: what no pod waits for pauses.
    pub is_throttled: bool,
    /// Fetches that wait in the STS scheduler.
    pub queued: usize,
    /// Role sessions in the cache.
    pub sessions: usize,
}

/// How one role session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionState {
    /// When what is held was issued, and when it expires. Absent when nothing that could be handed out is
    /// held.
    pub held: Option<(Timestamp, Timestamp)>,
    /// The last failure, unless a success came after it.
    pub failure: Option<Failure>,
    /// Whether a fetch is in flight or requested.
    pub is_fetching: bool,
    /// When the next fetch is due.
    pub next_in: Option<Duration>,
}

impl Failure {
    pub(super) fn of(error: &IssueError, at: Timestamp) -> Self {
        let IssueError { kind, code, request_id, .. } = error;
        let message = match &error.source {
            Some(source) => format!("{}: {}", error.message, chain(&**source)),
            None => error.message.to_string(),
        };
        Self { at, kind: *kind, code: code.clone(), message, request_id: request_id.clone() }
    }
}
