//! What the webhook counts. Depends on `answer` for the results; written by the parent.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::answer::Refusal;

#[derive(Debug)]
pub(super) struct Metrics {
    logins: Family<ResultLabels, Counter>,
    seconds: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let logins = Family::<ResultLabels, Counter>::default();
        registry.register("logins", "Requests to /authenticate, by result", logins.clone());
        let seconds = Histogram::new([0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0]);
        registry.register(
            "login_duration_seconds",
            "Time from a request's head to its response's head",
            seconds.clone(),
        );
        // Or an alert on an increase would miss the first.
        for result in Refusal::LABELS.into_iter().chain(["malformed_request"]) {
            drop(logins.get_or_create(&ResultLabels { result }));
        }
        Self { logins, seconds }
    }

    pub(super) fn observe(&self, result: &'static str, took: Duration) {
        self.logins.get_or_create(&ResultLabels { result }).inc();
        self.seconds.observe(took.as_secs_f64());
    }
}
