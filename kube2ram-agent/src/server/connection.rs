//! One connection of a pod: who called is read once, what is asked is parsed for each request, and each step's result is the next
//! step's input. Depends on every earlier module's seam; called by `server`.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt;
use http::{Method, Request, Response, StatusCode, Uri, header, request};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::{
    Server,
    error::RequestError,
    metrics::{PassThroughResult, RouteLabel},
    node_role::NodeRole,
    notices::notices_of,
    pass_through::{Relayed, relay},
    path::Target,
    reply,
    route::{Route, UpstreamTarget, route},
    wire,
};
use crate::{
    cloud::upstream::UpstreamError, datapath::Origin, identity::PodUid, kubernetes::Pod, telemetry::chain,
};

/// From a request's head to its response's head: the SDKs give up at 1 s, and a late answer helps nobody.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_millis(900);
/// How long a request waits for an agent that has just started: discovery takes some 100 ms when the metadata server is there.
const START_PATIENCE: Duration = Duration::from_millis(700);
/// How much of a client's text the access log keeps.
const LOGGED_BYTES: usize = 256;

/// One accepted connection.
pub(super) struct Connection {
    server: Arc<Server>,
    peer: SocketAddr,
    /// `None` when the kernel vouches for nobody.
    origin: Option<Origin>,
    /// Memoised: a cgroup never changes its pod.
    uid: OnceLock<PodUid>,
}

/// What the access log and the metrics tell about a request.
struct Record {
    route: RouteLabel,
    path: String,
    pod: Option<Arc<Pod>>,
    role: Option<String>,
}

/// Which of the agent's own items is asked for.
enum Item {
    Credentials { requested: Box<str> },
    RamList,
    RoleList,
}

impl Connection {
    pub(super) fn new(server: Arc<Server>, peer: SocketAddr, origin: Option<Origin>) -> Self {
        Self { server, peer, origin, uid: OnceLock::new() }
    }

    /// The calling pod, when there is one.
    pub(super) fn pod_uid(&self) -> Option<PodUid> {
        self.uid(self.origin?).ok().cloned()
    }

    /// Answers one request. Its body, if any, is not read.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Either<Full<Bytes>, Relayed>> {
        let started = Instant::now();
        let (request, _) = request.into_parts();
        let method = request.method.clone();
        let mut record = Record { route: RouteLabel::Refused, path: String::new(), pod: None, role: None };

        let answered = match timeout(REQUEST_DEADLINE, self.dispatch(request, &mut record)).await {
            Ok(answered) => answered,
            Err(_) if record.route == RouteLabel::PassThrough => {
                Err(RequestError::Upstream(UpstreamError::Timeout))
            }
            Err(_) => Err(RequestError::Deadline),
        };
        let (response, error) = match answered {
            Ok(response) => (response, None),
            Err(error) => (error.response().map(Either::Left), Some(error)),
        };
        self.report(&method, &record, response.status(), error.as_ref(), started.elapsed());
        response
    }

    async fn dispatch(
        &self,
        request: request::Parts,
        record: &mut Record,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let config = &self.server.config;
        let raw = raw_target(&request.uri);
        record.path = cut(&raw).escape_default().to_string();
        let origin = self.origin.ok_or(RequestError::Unvouched)?;
        let target = Target::parse(raw.as_bytes(), config.metadata).map_err(RequestError::Target)?;
        record.path = cut(target.path.as_str()).to_owned();

        let (label, item) = match route(&request.method, &target, config.metadata_policy) {
            Route::Credentials { requested } => (RouteLabel::Credentials, Item::Credentials { requested }),
            Route::PassThrough(upstream_target) => {
                record.route = RouteLabel::PassThrough;
                let uid = self.uid(origin)?;
                record.pod = self.server.pipeline.directory.pod(uid).now_or_never().and_then(Result::ok);
                return self.pass_through(request, &upstream_target).await;
            }
            Route::RamList => (RouteLabel::RamList, Item::RamList),
            Route::Refuse(refusal) => return Err(RequestError::Refused(refusal)),
            Route::RoleList => (RouteLabel::RoleList, Item::RoleList),
        };
        record.route = label;
        let pod = self.server.pipeline.directory.pod(self.uid(origin)?).await.map_err(RequestError::Pod)?;
        record.pod = Some(Arc::clone(&pod));
        self.serve_item(request, &target, item, &pod, record).await
    }

    fn uid(&self, origin: Origin) -> Result<&PodUid, RequestError> {
        if let Some(uid) = self.uid.get() {
            return Ok(uid);
        }
        let uid = self.server.pipeline.cgroups.pod_of(origin.cgroup).map_err(RequestError::Identity)?;
        Ok(self.uid.get_or_init(|| uid))
    }

    /// Pod → role session → permit → item.
    async fn serve_item(
        &self,
        request: request::Parts,
        target: &Target,
        item: Item,
        pod: &Pod,
        record: &mut Record,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let pipeline = &self.server.pipeline;
        let entitlements = timeout(START_PATIENCE, pipeline.entitlements.wait())
            .await
            .map_err(|_elapsed| RequestError::Starting)?;
        let host_network_pods = self.server.config.host_network_pods;
        if let Some(node_role) = NodeRole::of(pod, &entitlements.roles, host_network_pods) {
            record.route = RouteLabel::PassThrough;
            return self.pass_through(request, &UpstreamTarget::of_node_role(node_role, &target.path)).await;
        }
        let session = entitlements.roles.session_for(pod).map_err(RequestError::Role)?;
        record.role = Some(session.role.to_string());
        let requested = match &item {
            Item::Credentials { requested } => Some(&**requested),
            Item::RamList | Item::RoleList => None,
        };
        let allow_list = pipeline.directory.allow_list(&pod.namespace);
        let permit = entitlements
            .policy
            .permit(session, allow_list.as_ref().map(Option::as_deref), requested)
            .map_err(RequestError::Denied)?;
        let response = match item {
            Item::Credentials { .. } => {
                let credentials = entitlements
                    .credentials
                    .get(permit, &pod.uid)
                    .await
                    .map_err(RequestError::Credentials)?;
                reply::json(wire::document(&credentials).map_err(RequestError::Document)?)
            }
            Item::RamList => reply::text("security-credentials/"),
            Item::RoleList => reply::text(entitlements.roles.wire_name(&permit.session().role).to_owned()),
        };
        Ok(response.map(Either::Left))
    }

    async fn pass_through(
        &self,
        request: request::Parts,
        target: &UpstreamTarget,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        // The real server refuses tokens to requests that came through a proxy, against forgery through one. The header is not passed
        // on, so the refusal is ours to make.
        let is_proxied = request.headers.contains_key("x-forwarded-for")
            || request.headers.contains_key(header::FORWARDED);
        if request.method == Method::PUT && is_proxied {
            return Err(RequestError::Proxied);
        }
        let response =
            relay(&*self.server.pipeline.upstream, request, target).await.map_err(RequestError::Upstream)?;
        Ok(response.map(Either::Right))
    }

    /// Counts the request, tells the pod's owners what they should know and logs it unless the caller is too loud.
    fn report(
        &self,
        method: &Method,
        record: &Record,
        status: StatusCode,
        error: Option<&RequestError>,
        took: Duration,
    ) {
        let metrics = &self.server.metrics;
        metrics.observe(record.route, status, took);
        if record.route == RouteLabel::PassThrough {
            let result = match error {
                None => PassThroughResult::Relayed,
                Some(RequestError::Upstream(UpstreamError::Timeout)) => PassThroughResult::TimedOut,
                Some(_) => PassThroughResult::Failed,
            };
            metrics.pass_through(result);
        }

        if status == StatusCode::FORBIDDEN
            && let Some(error) = error
        {
            metrics.deny(error.kind());
        }
        for notice in error.iter().zip(&record.pod).flat_map(|(error, pod)| notices_of(error, pod)) {
            self.server.pipeline.notices.warn(notice);
        }
        match self.server.log.admit(self.uid.get()) {
            Some(suppressed) => self.log(method, record, status, error, took, suppressed),
            None => drop(metrics.log_lines_suppressed.inc()),
        }
    }

    /// Writes the request's line of the access log. `suppressed` is how many of the caller's were not written since its last one.
    fn log(
        &self,
        method: &Method,
        record: &Record,
        status: StatusCode,
        error: Option<&RequestError>,
        took: Duration,
        suppressed: u64,
    ) {
        let Record { path, pod, role, .. } = record;
        let suppressed = (suppressed > 0).then_some(suppressed);
        let namespace = pod.as_ref().map(|pod| &*pod.namespace);
        let name = pod.as_ref().map(|pod| &*pod.name);
        let cgroup = self.origin.map(|origin| origin.cgroup.0);
        let method = cut(method.as_str());
        // Whole microseconds, or a decimal fraction prints as 0.055279999999999996.
        let latency_ms = (took.as_secs_f64() * 1e6).round() / 1e3;
        let Some(error) = error else {
            info!(
                pod.namespace = namespace, pod.name = name, cgroup.id = cgroup, peer = %self.peer, method, path,
                status = status.as_u16(), latency_ms, role, suppressed, "request answered"
            );
            return;
        };
        warn!(
            pod.namespace = namespace, pod.name = name, cgroup.id = cgroup, peer = %self.peer, method, path,
            status = status.as_u16(), latency_ms, role, suppressed, kind = error.kind().as_str(), error = chain(error),
            "request refused"
        );
    }
}

/// The target as it was on the wire, but for a fragment, which the parser of `Uri` has cut off.
fn raw_target(uri: &Uri) -> std::borrow::Cow<'_, str> {
    match (uri.authority(), uri.path_and_query()) {
        (None, Some(target)) => target.as_str().into(),
        _ => uri.to_string().into(),
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LOGGED_BYTES)]
}
