//! The table of all metrics equals the registry.

use std::net::Ipv4Addr;

use kube2ram_sandbox::documents::{families, keep_current, metrics_table};
use kube2ram_service::{
    admin::Exposition,
    telemetry::{
        self,
        lossy::{LossyWriter, Room},
    },
};

use super::*;
use crate::{
    backend::{self, Mode},
    identity::{Identity, Mapped},
    testing::{Mapping, NOW, Scripted, SetClock, cluster, granted},
    verify::{MAX_TTL, Rates},
};

/// The only label of which not all values are there from the beginning.
const OPEN_LABELS: [&str; 1] = ["condition"];

/// As the command `server` has it with all backends, without what it takes to run.
fn registry() -> Registry {
    let mut registry = Registry::with_prefix("kube2ram_authenticator");
    let writer = LossyWriter::start(io::sink(), Room::default(), |_| {}).unwrap();
    telemetry::register_lost(&mut registry, &writer);
    let modes = [Mode::AckConfigMap, Mode::Crd, Mode::DynamicFile, Mode::MountedFile];
    drop(backend::Metrics::new(&mut registry, &modes));

    let clock: Arc<dyn Clock> = SetClock::at(NOW);
    let directory = tempfile::tempdir().unwrap();
    let names = vec!["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
    let certificate = tls::Source::Own { directory: directory.path().to_owned(), names };
    let settings = tls::Settings { certificate, client_ca: None };
    drop(Tls::load(settings, Arc::clone(&clock), &mut registry).unwrap());
    let (sts, _asked) = Scripted::new(|_| granted("alice"));
    let settings = verify::Settings { cache_ttl: MAX_TTL, rates: Rates::default() };
    let verifier = Verifier::new(cluster(), settings, sts, clock, TaskTracker::new(), &mut registry);
    let map = Arc::new(Mapping(|_: &Identity| Mapped::Nobody));
    drop(Webhook::new(webhook::Settings::default(), verifier, map, &mut registry));

    let readiness = Readiness::default();
    drop(readiness.wait_for("mappings"));
    registry.register_collector(Box::new(readiness));
    registry
}

#[test]
fn the_table_of_metrics_is_current() {
    let families = families(&Exposition::Text.encode(&registry()).unwrap());

    assert!(families.len() > 15, "{families:?}");
    keep_current("docs/authenticator/metrics.md", "metrics", &metrics_table(&families, &OPEN_LABELS));
}

#[test]
fn every_metric_is_named_and_described_as_prometheus_asks() {
    for (name, family) in families(&Exposition::Text.encode(&registry()).unwrap()) {
        assert!(name.starts_with("kube2ram_authenticator_"), "{name}");
        assert!(family.help.len() > 8 && family.help.ends_with('.'), "{name}: {:?}", family.help);
        assert_eq!(family.kind == "counter", name.ends_with("_total"), "{name}");
        for (label, values) in family.labels {
            let labels = ["backend", "budget", "cache", "code", "condition", "endpoint", "le", "result"];
            assert!(labels.contains(&label.as_str()) && values.len() <= 32, "{name}: {label} {values:?}");
        }
    }
}
