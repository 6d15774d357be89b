//! Component tests over real sockets; the rows are those of the ancestors' conformance table.

mod harness;
mod hostile;
mod pass_through;
mod serving;
mod tokens;

use super::*;
