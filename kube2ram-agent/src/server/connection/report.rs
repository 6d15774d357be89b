//! What is recorded about an answered request: metrics, Events, and a line of the access log. Depends on
//! `error`, `metrics`, `notices`; called by its parent.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::{Method, StatusCode, Uri};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Allowances, Connection, raw_target};
use crate::{
    datapath::Origin,
    pod::Pod,
    policy::Denial,
    role::RoleError,
    server::{
        Server,
        error::{ErrorKind, RequestError},
        metrics::{PassThroughResult, RouteLabel},
        notices::{misplaced, notices_of},
        path::{Target, TargetError},
    },
};
use kube2ram_cloud::{role::RoleSession, upstream::UpstreamError};
use kube2ram_service::telemetry::chain;

/// How much of a client's text the access log keeps.
const LOGGED_BYTES: usize = 256;

/// The facts about a request for the access log and the metrics.
pub(super) struct Record<'a> {
    pub(super) route: RouteLabel,
    /// When the request's head had arrived.
    pub(super) started: Instant,
    pub(super) uri: &'a Uri,
    /// `None` when it was not parsed.
    pub(super) target: Option<Result<Target, TargetError>>,
    pub(super) pod: Option<Arc<Pod>>,
    pub(super) session: Option<Arc<RoleSession>>,
}

impl Record<'_> {
    /// The path as it is logged.
    fn path(&self) -> Cow<'_, str> {
        match &self.target {
            None => Cow::default(),
            Some(Ok(target)) => cut(target.path.as_str()).into(),
            Some(Err(_)) => cut(&raw_target(self.uri)).escape_default().to_string().into(),
        }
    }
}

impl Connection {
    /// Counts the request, raises Events for the pod's owners, and logs it unless the caller sends too many.
    pub(super) fn report(
        &self,
        method: &Method,
        record: &Record<'_>,
        status: StatusCode,
        error: Option<&RequestError>,
    ) {
        let now = Instant::now();
        let (metrics, took) = (&self.server.metrics, now - record.started);
        metrics.observe(record.route, status, took);
        if record.route == RouteLabel::PassThrough {
            let result = match error {
                None => PassThroughResult::Relayed,
                Some(RequestError::PassThroughLimit(_)) => PassThroughResult::Throttled,
                Some(RequestError::Upstream(UpstreamError::Timeout)) => PassThroughResult::TimedOut,
                Some(_) => PassThroughResult::Failed,
            };
            metrics.pass_through(result);
        }

        if matches!(status, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED)
            && let Some(error) = error
        {
            metrics.deny(error.kind());
        }
        if let (Some(error), Some(pod)) = (error, &record.pod) {
            self.warn_owners(error, pod, record.session.as_deref());
        }
        let admitted = match self.allowances() {
            Some(Allowances { lines, .. }) => lines.admit(now),
            None => self.server.log.of(None).admit(now),
        };
        match admitted {
            Ok(suppressed) => self.log(method, record, status, error, took, suppressed),
            Err(_wait) => drop(metrics.log_lines_suppressed.inc()),
        }
    }

    fn warn_owners(&self, error: &RequestError, pod: &Pod, session: Option<&RoleSession>) {
        let Server { config, pipeline, .. } = &*self.server;
        if matches!(error, RequestError::Denied(Denial::OtherRole { .. }))
            && self.server.expects_former_answers()
        {
            return;
        }
        for notice in notices_of(error, pod, session, config) {
            pipeline.notices.warn(notice);
        }
        if matches!(error, RequestError::Role(RoleError::NoRole))
            && pipeline.directory.has_misplaced_role(&pod.namespace)
            && let Some(entitlements) = pipeline.entitlements.get()
        {
            pipeline.notices.warn(misplaced(pod, entitlements.roles.annotation_key()));
        }
    }

    /// Writes the request's line of the access log. `suppressed` is how many of the caller's were not written
    /// since its last one.
    fn log(
        &self,
        method: &Method,
        record: &Record<'_>,
        status: StatusCode,
        error: Option<&RequestError>,
        took: Duration,
        suppressed: u64,
    ) {
        let Record { pod, session, .. } = record;
        let path = &*record.path();
        let role = session.as_ref().map(|session| session.role.as_str());
        let suppressed = (suppressed > 0).then_some(suppressed);
        let namespace = pod.as_ref().map(|pod| &*pod.namespace);
        let name = pod.as_ref().map(|pod| &*pod.name);
        let (uid, cgroup) = match &self.origin {
            Some(Origin::Pod(uid)) => (Some(uid.as_str()), None),
            Some(Origin::Task(cgroup)) => (None, Some(cgroup.0)),
            None => (None, None),
        };
        let method = cut(method.as_str());
        // Whole microseconds, or a decimal fraction prints as 0.055279999999999996.
        let latency_ms = (took.as_secs_f64() * 1e6).round() / 1e3;
        let Some(error) = error else {
            info!(
                pod.namespace = namespace, pod.name = name, pod.uid = uid, cgroup.id = cgroup, peer = %self.peer, method, path,
                status = status.as_u16(), latency_ms, role, suppressed, "request answered"
            );
            return;
        };
        macro_rules! refused {
            ($level:ident) => {
                $level!(
                    pod.namespace = namespace, pod.name = name, pod.uid = uid, cgroup.id = cgroup, peer = %self.peer, method, path,
                    status = status.as_u16(), latency_ms, role, suppressed, kind = error.kind().as_str(), error = chain(error),
                    "request refused"
                )
            };
        }
        match error.kind() {
            // Nothing is denied: the SDKs of pods without a role ask, too.
            ErrorKind::MethodNotAllowed | ErrorKind::NoRole | ErrorKind::NotFound => refused!(info),
            _ => refused!(warn),
        }
    }
}

/// As much of a client's text as is logged.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LOGGED_BYTES)]
}
