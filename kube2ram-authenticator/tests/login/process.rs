//! The command itself, as a process with the flags of its manifests, and of the predecessor's: its signals
//! and its sockets.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    process::{Child, Command, ExitStatus},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use kube2ram_authenticator::token::{ClusterId, presign};
use kube2ram_cloud::BaseCredentials;
use kube2ram_sandbox::{
    clock::Clock,
    login::{Reviewer, is_complete, review},
    standin::{Accounts, Bind, Sts, StsMode},
};
use rustix::process::{Pid, Signal, kill_process};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};
use tokio_rustls::client::TlsStream;

use super::bench::{CLUSTER, eventually, exchange, keys, token};

/// The server, ended with the test.
struct Process {
    server: Server,
    webhook: SocketAddr,
    admin: SocketAddr,
    client: Arc<Reviewer>,
    accounts: Arc<Accounts>,
    sts: Sts,
    alice: BaseCredentials,
    directory: tempfile::TempDir,
    /// For as long as they are bound, nobody else gets these ports.
    _reserved: [TcpSocket; 2],
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_kube2ram-authenticator");

/// Starts a server on the files in `directory`. It answers probes in `directory/<probe>`, if that is given.
/// All other arguments are those of the predecessor's older example, except for the ports and STS.
fn server(directory: &Path, [webhook, admin]: [SocketAddr; 2], sts: &Sts, probe: Option<&str>) -> Server {
    let path = |name: &str| directory.join(name);
    let mut command = Command::new(PROGRAM);
    command
        .arg("server")
        .arg(format!("--config={}", path("config.yaml").display()))
        .arg(format!("--state-dir={}", path("state").display()))
        .arg(format!("--generate-kubeconfig={}", path("kubeconfig.yaml").display()))
        .arg(format!("--port={}", webhook.port()))
        .arg(format!("--metrics-port={}", admin.port()))
        .arg(format!("--sts-endpoint={}", sts.url()));
    if let Some(probe) = probe {
        fs::create_dir(path(probe)).unwrap();
        command.arg(format!("--probe-dir={}", path(probe).display()));
    }
    Server(command.spawn().unwrap())
}

/// A port that servers of this user may have and nobody else gets, while the socket is there: the command
/// takes numbers only.
fn reserve() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    socket
}

/// A server that serves. The user alice is in its configuration file.
async fn process() -> Process {
    let mapping = "mapUsers: [{userARN: 'acs:ram::1234567890123456:user/alice', username: alice}]";
    process_on(&format!("clusterID: {CLUSTER}\nserver: {{{mapping}}}\n"), Some("probe")).await
}

/// A server that serves with this configuration file.
async fn process_on(config: &str, probe: Option<&str>) -> Process {
    let accounts = Arc::new(Accounts::new(Clock::default()));
    let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts)).unwrap();
    let alice = keys(&accounts.add_user("alice"));
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("config.yaml"), config).unwrap();
    let reserved = [reserve(), reserve()];
    let [webhook, admin] = reserved.each_ref().map(|socket| socket.local_addr().unwrap());
    let server = server(directory.path(), [webhook, admin], &sts, probe);
    let ca = path("state/cert.pem");
    eventually(|| ca.exists()).await;
    let client = Arc::new(Reviewer::trusting(&ca, webhook).unwrap());
    let process =
        Process { server, webhook, admin, client, accounts, sts, alice, directory, _reserved: reserved };
    for _ in 0..1000 {
        if process.readiness().await == Some(200) {
            return process;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the server does not become ready");
}

impl Process {
    /// Whether the command `ready` says so of the server that answers probes there.
    fn is_ready(&self, probe: &str) -> bool {
        let directory = self.directory.path().join(probe);
        let ready = Command::new(PROGRAM).arg("ready").arg("--probe-dir").arg(directory).output().unwrap();
        ready.status.success()
    }

    /// The status of its readiness, if somebody answers.
    async fn readiness(&self) -> Option<u16> {
        let stream = TcpStream::connect(self.admin).await.ok()?;
        let request = "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        Some(exchange(stream, request.to_owned()).await.0)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server.0), signal).unwrap();
    }

    async fn ended(&mut self) -> ExitStatus {
        for _ in 0..1000 {
            if let Some(status) = self.server.0.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the process has not ended");
    }

    /// The addresses that its sockets listen on.
    fn listening(&self) -> BTreeSet<SocketAddr> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.server.0.id())).unwrap();
        let own: BTreeSet<String> = descriptors
            .filter_map(|entry| {
                fs::read_link(entry.unwrap().path()).ok()?.into_os_string().into_string().ok()
            })
            .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
            .collect();
        let tables = ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/net/{table}")).unwrap());
        let rows = tables.iter().flat_map(|table| table.lines().skip(1));
        let rows = rows.map(|row| row.split_whitespace().collect::<Vec<_>>());
        // The local address, the state and the inode.
        rows.filter(|row| row[3] == LISTEN && own.contains(row[9])).map(|row| address(row[1])).collect()
    }
}

/// An IPv4 address in host byte order and a port, in hex. Of IPv6, only the unspecified one is expected.
fn address(text: &str) -> SocketAddr {
    let (address, port) = text.split_once(':').unwrap();
    let port = u16::from_str_radix(port, 16).unwrap();
    match u32::from_str_radix(address, 16) {
        Ok(address) => (Ipv4Addr::from(address.to_ne_bytes()), port).into(),
        Err(_longer) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}

/// ack-ram-authenticator takes SIGTERM and goes on, so that its pods are killed after their grace period.
#[tokio::test]
async fn sigterm_lets_logins_end_that_have_begun_and_then_ends_the_process() {
    let mut process = process().await;
    process.sts.set_mode(StsMode::Slow(Duration::from_millis(1500))).unwrap();
    let stream = process.client.connect().await.unwrap();
    let login = tokio::spawn(exchange(stream, review(&token(&process.alice), "close")));
    // The request has arrived by now, and STS has not answered.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(process.sts.calls().is_empty() && !login.is_finished());

    process.signal(Signal::TERM);

    let mut readiness = process.readiness().await;
    while readiness == Some(200) {
        readiness = process.readiness().await;
    }
    assert_eq!(readiness, Some(503), "it is not ready, and still there");
    let (status, answer) = login.await.unwrap();
    assert_eq!(status, 200);
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(body["status"]["user"]["username"], "alice", "{answer}");
    assert!(process.ended().await.success());
    assert!(TcpStream::connect(process.webhook).await.is_err(), "nobody listens any longer");
}

/// Whether the server has closed a connection that nobody uses: the API server then opens another one.
async fn is_closed(stream: &mut TlsStream<TcpStream>) -> bool {
    tokio::time::timeout(Duration::ZERO, stream.read(&mut [0])).await.is_ok()
}

/// As the API server logs in: with a connection that it has kept, else with a new one.
async fn log_in(
    client: &Reviewer,
    kept: &mut Option<TlsStream<TcpStream>>,
    request: &str,
) -> io::Result<String> {
    let mut reused = None;
    if let Some(mut stream) = kept.take()
        && !is_closed(&mut stream).await
    {
        reused = Some(stream);
    }
    let mut stream = match reused {
        Some(stream) => stream,
        None => client.connect().await?,
    };
    stream.write_all(request.as_bytes()).await?;
    let mut read = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => read.extend_from_slice(&chunk[..length]),
        }
        let answer = str::from_utf8(&read).unwrap();
        if is_complete(answer) {
            if !answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n") {
                *kept = Some(stream);
            }
            return Ok(answer.to_owned());
        }
    }
}

/// What the API server repeats at once: a reset, and neither an end nor a connection that is refused.
fn is_repeated(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionReset
}

/// Whether a client keeps its connection, and how long it pauses: one for longer than a server that stops
/// waits for the next request of a connection.
const PACES: [(bool, Duration); 5] = [
    (false, Duration::ZERO),
    (true, Duration::ZERO),
    (false, Duration::ZERO),
    (true, Duration::ZERO),
    (true, Duration::from_millis(2500)),
];

/// A rolling update with a surge: the next server listens before the former one is ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_costs_no_login() {
    let mut process = process().await;
    let (request, stop) = (review(&token(&process.alice), "keep-alive"), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for (keeps, pause) in PACES {
        let (client, request, stop) = (Arc::clone(&process.client), request.clone(), Arc::clone(&stop));
        clients.spawn(async move {
            let (mut kept, mut logins, mut repeated) = (None, 0_usize, 0_usize);
            loop {
                // The last login begins after the former server has ended.
                let is_last = stop.load(Ordering::SeqCst);
                match log_in(&client, &mut kept, &request).await {
                    Ok(answer) => {
                        assert!(answer.contains(r#""authenticated":true"#), "{answer}");
                        logins += 1;
                        repeated = 0;
                    }
                    Err(error) => {
                        repeated += 1;
                        assert!(is_repeated(&error) && repeated < 5, "after {logins} logins: {error}");
                    }
                }
                if !keeps {
                    kept = None;
                }
                if is_last && repeated == 0 {
                    return (logins, pause);
                }
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
        });
    }
    assert!(process.is_ready("probe"));

    let addresses = [process.webhook, process.admin];
    let _next = server(process.directory.path(), addresses, &process.sts, Some("next-probe"));
    eventually(|| process.is_ready("next-probe")).await;
    assert!(process.is_ready("probe"), "both serve");
    process.signal(Signal::TERM);
    assert!(process.ended().await.success());

    assert!(!process.is_ready("probe") && process.is_ready("next-probe"));
    for _ in 0..100 {
        if process.readiness().await == Some(200) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(process.readiness().await, Some(200), "it has the admin port, too");
    stop.store(true, Ordering::SeqCst);
    while let Some(logins) = clients.join_next().await {
        let (logins, pause) = logins.unwrap();
        assert!(logins > if pause.is_zero() { 10 } else { 1 }, "{logins}");
    }
    assert_eq!(process.sts.calls().len(), 2, "one for each server");
}

/// The stand-in of STS has no user of the example's account. So its user logs in where the account is
/// replaced, and `check` shows that the file maps the user as it stands.
#[tokio::test]
async fn the_older_example_of_ack_ram_authenticator_starts_a_server_as_it_stands() {
    let cluster = ClusterId::parse("my-dev-cluster.example.com").unwrap();
    let replaced = EXAMPLE.replace(EXAMPLE_ACCOUNT, Accounts::UID);
    assert_ne!(replaced, EXAMPLE);
    let (nobody, alice) = (json!([false, null, null]), json!([true, "alice", ["system:masters"]]));

    for (config, account, expected) in
        [(EXAMPLE, EXAMPLE_ACCOUNT, nobody), (replaced.as_str(), Accounts::UID, alice)]
    {
        let mut process = process_on(config, None).await;
        let user = keys(&process.accounts.add_user("Alice"));
        let token = presign(&cluster, &user, Timestamp::now(), "a test").unwrap();
        let request = review(token.expose_secret(), "close");
        let (status, answer) = exchange(process.client.connect().await.unwrap(), request).await;
        let path = |name: &str| process.directory.path().join(name);
        let mut check = Command::new(PROGRAM);
        check.arg("check").arg(format!("acs:ram::{account}:user/Alice"));
        let checked = check.arg("--config").arg(path("config.yaml")).arg("--output=json").output().unwrap();
        let kubeconfig = fs::read_to_string(path("kubeconfig.yaml")).unwrap();
        process.signal(Signal::TERM);

        assert_eq!(status, 200, "{answer}");
        let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let (decided, user) = (&body["status"], &body["status"]["user"]);
        assert_eq!(json!([decided["authenticated"], user["username"], user["groups"]]), expected, "{answer}");
        let checked: Value = serde_json::from_slice(&checked.stdout).unwrap();
        assert_eq!(json!([checked["result"], checked["username"]]), json!(["user", "alice"]));
        let url = format!("https://localhost:{}/authenticate", process.webhook.port());
        assert!(kubeconfig.contains(&url), "{kubeconfig}");
        assert!(process.ended().await.success());
    }
}

#[tokio::test]
async fn a_list_of_mappings_that_cannot_be_read_is_named_by_readiness() {
    let sts = Sts::start(Bind::loopback(), Arc::new(Accounts::new(Clock::default()))).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("mappings.json"), r#"{"mapUsers": "of another form"}"#).unwrap();
    let backend =
        format!("backendMode: [DynamicFile], dynamicFilePath: '{}'", path("mappings.json").display());
    fs::write(path("config.yaml"), format!("clusterID: {CLUSTER}\nserver: {{{backend}}}\n")).unwrap();
    let reserved = [reserve(), reserve()];
    let [webhook, admin] = reserved.each_ref().map(|socket| socket.local_addr().unwrap());
    let _server = server(directory.path(), [webhook, admin], &sts, Some("probe"));

    // Somebody answers later than it starts.
    let mut answer = String::new();
    for _ in 0..1000 {
        if let Ok(stream) = TcpStream::connect(admin).await {
            let request = "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            answer = exchange(stream, request.to_owned()).await.1;
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    assert!(answer.starts_with("HTTP/1.1 503 "), "no mappings are there: {answer}");
    assert!(answer.contains("\nnote: DynamicFile: mapUsers cannot be read; "), "{answer}");
    assert!(!answer.contains("of another form"), "{answer}");
}

/// Of the alerts and the dashboard in `deploy/authenticator/monitoring`.
#[tokio::test]
async fn alerts_and_panels_ask_for_metrics_that_the_server_has() {
    let process = process().await;
    let stream = TcpStream::connect(process.admin).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let metrics = exchange(stream, request.to_owned()).await.1;
    let has = |name: &str| {
        metrics.lines().filter_map(|line| line.strip_prefix(name)).any(|rest| rest.starts_with([' ', '{']))
    };

    let mut asked = BTreeSet::new();
    for file in ["rules.yaml", "dashboard.json"] {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/authenticator/monitoring").join(file);
        let text = fs::read_to_string(path).unwrap();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        asked.extend(words.filter(|word| word.starts_with("kube2ram_authenticator_")).map(str::to_owned));
    }

    assert!(asked.len() > 12, "{asked:?}");
    // Named in a description; there while the server waits for something.
    asked.remove("kube2ram_authenticator_pending_conditions");
    for metric in asked {
        assert!(has(&metric), "{metric} in {metrics}");
    }
}

/// ack-ram-authenticator also listens on port 21363 of all addresses, in plain text.
#[tokio::test]
async fn it_listens_on_the_webhook_and_the_admin_address_and_nowhere_else() {
    let process = process().await;

    assert_eq!(process.listening(), BTreeSet::from([process.webhook, process.admin]));
}

/// The configuration in ack-ram-authenticator's older `example.yaml`, and the account in it.
const EXAMPLE: &str = include_str!("../../src/config/tests/predecessor-example.yaml");
const EXAMPLE_ACCOUNT: &str = "000000000000";
/// In `/proc/net/tcp`.
const LISTEN: &str = "0A";
