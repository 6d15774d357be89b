//! A whole metadata service over real sockets: the steps before it are fakes, role, policy, credential cache
//! and the client of the real server are the real ones.

use std::{
    collections::BTreeMap,
    os::fd::BorrowedFd,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use async_trait::async_trait;
use http::Response;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::{
    audit::Trail,
    credentials::{self},
    datapath::OriginError,
    identity::{CgroupId, IdentityError, PodUid},
    kubernetes::{Notice, PodError},
    pod::Pod,
    policy::PatternFormat,
    role::{AnnotationKeys, Attribution, CredentialsFrom},
};
use kube2ram_cloud::{
    alibaba, aws,
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer},
    role::{ArnStyle, BaseArn, RoleSession},
    upstream::{MetadataServer, PassGrant},
};
use kube2ram_service::{clock::SystemClock, state_dir::Secret};

pub(super) const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";
pub(super) const POD_CGROUP: CgroupId = CgroupId(7);
/// Another pod's.
pub(super) const OTHER_UID: &str = "0a1b2c3d-0000-4000-8000-000000000002";
pub(super) const OTHER_POD_CGROUP: CgroupId = CgroupId(72);
/// One that the pod made below its own.
pub(super) const NESTED_CGROUP: CgroupId = CgroupId(70);
/// One that the kernel does not open.
pub(super) const UNREADABLE_CGROUP: CgroupId = CgroupId(71);
pub(super) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// What the real metadata server answers everything with; the node's role is what must never leak.
pub(super) const UPSTREAM_BODY: &str = "node-answer";

/// The answers of the fakes; tests change them before they connect.
pub(super) struct World {
    pub(super) cgroup: Mutex<Option<CgroupId>>,
    pub(super) pod: Mutex<Result<Pod, fn() -> PodError>>,
    pub(super) pod_never_comes: Mutex<bool>,
    pub(super) allow_list: Mutex<Option<Option<Arc<str>>>>,
    pub(super) has_misplaced_role: Mutex<bool>,
    pub(super) refusal: Mutex<Option<IssueErrorKind>>,
    pub(super) issued: AtomicU32,
    pub(super) notices: Mutex<Vec<Notice>>,
    pub(super) now: Mutex<jiff::Timestamp>,
    /// Whether the real server sends a byte of an endless body each second.
    pub(super) upstream_drips: Mutex<bool>,
    pub(super) upstream_heads: Mutex<Vec<String>>,
    pub(super) upstream_response: Mutex<Option<Vec<u8>>>,
}

pub(super) struct Harness {
    pub(super) world: Arc<World>,
    pub(super) addr: SocketAddr,
    pub(super) server: Arc<Server>,
    entitlements: Arc<SetOnce<Entitlements>>,
    pub(super) tasks: TaskTracker,
    pub(super) drain: Drain,
    pub(super) registry: Registry,
}

pub(super) fn pod(annotations: &[(&str, &str)]) -> Pod {
    Pod {
        uid: PodUid::parse(UID).unwrap(),
        namespace: "team-a".into(),
        name: "web-0".into(),
        account_annotations: None,
        is_mirror: false,
        service_account: "web".into(),
        host_network: false,
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect::<BTreeMap<_, _>>(),
    }
}

pub(super) const ROLE_KEY: &str = "ram.aliyuncs.com/role";

impl Harness {
    /// A service whose caller is a pod annotated with `my-role`, without namespace restrictions.
    pub(super) async fn start() -> Self {
        Self::start_with(None, |_| {}).await
    }

    /// As [`start`](Self::start), on AWS.
    pub(super) async fn start_on_aws(configure: impl FnOnce(&mut Config)) -> Self {
        Self::start_with(None, |config| {
            (config.dialect, config.metadata) = (&aws::DIALECT, aws::DIALECT.metadata);
            configure(config);
        })
        .await
    }

    pub(super) async fn start_with(
        restrictions: Option<PatternFormat>,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        Self::start_from(CredentialsFrom::Node, None, restrictions, configure).await
    }

    /// As [`start_with`](Self::start_with); annotations of ServiceAccounts are read if `account_role` is a
    /// key.
    pub(super) async fn start_from(
        from: CredentialsFrom,
        account_role: Option<&str>,
        restrictions: Option<PatternFormat>,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let world = Arc::new(World {
            cgroup: Mutex::new(Some(POD_CGROUP)),
            pod: Mutex::new(Ok(pod(&[(ROLE_KEY, "my-role")]))),
            pod_never_comes: Mutex::new(false),
            allow_list: Mutex::new(None),
            has_misplaced_role: Mutex::new(false),
            refusal: Mutex::new(None),
            issued: AtomicU32::new(0),
            notices: Mutex::default(),
            now: Mutex::new(jiff::Timestamp::now()),
            upstream_drips: Mutex::new(false),
            upstream_heads: Mutex::default(),
            upstream_response: Mutex::new(None),
        });
        let mut registry = Registry::default();
        let (tasks, drain) = (TaskTracker::new(), Drain::new());
        let keys = AnnotationKeys {
            role: ROLE_KEY.into(),
            account_role: account_role.map(Box::from),
            external_id: "external-id".into(),
            policy: "policy".into(),
            duration: "duration".into(),
            session_name: "session-name".into(),
        };
        let mut config = Config {
            allow_list_annotation: "ram.aliyuncs.com/allowed-roles".into(),
            metadata: MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap()),
            metadata_policy: MetadataPolicy::Standard,
            host_network_pods: HostNetworkPods::Pass,
            pass_through_rate: 0,
            request_rate: 0,
            require_token: false,
            dialect: &alibaba::DIALECT,
        };
        configure(&mut config);
        let dialect = config.dialect;
        let base = match dialect.arns {
            ArnStyle::Acs => "acs:ram::123456789012:role/",
            ArnStyle::Aws => "arn:aws:iam::123456789012:role/",
        };
        let base = BaseArn::parse_in(dialect.arns, base).unwrap();
        let (duration, attribution) = (Duration::from_secs(3600), Attribution::default());
        let roles = Roles::try_new(dialect, keys, Some(base), None, duration, attribution, from).unwrap();
        let entitlements = Entitlements {
            policy: Policy::new(restrictions, &roles),
            roles,
            credentials: Cache::new(
                Arc::clone(&world) as _,
                Arc::new(SystemClock),
                TaskTracker::new(),
                drain.draining().clone(),
                credentials::Limits { answer: dialect.patience.answer, ..credentials::Limits::default() },
                credentials::Metrics::new(&mut registry),
                Trail::for_tests(),
            ),
        };
        let upstream = upstream(Arc::clone(&world)).await;
        let pipeline = Pipeline {
            clock: Arc::clone(&world) as _,
            cgroups: Arc::clone(&world) as _,
            directory: Arc::clone(&world) as _,
            entitlements: Arc::new(SetOnce::new_with(Some(entitlements))),
            notices: Arc::clone(&world) as _,
            tokens: Arc::new(Tokens::new(Secret::new(Box::new([7; 32])), dialect)),
            upstream: Arc::new(MetadataServer::new(MetadataAddr::v4_only(upstream), Arc::clone(&world) as _)),
        };
        let entitlements = Arc::clone(&pipeline.entitlements);
        let server = Server::new(config, pipeline, tasks.clone(), &mut registry);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener::bound_buffers(&listener).unwrap();
        let addr = listener.local_addr().unwrap();
        tasks.spawn(Arc::clone(&server).serve(Arc::new(listener), Arc::clone(&world) as _, drain.clone()));
        Self { world, addr, server, entitlements, tasks, drain, registry }
    }

    /// Claims the pod's credentials, as the prefetch does for the pods of the node: they are refreshed from
    /// now on.
    pub(super) fn claim(&self) {
        let Entitlements { roles, policy, credentials } = self.entitlements.get().unwrap();
        let pod = self.world.pod.lock().unwrap().as_ref().unwrap().clone();
        let permit = policy.permit(roles.session_for(&pod).unwrap(), None, None).unwrap();
        let claim = credentials::Claim { permit, pod: pod.uid, prefetch: false };
        credentials.set_claims([claim], Duration::ZERO);
    }

    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Sends raw bytes on a new connection and returns everything until the server closes it.
    pub(super) async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        // The server may close before it has read everything: then the write or the read fails, which also
        // means that it closed.
        if stream.write_all(bytes.as_ref()).await.is_err() {
            return String::new();
        }
        read_to_end(&mut stream).await
    }

    pub(super) async fn send(&self, method: &str, target: &str, headers: &str) -> Response<String> {
        response(
            &self
                .raw(format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"))
                .await,
        )
    }

    pub(super) async fn get(&self, target: &str) -> Response<String> {
        self.send("GET", target, "").await
    }

    pub(super) fn upstream_heads(&self) -> Vec<String> {
        self.world.upstream_heads.lock().unwrap().clone()
    }

    pub(super) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    pub(super) fn notice_reasons(&self) -> Vec<&'static str> {
        self.world.notices.lock().unwrap().iter().map(|notice| notice.reason).collect()
    }
}

pub(super) async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let reading = async {
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut chunk).await {
            text.extend_from_slice(&chunk[..length]);
        }
    };
    tokio::time::timeout(Duration::from_secs(400), reading).await.expect("the server must close");
    String::from_utf8(text).unwrap()
}

/// Parses one response.
pub(super) fn response(text: &str) -> Response<String> {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no response in {text:?}"));
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let mut response = Response::builder().status(status);
    for (name, value) in lines.map(|line| line.split_once(": ").unwrap()) {
        response = response.header(name, value);
    }
    response.body(body.to_owned()).unwrap()
}

/// Stands in for the real metadata server: keeps every request head and answers it.
async fn upstream(world: Arc<World>) -> std::net::SocketAddrV4 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let SocketAddr::V4(addr) = listener.local_addr().unwrap() else { unreachable!() };
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let world = Arc::clone(&world);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    head.push(byte);
                    if head.ends_with(b"\r\n\r\n") {
                        let text = String::from_utf8(std::mem::take(&mut head)).unwrap();
                        world.upstream_heads.lock().unwrap().push(text);
                        let drips = *world.upstream_drips.lock().unwrap();
                        if drips
                            && stream
                                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
                                .await
                                .is_ok()
                        {
                            while stream.write_all(b".").await.is_ok() {
                                sleep(Duration::from_secs(1)).await;
                            }
                            return;
                        }
                        let response = world.upstream_response.lock().unwrap().clone();
                        let length = UPSTREAM_BODY.len();
                        let usual = format!(
                            "HTTP/1.1 200 OK\r\nServer: real\r\nContent-Length: {length}\r\n\r\n{UPSTREAM_BODY}"
                        );
                        if stream.write_all(&response.unwrap_or(usual.into_bytes())).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    addr
}

impl Origins for World {
    fn origin_of(&self, _: BorrowedFd<'_>) -> Result<Origin, OriginError> {
        self.cgroup.lock().unwrap().map(Origin::Task).ok_or(OriginError::Unvouched)
    }
}

impl CgroupPods for World {
    fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError> {
        match cgroup {
            POD_CGROUP | NESTED_CGROUP => Ok(PodUid::parse(UID).unwrap()),
            OTHER_POD_CGROUP => Ok(PodUid::parse(OTHER_UID).unwrap()),
            UNREADABLE_CGROUP => Err(IdentityError::Open {
                id: cgroup,
                source: std::io::Error::from_raw_os_error(libc::EMFILE),
            }),
            _ => Err(IdentityError::Gone(cgroup)),
        }
    }
}

#[async_trait]
impl Directory for World {
    fn known_pod(&self, _: &PodUid) -> Option<Arc<Pod>> {
        let is_known = !*self.pod_never_comes.lock().unwrap();
        is_known.then(|| self.pod.lock().unwrap().as_ref().ok().map(|pod| Arc::new(pod.clone()))).flatten()
    }

    async fn pod(&self, _: &PodUid) -> Result<Arc<Pod>, PodError> {
        if *self.pod_never_comes.lock().unwrap() {
            std::future::pending::<()>().await;
        }
        self.pod.lock().unwrap().as_ref().map(|pod| Arc::new(pod.clone())).map_err(|error| error())
    }

    fn has_misplaced_role(&self, _: &str) -> bool {
        *self.has_misplaced_role.lock().unwrap()
    }

    fn allow_list(&self, _: &str) -> Option<Option<Arc<str>>> {
        self.allow_list.lock().unwrap().clone()
    }
}

impl Clock for World {
    fn now(&self) -> jiff::Timestamp {
        *self.now.lock().unwrap()
    }
}

impl Notices for World {
    fn warn(&self, notice: Notice) {
        self.notices.lock().unwrap().push(notice);
    }
}

impl PassGrant for World {
    fn grant(&self, _: BorrowedFd<'_>) -> std::io::Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Issuer for World {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        self.issued.fetch_add(1, Ordering::Relaxed);
        let refusal = *self.refusal.lock().unwrap();
        if let Some(kind) = refusal {
            return Err(IssueError {
                kind,
                code: "SomeCode".into(),
                message: "a message of STS".into(),
                request_id: None,
                retry_after: None,
                source: None,
            });
        }
        let now = jiff::Timestamp::now();
        Ok(Credentials {
            access_key_id: format!("STS.{}", session.role).into(),
            access_key_secret: "fake-secret".into(),
            security_token: "fake-token".into(),
            issued_at: now,
            expires_at: now + jiff::SignedDuration::from_hours(1),
            request_id: None,
            document: Default::default(),
        })
    }
}

/// Reads one response of a known length off a kept connection.
pub(super) async fn read_response(stream: &mut TcpStream) -> Response<String> {
    try_read_response(stream).await.expect("a response")
}

/// As [`read_response`]; `None` when the server has closed the connection.
pub(super) async fn try_read_response(stream: &mut TcpStream) -> Option<Response<String>> {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.ok()?);
    }
    let head = response(str::from_utf8(&text).unwrap());
    let mut body = vec![0; head.headers()["content-length"].to_str().unwrap().parse().unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    Some(head.map(|_| String::from_utf8(body).unwrap()))
}

/// Polls until `condition` holds.
pub(super) async fn eventually(condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition().await {
        assert!(Instant::now() < deadline, "still not so after 5 s");
        sleep(Duration::from_millis(5)).await;
    }
}

/// What this thread logs, as text.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Captures until the guard is dropped.
    pub(super) fn capture(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || log.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    pub(super) fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
