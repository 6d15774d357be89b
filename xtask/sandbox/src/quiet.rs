//! How strictly tests judge times on this machine: most of them run next to other work, which takes the
//! processors from the agent and its clients. Depends on nothing. Called by `client` and by tests.

use std::env;

use anyhow::Result;

/// Set to `1` on a machine without other work.
const QUIET: &str = "KUBE2RAM_QUIET";
/// How many probes may fail one after another on a busy machine.
const MAX_FAILED_IN_A_ROW: usize = 3;

/// Whether this machine has no other work, as `KUBE2RAM_QUIET=1` declares.
pub fn is_quiet() -> bool {
    env::var_os(QUIET).is_some_and(|value| value == "1")
}

/// Probes of an agent, one after another.
#[derive(Debug, Default)]
pub struct Probes {
    failed_in_a_row: usize,
}

impl Probes {
    /// Judges the next one; `None` when it failed, which single ones may on a busy machine.
    ///
    /// # Panics
    ///
    /// When one has failed on a quiet machine, or more than three in a row on another one.
    pub fn judge<T>(&mut self, what: &str, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(answer) => {
                self.failed_in_a_row = 0;
                Some(answer)
            }
            Err(error) => {
                self.failed_in_a_row += 1;
                let (failed, most) = (self.failed_in_a_row, if is_quiet() { 0 } else { MAX_FAILED_IN_A_ROW });
                assert!(failed <= most, "{what}: {failed} probes failed in a row; the last one: {error:#}");
                None
            }
        }
    }
}
