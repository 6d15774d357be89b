//! What git knows of the sources: the commit that they are, and its time. Nothing, where they are not the
//! root of a checkout. Called by `build` and `image`.

use std::process::Command;

use crate::command::{capture, root};

/// The commit that the sources are, if nothing in them was changed since.
pub(crate) fn revision() -> Option<String> {
    git(&["status", "--porcelain"]).filter(String::is_empty)?;
    git(&["rev-parse", "HEAD"])
}

/// When the last commit was made, in seconds since 1970: every clone has the same.
pub(crate) fn committed_at() -> Option<u64> {
    git(&["log", "-1", "--format=%ct"])?.parse().ok()
}

fn git(args: &[&str]) -> Option<String> {
    let ask = |args: &[&str]| capture(Command::new("git").current_dir(root()).args(args));
    // Not of a checkout that sources without git happen to lie in.
    ask(&["rev-parse", "--show-prefix"]).filter(String::is_empty)?;
    ask(args)
}
