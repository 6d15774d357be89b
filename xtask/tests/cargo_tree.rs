//! What cargo chooses for the workspace, by `cargo tree`: features, and what each crate links.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{collections::BTreeSet, env, process::Command};

/// A crate of this repository, a crate that it links, and the crates that it must not link. The second one
/// proves that the list of its dependencies was read.
const LINKED: [(&str, &str, &[&str]); 5] = [
    (
        "kube2ram-service",
        "kube",
        &["aya", "aya-log", "clap", "kube2ram-cloud", "kube2ram-common", "reqwest", "url"],
    ),
    ("kube2ram-cloud", "reqwest", &["aya", "aya-log", "clap", "kube2ram-common", "rcgen"]),
    ("kube2ram-authenticator", "kube2ram-cloud", &["aya", "aya-log", "kube2ram-agent", "kube2ram-common"]),
    ("kube2ram-agent", "aya", &["kube2ram-authenticator", "rcgen", "x509-parser"]),
    // What it imitates, it must not share: a wrong assumption would be tested against itself.
    (
        "kube2ram-sandbox",
        "hyper",
        &[
            "aya",
            "kube",
            "kube2ram-agent",
            "kube2ram-authenticator",
            "kube2ram-cloud",
            "kube2ram-common",
            "kube2ram-service",
            "reqwest",
        ],
    ),
];

/// The lines of `cargo tree` on this machine's target, each once.
fn tree(arguments: &[&str], format: &str) -> BTreeSet<String> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--target", &target, "--prefix", "none", "--format", format]);
    let output = tree.args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
}

/// Each crate that is built, with its features.
fn chosen(edges: &str) -> BTreeSet<String> {
    tree(&["--workspace", "--edges", edges], "{p} [{f}]")
}

/// The names of the crates that a crate links, and its own.
fn linked(krate: &str) -> BTreeSet<String> {
    let packages = tree(&["--package", krate, "--edges", "normal"], "{p}");
    packages.iter().filter_map(|package| package.split(' ').next()).map(str::to_owned).collect()
}

/// With and without the tests' dependencies, cargo must choose the same features, or it builds the workspace
/// twice.
#[test]
fn tests_want_no_other_features_than_programs() {
    let (programs, tests) = (chosen("normal,build"), chosen("normal,build,dev"));

    assert!(programs.len() > 200, "{programs:?}");
    let other: Vec<_> = programs.difference(&tests).collect();

    assert!(other.is_empty(), "add what is missing to xtask/features/Cargo.toml: {other:#?}");
}

#[test]
fn no_crate_links_what_belongs_to_another() {
    for (krate, has, lacks) in LINKED {
        let linked = linked(krate);

        assert!(linked.contains(krate) && linked.contains(has), "{krate}: {linked:?}");
        let wrong: Vec<_> = lacks.iter().filter(|name| linked.contains(**name)).collect();
        assert!(wrong.is_empty(), "{krate} links {wrong:?}: see \"Crates and modules\" in ARCHITECTURE.md");
    }
}

#[test]
fn the_crate_of_the_ebpf_programs_layouts_has_no_dependency() {
    assert_eq!(linked("kube2ram-common"), BTreeSet::from(["kube2ram-common".to_owned()]));
}
