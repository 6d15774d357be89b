//! Roles by ServiceAccount, end to end and in both clouds: the real agent on the real kernel, pods without
//! anything injected, a node whose own role may assume nothing, stand-ins for everything else. Needs root;
//! depends on the agent's binary and on `kube2ram-sandbox`, on nothing inside of the agent.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod api_server;
mod changes;
mod configuration;
mod node_mode;
mod restart;
mod roles;
mod secrecy;
mod support;
