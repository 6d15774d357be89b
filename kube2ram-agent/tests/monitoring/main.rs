//! What is shipped for Prometheus and Grafana: the rules and the metrics as promtool judges them, and, on the
//! real kernel, alerts, Events and panels in each situation that an operator may find. Needs Debian's
//! Prometheus (`cargo xtask setup`); where it is missing, CI fails and others are told.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod dashboard;
mod situations;

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kube2ram_sandbox::prometheus::Prometheus;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring").join(name)
}

fn rules() -> String {
    fs::read_to_string(shipped("rules.yaml")).unwrap()
}

/// A program of Prometheus's package; `None`, with a message, where it may be missing.
#[expect(clippy::print_stderr, reason = "a skip is said aloud")]
fn program(name: &str) -> Option<PathBuf> {
    let found = Prometheus::program(name);
    if found.is_none() {
        assert!(env::var_os("CI").is_none(), "{name} is missing");
        eprintln!("skipped: {name} is missing: cargo xtask setup");
    }
    found
}

/// Runs promtool and gives what it printed.
fn promtool(arguments: &[&str], input: &str) -> Option<(bool, String)> {
    let mut command = Command::new(program("promtool")?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    Some((output.status.success(), text))
}

#[test]
fn the_rules_are_ones_that_prometheus_takes() {
    let Some((is_right, said)) = promtool(&["check", "rules", shipped("rules.yaml").to_str().unwrap()], "")
    else {
        return;
    };

    assert!(is_right, "{said}");
}

#[test]
fn each_alert_fires_when_it_should_and_not_otherwise() {
    let tests = shipped("tests/rules.yaml");
    let Some((is_right, said)) = promtool(&["test", "rules", tests.to_str().unwrap()], "") else { return };
    assert!(is_right, "{said}");

    // The tests can fail: without the rules' patience an alert fires too early.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("tests")).unwrap();
    let copy = directory.path().join("tests/rules.yaml");
    fs::copy(tests, &copy).unwrap();
    fs::write(directory.path().join("rules.yaml"), rules().replace("    for: 5m", "    for: 1m")).unwrap();
    let (is_right, said) = promtool(&["test", "rules", copy.to_str().unwrap()], "").unwrap();
    assert!(!is_right && said.contains("FAILED"), "{said}");
}
