//! The table of all metrics equals the registry.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use super::*;
use crate::{
    app::{outside, snapshot},
    audit, credentials,
    datapath::{self},
    guard::ForwardGuard,
    kubernetes, listeners, reconcile, self_test, server, wire_guard,
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_sandbox::documents::{families, keep_current, keep_file_current, metrics_table};
use kube2ram_service::{
    admin::{Exposition, Readiness},
    clock::SystemClock,
    telemetry::{
        self,
        lossy::{LossyWriter, Room},
    },
};

/// Labels of which not all values are there from the beginning, or that differ with the build.
const OPEN_LABELS: [&str; 5] = ["condition", "map_layout", "revision", "status", "version"];

/// A cache with credentials in it.
#[derive(Debug)]
struct Held;

impl Collector for Held {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut survey = Survey::default();
        survey.shortest_left = Some(Duration::from_mins(50));
        survey.oldest = Some(Duration::from_mins(10));
        encode_survey(&survey, &mut encoder)
    }
}

/// Credentials of the node's role.
#[derive(Debug)]
struct Own;

impl Collector for Own {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_own(
            BaseSource::NodeRole,
            [("error", 0), ("ok", 1)],
            Some(SignedDuration::from_hours(3)),
            encoder,
        )
    }
}

/// As `service` has it, without what it takes to run.
fn registry() -> Registry {
    let mut root = Registry::default();
    of_process(&mut root, &(Arc::new(SystemClock) as Arc<dyn Clock>));
    let registry = root.sub_registry_with_prefix("kube2ram");
    of_build(registry);
    telemetry::register_lost(registry, &LossyWriter::start(io::sink(), Room::default(), |_| {}).unwrap());
    of_boot_guard(registry, None);
    drop(kubernetes::Metrics::new(
        registry.sub_registry_with_prefix("kubernetes"),
        kubernetes::Resource::ALL,
    ));
    drop(snapshot::metrics(registry));
    drop(outside::metrics(registry));
    registry.register_collector(Box::new(Held));
    registry.register_collector(Box::new(Own));
    server::register_metrics(registry);
    drop(audit::Metrics::new(registry));
    drop(credentials::Metrics::new(registry));
    registry.register_collector(Box::new(datapath::NoOutcomes));
    registry.register_collector(Box::new(datapath::NoEntries));
    drop(listeners::Metrics::new(registry));
    drop(self_test::metrics(registry));
    drop(reconcile::Metrics::new(registry));
    let metadata = MetadataAddr::v4_only(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80));
    drop(ForwardGuard::new(metadata, registry));
    drop(wire_guard::Metrics::new(registry));
    let readiness = Readiness::default();
    drop(readiness.wait_for("pods"));
    registry.register_collector(Box::new(readiness));
    root
}

#[test]
fn the_table_of_metrics_is_current() {
    let text = Exposition::Text.encode(&registry()).unwrap();
    let families = families(&text);

    assert!(families.len() > 40, "{}", families.len());
    keep_current("docs/metrics.md", "metrics", &metrics_table(&families, &OPEN_LABELS));
}

/// The operator's object holds the same rules as the plain file.
#[test]
fn the_manifest_of_the_rules_is_current() {
    let rules = repository_file("deploy/monitoring/rules.yaml");
    let (_, groups) = rules.split_once("\ngroups:\n").unwrap();
    let indented: String = format!("groups:\n{groups}")
        .lines()
        .map(|line| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") })
        .collect();
    let head = "# The alerts of rules.yaml for the Prometheus operator. Written by cargo xtask docs.\n\
        apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: kube2ram\n  namespace: kube-system\n  \
        labels: { app.kubernetes.io/name: kube2ram }\nspec:\n";

    keep_file_current("deploy/monitoring/prometheusrule.yaml", &format!("{head}{indented}"));
}

/// Helm reads no file outside of the chart.
#[test]
fn the_charts_copies_of_rules_and_dashboard_are_current() {
    for file in ["rules.yaml", "dashboard.json"] {
        let text = repository_file(&format!("deploy/monitoring/{file}"));
        keep_file_current(&format!("deploy/helm/kube2ram/files/{file}"), &text);
    }
}

/// A metric that is renamed must not leave an alert that never fires, or a panel that stays empty.
#[test]
fn alerts_and_panels_ask_for_metrics_that_exist() {
    let known = families(&Exposition::Text.encode(&registry()).unwrap());
    let mut asked = 0;
    for file in ["deploy/monitoring/rules.yaml", "deploy/monitoring/dashboard.json", "docs/runbooks.md"] {
        let text = repository_file(file);
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with("kube2ram_") || word.starts_with("process_")) {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
            let is_known = known.contains_key(word)
                || family.is_some_and(|name| known.get(name).is_some_and(|found| found.kind == "histogram"));
            assert!(is_known, "{file}: there is no metric {word}");
            asked += 1;
        }
    }
    assert!(asked > 60, "{asked}");
}

#[test]
fn every_alert_has_a_runbook_and_a_test() {
    let rules = repository_file("deploy/monitoring/rules.yaml");
    let (runbooks, tests) =
        (repository_file("docs/runbooks.md"), repository_file("deploy/monitoring/tests/rules.yaml"));
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let headings: Vec<_> = runbooks.lines().filter_map(|line| line.strip_prefix("## Kube2ram")).collect();

    assert!(alerts.len() > 20, "{alerts:?}");
    assert_eq!(alerts.len(), headings.len(), "each alert has one runbook, and each runbook an alert");
    for alert in alerts {
        assert!(runbooks.contains(&format!("\n## {alert}\n")), "{alert} has no runbook");
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "{alert} has no test");
        let link = format!("runbook: docs/runbooks.md#{}\n", alert.to_lowercase());
        assert_eq!(rules.matches(&link).count(), 1, "{alert} does not name its runbook");
    }
}

fn repository_file(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn every_metric_is_named_and_described_as_prometheus_asks() {
    let text = Exposition::Text.encode(&registry()).unwrap();

    for (name, family) in families(&text) {
        assert!(family.help.len() > 8 && family.help.ends_with('.'), "{name}: {:?}", family.help);
        assert!(name.starts_with("kube2ram_") || name.starts_with("process_"), "{name}");
        assert_eq!(family.kind == "counter", name.ends_with("_total"), "{name}");
        let told: usize = family.labels.values().map(BTreeSet::len).max().unwrap_or_default();
        assert!(told <= 32, "{name} has {told} values of a label");
        for (label, _) in family.labels {
            assert!(!["pod", "namespace", "role", "cgroup", "node"].contains(&label.as_str()), "{name}");
        }
    }
}

#[test]
fn counts_role_sessions_by_state() {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Held));
    let mut encoded = String::new();
    prometheus_client::encoding::text::encode(&mut encoded, &registry).unwrap();

    for sample in [
        r#"credential_sessions{state="fresh"} 0"#,
        "credentials_min_time_to_expiry_seconds 3000.0",
        "credentials_max_age_seconds 600.0",
    ] {
        assert!(encoded.lines().any(|line| line == sample), "no {sample} in\n{encoded}");
    }
}
