//! The metrics of `backend`. Called by its other parts.

use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use kube2ram_service::kubernetes::EVENT_RESULTS;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::mode::Mode;
use crate::mapping::{Report, State};

/// One label whose values are literals.
type Labelled<M = Counter> = Family<[(&'static str, &'static str); 1], M>;

/// The metrics of `backend`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    mappings: Labelled<Gauge>,
    conflicts: Labelled<Gauge>,
    refused: Labelled<Gauge>,
    broken_sections: Labelled<Gauge>,
    read_at: Labelled<Gauge<f64, AtomicU64>>,
    failures: Labelled,
    status_writes: Labelled,
    events: Labelled,
}

const STATUS_RESULTS: [&str; 4] = ["failed", "forbidden", "lost", "written"];

impl Metrics {
    /// Registers them, for these backends.
    pub fn new(registry: &mut Registry, modes: &[Mode]) -> Self {
        let metrics = Self::default();
        registry.register(
            "mappings",
            "Mappings and accounts that are used, by backend; those in conflict included",
            metrics.mappings.clone(),
        );
        registry.register(
            "mapping_conflicts",
            "Mappings that give some identities another user than another mapping does, by backend; these identities are mapped to nobody",
            metrics.conflicts.clone(),
        );
        registry.register(
            "mappings_refused",
            "Mappings that are not used because something is wrong with them, by backend",
            metrics.refused.clone(),
        );
        registry.register(
            "mapping_sections_broken",
            "Lists of mappings whose newest version cannot be read, by backend; the version before it is used",
            metrics.broken_sections.clone(),
        );
        registry.register(
            "mappings_changed_timestamp_seconds",
            "When the mappings that are used last changed, by backend; 0 before they are known",
            metrics.read_at.clone(),
        );
        registry.register(
            "mapping_failures",
            "Failed reads and watches of mappings, by backend",
            metrics.failures.clone(),
        );
        registry.register(
            "mapping_status_writes",
            "Writes of the status of RAMIdentityMappings, by result (failed, forbidden, lost, written)",
            metrics.status_writes.clone(),
        );
        registry.register(
            "mapping_events",
            "Events about mappings, by result (counted, dropped, duplicate, failed, forbidden, posted)",
            metrics.events.clone(),
        );
        for label in modes.iter().copied().map(of) {
            for gauge in [&metrics.mappings, &metrics.conflicts, &metrics.refused, &metrics.broken_sections] {
                drop(gauge.get_or_create(&label));
            }
            drop(metrics.read_at.get_or_create(&label));
            drop(metrics.failures.get_or_create(&label));
        }
        if modes.iter().any(|mode| mode.is_of_cluster()) {
            EVENT_RESULTS
                .iter()
                .for_each(|result| drop(metrics.events.get_or_create(&[("result", *result)])));
        }
        if modes.contains(&Mode::Crd) {
            STATUS_RESULTS
                .iter()
                .for_each(|result| drop(metrics.status_writes.get_or_create(&[("result", *result)])));
        }
        metrics
    }

    pub(super) fn published(&self, mode: Mode, reports: &[Report], broken: usize, now: Timestamp) {
        let count = |is: fn(&State) -> bool| reports.iter().filter(|report| is(&report.state)).count();
        let refused = count(|state| matches!(state, State::Refused(_)));
        for (gauge, count) in [
            (&self.mappings, reports.len() - refused),
            (&self.conflicts, count(|state| matches!(state, State::Conflict(_)))),
            (&self.refused, refused),
        ] {
            gauge.get_or_create(&of(mode)).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.broken(mode, broken);
        self.read_at.get_or_create(&of(mode)).set(now.as_duration().as_secs_f64());
    }

    pub(super) fn broken(&self, mode: Mode, sections: usize) {
        self.broken_sections.get_or_create(&of(mode)).set(i64::try_from(sections).unwrap_or(i64::MAX));
    }

    pub(super) fn failed(&self, mode: Mode) {
        self.failures.get_or_create(&of(mode)).inc();
    }

    pub(super) fn event(&self, result: &'static str) {
        self.events.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn status_write(&self, result: &'static str) {
        self.status_writes.get_or_create(&[("result", result)]).inc();
    }
}

fn of(mode: Mode) -> [(&'static str, &'static str); 1] {
    [("backend", mode.name())]
}
