//! The agent of kube2ram, as a library so that tests can run any part of it.
//!
//! Modules stand in data-flow order. One request is `Origin → PodUid → Pod → RoleSession → Permit →
//! Credentials → response`; each step turns one value into the next and does not call an earlier step. `app`
//! is the only composition root.

#![deny(unsafe_code)]

pub mod args;
mod netlink;

pub mod datapath;
pub mod guard;
pub mod reconcile;
pub mod self_test;
mod devices;
pub mod listeners;
pub mod identity;
pub mod wire_guard;
pub mod pod;
pub mod kubernetes;
pub mod role;
pub mod policy;
pub mod audit;
pub mod credentials;
pub mod server;

pub mod boot_guard;
pub mod control;
pub mod snapshot;
pub mod status;
pub mod handover;
pub mod predecessors;
pub mod preflight;
pub use kube2ram_service::probe;
pub mod uninstall;
pub mod app;
