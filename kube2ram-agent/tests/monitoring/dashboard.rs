//! The dashboard's panels and what they ask for, as Grafana would.

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};

use crate::{promtool, shipped};

/// One question of a panel.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) panel: String,
    /// In PromQL, without variables.
    pub(crate) expression: String,
}

/// All questions of the dashboard, about one node.
pub(crate) fn targets(node: &str) -> Vec<Target> {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(shipped("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let of_panel = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        // Grafana's is four scrapes long, here two minutes.
        targets.into_iter().map(move |target| Target {
            panel: title.clone(),
            expression: target["expr"]
                .as_str()
                .unwrap()
                .replace("$cluster", ".*")
                .replace("$node", node)
                .replace("$__rate_interval", "2m"),
        })
    };
    panels.iter().flat_map(of_panel).collect()
}

#[test]
fn its_variables_are_all_defined_and_its_panels_have_questions() {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(shipped("dashboard.json")).unwrap()).unwrap();
    let variables: Vec<_> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| &variable["name"])
        .collect();
    assert_eq!(variables, ["datasource", "cluster", "node"]);

    let mut ids = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let is_row = panel["type"] == "row";
        assert!(is_row || panel["datasource"]["uid"] == "${datasource}", "{panel}");
        assert!(is_row || !panel["targets"].as_array().unwrap().is_empty(), "{panel}");
        for target in panel["targets"].as_array().into_iter().flatten() {
            let asked = target["expr"].as_str().unwrap();
            let selectors = asked.matches(r#"cluster=~"$cluster",node=~"$node""#).count();
            assert_eq!(selectors, asked.matches("node=~").count(), "a node is one of its cluster: {asked}");
            assert!(selectors > 0, "{asked}");
        }
        assert!(!ids.contains(&&panel["id"]), "{}", panel["id"]);
        ids.push(&panel["id"]);
    }
    assert!(targets("n").iter().all(|target| !target.expression.contains('$')));
    assert!(targets("n").len() > 40);
}

/// Whether Prometheus understands these expressions.
fn understood(expressions: &[String]) -> Option<(bool, String)> {
    let rule = |expression: &String| json!({ "record": "panel", "expr": expression });
    // JSON is YAML.
    let rules = json!({ "groups": [{ "name": "panels", "rules": expressions.iter().map(rule).collect::<Vec<_>>() }] });
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    fs::write(file.path(), rules.to_string()).unwrap();
    promtool(&["check", "rules", "--lint=none", file.path().to_str().unwrap()], "")
}

#[test]
fn prometheus_understands_what_each_panel_asks() {
    let mut expressions: Vec<_> = targets("n").into_iter().map(|target| target.expression).collect();

    let Some((is_right, said)) = understood(&expressions) else { return };
    assert!(is_right && said.contains(&format!("{} rules found", expressions.len())), "{said}");

    // The test can fail.
    let last = expressions.last_mut().unwrap();
    *last = last.replacen("sum(", "sum((", 1);
    let (is_right, said) = understood(&expressions).unwrap();
    assert!(!is_right && said.contains("parse error"), "{said}");
}

#[test]
fn each_panel_asks_for_metrics_that_the_documents_list() {
    let documents = shipped("../../docs/metrics.md");
    let documents = fs::read_to_string(documents).unwrap();
    let listed: BTreeSet<_> =
        documents.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let is_metric = |word: &&str| word.starts_with("kube2ram_") || word.starts_with("process_");

    for Target { panel, expression } in targets("n") {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let metrics: Vec<_> = words.filter(is_metric).collect();
        for metric in &metrics {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| metric.strip_suffix(suffix));
            assert!(
                listed.contains(metric) || family.is_some_and(|name| listed.contains(name)),
                "{panel}: {metric}"
            );
        }
        assert!(!metrics.is_empty() || expression.contains("ALERTS{"), "{panel}: {expression}");
    }
}
