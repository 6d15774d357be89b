//! The main job, end to end: the real agent on the real kernel, pods that are cgroups and namespaces,
//! stand-ins for everything else. Needs root, `curl` and `python3`; depends on the agent's binary and on
//! `kube2ram-sandbox`, on nothing inside of the agent.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod address;
mod audit;
mod authenticator;
mod changes;
mod clients;
mod crash;
mod denials;
mod drain;
mod explain;
mod first_attach;
mod hardened;
mod http_proxy;
mod identity;
mod self_test;
mod ipv6;
mod lifecycle;
mod load;
mod observability;
mod oidc;
mod options;
mod outages;
mod ports;
mod situations;
mod status;
mod sts_answers;
mod support;
mod trees;
