//! What must hold of foreign input, whatever it is. `fuzz_targets` lets libFuzzer look for input of which it does not; a test of the
//! agent replays `corpus` without it. Each module is one target: its `check` panics when something does not hold.

pub mod allow_list;
pub mod annotations;
pub mod cgroup_path;
pub mod connection;
pub mod documents;
pub mod request_target;

pub mod model;

/// The targets by name.
pub const TARGETS: &[(&str, fn(&[u8]))] = &[
    ("allow_list", allow_list::check),
    ("annotations", annotations::check),
    ("cgroup_path", cgroup_path::check),
    ("connection", connection::check),
    ("documents", documents::check),
    ("request_target", request_target::check),
];
