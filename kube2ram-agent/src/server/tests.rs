//! Component tests over real sockets. Row numbers are those of docs/predecessors.md.

mod aws;
mod conformance;
mod conformance_credentials;
mod conformance_paths;
mod harness;
mod hostile;
mod pass_through;
mod service_accounts;
mod serving;
mod tokens;

use super::*;
