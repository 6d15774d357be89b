//! The server with the STS stand-in and mappings in an index, and what asks it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use kube2ram_authenticator::{
    mapping::{Entry, Index, Mappings, Restrictions, State},
    serve::{self, Listeners, Parts, ServeError, Settings},
    tls,
    token::{ClusterId, presign},
    verify::{self, MAX_TTL, Rates},
    webhook,
};
use kube2ram_cloud::{BaseCredentials, Endpoint};
use kube2ram_sandbox::{
    clock::Clock as SandboxClock,
    login::{Reviewer, review},
    standin::{AccessKey, Accounts, Bind, Sts},
};
use kube2ram_service::{admin::Readiness, clock::SystemClock, named_tasks::NamedTasks};
use prometheus_client::registry::Registry;
use secrecy::ExposeSecret as _;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

pub(crate) const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";

/// The user alice and each engineer by name; contractors, and the sessions of the roles admin and team-*, by
/// a pattern or by their role. Many other mappings are there to be passed over, by name and by pattern.
fn mappings() -> Arc<Mappings> {
    let entry = |resource: String, username: String| Entry {
        label: resource.as_str().into(),
        arn: format!("acs:ram::{}:{resource}", Accounts::UID),
        username,
        groups: vec!["developers".to_owned()],
        ..Entry::default()
    };
    let mut entries = vec![
        entry("user/alice".into(), "alice".into()),
        entry("role/admin".into(), "admin:{{SessionNameRaw}}".into()),
        entry("user/contractor-*".into(), "contractor".into()),
        entry("role/team-*".into(), "team:{{SessionName}}".into()),
    ];
    entries.extend((0..ENGINEERS).map(|n| entry(format!("user/engineer-{n}"), format!("engineer-{n}"))));
    for n in 0..OTHERS {
        entries.push(entry(format!("user/other-{n}"), format!("other-{n}")));
        entries.push(entry(format!("role/other-{n}-*"), "other:{{SessionName}}".into()));
    }
    let (index, reports) = Index::new(&entries, &[], Arc::new(Restrictions::default()));
    let mapped = State::Mapped { warnings: Vec::new() };
    assert!(reports.iter().all(|report| report.state == mapped), "{reports:?}");
    let mappings = Mappings::new(1);
    mappings.replace(0, Arc::new(index));
    Arc::new(mappings)
}

/// How many users are mapped by the name engineer-<number>.
pub(crate) const ENGINEERS: u32 = 50;
/// How many mappings of users, and how many patterns for roles, are for nobody here.
const OTHERS: u32 = 200;

pub(crate) struct Bench {
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) sts: Sts,
    pub(crate) webhook: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) client: Arc<Reviewer>,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), ServeError>>,
    pub(crate) directory: tempfile::TempDir,
}

pub(crate) async fn bench() -> Bench {
    let accounts = Arc::new(Accounts::new(SandboxClock::default()));
    let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let listeners = Listeners::bind(free(), free()).await.unwrap();
    let (webhook, admin) = listeners.addresses().unwrap();
    let init = tls::Init {
        directory: directory.path().join("state"),
        kubeconfig: directory.path().join("kubeconfig.yaml"),
        hostname: "localhost".into(),
        address: webhook.ip(),
        port: webhook.port(),
        client: None,
    };
    let certificate = tls::Source::Own { directory: init.directory.clone(), names: init.names() };
    let settings = Settings {
        cluster: ClusterId::parse(CLUSTER).unwrap(),
        sts: vec![Endpoint::parse(&sts.url()).unwrap()],
        tls: tls::Settings { certificate, client_ca: None },
        init: Some(init),
        verify: verify::Settings { cache_ttl: MAX_TTL, rates: Rates::default() },
        webhook: webhook::Settings::default(),
        grace: Duration::from_secs(10),
    };
    let parts = Parts {
        map: mappings(),
        clock: Arc::new(SystemClock),
        readiness: Readiness::default(),
        registry: Registry::with_prefix("kube2ram_authenticator"),
        background: NamedTasks::default(),
        listeners,
        probe: None,
    };
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(serve::run(settings, parts, shutdown.clone()));
    let ca = directory.path().join("state/cert.pem");
    eventually(|| ca.exists() && std::net::TcpStream::connect(webhook).is_ok()).await;
    let client = Arc::new(Reviewer::trusting(&ca, webhook).unwrap());
    Bench { accounts, sts, webhook, admin, client, shutdown, serving, directory }
}

fn free() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

pub(crate) async fn eventually(holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not come");
}

pub(crate) fn keys(key: &AccessKey) -> BaseCredentials {
    BaseCredentials {
        access_key_id: key.id.as_str().into(),
        access_key_secret: key.secret.as_str().into(),
        security_token: key.security_token.as_deref().map(Into::into),
    }
}

pub(crate) fn token_at(keys: &BaseCredentials, at: Timestamp) -> String {
    let cluster = ClusterId::parse(CLUSTER).unwrap();
    presign(&cluster, keys, at, "a test").unwrap().expose_secret().to_owned()
}

pub(crate) fn token(keys: &BaseCredentials) -> String {
    token_at(keys, Timestamp::now())
}

/// The status and the whole text of an answer.
pub(crate) async fn exchange(mut stream: impl Stream, request: String) -> (u16, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A server may end a connection without TLS's own end.
    drop(stream.read_to_string(&mut answer).await);
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer: {answer:?}")), answer)
}

pub(crate) trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Stream for S {}

impl Bench {
    pub(crate) async fn login(&self, token: &str) -> (u16, String) {
        exchange(self.client.connect().await.unwrap(), review(token, "close")).await
    }

    /// The `status` of a review that was decided.
    pub(crate) async fn decided(&self, token: &str) -> Value {
        let (status, answer) = self.login(token).await;
        assert_eq!(status, 200, "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<Value>(body).unwrap()["status"].take()
    }

    pub(crate) async fn ask_admin(&self, path: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.admin).await.unwrap();
        exchange(stream, format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }

    pub(crate) async fn end(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap().unwrap();
        assert!(TcpStream::connect(self.webhook).await.is_err(), "nobody listens any longer");
    }
}
