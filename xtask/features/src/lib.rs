//! No code, and nobody depends on it. As a member of the workspace it takes part in cargo's choice of
//! features when the whole workspace is selected, as all builds but a release's do. `cargo build`, `clippy`,
//! `doc` and the tests so build each crate once for all of them.
