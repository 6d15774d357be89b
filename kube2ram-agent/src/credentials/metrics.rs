//! What the credential cache counts. Depends on prometheus-client only; called by `cache`, composed by `app`.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::sts_queue::Rank;
use kube2ram_cloud::credentials::IssueErrorKind;

/// The credential cache's metrics.
#[derive(Debug)]
pub struct Metrics {
    issues: Family<IssueLabels, Counter>,
    issue_seconds: Histogram,
    turns: Family<TurnLabels, Counter>,
    turn_seconds: Histogram,
    /// Fetches that wait in the STS scheduler.
    pub(super) queued: Gauge,
    /// How often throttling has paused fetches that no pod waits for.
    pub(super) throttle_pauses: Counter,
    /// Role sessions that were planned to be fetched before a pod asks.
    pub(super) prefetches: Counter,
    /// Role sessions that were dropped because no pod has a claim to them any more, or for want of room.
    pub(super) dropped: Counter,
    /// Credentials that were handed out with less left than the floor, because STS failed or was slow.
    pub(super) below_floor: Counter,
    /// Requests that failed fast: on a remembered failure, or for want of room.
    pub(super) failed: Counter,
    /// Requests that were answered at once.
    pub(super) hit: Counter,
    /// Requests that waited for the first credentials.
    pub(super) miss: Counter,
    /// Requests that waited although valid credentials were held.
    pub(super) refresh: Counter,
    /// Role sessions in the cache.
    pub(super) entries: Gauge,
}

impl Metrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let issues = Family::<IssueLabels, Counter>::default();
        registry.register("sts_requests", "Requests to STS for credentials, by result", issues.clone());
        let issue_seconds = Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]);
        registry.register(
            "sts_request_duration_seconds",
            "Time until STS answered, retries included",
            issue_seconds.clone(),
        );
        let (turns, turn_seconds) = (
            Family::<TurnLabels, Counter>::default(),
            Histogram::new([0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0]),
        );
        registry.register(
            "sts_turns",
            "Fetches that the STS scheduler let through, by rank (ahead: before a pod asks; demand: a pod waits; retry: a pod waits again after a failure)",
            turns.clone(),
        );
        registry.register(
            "sts_turn_wait_seconds",
            "Time that a fetch waited in the STS scheduler",
            turn_seconds.clone(),
        );
        let queued = Gauge::default();
        registry.register("sts_queued", "Fetches that wait in the STS scheduler", queued.clone());
        let mut plain = |name, help| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let throttle_pauses =
            plain("sts_throttle_pauses", "Pauses of fetches that no pod waits for, because STS throttled");
        let prefetches = plain(
            "credential_prefetches",
            "Role sessions that were scheduled for a fetch before a pod asked",
        );
        let dropped = plain(
            "credential_cache_dropped",
            "Role sessions dropped because no pod uses them any longer, or because the cache was full",
        );
        let below_floor = plain(
            "credentials_below_floor",
            "Credentials served with less than 30 minutes left, or less than half of a lifetime under 45 minutes, because STS failed or was slow",
        );
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register(
            "credential_cache_requests",
            "Requests to the credential cache, by how they were answered",
            requests.clone(),
        );
        let entries = Gauge::default();
        registry.register("credential_cache_entries", "Role sessions in the cache", entries.clone());
        // Or an alert on an increase would miss the first.
        for result in std::iter::once("ok").chain(IssueErrorKind::ALL.map(IssueErrorKind::as_str)) {
            drop(issues.get_or_create(&IssueLabels { result }));
        }
        for rank in Rank::ALL.map(Rank::as_str) {
            drop(turns.get_or_create(&TurnLabels { rank }));
        }
        // A hit must not cost the look-up in the family.
        let counter = |cache| requests.get_or_create_owned(&RequestLabels { cache });
        Self {
            issues,
            issue_seconds,
            turns,
            turn_seconds,
            queued,
            throttle_pauses,
            prefetches,
            dropped,
            below_floor,
            failed: counter("failed"),
            hit: counter("hit"),
            miss: counter("miss"),
            refresh: counter("refresh"),
            entries,
        }
    }

    pub(super) fn turn(&self, rank: Rank, waited: Duration) {
        self.turns.get_or_create(&TurnLabels { rank: rank.as_str() }).inc();
        self.turn_seconds.observe(waited.as_secs_f64());
    }

    pub(super) fn issued(&self, result: Result<(), IssueErrorKind>, took: Duration) {
        let result = result.err().map_or("ok", IssueErrorKind::as_str);
        self.issues.get_or_create(&IssueLabels { result }).inc();
        self.issue_seconds.observe(took.as_secs_f64());
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TurnLabels {
    rank: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IssueLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    cache: &'static str,
}
