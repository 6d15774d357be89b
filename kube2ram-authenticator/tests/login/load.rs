//! Many logins at once, and a flood of garbage next to them. Figures are printed, for they depend on the
//! machine; asserted are counts, and who logged in. `cargo xtask bench authenticator` measures the program
//! instead.

#![expect(clippy::print_stdout, reason = "the figures are for who runs it")]

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use kube2ram_authenticator::verify::Rates;
use kube2ram_cloud::BaseCredentials;
use kube2ram_sandbox::{
    login::{Connection, Reviewer},
    standin::Accounts,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::bench::{Bench, ENGINEERS, bench, keys, token, token_at};

/// Somebody who is mapped: keys, and the username that they must become.
struct User {
    keys: BaseCredentials,
    username: String,
}

/// A token, and the username that it must become.
struct Login {
    token: String,
    username: String,
}

impl User {
    fn login_at(&self, at: Timestamp) -> Login {
        Login { token: token_at(&self.keys, at), username: self.username.clone() }
    }
}

/// Of five, three are mapped by name, one user by a pattern, and one session of a role by a pattern.
fn users(accounts: &Accounts) -> Vec<User> {
    let user = |n: u32| {
        let (key, username) = match n % 5 {
            0 => (accounts.add_user(&format!("contractor-{n}")), "contractor".to_owned()),
            1 => (
                accounts.add_session(&format!("team-{n}"), &format!("member-{n}")),
                format!("team:member-{n}"),
            ),
            _ => (accounts.add_user(&format!("engineer-{n}")), format!("engineer-{n}")),
        };
        User { keys: keys(&key), username }
    };
    (0..USERS).map(user).collect()
}

/// Times that logins took.
struct Times(Vec<Duration>);

impl Times {
    fn quantile(&self, of_100: usize) -> Duration {
        self.0[(self.0.len() - 1) * of_100 / 100]
    }

    fn print(&self, what: &str) {
        let (p50, p99, max) = (self.quantile(50), self.quantile(99), self.quantile(100));
        println!("{what}: {} logins, p50 {p50:?}, p99 {p99:?}, longest {max:?}", self.0.len());
    }
}

/// Logs in by `all` in turn, `rate` times a second, for `seconds`. Each must become its user. A login counts
/// from the time it was due, so that a late client does not hide a slow server.
async fn logins(client: &Arc<Reviewer>, all: &Arc<[Login]>, rate: u32, seconds: u32) -> Times {
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for number in 0..CONNECTIONS {
        let (client, all) = (Arc::clone(client), Arc::clone(all));
        clients.spawn(async move {
            let mut connection = Connection::open(client).await.unwrap();
            let mut times = Vec::new();
            for n in (number..rate * seconds).step_by(CONNECTIONS as usize) {
                let due = begun + Duration::from_secs(1) * n / rate;
                sleep_until(due).await;
                let Login { token, username } = &all[n as usize % all.len()];
                let (status, answer) = connection.review(token).await.unwrap();
                times.push(due.elapsed());
                let user = format!(r#""authenticated":true,"user":{{"username":"{username}","#);
                assert!(status == 200 && answer.contains(&user), "{username}: {status} {answer}");
            }
            times
        });
    }
    let mut times = clients.join_all().await.concat();
    times.sort_unstable();
    Times(times)
}

/// Sends tokens that are none, one after the other, until `stop`.
async fn flood(
    client: Arc<Reviewer>,
    victim: BaseCredentials,
    number: u32,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
) {
    let mut connection = Connection::open(client).await.unwrap();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        let token = match n % 4 {
            0 => format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", "e30".repeat(300)),
            1 => format!("k8s-ack-v2.{}", "bm9uc2Vuc2U".repeat(n % 1000)),
            2 => token(&BaseCredentials {
                access_key_id: format!("LTAI{number}.{n}").into(),
                ..victim.clone()
            }),
            _ => token(&BaseCredentials {
                access_key_secret: format!("{number}.{n}").into(),
                ..victim.clone()
            }),
        };
        let (status, answer) = connection.review(&token).await.unwrap();
        assert!(!answer.contains(r#""authenticated":true"#));
        // Denied, told to wait, or not decided.
        assert!([200, 429, 503].contains(&status), "{status} {answer}");
        sent.fetch_add(1, Ordering::Relaxed);
    }
}

/// The resident memory of this process: of the server, the clients and the stand-in together.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

async fn metric(bench: &Bench, name: &str) -> u64 {
    let metrics = bench.ask_admin("/metrics").await.1;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

/// Each of the users' tokens costs one call of STS, however often it is used. A flood of garbage next to them
/// costs what strangers may, and no user's login, not even one with a new token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_garbage_keeps_out_no_user_and_each_token_costs_one_call() {
    let bench = bench().await;
    let users = users(&bench.accounts);
    let now = Timestamp::now();
    let all: Arc<[Login]> = users.iter().map(|user| user.login_at(now)).collect();
    let begun = Instant::now();

    logins(&bench.client, &all, USERS, 1).await.print("first logins");
    assert_eq!(bench.sts.calls().len(), USERS as usize);
    logins(&bench.client, &all, RATE, SECONDS).await.print("remembered");
    assert_eq!(bench.sts.calls().len(), USERS as usize, "one call for a token");
    let memory_before = resident_kib();

    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let victim = keys(&bench.accounts.add_user("bob"));
    let mut floods = JoinSet::new();
    for number in 0..FLOODS {
        let (client, victim) = (Arc::clone(&bench.client), victim.clone());
        floods.spawn(flood(client, victim, number, Arc::clone(&stop), Arc::clone(&sent)));
    }
    // A date is in whole seconds: another one makes another token.
    let before = now - SignedDuration::from_secs(60);
    let new: Arc<[Login]> = users.iter().map(|user| user.login_at(before)).collect();
    let (remembered, new) =
        tokio::join!(logins(&bench.client, &all, RATE, SECONDS), logins(&bench.client, &new, 10, SECONDS));
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = floods.join_next().await {
        ended.unwrap();
    }
    let took = begun.elapsed();
    remembered.print("remembered, in a flood");
    new.print("new tokens, in a flood");
    let garbage = sent.load(Ordering::Relaxed);
    println!("flood: {garbage} tokens of garbage in {SECONDS} s");
    println!("memory: {memory_before} KiB before the flood, {} KiB after", resident_kib());

    // Of whom nobody has logged in with before, two seconds' worth at once.
    let strangers = u64::from(Rates::default().unknown) * (took.as_secs() + 3);
    let of_users = u64::from(USERS + 10 * SECONDS);
    let calls = bench.sts.calls().len() as u64;
    println!("STS: {calls} calls, of which {of_users} for users");
    assert!((of_users..=of_users + strangers).contains(&calls), "{calls} calls");
    assert!(garbage > strangers, "a flood is more than what is let through: {garbage}");
    let entries = metric(&bench, "kube2ram_authenticator_remembered_answers").await;
    assert!(entries <= calls, "{entries} answers are remembered of {calls}");
    bench.end().await;
}

const CONNECTIONS: u32 = 16;
const USERS: u32 = ENGINEERS;
/// Connections with garbage.
const FLOODS: u32 = 8;
/// Logins for each second.
const RATE: u32 = 500;
/// How long each phase takes. All of them must end before an identity is forgotten.
const SECONDS: u32 = 4;
