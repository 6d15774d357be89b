//! The service under test: the real pipeline over fakes, on a runtime with paused time.

use std::{
    cell::OnceCell,
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use kube2ram_agent::{
    audit::{self, Trail},
    credentials::{self, Cache},
    identity::{CgroupId, CgroupPods, IdentityError, PodUid},
    kubernetes::{Directory, Notice, Notices, PodError},
    pod::Pod,
    policy::Policy,
    role::{AnnotationKeys, Attribution, CredentialsFrom, Roles},
    server::{Config, Entitlements, HostNetworkPods, MetadataPolicy, Pipeline, Server, token::Tokens},
};
use kube2ram_cloud::{
    Cloud, MetadataAddr,
    credentials::{Credentials, IssueError, Issuer},
    role::{BaseArn, RoleSession},
    upstream::{ResponseBody, Upstream, UpstreamError},
};
use kube2ram_service::{clock::Clock, state_dir::Secret};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    runtime::{Builder, Runtime},
    sync::SetOnce,
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::super::model::Tree;

/// What the real metadata server answers everything with.
pub(super) const UPSTREAM_BODY: &str = "node-answer";
/// What credentials hold.
pub(super) const SECRET: &str = "fake-secret";
const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";
const ROLE_KEY: &str = "role";
/// One for each cloud and policy.
const SERVICES_COUNT: usize = 2 * Cloud::ALL.len();

/// The service and what stands around it.
pub(super) struct Service {
    pub(super) server: Arc<Server>,
    pub(super) world: Arc<World>,
}

/// What the service depends on.
pub(super) struct World {
    pod: Arc<Pod>,
    metadata: MetadataAddr,
    /// The real server's connections: each ends with what was sent on it.
    upstream: Mutex<Vec<JoinHandle<Vec<u8>>>>,
}

thread_local! {
    static SERVICES: [OnceCell<(Runtime, Arc<Service>)>; SERVICES_COUNT] =
        const { [const { OnceCell::new() }; SERVICES_COUNT] };
}

/// Runs `conversation` with the service of this thread.
pub(super) fn with_service<F: Future>(
    cloud: Cloud,
    policy: MetadataPolicy,
    conversation: impl FnOnce(Arc<Service>) -> F,
) -> F::Output {
    SERVICES.with(|services| {
        let index = 2 * (cloud as usize) + usize::from(policy == MetadataPolicy::Open);
        let (runtime, service) = services[index].get_or_init(|| {
            let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
            let runtime = runtime.expect("a runtime without I/O");
            let service = runtime.block_on(async { Service::new(cloud, policy) });
            (runtime, service)
        });
        runtime.block_on(conversation(Arc::clone(service)))
    })
}

impl Service {
    fn new(cloud: Cloud, policy: MetadataPolicy) -> Arc<Self> {
        let (dialect, Tree { metadata, base, .. }) = (cloud.dialect(), Tree::of(cloud));
        let annotations: BTreeMap<Box<str>, Box<str>> = BTreeMap::from([(ROLE_KEY.into(), "my-role".into())]);
        let pod = Pod {
            uid: PodUid::parse(UID).expect("a UID"),
            namespace: "team-a".into(),
            name: "web-0".into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "web".into(),
            host_network: false,
            annotations,
        };
        let world = Arc::new(World { pod: Arc::new(pod), metadata: *metadata, upstream: Mutex::default() });
        let [external_id, policy_key, duration, session_name] =
            ["external-id", "policy", "duration", "session-name"].map(Box::from);
        let keys = AnnotationKeys {
            role: ROLE_KEY.into(),
            account_role: None,
            external_id,
            policy: policy_key,
            duration,
            session_name,
        };
        let base = BaseArn::parse_in(dialect.arns, base).expect("a base ARN");
        let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
        let roles =
            Roles::try_new(dialect, keys, Some(base), None, duration, attribution, CredentialsFrom::Node)
                .expect("no default role");
        let mut registry = Registry::default();
        let trail =
            Trail::start("node", Arc::clone(&world) as _, |_| None, None, audit::Metrics::new(&mut registry));
        let credentials = Cache::new(
            Arc::clone(&world) as _,
            Arc::clone(&world) as _,
            TaskTracker::new(),
            CancellationToken::new(),
            credentials::Limits::default(),
            credentials::Metrics::new(&mut registry),
            Arc::new(trail.expect("no thread")),
        );
        let pipeline = Pipeline {
            clock: Arc::clone(&world) as _,
            cgroups: Arc::clone(&world) as _,
            directory: Arc::clone(&world) as _,
            entitlements: Arc::new(SetOnce::new_with(Some(Entitlements {
                policy: Policy::new(None, &roles),
                roles,
                credentials,
            }))),
            notices: Arc::clone(&world) as _,
            tokens: Arc::new(Tokens::new(Secret::new(Box::new([7; 32])), dialect)),
            upstream: Arc::clone(&world) as _,
        };
        let config = Config {
            allow_list_annotation: "allowed-roles".into(),
            metadata: *metadata,
            metadata_policy: policy,
            host_network_pods: HostNetworkPods::Pass,
            pass_through_rate: 0,
            request_rate: 0,
            dialect,
            require_token: false,
        };
        Arc::new(Self { server: Server::new(config, pipeline, TaskTracker::new(), &mut registry), world })
    }
}

impl World {
    /// What reached the real server since the last time: all bytes of each connection.
    pub(super) async fn take_upstream(&self) -> Vec<Vec<u8>> {
        let connections = std::mem::take(&mut *self.upstream.lock().expect("no panic holds it"));
        let mut received = Vec::new();
        for connection in connections {
            received.push(connection.await.expect("it does not panic"));
        }
        received
    }
}

/// Answers one request, and then listens on for what should not come.
async fn answer(mut stream: DuplexStream) -> Vec<u8> {
    let mut received = Vec::new();
    while !received.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => received.push(byte),
            Err(_closed) => return received,
        }
    }
    let length = UPSTREAM_BODY.len();
    let response =
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{UPSTREAM_BODY}");
    // The agent may not wait for it.
    drop(stream.write_all(response.as_bytes()).await);
    drop(stream.read_to_end(&mut received).await);
    received
}

#[async_trait]
impl Upstream for World {
    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<ResponseBody>, UpstreamError> {
        let failed = |error: hyper::Error| UpstreamError::Exchange(error.into());
        let (near, far) = duplex(16 * 1024);
        self.upstream.lock().expect("no panic holds it").push(tokio::spawn(answer(far)));
        let host = HeaderValue::from_str(&self.metadata.v4.ip().to_string()).expect("an address");
        request.headers_mut().insert(header::HOST, host);
        let (mut sender, connection) = http1::handshake(TokioIo::new(near)).await.map_err(failed)?;
        tokio::spawn(connection);
        Ok(sender.send_request(request).await.map_err(failed)?.map(ResponseBody::from))
    }
}

impl CgroupPods for World {
    fn pod_of(&self, _: CgroupId) -> Result<PodUid, IdentityError> {
        Ok(self.pod.uid.clone())
    }
}

#[async_trait]
impl Directory for World {
    fn known_pod(&self, _: &PodUid) -> Option<Arc<Pod>> {
        Some(Arc::clone(&self.pod))
    }

    async fn pod(&self, _: &PodUid) -> Result<Arc<Pod>, PodError> {
        Ok(Arc::clone(&self.pod))
    }

    fn has_misplaced_role(&self, _: &str) -> bool {
        false
    }

    fn allow_list(&self, _: &str) -> Option<Option<Arc<str>>> {
        None
    }
}

impl Notices for World {
    fn warn(&self, _: Notice) {}
}

impl Clock for World {
    fn now(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }
}

#[async_trait]
impl Issuer for World {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let now = self.now();
        Ok(Credentials {
            access_key_id: format!("STS.{}", session.role).into(),
            access_key_secret: SECRET.into(),
            security_token: SECRET.into(),
            issued_at: now,
            expires_at: now + Duration::from_hours(1),
            request_id: None,
            document: Default::default(),
        })
    }
}
