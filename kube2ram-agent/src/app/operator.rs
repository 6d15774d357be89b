//! What operators ask: the status of the agent, why a pod gets what it gets, and what is logged. Reads every
//! part, changes none but the log. Depends on all of them; called by `app` through the control socket.

mod access_key;
mod duration;
mod explain;
mod pods;
mod report;

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp, Unit};
use tokio::{
    sync::SetOnce,
    time::{Duration, Instant},
};
use tracing::level_filters::LevelFilter;

pub(super) use self::duration::{is_chained, notice as duration_notice};
use self::explain::Judge;
use super::{host_port::HostPort, log_level::LogLevel, outside, store::store_of};
use crate::{
    args::Config,
    audit::Trail,
    control::{self, ChangeLogLevel, Request},
    datapath::{Counters, Settings, Targets},
    guard,
    identity::PodUid,
    kubernetes::{Cluster, PodView},
    reconcile,
    self_test::SelfTest,
    server::Entitlements,
    status::SCHEMA,
    wire_guard,
};
use kube2ram_cloud::{Base, upstream::UpstreamActivity};
use kube2ram_service::{admin::Readiness, clock::Clock, drain::Drain};

/// All that can be asked.
pub(super) struct Operator {
    pub(super) config: Arc<Config>,
    pub(super) settings: Settings,
    pub(super) kernel: Kernel,
    pub(super) outside: outside::State,
    /// Those of `--app-port` and `--metrics-port`.
    pub(super) ports: [Arc<HostPort>; 2],
    pub(super) cluster: Arc<Cluster>,
    pub(super) entitlements: Arc<SetOnce<Entitlements>>,
    pub(super) trail: Arc<Trail>,
    pub(super) base: Base,
    /// With the metadata server.
    pub(super) activity: UpstreamActivity,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) readiness: Readiness,
    pub(super) log_level: LogLevel,
    pub(super) drain: Drain,
    pub(super) started: Instant,
}

/// What is known of the kernel's side.
pub(super) struct Kernel {
    pub(super) state: reconcile::State,
    pub(super) counters: Counters,
    /// `None` where there is to be no guard.
    pub(super) guard: Option<guard::State>,
    /// As above.
    pub(super) wire_guard: Option<wire_guard::State>,
    pub(super) targets: Targets,
    pub(super) self_test: Arc<SelfTest>,
}

impl Operator {
    /// Answers one question.
    pub(super) async fn answer(self: Arc<Self>, request: Request) -> Result<serde_json::Value, String> {
        let document = match request {
            Request::Explain { namespace, name } => {
                serde_json::to_value(self.explain(&namespace, &name).await)
            }
            Request::ExplainAccessKey { access_key_id } => {
                serde_json::to_value(self.explain_access_key(access_key_id).await?)
            }
            Request::LogLevel(change) => serde_json::to_value(self.change_log_level(change)?),
            Request::Status => serde_json::to_value(self.status().await),
            Request::Store => Ok(store_of(&self.config, &self.cluster)),
        };
        document.map_err(|error| format!("cannot write the answer: {error}"))
    }

    /// Has the log fall back in time, for ever.
    pub(super) async fn keep_log_level(self: Arc<Self>) {
        self.log_level.run().await;
    }

    fn change_log_level(&self, change: Option<ChangeLogLevel>) -> Result<control::LogLevel, String> {
        match change {
            None => {}
            Some(ChangeLogLevel::Reset) => self.log_level.reset(),
            Some(ChangeLogLevel::To { level, seconds }) => {
                let level: LevelFilter =
                    level.parse().map_err(|_unknown| format!("there is no log level {level:?}"))?;
                self.log_level.set(level, Duration::from_secs(seconds), self.clock.now());
            }
        }
        let (level, until) = self.log_level.read();
        Ok(control::LogLevel { schema: SCHEMA, level: level.to_string(), until: until.map(rounded) })
    }

    fn judge(&self) -> Judge<'_> {
        Judge {
            config: &self.config,
            cluster: &self.cluster,
            is_chained: is_chained(&self.config, &self.base),
            entitlements: self.entitlements.get(),
        }
    }

    fn now(&self) -> Timestamp {
        rounded(self.clock.now())
    }

    /// When something was that happened so long ago.
    fn ago(&self, span: Duration) -> Timestamp {
        let span = SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX);
        rounded(self.clock.now().checked_sub(span).unwrap_or(Timestamp::UNIX_EPOCH))
    }
}

/// The namespace and name of a pod that is known, by what its cgroup is named after.
pub(super) fn pod_name(cluster: &Cluster, uid: &PodUid) -> Option<String> {
    let view = cluster.pod_views();
    let is_it = |view: &&PodView| view.pod.uid == *uid || view.config_hash.as_ref() == Some(uid);
    view.iter().find(is_it).map(|view| format!("{}/{}", view.pod.namespace, view.pod.name))
}

/// To milliseconds: what is finer is noise.
fn rounded(at: Timestamp) -> Timestamp {
    at.round(Unit::Millisecond).unwrap_or(at)
}
