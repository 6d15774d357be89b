//! What the cluster's side counts. Called by the other parts of `kubernetes`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// One label whose values are literals in this module's callers.
type Labelled = Family<[(&'static str, &'static str); 1], Counter>;

/// The metrics of `kubernetes`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) pods: Gauge,
    pub(super) namespaces: Gauge,
    pub(super) departed_pods: Gauge,
    pub(super) restored_pods: Gauge,
    pub(super) watch_errors: Labelled,
    pub(super) pod_waits: Labelled,
    pub(super) pod_lists: Labelled,
    pub(super) events: Labelled,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pods", "Pods of this node that are known", metrics.pods.clone());
        registry.register("namespaces", "Namespaces that are known", metrics.namespaces.clone());
        registry.register(
            "departed_pods",
            "Pods that are deleted, but whose cgroups are still there",
            metrics.departed_pods.clone(),
        );
        registry.register(
            "restored_pods",
            "Pods known from before the agent's restart, while the API server is away",
            metrics.restored_pods.clone(),
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
            "Kubernetes Events, by result (dropped, duplicate, failed, posted)",
            metrics.events.clone(),
        );
        metrics
    }

    pub(super) fn watch_error(&self, resource: &'static str) {
        self.watch_errors.get_or_create(&[("resource", resource)]).inc();
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
}
