//! [`Permit`](crate::policy::Permit) → credentials: the cache with single flight and refresh ahead of expiry.
//! Called by `server`; asks an [`Issuer`](kube2ram_cloud::credentials::Issuer) on a miss.

mod account;
mod cache;
mod entry;
mod issued;
mod limits;
mod sts_scheduler;
mod metrics;
mod survey;
mod sts_queue;

use std::{sync::Arc, time::Duration};

pub use self::{
    account::{Attempt, Failure, Issues, SessionState},
    cache::{Cache, Claim, ISSUE_DEADLINE},
    limits::Limits,
    metrics::Metrics,
    survey::{Standing, Survey},
};
use kube2ram_cloud::credentials::{IssueError, IssueErrorKind};
pub use kube2ram_service::rate_limiter::Rate;

/// The time over which an agent that has just started spreads the fetches that no pod has asked for. It is as
/// long as credentials are used before they are refreshed, so a roll-out to all nodes of an account makes
/// hardly more calls to STS than any other hour (`tests/fleet.rs`). A pod that asks earlier waits for STS
/// once, about 50 ms.
pub const WARM_UP: Duration = Duration::from_mins(26);

/// The memory that the pods with credentials take, besides their claims.
#[cfg(test)]
pub(crate) const HOLDERS_LIMIT_BYTES: usize = issued::HOLDERS_LIMIT_BYTES;

/// Why the cache has no credentials to give.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The cache is full of sessions that are all in use.
    #[error("too many role sessions")]
    Full,
    /// Issuing failed, now or not long ago.
    #[error("no credentials for the role session")]
    Issue {
        /// The failure.
        #[source]
        source: Arc<IssueError>,
        /// When it is worth asking again.
        retry_after: Duration,
    },
    /// Issuing takes longer than a pod waits; it continues.
    #[error("credentials are not ready yet")]
    NotReady {
        /// When it is worth asking again.
        retry_after: Duration,
    },
}

/// The closed set of [`CredentialError`]s: the metrics label, and what the HTTP status depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// [`CredentialError::Full`].
    Full,
    /// [`CredentialError::Issue`], by its own kind.
    Issue(IssueErrorKind),
    /// [`CredentialError::NotReady`].
    NotReady,
}

impl ErrorKind {
    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Issue(kind) => kind.as_str(),
            Self::NotReady => "not_ready",
        }
    }
}

impl CredentialError {
    /// Which of the closed set it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Full => ErrorKind::Full,
            Self::Issue { source, .. } => ErrorKind::Issue(source.kind),
            Self::NotReady { .. } => ErrorKind::NotReady,
        }
    }

    /// Whether asking again later may help; a denial otherwise.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Full | Self::NotReady { .. } => true,
            Self::Issue { source, .. } => source.kind.is_transient(),
        }
    }

    /// How long to wait before asking again, when that may help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Issue { retry_after, .. } | Self::NotReady { retry_after } if self.is_transient() => {
                Some(*retry_after)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
