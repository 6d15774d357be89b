//! What the listeners in pods count. Called by `listeners`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::devices::Device;

/// The metrics of `listeners`.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) open: Gauge,
    /// Whether pods' cgroups are looked at every second, because inotify does not work.
    pub(super) polling: Gauge,
    beside_host: Family<[(&'static str, &'static str); 1], Gauge>,
    failures: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pod_listeners", "Pods with a listener of their own", metrics.open.clone());
        registry.register(
            "pod_cgroups_polled",
            "Whether pods' cgroups are looked at every second, because inotify does not work: its instances are used up (fs.inotify.max_user_instances)",
            metrics.polling.clone(),
        );
        registry.register(
            "pod_listener_failures",
            "Failed steps towards listeners in pods, whom the host's listener serves meanwhile, by step (close, contested: two pods in one network namespace, ended: by somebody in the pod, find, listen, redirect, survey, watch), and questions for pods' devices that failed (links)",
            metrics.failures.clone(),
        );
        registry.register(
            "pods_beside_host_network",
            "Pods with a device whose packets do not pass the node's network stack, nor the forward guard, or may not, by device (ebpf: routed by a program, ipvlan, macvlan, nic)",
            metrics.beside_host.clone(),
        );
        for device in Device::ALL {
            metrics.beside_host(device, 0);
        }
        // Or an alert on an increase would miss the first.
        for step in ["close", "contested", "ended", "find", "links", "listen", "redirect", "survey", "watch"]
        {
            drop(metrics.failures.get_or_create(&[("step", step)]));
        }
        metrics
    }

    pub(super) fn beside_host(&self, device: Device, pods: usize) {
        self.beside_host.get_or_create(&[("device", device.label())]).set(pods as i64);
    }

    pub(super) fn failed(&self, step: &'static str) {
        self.failures.get_or_create(&[("step", step)]).inc();
    }
}
