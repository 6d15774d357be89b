//! What the audit trail counts. Depends on prometheus-client only; composed by `app`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// The audit trail's metrics. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Records for which the queue had no room.
    pub(super) dropped: Counter,
    /// Records that could not be written.
    pub(super) error: Counter,
    /// Answers without a record: too many pods have the credentials.
    pub(super) not_recorded: Counter,
    /// Records that are in the file.
    pub(super) written: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let records = Family::<[(&'static str, &'static str); 1], Counter>::default();
        let help = "Records of the audit trail, by result (dropped: the queue was full; error: the file could not be written; not_recorded: each answer to a pod beyond the 256 of a session; written)";
        registry.register("audit_records", help, records.clone());
        let counter = |result| records.get_or_create_owned(&[("result", result)]);
        Self {
            dropped: counter("dropped"),
            error: counter("error"),
            not_recorded: counter("not_recorded"),
            written: counter("written"),
        }
    }
}
