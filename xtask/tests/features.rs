//! Cargo chooses features by what is selected. With and without the tests' dependencies it must be the same
//! choice, or the workspace is built twice.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{collections::BTreeSet, env, process::Command};

/// Each crate that is built, with its features.
fn chosen(edges: &str) -> BTreeSet<String> {
    let arguments = ["tree", "--locked", "--offline", "--workspace", "--edges", edges];
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut tree = Command::new(env!("CARGO"));
    tree.args(arguments).args(["--target", &target, "--prefix", "none", "--format", "{p} [{f}]"]);
    let output = tree.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
}

#[test]
fn tests_want_no_other_features_than_programs() {
    let (programs, tests) = (chosen("normal,build"), chosen("normal,build,dev"));

    assert!(programs.len() > 200, "{programs:?}");
    let other: Vec<_> = programs.difference(&tests).collect();

    assert!(other.is_empty(), "add what is missing to xtask/features/Cargo.toml: {other:#?}");
}
