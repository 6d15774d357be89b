//! Properties that must hold for every input. `fuzz_targets` lets libFuzzer search for counterexamples; a
//! test of the agent replays `corpus` without libFuzzer. Each module is one target: its `check` panics when a
//! property does not hold.

pub mod allow_list;
pub mod annotations;
pub mod aws_documents;
pub mod cgroup_path;
pub mod connection;
pub mod documents;
pub mod request_target;

pub mod model;

/// A target.
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Panics when something does not hold.
    pub check: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "allow_list", check: allow_list::check },
    Target { name: "annotations", check: annotations::check },
    Target { name: "aws_documents", check: aws_documents::check },
    Target { name: "cgroup_path", check: cgroup_path::check },
    Target { name: "connection", check: connection::check },
    Target { name: "documents", check: documents::check },
    Target { name: "request_target", check: request_target::check },
];
