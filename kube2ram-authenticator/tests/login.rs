//! Logins over TLS against the STS stand-in, which checks every signature by its own code. The server is the
//! whole one but its mappings; the client's tokens are signed with keys of the stand-in's account.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use kube2ram_authenticator::{
    identity::{Identity, Map, Mapped, User},
    serve::{self, Listeners, Parts, ServeError, Settings},
    tls,
    token::{ClusterId, presign},
    verify::{self, MAX_TTL, Rates},
    webhook,
};
use kube2ram_cloud::{
    Base, BaseCredentials, Endpoint, StsClient,
    alibaba::sts::StsIssuer,
    credentials::Issuer as _,
    role::{Grant, RoleArn, RoleSession, SessionName},
};
use kube2ram_sandbox::{
    clock::Clock as SandboxClock,
    standin::{AccessKey, Accounts, Bind, Role, Sts, StsMode},
};
use kube2ram_service::{admin::Readiness, clock::SystemClock};
use prometheus_client::registry::Registry;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";

/// The user alice, and everybody with the role admin under the name of the session.
struct Mappings;

impl Map for Mappings {
    fn map(&self, identity: &Identity) -> Mapped {
        let resource = identity.canonical_arn.rsplit(':').next().unwrap_or_default();
        let username = match (resource, &identity.session_name) {
            ("user/alice", None) => "alice".to_owned(),
            ("role/admin", Some(session)) => format!("admin:{session}"),
            _ => return Mapped::Nobody,
        };
        Mapped::User(User { username: username.into(), groups: vec!["developers".into()] })
    }

    fn is_loaded(&self) -> bool {
        true
    }
}

struct Bench {
    accounts: Arc<Accounts>,
    sts: Sts,
    webhook: SocketAddr,
    admin: SocketAddr,
    tls: TlsConnector,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), ServeError>>,
    directory: tempfile::TempDir,
}

async fn bench() -> Bench {
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
        map: Arc::new(Mappings),
        clock: Arc::new(SystemClock),
        readiness: Readiness::default(),
        registry: Registry::with_prefix("kube2ram_authenticator"),
        background: JoinSet::new(),
        listeners,
    };
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(serve::run(settings, parts, shutdown.clone()));
    let ca = directory.path().join("state/cert.pem");
    eventually(|| ca.exists()).await;
    let tls = trusting(&ca);
    Bench { accounts, sts, webhook, admin, tls, shutdown, serving, directory }
}

fn free() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn trusting(ca: &Path) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(ca).unwrap()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

async fn eventually(holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not come");
}

fn keys(key: &AccessKey) -> BaseCredentials {
    BaseCredentials {
        access_key_id: key.id.as_str().into(),
        access_key_secret: key.secret.as_str().into(),
        security_token: key.security_token.as_deref().map(Into::into),
    }
}

fn token_at(keys: &BaseCredentials, at: Timestamp) -> String {
    let cluster = ClusterId::parse(CLUSTER).unwrap();
    presign(&cluster, keys, at, "a test").unwrap().expose_secret().to_owned()
}

fn token(keys: &BaseCredentials) -> String {
    token_at(keys, Timestamp::now())
}

/// The status and the whole text of an answer.
async fn exchange(mut stream: impl Stream, request: String) -> (u16, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A server may end a connection without TLS's own end.
    drop(stream.read_to_string(&mut answer).await);
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer: {answer:?}")), answer)
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Stream for S {}

impl Bench {
    async fn login(&self, token: &str) -> (u16, String) {
        let review = json!({
            "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "spec": { "token": token },
        })
        .to_string();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TcpStream::connect(self.webhook).await.unwrap();
        let stream = self.tls.connect(name, stream).await.unwrap();
        let length = review.len();
        exchange(
            stream,
            format!(
                "POST /authenticate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\nConnection: close\r\n\r\n{review}"
            ),
        )
        .await
    }

    /// The `status` of a review that was decided.
    async fn decided(&self, token: &str) -> Value {
        let (status, answer) = self.login(token).await;
        assert_eq!(status, 200, "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str::<Value>(body).unwrap()["status"].take()
    }

    async fn ask_admin(&self, path: &str) -> (u16, String) {
        let stream = TcpStream::connect(self.admin).await.unwrap();
        exchange(stream, format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }

    async fn end(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap().unwrap();
        assert!(TcpStream::connect(self.webhook).await.is_err(), "nobody listens any longer");
    }
}

#[tokio::test]
async fn a_user_and_a_session_of_a_role_become_whom_they_are_mapped_to() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let role = Accounts::role_arn("admin");
    bench.accounts.add_role(role.clone(), Role::default());
    let issuer = StsIssuer::new(
        StsClient::try_new(false).unwrap(),
        vec![Endpoint::parse(&bench.sts.url()).unwrap()],
        Base::of_keys(alice.clone()),
        Arc::new(SystemClock),
    );
    let session = RoleSession {
        role: RoleArn::parse(&role).unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("alice@laptop").unwrap(),
        duration: Duration::from_secs(3600),
        tags: Box::default(),
        source_identity: None,
    };
    let issued = issuer.issue(&session).await.unwrap();
    let admin = BaseCredentials {
        access_key_id: issued.access_key_id,
        access_key_secret: issued.access_key_secret,
        security_token: Some(issued.security_token),
    };

    let as_alice = bench.decided(&token(&alice)).await;
    let as_admin = bench.decided(&token(&admin)).await;

    assert_eq!(as_alice["user"]["username"], "alice", "{as_alice}");
    assert_eq!(as_admin["user"]["username"], "admin:alice@laptop", "{as_admin}");
    assert_eq!(as_admin["user"]["groups"], json!(["developers"]));
    assert_eq!(as_admin["user"]["extra"]["canonicalArn"], json!(["acs:ram::1234567890123456:role/admin"]));
    assert_eq!(bench.ask_admin("/readyz").await.0, 200);
    bench.end().await;
}

#[tokio::test]
async fn intruders_are_denied() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let bob = keys(&bench.accounts.add_user("bob"));
    let forged = BaseCredentials { access_key_secret: "guessed".into(), ..alice.clone() };
    let invented = BaseCredentials { access_key_id: "LTAI.nobody".into(), ..alice.clone() };
    let elsewhere = {
        let other = ClusterId::parse("another-cluster").unwrap();
        presign(&other, &alice, Timestamp::now(), "a test").unwrap().expose_secret().to_owned()
    };
    let old = Timestamp::now() - SignedDuration::from_mins(16);
    assert_eq!(bench.decided(&token(&alice)).await["authenticated"], true, "the allowed twin");

    for (who, token) in [
        ("a user who is not mapped", token(&bob)),
        ("a wrong secret", token(&forged)),
        ("an invented key", token(&invented)),
        ("a token of another cluster", elsewhere),
        ("a token after its window", token_at(&alice, old)),
        ("a token of another authenticator", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln".into()),
    ] {
        assert_eq!(bench.decided(&token).await, json!({ "authenticated": false }), "{who}");
    }
    bench.end().await;
}

#[tokio::test]
async fn an_outage_of_sts_is_503_and_ends_and_throttling_is_429() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let token = token(&alice);
    for (mode, status) in [(StsMode::Refuse, 503), (StsMode::Unavailable, 503), (StsMode::Throttle, 429)] {
        bench.sts.set_mode(mode).unwrap();
        let (answered, answer) = bench.login(&token).await;
        assert_eq!(answered, status, "{answer}");
        assert!(answer.to_ascii_lowercase().contains("\r\nretry-after: "), "{answer}");
    }

    bench.sts.set_mode(StsMode::Ok).unwrap();

    assert_eq!(bench.decided(&token).await["authenticated"], true);
    bench.end().await;
}

#[tokio::test]
async fn many_logins_with_one_token_cost_one_call() {
    let bench = Arc::new(bench().await);
    let alice = keys(&bench.accounts.add_user("alice"));
    let token: Arc<str> = token(&alice).into();

    let logins: Vec<_> = (0..40)
        .map(|_| {
            let (bench, token) = (Arc::clone(&bench), Arc::clone(&token));
            tokio::spawn(async move { bench.decided(&token).await })
        })
        .collect();
    for login in logins {
        assert_eq!(login.await.unwrap()["user"]["username"], "alice");
    }

    assert_eq!(bench.sts.calls().len(), 1);
    let metrics = bench.ask_admin("/metrics").await.1;
    assert!(metrics.contains("kube2ram_authenticator_logins_total{result=\"success\"} 40\n"), "{metrics}");
    for secret in [alice.access_key_secret.expose_secret(), &*token] {
        assert!(!metrics.contains(secret));
    }
    let Some(bench) = Arc::into_inner(bench) else { panic!("every login has ended") };
    bench.end().await;
}

#[tokio::test]
async fn a_restart_keeps_what_the_api_server_trusts() {
    let bench = bench().await;
    let state = bench.directory.path().join("state");
    let made = fs::read(state.join("cert.pem")).unwrap();
    let kubeconfig = fs::read_to_string(bench.directory.path().join("kubeconfig.yaml")).unwrap();
    let wanted = tls::Init {
        directory: state.clone(),
        kubeconfig: bench.directory.path().join("kubeconfig.yaml"),
        hostname: "localhost".into(),
        address: bench.webhook.ip(),
        port: bench.webhook.port(),
        client: None,
    };

    let again = tls::init(&wanted, Timestamp::now()).unwrap();

    assert!(!again.made_authority && !again.wrote_kubeconfig);
    assert_eq!(fs::read(state.join("cert.pem")).unwrap(), made);
    assert!(kubeconfig.contains(&format!("https://localhost:{}/authenticate", bench.webhook.port())));
    bench.end().await;
}
