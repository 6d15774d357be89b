//! The command itself, as a process with the flags of its manifests: its signals and its sockets.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use kube2ram_cloud::BaseCredentials;
use kube2ram_sandbox::{
    clock::Clock,
    standin::{Accounts, Bind, Sts, StsMode},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::net::TcpStream;

use super::bench::{CLUSTER, Client, eventually, exchange, keys, review, token};

/// The server, ended with the test.
struct Process {
    child: Child,
    webhook: SocketAddr,
    admin: SocketAddr,
    client: Client,
    sts: Sts,
    alice: BaseCredentials,
    _directory: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A port that was free a moment ago: the command takes numbers only.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A server that serves. The user alice is in its configuration file.
async fn process() -> Process {
    let accounts = Arc::new(Accounts::new(Clock::default()));
    let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts)).unwrap();
    let alice = keys(&accounts.add_user("alice"));
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mapping = "mapUsers: [{userARN: 'acs:ram::1234567890123456:user/alice', username: alice}]";
    fs::write(path("config.yaml"), format!("clusterID: {CLUSTER}\nserver: {{{mapping}}}\n")).unwrap();
    let (port, metrics_port) = (free_port(), free_port());
    let child = Command::new(env!("CARGO_BIN_EXE_kube2ram-authenticator"))
        .arg("server")
        .arg(format!("--config={}", path("config.yaml").display()))
        .arg(format!("--state-dir={}", path("state").display()))
        .arg(format!("--generate-kubeconfig={}", path("kubeconfig.yaml").display()))
        .arg(format!("--port={port}"))
        .arg(format!("--metrics-port={metrics_port}"))
        .arg(format!("--sts-endpoint={}", sts.url()))
        .spawn()
        .unwrap();
    let [webhook, admin] = [port, metrics_port].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let ca = path("state/cert.pem");
    eventually(|| ca.exists()).await;
    let client = Client::trusting(&ca, webhook);
    let process = Process { child, webhook, admin, client, sts, alice, _directory: directory };
    for _ in 0..1000 {
        if process.readiness().await == Some(200) {
            return process;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the server does not become ready");
}

impl Process {
    /// The status of its readiness, if somebody answers.
    async fn readiness(&self) -> Option<u16> {
        let stream = TcpStream::connect(self.admin).await.ok()?;
        let request = "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        Some(exchange(stream, request.to_owned()).await.0)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    async fn ended(&mut self) -> ExitStatus {
        for _ in 0..1000 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the process has not ended");
    }

    /// The addresses that its sockets listen on.
    fn listening(&self) -> BTreeSet<SocketAddr> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
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
    let stream = process.client.connect().await;
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

/// ack-ram-authenticator also listens on port 21363 of all addresses, in plain text.
#[tokio::test]
async fn it_listens_on_the_webhook_and_the_admin_address_and_nowhere_else() {
    let process = process().await;

    assert_eq!(process.listening(), BTreeSet::from([process.webhook, process.admin]));
}

/// In `/proc/net/tcp`.
const LISTEN: &str = "0A";
