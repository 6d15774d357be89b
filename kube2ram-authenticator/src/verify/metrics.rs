//! What verification counts. Depends on prometheus-client only; written by the parent.

use std::time::Duration;

use kube2ram_cloud::alibaba::caller_identity::CallErrorKind;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{Budget, Source};

#[derive(Debug)]
pub(super) struct Metrics {
    asked: Family<ResultLabels, Counter>,
    asked_seconds: Histogram,
    answered: [Counter; 3],
    limited: Family<BudgetLabels, Counter>,
    /// Answers that are remembered.
    pub(super) remembered: Gauge,
    /// How many seconds STS's clock is ahead.
    pub(super) clock_offset: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    cache: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BudgetLabels {
    budget: &'static str,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let asked = Family::<ResultLabels, Counter>::default();
        registry.register("sts_requests", "Calls of GetCallerIdentity, by result", asked.clone());
        let asked_seconds = Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
        registry.register(
            "sts_request_duration_seconds",
            "Time until STS answered, all endpoints that were tried included",
            asked_seconds.clone(),
        );
        let answered = Family::<SourceLabels, Counter>::default();
        registry.register(
            "verifications",
            "Tokens with an outcome of STS, by whether it was asked, was being asked or had answered before",
            answered.clone(),
        );
        let limited = Family::<BudgetLabels, Counter>::default();
        registry.register(
            "rate_limited",
            "Tokens that STS was not asked about because of a limit, by limit",
            limited.clone(),
        );
        let remembered = Gauge::default();
        registry.register("remembered_answers", "Answers of STS that are remembered", remembered.clone());
        let clock_offset = Gauge::default();
        registry.register(
            "sts_clock_offset_seconds",
            "How far the clock of STS is ahead of this machine's; 0 within 3 seconds",
            clock_offset.clone(),
        );
        // Or an alert on an increase would miss the first.
        for result in std::iter::once("ok").chain(CallErrorKind::ALL.map(CallErrorKind::as_str)) {
            drop(asked.get_or_create(&ResultLabels { result }));
        }
        for budget in Budget::ALL.map(Budget::as_str) {
            drop(limited.get_or_create(&BudgetLabels { budget }));
        }
        let answered =
            Source::ALL.map(|source| answered.get_or_create_owned(&SourceLabels { cache: source.as_str() }));
        Self { asked, asked_seconds, answered, limited, remembered, clock_offset }
    }

    pub(super) fn asked(&self, error: Option<CallErrorKind>, took: Duration) {
        let result = error.map_or("ok", CallErrorKind::as_str);
        self.asked.get_or_create(&ResultLabels { result }).inc();
        self.asked_seconds.observe(took.as_secs_f64());
    }

    pub(super) fn answered(&self, source: Source) {
        // By their order in `ALL`.
        self.answered[source as usize].inc();
    }

    pub(super) fn limited(&self, budget: Budget) {
        self.limited.get_or_create(&BudgetLabels { budget: budget.as_str() }).inc();
    }
}
