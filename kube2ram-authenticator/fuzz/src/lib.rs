//! Properties that must hold for every input of the authenticator. `fuzz_targets` lets libFuzzer search for
//! counterexamples; a test of the authenticator replays `corpus` without libFuzzer. Each module is one
//! target: its `check` panics when a property does not hold, and returns whether the input was accepted.

pub mod caller;
pub mod config;
pub mod review;
pub mod token;

/// A target.
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Panics when something does not hold. Returns whether the input was accepted, so that the replay can
    /// prove that the corpus reaches both outcomes.
    pub check: fn(&[u8]) -> bool,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "authenticator_caller", check: caller::check },
    Target { name: "authenticator_config", check: config::check },
    Target { name: "authenticator_review", check: review::check },
    Target { name: "authenticator_token", check: token::check },
];
