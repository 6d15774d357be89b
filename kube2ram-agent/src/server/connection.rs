//! One connection of a pod: the caller is identified once, each request is parsed, and each step's result is
//! the next step's input. Depends on the interfaces of every earlier module; called by `server`.

use std::{
    borrow::Cow,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use bytes::Bytes;
use futures::poll;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::{Either, Full};
use tokio::time::{Instant, timeout};

mod report;

use self::report::Record;
use super::{
    Entitlements, HostNetworkPods, Pipeline, Server,
    error::RequestError,
    identities::Identified,
    metrics::RouteLabel,
    node_role::NodeRole,
    pass_through::{Relayed, relay},
    path::Target,
    reply,
    route::{NodeTarget, Refusal, Route, UpstreamTarget, route},
    token::TokenError,
};
use crate::{
    datapath::{Origin, OriginError},
    identity::PodUid,
    pod::Pod,
    role::{RoleError, Roles},
};
use kube2ram_cloud::{dialect::SECURITY_CREDENTIALS, role::RoleSession, upstream::UpstreamError};
use kube2ram_service::{connection_limiter::ConnectionPermit, rate_limiter::RateLimiter};

/// One accepted connection.
pub(super) struct Connection {
    server: Arc<Server>,
    peer: SocketAddr,
    /// `None` when the kernel has no record of the caller.
    origin: Option<Origin>,
    /// Whether the node itself may ask for the agent's health by it. Then there is no origin.
    checks_health: bool,
    /// Whether it is counted, if nobody vouches for it. The health check of the node is not.
    is_counted: AtomicBool,
    /// Memoised: neither a listener nor a cgroup ever changes its pod.
    uid: OnceLock<PodUid>,
    allowances: OnceLock<Allowances>,
    /// The entitlements of the last request's pod; they are looked up again when its annotations change.
    session: Mutex<Option<(Arc<Pod>, Arc<RoleSession>)>>,
}

/// The pod's state that all of its connections share; looked up once per connection.
struct Allowances {
    /// How often it may ask.
    rate: Arc<RateLimiter>,
    /// How many lines of the log it may cause.
    lines: Arc<RateLimiter>,
}

/// Where kube2iam's manifests have the kubelet ask.
const HEALTH: &str = "/healthz";

/// Which of the agent's own items is asked for.
enum Item {
    Credentials { requested: Box<str> },
    CredentialDirectory,
    RoleList,
}

impl Connection {
    pub(super) fn new(server: Arc<Server>, peer: SocketAddr, origin: Option<Origin>) -> Self {
        let uid = match &origin {
            Some(Origin::Pod(uid)) => OnceLock::from(uid.clone()),
            Some(Origin::Task(_)) | None => OnceLock::new(),
        };
        let (allowances, session) = (OnceLock::new(), Mutex::default());
        let is_counted = AtomicBool::new(true);
        Self { server, peer, origin, checks_health: false, is_counted, uid, allowances, session }
    }

    /// A connection of the node itself, of which the kernel has no record.
    pub(super) fn of_node(server: Arc<Server>, peer: SocketAddr) -> Self {
        let is_counted = AtomicBool::new(false);
        Self { checks_health: true, is_counted, ..Self::new(server, peer, None) }
    }

    /// Whether it is a connection of the node itself.
    pub(super) fn checks_health(&self) -> bool {
        self.checks_health
    }

    /// The calling pod, when there is one. To be asked once for a connection, which is counted by it.
    pub(super) fn pod_uid(&self) -> Option<PodUid> {
        let uid = self.uid(self.origin.as_ref()?);
        let identified = match &uid {
            Ok(_) => Identified::Pod,
            Err(RequestError::Identity(error)) => error.into(),
            Err(_) => Identified::Unreadable,
        };
        self.server.metrics.identities.count(identified);
        uid.ok().cloned()
    }

    /// Whether it came by a listener that the pod has to itself.
    pub(super) fn has_own_listener(&self) -> bool {
        matches!(self.origin, Some(Origin::Pod(_)))
    }

    /// Answers one request. `permit` is the connection's permit; the connection is not idle until the answer
    /// has ended.
    pub(super) async fn answer(
        &self,
        request: Request<()>,
        permit: Option<&ConnectionPermit<Option<PodUid>>>,
    ) -> Response<Either<Full<Bytes>, Relayed>> {
        if self.checks_health() {
            // As at the admin listener: the agent answers. In no log, as the probes that are commands.
            if request.method() == Method::GET && request.uri() == HEALTH {
                return reply::text("ok\n").map(Either::Left);
            }
            if !self.is_counted.swap(true, Ordering::Relaxed) {
                self.server.count_unvouched(self.peer, &OriginError::Unvouched);
            }
        }
        let started = Instant::now();
        let busy = permit.map(ConnectionPermit::busy);
        let mut record = Record {
            route: RouteLabel::Refused,
            started,
            target: None,
            pod: None,
            session: None,
            uri: request.uri(),
        };
        let answered = match self.pay(started) {
            Ok(()) => self.answer_in_time(&request, &mut record).await,
            Err(error) => Err(error),
        };
        let (mut response, error) = match answered {
            Ok(response) => (response, None),
            Err(error) => (error.response().map(Either::Left), Some(error)),
        };
        self.report(request.method(), &record, response.status(), error.as_ref());
        // What is passed through has the real server's own headers.
        if error.is_some() || record.route != RouteLabel::PassThrough {
            let server = HeaderValue::from_static(self.server.config.dialect.server);
            response.headers_mut().insert(header::SERVER, server);
        }
        // The agent's own answers are sent as a whole; passed-through answers take as long as the real server
        // and the client do.
        if let Either::Right(relayed) = response.body_mut() {
            relayed.keep_busy(busy);
        }
        response
    }

    /// Counts the request against the caller's rate.
    fn pay(&self, now: Instant) -> Result<(), RequestError> {
        let admitted = match self.allowances() {
            Some(Allowances { rate, .. }) => rate.admit(now),
            None => self.server.rates.of(None).admit(now),
        };
        admitted.map(drop).map_err(|retry_after| RequestError::OverRate { retry_after })
    }

    /// `None` until the caller's pod is known.
    fn allowances(&self) -> Option<&Allowances> {
        let uid = self.uid.get()?;
        let Server { rates, log, .. } = &*self.server;
        Some(
            self.allowances
                .get_or_init(|| Allowances { rate: rates.of(Some(uid)), lines: log.of(Some(uid)) }),
        )
    }

    async fn answer_in_time(
        &self,
        request: &Request<()>,
        record: &mut Record<'_>,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let waited = {
            let mut answer = pin!(self.dispatch(request, record));
            match poll!(answer.as_mut()) {
                // Most answers are at hand, and need no timer.
                Poll::Ready(answered) => return answered,
                Poll::Pending => Box::pin(timeout(self.server.config.dialect.patience.request, answer)).await,
            }
        };
        waited.unwrap_or_else(|_elapsed| {
            Err(match record.route {
                RouteLabel::PassThrough => RequestError::Upstream(UpstreamError::Timeout),
                _ => RequestError::Deadline,
            })
        })
    }

    /// The steps of a request. What waits is in a box: most requests wait for nothing, and hyper moves this
    /// future as a whole.
    async fn dispatch(
        &self,
        request: &Request<()>,
        record: &mut Record<'_>,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let config = &self.server.config;
        let target = record.target.insert(Target::parse(
            raw_target(request.uri()).as_bytes(),
            config.metadata,
            config.dialect,
        ));
        let origin = self.origin.as_ref().ok_or(RequestError::Unvouched)?;
        if request.method() == Method::CONNECT {
            return Err(RequestError::Tunnel);
        }
        let target = target.as_ref().map_err(|error| RequestError::Target(*error))?;
        let uid = self.uid(origin)?;

        let route = route(request.method(), target, config.metadata_policy, config.dialect);
        if !matches!(route, Route::Refuse(_) | Route::Token)
            && let Err(error) = self.check_token(uid, request.headers())
        {
            record.pod = self.pod_if_known(uid);
            return Err(RequestError::Token(error));
        }
        let (label, item) = match route {
            Route::Credentials { requested } => (RouteLabel::Credentials, Item::Credentials { requested }),
            Route::NodeItem { target, refusal } => {
                return Box::pin(self.serve_node_item(request, target, refusal, uid, record)).await;
            }
            Route::PassThrough(upstream_target) => {
                record.route = RouteLabel::PassThrough;
                record.pod = self.pod_if_known(uid);
                return Box::pin(self.pass_through(request, &upstream_target, uid)).await;
            }
            Route::CredentialDirectory => (RouteLabel::CredentialDirectory, Item::CredentialDirectory),
            Route::Refuse(refusal) => {
                record.pod = self.pod_if_known(uid);
                return Err(RequestError::Refused(refusal));
            }
            Route::RoleList => (RouteLabel::RoleList, Item::RoleList),
            Route::Token => {
                record.route = RouteLabel::Token;
                record.pod = self.pod_if_known(uid);
                return self.issue_token(uid, request.headers());
            }
        };
        record.route = label;
        let pod = self.pod(uid).await?;
        record.pod = Some(Arc::clone(&pod));
        self.serve_item(request, item, &pod, record).await
    }

    /// For the log only.
    fn pod_if_known(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        self.server.pipeline.directory.known_pod(uid)
    }

    fn uid(&self, origin: &Origin) -> Result<&PodUid, RequestError> {
        if let Some(uid) = self.uid.get() {
            return Ok(uid);
        }
        let uid = match origin {
            Origin::Pod(uid) => uid.clone(),
            Origin::Task(cgroup) => {
                self.server.pipeline.cgroups.pod_of(*cgroup).map_err(RequestError::Identity)?
            }
        };
        Ok(self.uid.get_or_init(|| uid))
    }

    /// What a pod is entitled to follows from its object alone, and that is the same one from request to
    /// request.
    fn session(&self, roles: &Roles, pod: &Arc<Pod>) -> Result<Arc<RoleSession>, RoleError> {
        let mut last = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, session)) = &*last
            && Arc::ptr_eq(last, pod)
        {
            return Ok(Arc::clone(session));
        }
        let session = Arc::new(roles.session_for(pod)?);
        *last = Some((Arc::clone(pod), Arc::clone(&session)));
        Ok(session)
    }

    /// Passes what belongs to the node's role to a pod that may have it.
    async fn serve_node_item(
        &self,
        request: &Request<()>,
        target: NodeTarget,
        refusal: Refusal,
        uid: &PodUid,
        record: &mut Record<'_>,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let policy = self.server.config.host_network_pods;
        // Most pods' answer needs nothing that may be away: neither the API server nor, for the roles, the
        // metadata server.
        if policy == HostNetworkPods::Deny {
            record.pod = self.pod_if_known(uid);
            return Err(RequestError::Refused(refusal));
        }
        let pod = self.pod(uid).await?;
        record.pod = Some(Arc::clone(&pod));
        if !pod.host_network {
            return Err(RequestError::Refused(refusal));
        }
        let roles = &self.entitlements().await?.roles;
        let node_role = NodeRole::of(&pod, roles, policy).ok_or(RequestError::Refused(refusal))?;
        record.route = RouteLabel::PassThrough;
        self.pass_through(request, &target.open(node_role), uid).await
    }

    async fn pod(&self, uid: &PodUid) -> Result<Arc<Pod>, RequestError> {
        let directory = &self.server.pipeline.directory;
        match directory.known_pod(uid) {
            Some(pod) => Ok(pod),
            None => directory.pod(uid).await.map_err(RequestError::Pod),
        }
    }

    async fn entitlements(&self) -> Result<&Entitlements, RequestError> {
        let entitlements = &self.server.pipeline.entitlements;
        match entitlements.get() {
            Some(known) => Ok(known),
            None => Box::pin(timeout(self.server.config.dialect.patience.start, entitlements.wait()))
                .await
                .map_err(|_elapsed| RequestError::Starting),
        }
    }

    /// Pod → role session → permit → item.
    async fn serve_item(
        &self,
        request: &Request<()>,
        item: Item,
        pod: &Arc<Pod>,
        record: &mut Record<'_>,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let pipeline = &self.server.pipeline;
        let entitlements = self.entitlements().await?;
        let host_network_pods = self.server.config.host_network_pods;
        if let Some(node_role) = NodeRole::of(pod, &entitlements.roles, host_network_pods)
            && let Some(Ok(target)) = &record.target
        {
            record.route = RouteLabel::PassThrough;
            let upstream_target = UpstreamTarget::of_node_role(node_role, &target.path);
            return Box::pin(self.pass_through(request, &upstream_target, &pod.uid)).await;
        }
        let session = self.session(&entitlements.roles, pod).map_err(RequestError::Role)?;
        record.session = Some(Arc::clone(&session));
        let requested = match &item {
            Item::Credentials { requested } => Some(&**requested),
            Item::CredentialDirectory | Item::RoleList => None,
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
                    .get_by(permit, &pod.uid, record.started + self.server.config.dialect.patience.answer)
                    .await
                    .map_err(RequestError::Credentials)?;
                let write = || (self.server.config.dialect.document)(&credentials);
                reply::json(credentials.document.get_or_write(write).map_err(RequestError::Document)?)
            }
            Item::CredentialDirectory => reply::text(format!("{SECURITY_CREDENTIALS}/")),
            Item::RoleList => reply::text(entitlements.roles.wire_name(&permit.session().role).to_owned()),
        };
        Ok(response.map(Either::Left))
    }

    fn issue_token(
        &self,
        uid: &PodUid,
        headers: &HeaderMap,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let Pipeline { tokens, clock, .. } = &self.server.pipeline;
        let token = tokens.issue(uid, headers, clock.now()).map_err(RequestError::NoToken)?;
        let mut response = reply::text(token).map(Either::Left);
        let names = &self.server.config.dialect.tokens;
        if let Some(ttl) = headers.get(&names.ttl).filter(|_| names.echoes_ttl) {
            response.headers_mut().insert(names.ttl.clone(), ttl.clone());
        }
        Ok(response)
    }

    /// As the real server, with `--require-token` and without. Without, an expired token is as good as none:
    /// credentials-go before 1.4 never renews its own.
    fn check_token(&self, uid: &PodUid, headers: &HeaderMap) -> Result<(), TokenError> {
        let is_required = self.server.config.require_token;
        if !is_required && !headers.contains_key(&self.server.config.dialect.tokens.token) {
            return Ok(());
        }
        let Pipeline { tokens, clock, .. } = &self.server.pipeline;
        match tokens.check(uid, headers, clock.now()) {
            Err(TokenError::Missing(_) | TokenError::Expired) if !is_required => Ok(()),
            checked => checked,
        }
    }

    async fn pass_through(
        &self,
        request: &Request<()>,
        target: &UpstreamTarget,
        uid: &PodUid,
    ) -> Result<Response<Either<Full<Bytes>, Relayed>>, RequestError> {
        let share = self.server.pass_through_limiter.take(uid).map_err(RequestError::PassThroughLimit)?;
        let relayed = relay(&*self.server.pipeline.upstream, request, target, share).await;
        relayed.map_err(RequestError::Upstream)
    }
}

/// The target as it was on the wire, but for a fragment, which the parser of `Uri` has cut off.
fn raw_target(uri: &Uri) -> Cow<'_, str> {
    match (uri.authority(), uri.path_and_query()) {
        (None, Some(target)) => target.as_str().into(),
        _ => uri.to_string().into(),
    }
}
