//! Hands a node from one agent to the next without a moment in which nobody serves: the lock and the listeners of the host go through a Unix socket in the state
//! directory. In pods the next agent opens listeners of its own, beside those of the former. Depends on `datapath` and `state_dir`; called by `app`.
//!
//! An agent that finds another one prepares itself and stands by. The running one passes everything on when it is told to end, and goes on serving
//! until the other one says that it does. So an agent that cannot serve never ends one that can, and whoever is told to end is the one that ends.

mod channel;
mod heirs;
mod predecessor;

use std::{io, net::SocketAddr, os::fd::OwnedFd, path::PathBuf};

use kube2ram_common::abi::ABI_VERSION;
use serde::{Deserialize, Serialize};

pub use self::{
    heirs::{Heirs, Post},
    predecessor::{Predecessor, Seat, claim},
};
use crate::datapath::DatapathError;

/// What this file's messages look like and mean. Agents of different versions do not hand over: the later one starts when the other has ended.
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
    /// Of an agent that listens, or would, on these addresses. `is_pod`: its own cgroup lies below the pods'. Elsewhere a listener is of no use to
    /// another agent, because `sock_ops` runs in the cgroup that made it.
    pub fn new(app: SocketAddr, admin: SocketAddr, is_pod: bool) -> Self {
        Self { protocol: PROTOCOL, layout: ABI_VERSION, app, admin, is_pod }
    }

    fn fits(&self, other: &Self) -> bool {
        self == other && self.is_pod
    }
}

/// Everything that a node's agent has which the next one cannot make itself without a gap.
#[derive(Debug)]
pub struct Estate {
    /// The lock of the pins.
    pub lock: OwnedFd,
    /// The listener for pods without one of their own.
    pub app: OwnedFd,
    /// The operator's listener.
    pub admin: OwnedFd,
}

/// Why agents do not understand each other. Pods are served by the running one as long as it runs.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The running agent is another version's, or its addresses are others.
    #[error(
        "the running agent has another version or other addresses, or one of the two agents does not run in a pod"
    )]
    Different,
    /// The other agent ended, or hung up.
    #[error("the other agent closed the connection")]
    HungUp,
    /// A message is none, or comes at the wrong time.
    #[error("unexpected handover message")]
    Malformed,
    /// The lock of the pins could not be tried.
    #[error("cannot try to lock the pin directory")]
    Lock(#[source] DatapathError),
    /// The socket could not be made.
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
    /// The other agent is not this user's.
    #[error("the other agent runs as another user")]
    Stranger,
    /// No answer in time.
    #[error("the other agent does not answer")]
    Timeout,
}

#[cfg(test)]
mod tests;
