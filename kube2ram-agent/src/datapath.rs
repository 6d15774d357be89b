//! The kernel half's user side: loads, pins and attaches the programs, and reads what they know of a connection.
//! The only home of aya. Called by `app` (attach) and `server` (origin of an accepted connection).

use std::os::fd::BorrowedFd;

use crate::identity::CgroupId;

/// What the kernel vouches for about one accepted connection: who called connect(2), and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The cgroup of the task that called connect(2); a nested cgroup of a container is possible.
    pub cgroup: CgroupId,
    /// The process (tgid, as seen from the host) that called connect(2). For logs only.
    pub tgid: u32,
}

/// Why a connection has no origin.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// Two sockets claimed one 4-tuple, so the kernel half vouches for neither.
    #[error("ambiguous connection")]
    Ambiguous,
    /// Reading the socket's storage failed.
    #[error("cannot read the origin of a connection")]
    Read(#[source] std::io::Error),
    /// No connect hook vouched for the connection: it was not redirected but dialled directly.
    #[error("connection that no connect hook vouched for")]
    Unvouched,
}

/// Tells who is behind an accepted connection. The seam between the kernel and everything else.
pub trait Origins: Send + Sync + 'static {
    /// Reads the origin of an accepted socket.
    ///
    /// # Errors
    /// [`OriginError::Unvouched`] when the kernel did not mark it; any error must end in a denial.
    fn origin_of(&self, socket: BorrowedFd<'_>) -> Result<Origin, OriginError>;
}

/// Marks sockets of the agent itself, so that the connect hook lets them reach the real metadata server.
pub trait PassGrant: Send + Sync + 'static {
    /// Grants the pass; call it before connect(2).
    ///
    /// # Errors
    /// The map write's error; the connect would then be redirected to the agent itself, so the caller must give up.
    fn grant(&self, socket: BorrowedFd<'_>) -> std::io::Result<()>;
}
