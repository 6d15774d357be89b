//! What the sources and documents are held to besides rustfmt and clippy: where names and crates may stand,
//! how modules depend on each other, how long files and comments are, which words documents use. Called by
//! `steps`, for `cargo xtask lint`.
//!
//! Each rule is a function of the files' text, so that its tests can break it.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::command::{capture, root, say};

mod homes;
mod modules;
mod size;
mod text;
mod words;

/// The crates that the agent and the authenticator are built of.
const CRATES: [&str; 4] =
    ["kube2ram-agent/src/", "kube2ram-authenticator/src/", "kube2ram-cloud/src/", "kube2ram-service/src/"];

/// A file of the repository.
struct Source {
    /// Relative to the repository.
    path: String,
    text: String,
}

/// Where a rule is broken, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    path: String,
    /// From 1; 0 is the whole file.
    line: usize,
    advice: String,
}

impl Fault {
    fn new(path: &str, line: usize, advice: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, advice: advice.into() }
    }
}

/// Reads all files that git knows, and applies every rule.
///
/// # Errors
/// When a rule is broken; each place is named before.
pub(crate) fn check() -> Result<()> {
    let sources = sources()?;
    let mut faults = homes::clouds(&sources);
    for rule in [homes::crates, modules::cycles, size::comments, size::files, words::check] {
        faults.extend(rule(&sources));
    }
    for Fault { path, line, advice } in &faults {
        match line {
            0 => say(format!("{path}: {advice}")),
            line => say(format!("{path}:{line}: {advice}")),
        }
    }
    if !faults.is_empty() {
        bail!("{} places break the rules of this repository (xtask/src/house)", faults.len());
    }
    Ok(())
}

/// The text files that are committed or about to be.
fn sources() -> Result<Vec<Source>> {
    let list = ["ls-files", "--cached", "--others", "--exclude-standard", "*.rs", "*.md"];
    let list = capture(Command::new("git").current_dir(root()).args(list)).context("git lists no files")?;
    let files = list.lines().map(PathBuf::from).filter(|path| root().join(path).is_file());
    files
        .map(|path| {
            let text = fs::read_to_string(root().join(&path))
                .with_context(|| format!("cannot read {}", path.display()))?;
            Ok(Source { path: path.display().to_string(), text })
        })
        .collect()
}

#[cfg(test)]
fn source(path: &str, text: &str) -> Source {
    Source { path: path.to_owned(), text: text.to_owned() }
}
