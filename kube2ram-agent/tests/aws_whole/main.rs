//! The main job on AWS, end to end: the real agent on the real kernel, pods that are cgroups and namespaces,
//! stand-ins for everything else. Needs root and `python3`; depends on the agent's binary and on
//! `kube2ram-sandbox`, on nothing inside of the agent.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod attribution;
mod manifest;
mod neighbours;
mod paths;
mod roles;
mod sts;
mod support;
mod tokens;
mod words;
