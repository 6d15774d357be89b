//! Logins to a real API server by kubectl, with the webhook as its manifests run it, and a stand-in of STS:
//! `cargo xtask test --api-server`.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod cluster;
mod definition;
mod example;
mod intruders;
mod logins;
mod outages;
mod revocation;
