//! What the listeners in pods count. Called by `listeners`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The metrics of `listeners`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) open: Gauge,
    failures: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pod_listeners", "Pods with a listener of their own", metrics.open.clone());
        registry.register(
            "pod_listener_failures",
            "Failed steps towards listeners in pods, whom the host's listener serves meanwhile, by step (close, find, listen, redirect, survey, watch)",
            metrics.failures.clone(),
        );
        metrics
    }

    pub(super) fn failed(&self, step: &'static str) {
        self.failures.get_or_create(&[("step", step)]).inc();
    }
}
