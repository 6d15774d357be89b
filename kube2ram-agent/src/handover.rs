//! Hands a node from the outgoing agent to the incoming one without a gap: the lock and the host's listeners
//! are passed through a Unix socket in the state directory. In pods the incoming agent opens its own
//! listeners, next to those of the outgoing agent. Depends on `datapath` and `state_dir`; called by `app`.
//!
//! An agent that finds another one prepares itself and stands by. When the running agent is told to stop, it
//! passes everything on, and serves until the standby agent reports that it serves. So an agent that cannot
//! serve never ends one that can, and the agent that is told to stop always stops.

mod channel;
mod standby;
mod outgoing;

use std::{io, net::SocketAddr, os::fd::OwnedFd, path::PathBuf};

use kube2ram_common::abi::ABI_VERSION;
use serde::{Deserialize, Serialize};

pub use self::{
    outgoing::{LockOutcome, OutgoingAgent, claim},
    standby::{StandbyListener, Standbys},
};
use crate::datapath::DatapathError;

/// The version of the messages. Agents of different versions do not hand over: the later one starts when the
/// other has ended.
const PROTOCOL: u32 = 2;
/// The socket's name in the state directory.
pub const SOCKET: &str = "handover";

/// What two agents must have in common, so that pods do not notice which of them serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    protocol: u32,
    layout: u32,
    app: SocketAddr,
    admin: SocketAddr,
    is_pod: bool,
}

impl Hello {
    /// Of an agent that listens, or would, on these addresses. `is_pod`: its own cgroup lies below the pods'.
    /// Elsewhere a listener is of no use to another agent, because `sock_ops` runs in the cgroup that made
    /// it.
    pub fn new(app: SocketAddr, admin: SocketAddr, is_pod: bool) -> Self {
        Self { protocol: PROTOCOL, layout: ABI_VERSION, app, admin, is_pod }
    }

    fn fits(&self, other: &Self) -> bool {
        self == other && self.is_pod
    }
}

/// The descriptors of the running agent that the next agent cannot create itself without a gap.
#[derive(Debug)]
pub struct HandoverState {
    /// The lock of the pins.
    pub lock: OwnedFd,
    /// The host listener, for pods without an in-pod listener.
    pub app: OwnedFd,
    /// The operator's listener.
    pub admin: OwnedFd,
}

/// Why a handover is not possible. The running agent serves pods as long as it runs.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The running agent has another version or other addresses.
    #[error(
        "the running agent has another version or other addresses, or one of the two agents does not run in a pod"
    )]
    Different,
    /// The other agent ended, or closed the connection.
    #[error("the other agent closed the connection")]
    HungUp,
    /// A message is malformed, or arrives at the wrong time.
    #[error("unexpected handover message")]
    Malformed,
    /// The attempt to lock the pins failed.
    #[error("cannot try to lock the pin directory")]
    Lock(#[source] DatapathError),
    /// The socket could not be created.
    #[error("cannot create the socket {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The socket does not work.
    #[error("cannot communicate with the other agent")]
    Speak(#[source] io::Error),
    /// The other agent runs as another user.
    #[error("the other agent runs as another user")]
    Stranger,
    /// No answer in time.
    #[error("the other agent does not answer")]
    Timeout,
}

#[cfg(test)]
mod tests;
