//! The metrics of `kubernetes`. Called by its other parts.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Resource;

/// One label whose values are literals in this module's callers.
type Labelled<M = Counter> = Family<[(&'static str, &'static str); 1], M>;

/// The metrics of `kubernetes`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) pods: Gauge,
    pub(super) namespaces: Gauge,
    pub(super) namespaces_without_room: Gauge,
    pub(super) departed_pods: Gauge,
    pub(super) restored_pods: Gauge,
    pub(super) unreadable_pods: Counter,
    synced: Labelled<Gauge>,
    pub(super) watch_errors: Labelled,
    watch_messages: Labelled<Gauge<f64, AtomicU64>>,
    watches: Labelled<Gauge>,
    pub(super) pod_waits: Labelled,
    pub(super) pod_lists: Labelled,
    pub(super) events: Labelled,
    pub(super) token_requests: Labelled,
    pub(super) service_account_reads: Labelled,
}

impl Metrics {
    /// Registers them. What is not among `resources` is not watched, and has no series: an alert on closed
    /// watches must not see one.
    pub fn new(registry: &mut Registry, resources: &[Resource]) -> Self {
        let metrics = Self::default();
        registry.register("pods", "Known pods of this node", metrics.pods.clone());
        registry.register(
            "namespaces",
            "Known namespaces; none without --namespace-restrictions",
            metrics.namespaces.clone(),
        );
        registry.register(
            "namespaces_without_room",
            "Namespaces without room for their allow-lists, which may take 4 MiB in all; counted up to 1,024. Their pods get no role that needs an allow-list",
            metrics.namespaces_without_room.clone(),
        );
        registry.register(
            "departed_pods",
            "Deleted pods whose cgroups still exist",
            metrics.departed_pods.clone(),
        );
        registry.register(
            "restored_pods",
            "Pods known from the snapshot only, while the API server is unavailable",
            metrics.restored_pods.clone(),
        );
        registry.register(
            "unreadable_pods",
            "Pods from the API server that the agent cannot parse",
            metrics.unreadable_pods.clone(),
        );
        registry.register(
            "synced",
            "Whether a resource has been listed completely, by resource (pods, namespaces)",
            metrics.synced.clone(),
        );
        registry.register(
            "watches",
            "Watches that the API server holds open, by resource (pods, namespaces)",
            metrics.watches.clone(),
        );
        registry.register(
            "watch_last_message_timestamp_seconds",
            "When the API server last sent something on a watch, its bookmarks included, by resource (pods, namespaces); 0 before the first message",
            metrics.watch_messages.clone(),
        );
        registry.register(
            "watch_errors",
            "Failed or broken watches, by resource (pods, namespaces)",
            metrics.watch_errors.clone(),
        );
        registry.register(
            "pod_waits",
            "Look-ups of pods that the watch had not shown yet, by result (found, ambiguous, unavailable, unknown)",
            metrics.pod_waits.clone(),
        );
        registry.register(
            "pod_lists",
            "Direct lists for pods that the watch had not shown yet, by result (error, ok)",
            metrics.pod_lists.clone(),
        );
        registry.register(
            "events",
            "Kubernetes Events, by result (counted, dropped, duplicate, failed, forbidden, posted)",
            metrics.events.clone(),
        );
        registry.register(
            "token_requests",
            "Requests for a ServiceAccount's token with --credentials-from=service-account, by outcome (cluster_configuration, issued, throttled, token)",
            metrics.token_requests.clone(),
        );
        registry.register(
            "service_account_reads",
            "Reads of a ServiceAccount's annotations, by result (absent, error, forbidden, ok)",
            metrics.service_account_reads.clone(),
        );
        metrics.start_at_zero(resources);
        metrics
    }

    /// Or an alert on an increase would miss the first.
    fn start_at_zero(&self, resources: &[Resource]) {
        for resource in resources.iter().copied().map(labelled) {
            drop(self.synced.get_or_create(&resource));
            drop(self.watch_errors.get_or_create(&resource));
            drop(self.watch_messages.get_or_create(&resource));
            drop(self.watches.get_or_create(&resource));
        }
        for (family, results) in [
            (&self.pod_waits, &["ambiguous", "found", "unavailable", "unknown"][..]),
            (&self.pod_lists, &["error", "ok"]),
            (&self.events, &["counted", "dropped", "duplicate", "failed", "forbidden", "posted"]),
            (&self.service_account_reads, &["absent", "error", "forbidden", "ok"]),
        ] {
            results.iter().for_each(|result| drop(family.get_or_create(&[("result", *result)])));
        }
        for outcome in ["cluster_configuration", "issued", "throttled", "token"] {
            drop(self.token_requests.get_or_create(&[("outcome", outcome)]));
        }
    }

    pub(super) fn synced(&self, resource: Resource) {
        self.synced.get_or_create(&labelled(resource)).set(1);
    }

    pub(super) fn watches(&self, resource: Resource) -> Gauge {
        self.watches.get_or_create_owned(&labelled(resource))
    }

    pub(super) fn watch_message(&self, resource: Resource) -> Gauge<f64, AtomicU64> {
        self.watch_messages.get_or_create_owned(&labelled(resource))
    }

    pub(super) fn watch_error(&self, resource: Resource) {
        self.watch_errors.get_or_create(&labelled(resource)).inc();
    }

    pub(super) fn pod_wait(&self, result: &'static str) {
        self.pod_waits.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn pod_list(&self, result: &'static str) {
        self.pod_lists.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn event(&self, result: &'static str) {
        self.events.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn token_request(&self, outcome: &'static str) {
        self.token_requests.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub(super) fn service_account_read(&self, result: &'static str) {
        self.service_account_reads.get_or_create(&[("result", result)]).inc();
    }
}

fn labelled(resource: Resource) -> [(&'static str, &'static str); 1] {
    [("resource", resource.as_str())]
}
