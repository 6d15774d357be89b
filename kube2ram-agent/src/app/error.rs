//! Why the agent does not run. Used by all of `app`.

use std::{io, net::SocketAddr};

use crate::{
    datapath::DatapathError, handover::HandoverError, identity::MountError, probe::ProbeError,
    wire_guard::WireGuardError,
};
use kube2ram_cloud::{BaseError, StsClientError};
use kube2ram_service::{kubernetes::ClientError, state_dir::StateDirError};

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The thread of the admin service could not be started.
    #[error("cannot start the thread of the admin service")]
    AdminThread(#[source] io::Error),
    /// The thread that writes the audit records could not be started.
    #[error("cannot start the thread that writes the audit records")]
    Audit(#[source] io::Error),
    /// The variables for the agent's own credentials, or for STS, are incomplete or malformed.
    #[error("cannot use the variables for the agent's own credentials or for STS")]
    BaseCredentials(#[source] BaseError),
    /// A listener could not be bound.
    #[error("cannot listen on {address} ({flag})")]
    Bind {
        /// What was tried.
        address: SocketAddr,
        /// The flag to change.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A part that the agent cannot do without ended.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
    /// The cgroups are not where they should be.
    #[error("cannot find the pods' cgroups")]
    Cgroups(#[source] MountError),
    /// The eBPF programs are not attached.
    #[error("cannot activate the eBPF programs")]
    Datapath(#[source] DatapathError),
    /// Descriptors that one agent hands to another could not be copied, or are of the wrong kind.
    #[error("cannot hand the node over")]
    PassListener(#[source] io::Error),
    /// The handover between agents of this node failed.
    #[error("the handover with another agent of this node failed")]
    Handover(#[source] HandoverError),
    /// The API server's address or credentials are unusable.
    #[error("cannot create a client for the API server")]
    Kubernetes(#[source] ClientError),
    /// The machine's host name, the only name that the agent has for its node, is not the node's name.
    #[error(
        "the node's name is not known: no pod of a node {0}, which is the machine's host name, has an address of this machine; set --node, or the \
         variable NODE_NAME from spec.nodeName"
    )]
    NodeName(String),
    /// The node's network namespace.
    #[error("cannot open the node's network namespace")]
    Namespace(#[source] io::Error),
    /// The id of the agent's own cgroup.
    #[error("cannot examine the agent's own cgroup")]
    OwnCgroup(#[source] io::Error),
    /// The node lacks something; each condition with its remedy.
    #[error("this node is not ready for the agent: {0}")]
    Preflight(String),
    /// The probes could not reach the agent.
    #[error("cannot open the socket of the probes")]
    Probe(#[source] ProbeError),
    /// A part did not release what is to be handed over.
    #[error("the in-pod listeners were not released in time")]
    Release,
    /// The programs and maps were removed and created again while this agent stood by.
    #[error(
        "the eBPF programs were replaced after this agent had prepared: the agent stops, and prepares again at its next start"
    )]
    Replaced,
    /// The directory that agents share.
    #[error("cannot use the state directory")]
    StateDir(#[source] StateDirError),
    /// The certificates by which STS is known cannot be used.
    #[error("cannot create a client for STS")]
    StsClient(#[source] StsClientError),
    /// What an earlier agent left on network devices.
    #[error("cannot remove the wire guard")]
    WireGuard(#[source] WireGuardError),
    /// A part panicked.
    #[error("a background task of the agent panicked")]
    Panicked(#[source] tokio::task::JoinError),
    /// Another process has a port, so there is no listener to hand over.
    #[error("another process has the port of {0}")]
    PortTaken(&'static str),
}

impl AppError {
    /// The process's exit status: 64 for an environment that is wrong, as for flags (EX_USAGE of sysexits.h),
    /// else 1.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::BaseCredentials(_) | Self::NodeName(_)) { 64 } else { 1 }
    }
}
