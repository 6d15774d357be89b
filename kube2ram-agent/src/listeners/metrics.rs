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
    /// Whether the agent polls pods' cgroups every second, because inotify does not work.
    pub(super) polling: Gauge,
    beside_host: Family<[(&'static str, &'static str); 1], Gauge>,
    failures: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("pod_listeners", "Pods with an in-pod listener", metrics.open.clone());
        registry.register(
            "pod_cgroups_polled",
            "Whether the agent polls pods' cgroups every second, because no inotify instance is left (fs.inotify.max_user_instances)",
            metrics.polling.clone(),
        );
        registry.register(
            "pod_listener_failures",
            "Failed steps for in-pod listeners, by step (close; contested: two pods in one network namespace; ended: a process in the pod destroyed the listener; find; links: pods' devices cannot be listed; listen; redirect; survey; watch). The host listener serves these pods until the agent succeeds",
            metrics.failures.clone(),
        );
        registry.register(
            "pods_beside_host_network",
            "Pods with a device whose packets bypass the node's network stack, and so the netfilter rules, by device (ebpf: routed by a program, which may bypass them; ipvlan; macvlan; nic)",
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
