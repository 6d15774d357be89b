//! What is shipped for Prometheus and Grafana, as promtool judges it. Needs Debian's Prometheus (`cargo xtask
//! setup`); where it is missing, CI fails and others are told. Whether the metrics exist is a test of
//! `tests/login`.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use kube2ram_sandbox::prometheus::Prometheus;
use serde_json::{Value, json};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/authenticator/monitoring").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap()
}

/// Whether promtool is content, and what it printed; `None`, with a message, where it may be missing.
#[expect(clippy::print_stderr, reason = "a skip is said aloud")]
fn promtool(arguments: &[&str]) -> Option<(bool, String)> {
    let Some(program) = Prometheus::program("promtool") else {
        assert!(env::var_os("CI").is_none(), "promtool is missing");
        eprintln!("skipped: promtool is missing: cargo xtask setup");
        return None;
    };
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8(said).unwrap()).concat();
    Some((output.status.success(), said))
}

fn alerts() -> Vec<Value> {
    let rules: Value = serde_saphyr::from_str(&text("rules.yaml")).unwrap();
    rules["groups"][0]["rules"].as_array().unwrap().clone()
}

#[test]
fn each_alert_fires_when_it_should_and_not_otherwise() {
    let tests = shipped("tests/rules.yaml");
    for alert in alerts() {
        let name = alert["alert"].as_str().unwrap();
        assert!(text("tests/rules.yaml").contains(&format!("- name: {name}\n")), "no test of {name}");
    }
    let Some((is_right, said)) = promtool(&["test", "rules", tests.to_str().unwrap()]) else { return };
    assert!(is_right, "{said}");

    // The tests can fail: without the rules' patience an alert fires too early.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("tests")).unwrap();
    let copy = directory.path().join("tests/rules.yaml");
    fs::copy(tests, &copy).unwrap();
    let hasty = text("rules.yaml").replace("for: 10m", "for: 1m");
    fs::write(directory.path().join("rules.yaml"), hasty).unwrap();
    let (is_right, said) = promtool(&["test", "rules", copy.to_str().unwrap()]).unwrap();
    assert!(!is_right && said.contains("FAILED"), "{said}");
}

#[test]
fn each_alert_has_a_runbook() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs/authenticator/runbooks.md");
    let runbooks = fs::read_to_string(path).unwrap();

    for alert in alerts() {
        let name = alert["alert"].as_str().unwrap();
        assert!(runbooks.contains(&format!("\n## {name}\n")), "{name}");
        let named = format!("docs/authenticator/runbooks.md#{}", name.to_ascii_lowercase());
        assert_eq!(alert["annotations"]["runbook"], named);
    }
}

#[test]
fn prometheus_understands_the_rules_and_what_each_panel_asks() {
    let dashboard: Value = serde_json::from_str(&text("dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let mut expressions = Vec::new();
    for target in targets {
        let asked = target["expr"].as_str().unwrap();
        assert!(asked.contains(r#"cluster=~"$cluster",instance=~"$instance""#), "{asked}");
        let asked = asked.replace("$cluster", ".*").replace("$instance", ".*");
        let asked = asked.replace("$__rate_interval", "2m");
        assert!(!asked.contains('$'), "{asked}");
        expressions.push(asked);
    }
    assert!(expressions.len() > 12, "only {} questions", expressions.len());
    let ids: std::collections::BTreeSet<_> =
        panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");

    // JSON is YAML.
    let check = |expressions: &[String]| {
        let rule = |expression: &String| json!({ "record": "panel", "expr": expression });
        let rules: Vec<_> = expressions.iter().map(rule).collect();
        let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        fs::write(file.path(), json!({ "groups": [{ "name": "panels", "rules": rules }] }).to_string())
            .unwrap();
        promtool(&["check", "rules", "--lint=none", file.path().to_str().unwrap()])
    };
    let Some((is_right, said)) = check(&expressions) else { return };
    assert!(is_right && said.contains(&format!("{} rules found", expressions.len())), "{said}");
    let (is_right, said) = promtool(&["check", "rules", shipped("rules.yaml").to_str().unwrap()]).unwrap();
    assert!(is_right, "{said}");

    // The test can fail.
    let last = expressions.last_mut().unwrap();
    *last = last.replacen("sum by", "sum((by", 1);
    let (is_right, said) = check(&expressions).unwrap();
    assert!(!is_right && said.contains("parse error"), "{said}");
}
