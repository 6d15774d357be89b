//! The dashboard's panels and what they ask for, as Grafana would.

use std::fs;

use serde_json::Value;

use crate::shipped;

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
    assert_eq!(variables, ["datasource", "node"]);

    let mut ids = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let is_row = panel["type"] == "row";
        assert!(is_row || panel["datasource"]["uid"] == "${datasource}", "{panel}");
        assert!(is_row || !panel["targets"].as_array().unwrap().is_empty(), "{panel}");
        assert!(!ids.contains(&&panel["id"]), "{}", panel["id"]);
        ids.push(&panel["id"]);
    }
    assert!(targets("n").iter().all(|target| !target.expression.contains('$')));
    assert!(targets("n").len() > 40);
}
