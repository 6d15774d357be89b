//! How many tests a step ran. Called by everything that tests, and by `ci`, which adds them up.

use std::{fmt, iter::Sum, ops::Add};

/// Tests that passed, failed, and did not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Counts {
    /// So many that passed, and nothing else: a step that ends at its first failure.
    pub(crate) fn passed(passed: usize) -> Self {
        Self { passed, ..Self::default() }
    }

    /// The counts of cargo-nextest's JUnit report of a whole run.
    pub(crate) fn of_junit(report: &str) -> Option<Self> {
        let suites = report.lines().find_map(|line| line.trim().strip_prefix("<testsuites "))?;
        let attribute = |name: &str| -> Option<usize> {
            suites.split_once(&format!(r#" {name}=""#))?.1.split('"').next()?.parse().ok()
        };
        let failed = attribute("failures")? + attribute("errors")?;
        Some(Self { passed: attribute("tests")?.checked_sub(failed)?, failed, skipped: 0 })
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed")?;
        if *skipped > 0 { write!(f, ", {skipped} skipped") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_another_text_is_none() {
        let report = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" uuid="1" timestamp="2026" time="9.1" tests="12" failures="1" errors="2">
    <testsuite name="kube2ram-common" tests="12" disabled="0" errors="0" failures="0">"#;

        assert_eq!(Counts::of_junit(report), Some(Counts { passed: 9, failed: 3, skipped: 0 }));
        assert_eq!(Counts::of_junit("<testsuite tests=\"12\">"), None);
        assert_eq!(Counts::of_junit(r#"<testsuites tests="1" failures="2" errors="0">"#), None);
    }
}
