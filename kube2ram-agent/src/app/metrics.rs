//! The metrics that are read at each scrape instead of counted: the build, the held role sessions, the
//! agent's own credentials. Depends on `credentials` and `cloud`; called by `app`.

use std::{fmt, sync::Arc};

use jiff::SignedDuration;
use kube2ram_common::abi::ABI_VERSION;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{
        MetricType,
        counter::ConstCounter,
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::Registry,
};
use tokio::sync::SetOnce;

mod process;

pub(super) use self::process::register as of_process;
use crate::{
    credentials::{Standing, Survey},
    server::Entitlements,
};
use kube2ram_cloud::{Base, BaseSource};
use kube2ram_service::clock::Clock;

/// The source revision, as given at the build.
const REVISION: &str = match option_env!("KUBE2RAM_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Returns what runs.
pub(super) fn of_build(registry: &mut Registry) {
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("revision", REVISION.to_owned()),
        ("map_layout", ABI_VERSION.to_string()),
    ];
    registry.register("build", "Version of the running agent", Info::new(labels));
}

/// Returns whether the boot guard could be installed when this pod started. Looked at once: it does not
/// change.
pub(super) fn of_boot_guard(registry: &mut Registry, failure: Option<&str>) {
    let gauge = Gauge::<i64>::default();
    gauge.set(failure.is_some().into());
    let help = "Whether the boot guard could not be installed on this node when the agent's pod started";
    registry.register("boot_guard_installation_failed", help, gauge);
}

/// Collects the credentials for pods, and those that the agent signs with (`base`), if it signs anything.
pub(super) fn of_credentials(
    registry: &mut Registry,
    entitlements: &Arc<SetOnce<Entitlements>>,
    base: Option<&Base>,
    clock: &Arc<dyn Clock>,
) {
    registry.register_collector(Box::new(Sessions(Arc::clone(entitlements))));
    if let Some(base) = base.cloned() {
        registry.register_collector(Box::new(OwnCredentials { base, clock: Arc::clone(clock) }));
    }
}

/// The role sessions in the cache.
struct Sessions(Arc<SetOnce<Entitlements>>);

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sessions")
    }
}

impl Collector for Sessions {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let survey = self.0.get().map(|entitlements| entitlements.credentials.survey()).unwrap_or_default();
        encode_survey(&survey, &mut encoder)
    }
}

fn encode_survey(survey: &Survey, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let help = "Role sessions in the cache, by state (below_floor: valid, but for less time than pods are promised; denied: STS refuses them; failing: no valid credentials, and STS issues none; fresh; pending: not requested yet).";
    let mut sessions = encoder.encode_descriptor("credential_sessions", help, None, MetricType::Gauge)?;
    for standing in Standing::ALL {
        let gauge = ConstGauge::new(survey.count(standing));
        gauge.encode(sessions.encode_family(&[("state", standing.label())])?)?;
    }
    // What does not exist has no age.
    if let Some(left) = survey.shortest_left {
        let help = "Shortest remaining lifetime of the credentials that pods are given.";
        let name = "credentials_min_time_to_expiry_seconds";
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(left.as_secs_f64()).encode(metric)?;
    }
    if let Some(age) = survey.oldest {
        let help = "Age of the oldest credentials that pods are given.";
        let metric =
            encoder.encode_descriptor("credentials_max_age_seconds", help, None, MetricType::Gauge)?;
        ConstGauge::new(age.as_secs_f64()).encode(metric)?;
    }
    Ok(())
}

/// What the agent signs its calls with.
struct OwnCredentials {
    base: Base,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for OwnCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnCredentials")
    }
}

impl Collector for OwnCredentials {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let left = self.base.state().expires_at.map(|end| end.duration_since(self.clock.now()));
        encode_own(self.base.source(), self.base.fetches(), left, encoder)
    }
}

/// `left` is unknown for static keys, which have no known expiry.
fn encode_own(
    source: BaseSource,
    fetches: [(&'static str, u64); 2],
    left: Option<SignedDuration>,
    mut encoder: DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let help = "Source of the agent's own credentials, 1 for the one in use (node_role, oidc, static_keys).";
    let mut sources = encoder.encode_descriptor("base_credentials", help, None, MetricType::Gauge)?;
    for known in BaseSource::ALL {
        let gauge = ConstGauge::new(i64::from(known == source));
        gauge.encode(sources.encode_family(&[("source", known.as_str())])?)?;
    }
    let help = "Fetches of the agent's own credentials, from the metadata server or with its OIDC token, by result (error, ok).";
    let mut family = encoder.encode_descriptor("base_credential_fetches", help, None, MetricType::Counter)?;
    for (result, count) in fetches {
        ConstCounter::new(count).encode(family.encode_family(&[("result", result)])?)?;
    }
    if let Some(left) = left {
        let help = "Remaining lifetime of the agent's own credentials; negative once they have expired.";
        let name = "base_credentials_time_to_expiry_seconds";
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(left.as_secs_f64()).encode(metric)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
