//! The registry in the format that the client accepts: OpenMetrics for Prometheus, its older text format for
//! people and tools such as `promtool check metrics`. Pure; called by `admin`.

use std::fmt;

use http::{HeaderMap, header};
use prometheus_client::{encoding::text, registry::Registry};

/// An encoding of the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// `application/openmetrics-text`.
    OpenMetrics,
    /// Prometheus' own text format.
    Text,
}

impl Exposition {
    /// The format that the client accepts; the older one unless OpenMetrics is named.
    pub fn asked_for(headers: &HeaderMap) -> Self {
        let mut accepted = headers.get_all(header::ACCEPT).iter();
        let names_it = |accept: &header::HeaderValue| {
            accept.to_str().is_ok_and(|accept| accept.contains("application/openmetrics-text"))
        };
        if accepted.any(names_it) { Self::OpenMetrics } else { Self::Text }
    }

    /// The value of `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// All metrics of `registry`.
    ///
    /// # Errors
    /// When a metric cannot be written, which is a bug of it.
    pub fn encode(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut metrics = String::new();
        text::encode(&mut metrics, registry)?;
        Ok(match self {
            Self::OpenMetrics => metrics,
            Self::Text => to_text(&metrics),
        })
    }
}

/// The formats differ in what they call a family: there counters lack `_total` and infos `_info`, which their
/// samples have.
fn to_text(metrics: &str) -> String {
    let mut converted = String::with_capacity(metrics.len());
    let mut pending_help = None;
    for line in metrics.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            pending_help = Some(help);
            continue;
        }
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|kind| kind.split_once(' ')) else {
            converted.extend([line, "\n"]);
            continue;
        };
        let (suffix, kind) = match kind {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            kind => ("", kind),
        };
        let help = pending_help.take().and_then(|help| help.split_once(' ')).map_or("", |(_, help)| help);
        converted.extend(["# HELP ", name, suffix, " ", help, "\n# TYPE ", name, suffix, " ", kind, "\n"]);
    }
    converted
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram, info::Info};

    use super::*;

    fn registry() -> Registry {
        let mut registry = Registry::with_prefix("kube2ram");
        registry.register("things", "Things", Counter::<u64>::default());
        registry.register("open", "Open things", Gauge::<i64>::default());
        registry.register("build", "What runs", Info::new([("version", "1")]));
        registry.register("wait_seconds", "Waits", Histogram::new([1.0]));
        registry
    }

    #[test]
    fn gives_open_metrics_to_who_names_it() {
        let accept = |value: &'static str| {
            let headers = [(header::ACCEPT, http::HeaderValue::from_static(value))].into_iter().collect();
            Exposition::asked_for(&headers)
        };

        // As Prometheus 2.42 asks.
        assert_eq!(
            accept("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"),
            Exposition::OpenMetrics
        );
        assert_eq!([accept("*/*"), accept("text/plain")], [Exposition::Text; 2]);
        assert_eq!(Exposition::asked_for(&HeaderMap::new()), Exposition::Text);
        let metrics = Exposition::OpenMetrics.encode(&registry()).unwrap();
        assert!(metrics.contains("# TYPE kube2ram_things counter\n") && metrics.ends_with("# EOF\n"));
    }

    #[test]
    fn names_families_as_their_samples_in_the_older_format() {
        let metrics = Exposition::Text.encode(&registry()).unwrap();

        assert_eq!(
            metrics,
            "# HELP kube2ram_things_total Things.\n# TYPE kube2ram_things_total counter\nkube2ram_things_total 0\n\
             # HELP kube2ram_open Open things.\n# TYPE kube2ram_open gauge\nkube2ram_open 0\n\
             # HELP kube2ram_build_info What runs.\n# TYPE kube2ram_build_info gauge\nkube2ram_build_info{version=\"1\"} 1\n\
             # HELP kube2ram_wait_seconds Waits.\n# TYPE kube2ram_wait_seconds histogram\nkube2ram_wait_seconds_sum 0.0\n\
             kube2ram_wait_seconds_count 0\nkube2ram_wait_seconds_bucket{le=\"1.0\"} 0\nkube2ram_wait_seconds_bucket{le=\"+Inf\"} 0\n"
        );
    }
}
