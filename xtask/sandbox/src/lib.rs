//! One Linux machine as a Kubernetes node: pods made of cgroups and network namespaces, and stand-ins for the
//! API server, the metadata server and STS. It shares no code with the agent, so that neither can hide the
//! other's mistakes. Used by `cargo xtask sandbox` and by the agent's kernel tests.

pub mod agent;
pub mod bench;
pub mod client;
pub mod clock;
mod cloud;
pub mod container;
pub mod control_plane;
mod credentials_from;
pub mod documents;
pub mod jwks;
pub mod kernel;
mod log_writer;
pub mod login;
pub mod node;
pub mod prometheus;
pub mod quiet;
mod sandbox;
mod secrets;
pub mod sdk;
pub mod show;
pub mod situation;
pub mod standin;

pub use self::{
    cloud::Cloud,
    credentials_from::CredentialsFrom,
    sandbox::{InPod, Sandbox},
};

use std::{
    io::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Locks for a short section. A panic elsewhere fails its own test; it must not hide behind a poisoned lock
/// in this one.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints for the person at the terminal, who may have closed it.
fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}
