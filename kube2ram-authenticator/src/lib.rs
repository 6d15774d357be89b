//! The authenticator of kube2ram, as a library so that tests can run any part of it: RAM users and roles log
//! in to a Kubernetes API server. Its client signs a call to STS, its server sends the call and learns who
//! signed it, and a mapping turns that identity into a Kubernetes user.
//!
//! A login is `token → SignedCall → Identity → Mapped → TokenReview`; each step turns one value into the
//! next. No step gives more than the one before it: any error is a denial.

#![deny(unsafe_code)]

pub mod args;
pub mod config;
mod files;
pub mod identity;
pub mod mapping;
pub mod backend;
pub mod check;
pub mod token;
pub mod verify;
pub mod webhook;
pub mod tls;
pub mod serve;
pub mod client;
#[cfg(test)]
mod testing;
