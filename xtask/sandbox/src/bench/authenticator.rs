//! Logins at the authenticator, alone and next to a flood of garbage. The program is the released one, and
//! the stand-in of STS is on the same machine. Depends on `login`. Called by `bench`.

use std::{
    env,
    fs::{self, DirBuilder, File},
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    runtime::Builder,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use uuid::Uuid;

use super::{
    process::Process,
    table::{Target, number},
};
use crate::{
    client::Request,
    clock::Clock,
    login::{Connection, Reviewer, Server, free_ports, token_of, user_arn, wait_for},
    standin::{AccessKey, Accounts, Bind, Sts},
};

/// Those that the API server keeps.
const CONNECTIONS: u32 = 16;
/// Further ones, with garbage.
const FLOODS: u32 = 8;
const USERS: u32 = 50;
/// Logins for each second.
const RATE: u32 = 500;
/// How long each part takes. All parts must end before an identity is forgotten, which is after a minute.
const SECONDS: u32 = 20;
/// Mappings of users, and patterns for roles, that are for nobody here.
const OTHERS: u32 = 200;
const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";

/// Prints latencies, memory and calls of STS.
pub(super) fn measure(authenticator: &Path, out: &mut dyn Write) -> Result<()> {
    let bench = Bench::start(authenticator)?;
    let all = bench.logins();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let logins = |rate, seconds| runtime.block_on(logins(&bench.reviewer, &all, rate, seconds));
    let what = format!("{RATE} logins/s of {USERS} users");

    // What is measured is remembered.
    logins(USERS, 1)?;
    logins(RATE, SECONDS)?.print(out, &what, Target::AtMost(10.0))?;
    let calls = bench.sts.calls().len();
    number(out, "  asked of STS", calls as f64, "calls", Target::AtMost(f64::from(USERS)))?;
    number(out, "  resident memory", bench.process().resident_mib()?, "MiB", Target::None)?;

    let flood = Flood::start(&bench)?;
    let during = logins(RATE, SECONDS);
    let garbage = flood.stop()?;
    during?.print(out, &format!("{what}, in a flood"), Target::AtMost(50.0))?;
    number(out, "  garbage", garbage, "/s", Target::None)?;
    let more = bench.sts.calls().len() - calls;
    number(out, "  asked of STS, all for garbage", more as f64, "calls", Target::None)?;
    number(out, "  resident memory", bench.process().resident_mib()?, "MiB", Target::None)
}

/// The program and what it needs.
struct Bench {
    /// Killed before its directory is removed.
    server: Server,
    _directory: Directory,
    accounts: Arc<Accounts>,
    sts: Sts,
    reviewer: Arc<Reviewer>,
}

/// A token, and the username that it must become.
struct Login {
    token: String,
    username: String,
}

impl Bench {
    fn start(authenticator: &Path) -> Result<Self> {
        let accounts = Arc::new(Accounts::new(Clock::default()));
        let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts))?;
        let directory = Directory::create()?;
        let at = |name: &str| directory.0.join(name);
        let [port, metrics_port] = free_ports()?;
        fs::write(at("config.yaml"), config(&directory.0, port).to_string())?;
        let log = File::create(at("server.log"))?;
        let mut server = Command::new(authenticator);
        server.arg("server").arg("--config").arg(at("config.yaml"));
        server.arg("--probe-dir").arg(&directory.0);
        server.args(["--sts-endpoint", &sts.url(), "--metrics-port", &metrics_port.to_string()]);
        server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let server = Server(server.spawn().context("cannot start the authenticator")?);
        let readiness = Request::get(format!("http://127.0.0.1:{metrics_port}/readyz"));
        wait_for(|| readiness.send().is_ok_and(|reply| reply.status == 200)).with_context(|| {
            let log = fs::read_to_string(at("server.log")).unwrap_or_default();
            format!("the authenticator is not ready: {log}")
        })?;
        let webhook = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let reviewer = Arc::new(Reviewer::trusting(&at("state/cert.pem"), webhook)?);
        Ok(Self { server, _directory: directory, accounts, sts, reviewer })
    }

    /// Of five users, three are mapped by name, one by a pattern, and one is a session of a role that is
    /// mapped by a pattern.
    fn logins(&self) -> Arc<[Login]> {
        let login = |n: u32| {
            let (key, username) = match n % 5 {
                0 => (self.accounts.add_user(&format!("contractor-{n}")), "contractor".to_owned()),
                1 => {
                    let (role, session) = (format!("team-{n}"), format!("member-{n}"));
                    (self.accounts.add_session(&role, &session), format!("team:{session}"))
                }
                _ => (self.accounts.add_user(&format!("engineer-{n}")), format!("engineer-{n}")),
            };
            Login { token: token_of(CLUSTER, &key, Timestamp::now()), username }
        };
        (0..USERS).map(login).collect()
    }

    fn process(&self) -> Process {
        Process(self.server.0.id())
    }
}

fn config(directory: &Path, port: u16) -> Value {
    let mapping = |key: &str, arn: String, username: &str| {
        let groups = ["developers"];
        json!({ key: arn, "username": username, "groups": groups })
    };
    let user = |name: &str, username: &str| mapping("userARN", user_arn(name), username);
    let role = |name: &str, username: &str| mapping("roleARN", Accounts::role_arn(name), username);
    let mut users = vec![user("contractor-*", "contractor")];
    let mut roles = vec![role("team-*", "team:{{SessionName}}")];
    let names = (0..USERS).map(|n| format!("engineer-{n}"));
    users.extend(names.chain((0..OTHERS).map(|n| format!("other-{n}"))).map(|name| user(&name, &name)));
    roles.extend((0..OTHERS).map(|n| role(&format!("other-{n}-*"), "other:{{SessionName}}")));
    json!({
        "clusterID": CLUSTER,
        "server": {
            "port": port, "stateDir": directory.join("state"),
            "generateKubeconfig": directory.join("webhook.yaml"), "backendMode": ["MountedFile"],
            "mapUsers": users, "mapRoles": roles,
        },
    })
}

/// Times that logins took, the shortest first.
struct Times(Vec<Duration>);

impl Times {
    fn print(&self, out: &mut dyn Write, what: &str, target: Target) -> Result<()> {
        let at = |of_100: usize| self.0[(self.0.len() - 1) * of_100 / 100].as_secs_f64() * 1e3;
        number(out, &format!("{what}: p50"), at(50), "ms", Target::None)?;
        number(out, &format!("{what}: p99"), at(99), "ms", target)?;
        number(out, &format!("{what}: longest"), at(100), "ms", Target::None)
    }
}

/// Logs in by `all` in turn, `rate` times a second, for `seconds`. Each must become its user. A login counts
/// from the time it was due, so that a late client does not hide a slow server.
async fn logins(reviewer: &Arc<Reviewer>, all: &Arc<[Login]>, rate: u32, seconds: u32) -> Result<Times> {
    let mut connections = Vec::new();
    for number in 0..CONNECTIONS {
        connections.push((number, Connection::open(Arc::clone(reviewer)).await?));
    }
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for (number, mut connection) in connections {
        let all = Arc::clone(all);
        clients.spawn(async move {
            let mut times = Vec::new();
            for n in (number..rate * seconds).step_by(CONNECTIONS as usize) {
                let due = begun + Duration::from_secs(1) * n / rate;
                sleep_until(due).await;
                let Login { token, username } = &all[n as usize % all.len()];
                let (status, answer) = connection.review(token).await?;
                times.push(due.elapsed());
                let user = format!(r#""authenticated":true,"user":{{"username":"{username}","#);
                ensure!(status == 200 && answer.contains(&user), "{username}: {status} {answer}");
            }
            anyhow::Ok(times)
        });
    }
    let mut times = Vec::new();
    while let Some(client) = clients.join_next().await {
        times.extend(client??);
    }
    times.sort_unstable();
    Ok(Times(times))
}

/// Tokens that are none. They have a thread of their own, so that who logs in does not wait for them.
struct Flood {
    begun: Instant,
    stop: Arc<AtomicBool>,
    sending: thread::JoinHandle<Result<usize>>,
}

impl Flood {
    fn start(bench: &Bench) -> Result<Self> {
        let (begun, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let (reviewer, until) = (Arc::clone(&bench.reviewer), Arc::clone(&stop));
        // A user who is mapped to nobody.
        let bob = bench.accounts.add_user("bob");
        let sending = thread::Builder::new().name("flood".into()).spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(flood(reviewer, bob, until))
        })?;
        Ok(Self { begun, stop, sending })
    }

    /// How much it sent, for each second.
    fn stop(self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let Ok(sent) = self.sending.join() else { bail!("the flood has panicked") };
        Ok(sent? as f64 / self.begun.elapsed().as_secs_f64())
    }
}

async fn flood(reviewer: Arc<Reviewer>, bob: AccessKey, stop: Arc<AtomicBool>) -> Result<usize> {
    let mut clients = JoinSet::new();
    for number in 0..FLOODS {
        let mut connection = Connection::open(Arc::clone(&reviewer)).await?;
        let (bob, stop) = (bob.clone(), Arc::clone(&stop));
        clients.spawn(async move {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                sent += 1;
                let (status, answer) = connection.review(&garbage(&bob, number, sent)).await?;
                // Denied, told to wait, or not decided.
                let is_kept_out = [200, 429, 503].contains(&status) && !answer.contains("\"user\":{");
                ensure!(is_kept_out, "garbage was answered {status} {answer}");
            }
            anyhow::Ok(sent)
        });
    }
    let mut sent = 0;
    while let Some(client) = clients.join_next().await {
        sent += client??;
    }
    Ok(sent)
}

/// One after the other: a token of another authenticator, nonsense, one of an invented key, and one that was
/// signed with a wrong secret.
fn garbage(bob: &AccessKey, number: u32, n: usize) -> String {
    let signed = |key: AccessKey| token_of(CLUSTER, &key, Timestamp::now());
    match n % 4 {
        0 => format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", "e30".repeat(300)),
        1 => format!("k8s-ack-v2.{}", "bm9uc2Vuc2U".repeat(n % 1000)),
        2 => signed(AccessKey { id: format!("LTAI{number}.{n}"), ..bob.clone() }),
        _ => signed(AccessKey { secret: format!("{number}.{n}"), ..bob.clone() }),
    }
}

/// Removed with what is in it.
struct Directory(PathBuf);

impl Directory {
    fn create() -> Result<Self> {
        let path = env::temp_dir().join(format!("kube2ram-bench-{}", Uuid::new_v4().simple()));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The system empties its temporary directory, if this does not.
        drop(fs::remove_dir_all(&self.0));
    }
}
