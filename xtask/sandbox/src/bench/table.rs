//! Numbers of several variants, measured in turn, as ratios to the one that they are compared with. Depends
//! on nothing; used by the other parts of `bench`.

use std::{fmt, io::Write};

use anyhow::Result;

/// What one variant took, round by round; every variant of a comparison has the same rounds.
#[derive(Clone, Debug, Default)]
pub(super) struct Rounds(Vec<f64>);

impl Rounds {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(super) fn median(&self) -> f64 {
        middle(&self.0).1
    }

    /// This variant's rounds over the same rounds of another: lowest, median, highest.
    pub(super) fn over(&self, baseline: &Self) -> Ratio {
        let ratios: Vec<_> = self.0.iter().zip(&baseline.0).map(|(this, that)| this / that).collect();
        let (low, median, high) = middle(&ratios);
        Ratio { low, median, high }
    }
}

/// A ratio, and how far the rounds lie apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ratio {
    low: f64,
    median: f64,
    high: f64,
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.median, self.low, self.high)
    }
}

/// What design or docs promise of a number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Nothing; it is there to be known.
    None,
}

impl Target {
    fn verdict(self, value: f64) -> String {
        match self {
            Self::AtLeast(least) => format!("{} ≥ {least}", crate::show::mark(value >= least)),
            Self::AtMost(most) => format!("{} ≤ {most}", crate::show::mark(value <= most)),
            Self::None => String::new(),
        }
    }
}

/// Prints one line of the report: what, its value, the ratio and the target.
pub(super) fn row(
    out: &mut dyn Write,
    what: &str,
    value: &str,
    ratio: Option<Ratio>,
    target: Target,
) -> Result<()> {
    let (shown, verdict) = match ratio {
        Some(ratio) => (ratio.to_string(), target.verdict(ratio.median)),
        None => (String::new(), String::new()),
    };
    let line = format!("  {what:<58} {value:>12}  {shown:<19} {verdict}");
    Ok(writeln!(out, "{}", line.trim_end())?)
}

/// The same for a number that is no ratio.
pub(super) fn number(out: &mut dyn Write, what: &str, value: f64, unit: &str, target: Target) -> Result<()> {
    let line =
        format!("  {what:<58} {:>12}  {:<19} {}", format!("{value:.1} {unit}"), "", target.verdict(value));
    Ok(writeln!(out, "{}", line.trim_end())?)
}

fn middle(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => (f64::NAN, f64::NAN, f64::NAN),
        len => (sorted[0], sorted[len / 2], sorted[len - 1]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_compares_rounds_of_the_same_number() {
        let (slow, fast) = (Rounds(vec![2.0, 30.0, 4.0]), Rounds(vec![1.0, 10.0, 4.0]));

        let ratio = slow.over(&fast);

        assert_eq!((ratio.low, ratio.median, ratio.high), (1.0, 2.0, 3.0));
    }
}
