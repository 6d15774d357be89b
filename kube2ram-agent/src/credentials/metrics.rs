//! What the credential cache counts. Depends on prometheus-client only; called by `cache`, composed by `app`.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::IssueErrorKind;

/// The credential cache's metrics.
#[derive(Debug)]
pub struct Metrics {
    issues: Family<IssueLabels, Counter>,
    issue_seconds: Histogram,
    /// Requests that failed fast: on a remembered failure, or for want of room.
    pub(super) failed: Counter,
    /// Requests that were answered at once.
    pub(super) hit: Counter,
    /// Requests that waited for the first credentials.
    pub(super) miss: Counter,
    /// Requests that waited for better credentials than those at hand.
    pub(super) refresh: Counter,
    /// Role sessions in the cache.
    pub(super) entries: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let issues = Family::default();
        registry.register("sts_requests", "Requests for credentials to STS, by result", issues.clone());
        let issue_seconds = Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]);
        registry.register(
            "sts_request_duration_seconds",
            "Time until STS answered, its retries included",
            issue_seconds.clone(),
        );
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register(
            "credential_cache_requests",
            "Requests to the credential cache, by how they were answered",
            requests.clone(),
        );
        let entries = Gauge::default();
        registry.register("credential_cache_entries", "Role sessions in the cache", entries.clone());
        // A hit must not pay for the family's look-up.
        let counter = |cache| requests.get_or_create_owned(&RequestLabels { cache });
        Self {
            issues,
            issue_seconds,
            failed: counter("failed"),
            hit: counter("hit"),
            miss: counter("miss"),
            refresh: counter("refresh"),
            entries,
        }
    }

    pub(super) fn issued(&self, result: Result<(), IssueErrorKind>, took: Duration) {
        let result = result.err().map_or("ok", IssueErrorKind::as_str);
        self.issues.get_or_create(&IssueLabels { result }).inc();
        self.issue_seconds.observe(took.as_secs_f64());
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IssueLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    cache: &'static str,
}
