//! The cache as its callers see it, on paused time.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    audit::{Event, Trail},
    identity::PodUid,
};
use kube2ram_cloud::{
    credentials::{Credentials, Issuer},
    role::{
        ExternalId, Grant, RoleArn, RoleSession, ServiceAccount, SessionName, SessionPolicy, SourceIdentity,
        Tag, TagValue,
    },
};
use kube2ram_service::clock::Clock;

mod day;
mod fleet;
mod node_start;
mod quota;

const LIFE: Duration = Duration::from_hours(1);

/// Goes with tokio's clock, but can be set.
struct ManualClock {
    start: Instant,
    jump_seconds: AtomicI64,
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        let epoch: Timestamp = "2026-11-21T21:30:00Z".parse().unwrap();
        epoch + self.start.elapsed() + SignedDuration::from_secs(self.jump_seconds.load(Ordering::SeqCst))
    }
}

struct ScriptedIssuer {
    clock: Arc<ManualClock>,
    calls: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
    delay: Mutex<Duration>,
    /// What the next calls give; credentials when empty.
    failures: Mutex<VecDeque<(IssueErrorKind, Option<Duration>)>>,
}

impl ScriptedIssuer {
    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn fail(&self, kind: IssueErrorKind, times: usize) {
        self.failures.lock().unwrap().extend(std::iter::repeat_n((kind, None), times));
    }
}

#[async_trait]
impl Issuer for ScriptedIssuer {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(running, Ordering::SeqCst);
        let delay = *self.delay.lock().unwrap();
        sleep(delay).await;
        self.running.fetch_sub(1, Ordering::SeqCst);

        let failure = self.failures.lock().unwrap().pop_front();
        if let Some((kind, retry_after)) = failure {
            let (code, message) = ("Code".into(), "message".into());
            return Err(IssueError { kind, code, message, request_id: None, retry_after, source: None });
        }
        Ok(Credentials {
            access_key_id: format!("STS.{number}").into(),
            access_key_secret: "hush".into(),
            security_token: "hush".into(),
            issued_at: self.clock.now(),
            expires_at: self.clock.now() + session.duration,
            request_id: None,
            document: Default::default(),
        })
    }
}

struct Bench {
    cache: Cache,
    issuer: Arc<ScriptedIssuer>,
    clock: Arc<ManualClock>,
    registry: Registry,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    trail: Arc<Trail>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        let clock = Arc::new(ManualClock { start: Instant::now(), jump_seconds: AtomicI64::new(0) });
        let issuer = Arc::new(ScriptedIssuer {
            clock: Arc::clone(&clock),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
            delay: Mutex::new(Duration::from_millis(50)),
            failures: Mutex::default(),
        });
        let mut registry = Registry::default();
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let trail = Trail::for_tests();
        let cache = Cache::new(
            Arc::clone(&issuer) as Arc<dyn Issuer>,
            Arc::clone(&clock) as Arc<dyn Clock>,
            tasks.clone(),
            shutdown.clone(),
            limits,
            Metrics::new(&mut registry),
            Arc::clone(&trail),
        );
        Self { cache, issuer, clock, registry, tasks, shutdown, trail }
    }

    async fn ask(&self, session: &RoleSession) -> Result<Arc<Credentials>, CredentialError> {
        self.cache.of_session(session.clone(), &pod(1)).await
    }

    /// Pod 1 has a claim to these, and asks by itself.
    fn claim(&self, sessions: &[&str]) {
        self.claim_all(sessions.iter().map(|role| (session(role), pod(1), false)), Duration::ZERO);
    }

    fn claim_all(&self, claims: impl IntoIterator<Item = (RoleSession, PodUid, bool)>, spread: Duration) {
        let claims = claims.into_iter().map(|(session, pod, prefetch)| (session.into(), (pod, prefetch)));
        self.cache.set_claimed(claims.collect(), spread);
    }

    async fn id(&self, session: &RoleSession) -> Box<str> {
        self.ask(session).await.unwrap().access_key_id.clone()
    }

    async fn error(&self, session: &RoleSession) -> CredentialError {
        self.ask(session).await.unwrap_err()
    }

    /// Asks every second until there is no answer any longer, and returns how long there was one: at most two
    /// lifetimes.
    async fn answered_for(&self, session: &RoleSession) -> Duration {
        let start = Instant::now();
        while start.elapsed() < LIFE * 2 && self.ask(session).await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
        start.elapsed()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text
    }
}

/// As fast as one likes.
fn unlimited() -> Limits {
    let rate = Rate { burst: 10_000, interval: Duration::from_millis(1) };
    Limits { node: rate, reserve: 0, pace: rate, pod: rate, ..Limits::default() }
}

fn bench() -> Bench {
    Bench::new(unlimited())
}

fn pod(n: u32) -> PodUid {
    PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
}

fn session(role: &str) -> RoleSession {
    RoleSession {
        role: RoleArn::parse(&format!("acs:ram::1234567890123456:role/{role}")).unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("default.web").unwrap(),
        duration: LIFE,
        tags: [].into(),
        source_identity: None,
    }
}

fn minutes(minutes: u64) -> Duration {
    Duration::from_mins(minutes)
}

#[tokio::test(start_paused = true)]
async fn many_concurrent_callers_cost_one_issue() {
    let bench = bench();
    let mut callers = JoinSet::new();
    for _ in 0..200 {
        let cache = bench.cache.clone();
        callers.spawn(
            async move { cache.of_session(session("a"), &pod(1)).await.unwrap().access_key_id.clone() },
        );
    }

    let ids = callers.join_all().await;

    assert!(ids.len() == 200 && ids.iter().all(|id| &**id == "STS.1"));
    assert_eq!(bench.issuer.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn each_issue_is_recorded_and_each_pod_once_that_is_given_it() {
    let bench = bench();
    let of = |access_key_id: &str| {
        let records = bench.trail.remembered(access_key_id);
        records.into_iter().map(|record| (record.event, record.pod.uid)).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + Duration::from_secs(1);
    bench.cache.of_session_by(&Arc::new(session("a")), &pod(1), deadline).await.unwrap();
    assert_eq!(of("STS.1"), [(Event::Issued, pod(1))], "fetched ahead, and given to nobody");

    for n in [2, 1, 2, 1, 1] {
        bench.cache.of_session(session("a"), &pod(n)).await.unwrap();
    }
    bench.claim(&["a"]);
    sleep(minutes(29)).await;
    bench.cache.of_session(session("a"), &pod(2)).await.unwrap();
    bench.issuer.fail(IssueErrorKind::Denied, 1);
    bench.cache.of_session(session("b"), &pod(3)).await.unwrap_err();

    assert_eq!(
        of("STS.1"),
        [(Event::Issued, pod(1)), (Event::Delivered, pod(2)), (Event::Delivered, pod(1))]
    );
    assert_eq!(of("STS.2"), [(Event::Issued, pod(1)), (Event::Delivered, pod(2))]);
    assert_eq!(of("STS.3"), [], "what is denied is no session");
}

/// The wait for better credentials ends with those that are held.
#[tokio::test(start_paused = true)]
async fn credentials_that_are_given_while_sts_is_slow_are_recorded_as_what_they_are() {
    let bench = bench();
    let holders = |access_key_id: &str| {
        let records = bench.trail.remembered(access_key_id);
        records.into_iter().map(|record| record.pod.uid).collect::<Vec<_>>()
    };
    bench.ask(&session("a")).await.unwrap();
    *bench.issuer.delay.lock().unwrap() = Duration::from_secs(9);
    bench.clock.jump_seconds.store(35 * 60, Ordering::SeqCst);

    let held = bench.cache.of_session(session("a"), &pod(2)).await.unwrap();
    sleep(Duration::from_secs(9)).await;
    let fresh = bench.cache.of_session(session("a"), &pod(2)).await.unwrap();

    assert_eq!((&*held.access_key_id, &*fresh.access_key_id), ("STS.1", "STS.2"));
    assert_eq!(holders("STS.1"), [pod(1), pod(1), pod(2)]);
    assert_eq!(holders("STS.2"), [pod(1), pod(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_hit_neither_waits_nor_issues() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    let before = Instant::now();

    for _ in 0..100 {
        bench.ask(&session("a")).await.unwrap();
    }

    assert_eq!((bench.issuer.calls(), before.elapsed()), (1, Duration::ZERO));
    assert!(bench.metrics().contains(r#"credential_cache_requests_total{cache="hit"} 100"#));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_disconnects_does_not_cancel_the_fetch() {
    let bench = bench();
    let gone = timeout(Duration::from_millis(10), bench.ask(&session("a"))).await;
    assert!(gone.is_err());

    let id = bench.id(&session("a")).await;

    assert_eq!((&*id, bench.issuer.calls()), ("STS.1", 1));
}

#[tokio::test(start_paused = true)]
async fn answers_in_time_while_a_slow_fetch_goes_on() {
    let bench = bench();
    *bench.issuer.delay.lock().unwrap() = Duration::from_secs(2);
    let before = Instant::now();

    let error = bench.error(&session("a")).await;
    let took = before.elapsed();
    sleep(Duration::from_secs(2)).await;

    assert_eq!((error.kind(), error.is_transient()), (ErrorKind::NotReady, true));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(1)));
    assert!(took <= Duration::from_millis(801), "{took:?}");
    assert_eq!((&*bench.id(&session("a")).await, bench.issuer.calls()), ("STS.1", 1));
}

#[tokio::test(start_paused = true)]
async fn gives_up_on_an_issuer_that_hangs() {
    let bench = bench();
    *bench.issuer.delay.lock().unwrap() = minutes(10);
    bench.error(&session("a")).await;

    // Within the first back-off.
    sleep(ISSUE_DEADLINE - Duration::from_millis(700)).await;

    let kind = bench.error(&session("a")).await.kind();
    assert_eq!(kind, ErrorKind::Issue(IssueErrorKind::Unavailable));
}

#[tokio::test(start_paused = true)]
async fn refreshes_at_about_half_life_what_is_in_use() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.claim(&["a"]);

    sleep(minutes(23)).await;
    let before = bench.id(&session("a")).await;
    sleep(minutes(6)).await;
    let calls = bench.issuer.calls();
    let after = bench.id(&session("a")).await;

    assert_eq!((&*before, calls, &*after), ("STS.1", 2, "STS.2"));
}

#[tokio::test(start_paused = true)]
async fn refreshes_are_spread() {
    let bench = Bench::new(Limits { concurrent_issues: 100, ..unlimited() });
    for number in 0..40 {
        bench.ask(&session(&format!("r{number}"))).await.unwrap();
    }
    let claims = (0..40).map(|number| (session(&format!("r{number}")), pod(1), false));
    bench.claim_all(claims, Duration::ZERO);
    let mut calls_by_minute = Vec::new();

    for _ in 0..30 {
        sleep(minutes(1)).await;
        calls_by_minute.push(bench.issuer.calls());
    }

    assert_eq!((calls_by_minute[22], calls_by_minute[29]), (40, 80));
    calls_by_minute.dedup();
    assert!(calls_by_minute.len() > 3, "{calls_by_minute:?}");
}

#[tokio::test(start_paused = true)]
async fn what_no_pod_has_a_claim_to_is_not_refreshed() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    sleep(minutes(29)).await;

    assert_eq!((bench.issuer.calls(), bench.tasks.len()), (1, 0));
    assert!(bench.metrics().contains("credential_cache_entries 0"));
}

#[tokio::test(start_paused = true)]
async fn what_a_pod_has_a_claim_to_is_refreshed_though_nobody_asks() {
    let bench = bench();
    bench.claim_all([(session("a"), pod(1), true)], Duration::ZERO);

    sleep(minutes(24 * 60)).await;

    // Each is used for 24 to 28.5 minutes.
    assert!((51..=61).contains(&bench.issuer.calls()), "{}", bench.issuer.calls());
}

#[tokio::test(start_paused = true)]
async fn credentials_outlive_the_last_pod_that_has_a_claim_to_them_for_a_while() {
    let bench = bench();
    // Twelve hours' would be refreshed only after five.
    let session = RoleSession { duration: LIFE * 12, ..session("a") };
    let claim = |n| (session.clone(), pod(n), true);
    bench.claim_all([claim(1)], Duration::ZERO);
    sleep(Duration::from_secs(1)).await;
    let held = Arc::downgrade(&bench.ask(&session).await.unwrap());

    bench.claim_all([claim(2)], Duration::ZERO);
    sleep(minutes(31)).await;
    assert!(held.upgrade().is_some(), "another pod has one");
    bench.claim_all([], Duration::ZERO);
    sleep(minutes(29)).await;
    assert!(held.upgrade().is_some(), "the next pod is given these");
    sleep(minutes(2)).await;

    assert!(held.upgrade().is_none(), "freed, and with that zeroised");
    assert_eq!((bench.issuer.calls(), bench.tasks.len()), (1, 0));
    assert!(bench.metrics().contains("credential_cache_dropped_total 1"));
}

#[tokio::test(start_paused = true)]
async fn jobs_of_one_role_one_after_another_cost_no_call_each() {
    let bench = bench();

    for n in 0..20 {
        bench.claim_all([(session("a"), pod(n), true)], Duration::ZERO);
        assert!(bench.cache.of_session(session("a"), &pod(n)).await.is_ok());
        sleep(Duration::from_secs(30)).await;
        bench.claim_all([], Duration::ZERO);
        sleep(Duration::from_secs(12)).await;
        bench.claim_all([], Duration::ZERO);
    }

    assert_eq!(bench.issuer.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_failed_or_nears_its_refresh_does_not_outlive_its_pod() {
    let bench = bench();
    bench.claim(&["failing", "old"]);
    bench.ask(&session("old")).await.unwrap();
    bench.issuer.fail(IssueErrorKind::Unavailable, 1000);
    bench.error(&session("failing")).await;
    sleep(minutes(40)).await;

    bench.claim_all([], Duration::ZERO);

    sleep(Duration::from_secs(1)).await;
    assert!(bench.metrics().contains("credential_cache_entries 0"), "{}", bench.metrics());
}

#[tokio::test(start_paused = true)]
async fn a_bounded_number_of_sessions_outlives_its_pods() {
    let bench = Bench::new(Limits { node: Rate { burst: 1000, ..unlimited().node }, ..unlimited() });
    bench.claim_all((0..200).map(|n| (session(&format!("r{n}")), pod(n), true)), Duration::ZERO);
    sleep(minutes(1)).await;

    bench.claim_all([], Duration::ZERO);

    sleep(Duration::from_secs(1)).await;
    assert!(bench.metrics().contains("credential_cache_entries 128"), "{}", bench.metrics());
}

#[tokio::test(start_paused = true)]
async fn what_a_pod_has_just_asked_for_waits_a_while_for_its_claim() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    // Looked up before the pod was known.
    bench.claim_all([], Duration::ZERO);
    assert_eq!(&*bench.id(&session("a")).await, "STS.1");
    sleep(Duration::from_secs(11)).await;
    bench.claim_all([], Duration::ZERO);

    assert!(bench.metrics().contains("credential_cache_entries 0"));
}

#[tokio::test(start_paused = true)]
async fn prefetches_are_spread_and_a_pod_that_asks_does_not_wait_for_its_own() {
    let bench = Bench::new(Limits { jitter: || 0.5, ..unlimited() });
    let claims = (0..50).map(|n| (session(&format!("r{n}")), pod(n), true));
    bench.claim_all(claims, minutes(20));

    let before = Instant::now();
    let answer = bench.ask(&session("r7")).await;
    let (took, calls) = (before.elapsed(), bench.issuer.calls());
    sleep(minutes(9)).await;
    let early = bench.issuer.calls();
    sleep(minutes(2)).await;

    assert!(answer.is_ok() && took < Duration::from_millis(100), "{took:?}");
    assert_eq!((calls, early, bench.issuer.calls()), (1, 1, 50));
    assert!(bench.metrics().contains("credential_prefetches_total 50"));
}

#[tokio::test(start_paused = true)]
async fn a_request_overtakes_queued_prefetches_on_a_cold_start() {
    let bench =
        Bench::new(Limits { node: Rate { burst: 1, interval: Duration::from_secs(1) }, ..unlimited() });
    bench.claim_all((0..100).map(|n| (session(&format!("r{n}")), pod(n), true)), Duration::ZERO);
    sleep(Duration::from_millis(100)).await;

    // One queued session, and one that is new. At one per second they take longer than a pod waits.
    for (role, n) in [("r99", 99), ("new", 200)] {
        drop(bench.cache.of_session(session(role), &pod(n)).await);
    }
    sleep(Duration::from_secs(1)).await;

    assert!(bench.cache.of_session(session("r99"), &pod(99)).await.is_ok());
    assert!(bench.cache.of_session(session("new"), &pod(200)).await.is_ok());
    assert!(bench.issuer.calls() <= 4, "{}", bench.issuer.calls());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_changes_its_role_in_a_loop_starves_nobody_and_spares_sts() {
    let bench = Bench::new(Limits::default());
    let cache = bench.cache.clone();
    let hostile = tokio::spawn(async move {
        for n in 0..1200_u32 {
            let role = session(&format!("hostile{n}"));
            cache.set_claimed([(role.clone().into(), (pod(1), true))].into(), Duration::ZERO);
            let _late = timeout(Duration::from_millis(250), cache.of_session(role, &pod(1))).await;
            sleep(Duration::from_millis(250)).await;
        }
    });
    let mut slowest = Duration::ZERO;

    for n in 0..20 {
        sleep(Duration::from_secs(10)).await;
        let before = Instant::now();
        bench.cache.of_session(session(&format!("victim{n}")), &pod(100 + n)).await.unwrap();
        slowest = slowest.max(before.elapsed());
    }
    let calls = bench.issuer.calls();
    hostile.abort();

    assert!(slowest < Duration::from_millis(100), "{slowest:?}");
    // Twenty for the others, four at once and one in fifteen seconds for it.
    assert!(calls <= 20 + 4 + 200 / 15 + 1, "{calls}");
    assert!(calls > 30, "{calls}: it gets its own share");
}

#[tokio::test(start_paused = true)]
async fn a_crowd_of_failing_sessions_does_not_hold_up_another_pods_first() {
    let bench = Bench::new(Limits::default());
    bench.issuer.fail(IssueErrorKind::Unavailable, 1_000_000);
    let mut crowd = JoinSet::new();
    for n in 0..300 {
        let cache = bench.cache.clone();
        crowd.spawn(async move {
            for _ in 0..200 {
                let _failed = cache.of_session(session(&format!("r{n}")), &pod(n)).await;
                sleep(Duration::from_millis(500)).await;
            }
        });
    }
    // Every one of them has failed at least once.
    sleep(minutes(1)).await;
    bench.issuer.failures.lock().unwrap().clear();

    let before = Instant::now();
    let answer = bench.cache.of_session(session("victim"), &pod(5000)).await;

    assert!(answer.is_ok(), "{answer:?}");
    assert!(before.elapsed() < Duration::from_millis(300), "{:?}", before.elapsed());
    // The node's burst, and ten a second.
    assert!(bench.issuer.calls() <= 250 + 10 * 62, "{}", bench.issuer.calls());
    crowd.abort_all();
}

#[tokio::test(start_paused = true)]
async fn while_sts_throttles_only_first_requests_reach_it() {
    let bench = bench();
    bench.claim_all((0..200).map(|n| (session(&format!("r{n}")), pod(n), true)), Duration::ZERO);
    bench.issuer.fail(IssueErrorKind::Throttled, 1);
    sleep(Duration::from_millis(900)).await;
    let (paused, queued) = (bench.issuer.calls(), bench.metrics());

    let asked = bench.ask(&session("another")).await;
    // The pause may be 2 s, and then the node has a rate.
    sleep(Duration::from_secs(20)).await;

    assert!(paused <= 8, "{paused}: those that were on their way");
    assert!(queued.contains("sts_throttle_pauses_total 1"), "{queued}");
    assert!(asked.is_ok(), "{asked:?}");
    assert!(bench.issuer.calls() >= 200, "{}", bench.issuer.calls());
}

#[tokio::test(start_paused = true)]
async fn a_denied_role_is_asked_about_again_only_when_a_pod_asks() {
    let bench = bench();
    bench.issuer.fail(IssueErrorKind::Denied, 1);
    bench.claim_all([(session("a"), pod(1), true)], Duration::ZERO);

    sleep(minutes(600)).await;
    let calls = bench.issuer.calls();

    assert_eq!(calls, 1);
    assert!(bench.ask(&session("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_nobody_asked_for_while_sts_failed_is_tried_at_once_when_a_pod_asks() {
    let bench = bench();
    bench.issuer.fail(IssueErrorKind::Unavailable, 12);
    bench.claim_all([(session("a"), pod(1), true)], Duration::ZERO);
    while bench.issuer.calls() < 12 {
        sleep(Duration::from_secs(1)).await;
    }
    sleep(Duration::from_secs(1)).await;

    let answer = bench.ask(&session("a")).await;

    assert_eq!(&*answer.unwrap().access_key_id, "STS.13");
}

/// The node's own pause, of two minutes at the most, is what is left to wait for.
#[tokio::test(start_paused = true)]
async fn what_nobody_asked_for_while_sts_throttled_waits_no_longer_than_sts_asked_when_a_pod_asks() {
    let bench = bench();
    let throttled = (IssueErrorKind::Throttled, Some(Duration::from_secs(1)));
    bench.issuer.failures.lock().unwrap().extend([throttled; 12]);
    bench.claim_all([(session("a"), pod(1), true)], Duration::ZERO);
    while bench.issuer.calls() < 12 {
        sleep(Duration::from_secs(1)).await;
    }
    sleep(Duration::from_secs(2)).await;

    let since = Instant::now();
    while bench.ask(&session("a")).await.is_err() {
        sleep(Duration::from_secs(1)).await;
    }

    assert!(since.elapsed() < Duration::from_secs(122), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_transient_failure_keeps_what_is_valid_and_nothing_else() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.claim(&["a"]);
    bench.issuer.fail(IssueErrorKind::Unavailable, 1000);

    let answered = bench.answered_for(&session("a")).await;

    assert!((minutes(59)..LIFE - Duration::from_secs(3)).contains(&answered), "{answered:?}");
    assert!((5..60).contains(&bench.issuer.calls()), "{}", bench.issuer.calls());
    let error = bench.error(&session("a")).await;
    assert_eq!(error.kind(), ErrorKind::Issue(IssueErrorKind::Unavailable));

    bench.issuer.failures.lock().unwrap().clear();
    sleep(Duration::from_secs(31)).await;
    assert!(bench.ask(&session("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn base_credentials_that_fail_keep_what_is_valid() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.claim(&["a"]);
    bench.issuer.fail(IssueErrorKind::BaseCredentials, 1);

    sleep(minutes(33)).await;

    assert!(bench.ask(&session("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_transient_failure_with_nothing_valid_backs_off() {
    let bench = bench();
    bench.issuer.fail(IssueErrorKind::Unavailable, 1000);
    let before = Instant::now();

    // A pod that asks twice a second for five minutes.
    for _ in 0..600 {
        bench.error(&session("a")).await;
        sleep(Duration::from_millis(500)).await;
    }

    let calls = bench.issuer.calls();
    assert!(before.elapsed() < minutes(6));
    assert!((8..40).contains(&calls), "{calls}");
}

/// Nobody is quick to correct the cluster's configuration, and all pods of all nodes would ask.
#[tokio::test(start_paused = true)]
async fn a_fault_of_the_clusters_configuration_is_asked_about_slowly() {
    let cold = bench();
    cold.issuer.fail(IssueErrorKind::ClusterConfiguration, 1000);
    let mut failed_at = Vec::new();

    // A pod that asks twice a second for five minutes.
    for _ in 0..600 {
        let error = cold.error(&session("a")).await;
        assert!(error.retry_after().is_some_and(|wait| wait <= Duration::from_secs(30)), "{error:?}");
        if cold.issuer.calls() > failed_at.len() {
            failed_at.push(Instant::now());
        }
        sleep(Duration::from_millis(500)).await;
    }

    assert!((10..31).contains(&failed_at.len()), "{}", failed_at.len());
    for pair in failed_at.windows(2) {
        assert!(pair[1] - pair[0] > Duration::from_secs(9), "{:?}", pair[1] - pair[0]);
    }

    let held = bench();
    held.ask(&session("a")).await.unwrap();
    held.claim(&["a"]);
    held.issuer.fail(IssueErrorKind::ClusterConfiguration, 1000);

    let answered = held.answered_for(&session("a")).await;

    assert!((minutes(59)..LIFE - Duration::from_secs(3)).contains(&answered), "{answered:?}");
    // At most one a minute from its refresh to its last minute, and a few in that one.
    assert!((5..40).contains(&held.issuer.calls()), "{}", held.issuer.calls());
    held.issuer.failures.lock().unwrap().clear();
    sleep(Duration::from_secs(31)).await;
    assert!(held.ask(&session("a")).await.is_ok(), "it recovers");
}

#[tokio::test(start_paused = true)]
async fn a_denial_is_remembered_and_then_asked_about_again() {
    for kind in [IssueErrorKind::Denied, IssueErrorKind::NoSuchRole, IssueErrorKind::Invalid] {
        let bench = bench();
        bench.issuer.fail(kind, 1);

        let first = bench.error(&session("a")).await;
        sleep(Duration::from_secs(29)).await;
        let second = bench.error(&session("a")).await;
        let calls = bench.issuer.calls();
        sleep(Duration::from_secs(2)).await;
        let third = bench.ask(&session("a")).await;

        assert_eq!((first.kind(), second.kind()), (ErrorKind::Issue(kind), ErrorKind::Issue(kind)));
        assert_eq!((first.is_transient(), first.retry_after(), calls), (false, None, 1));
        assert!(third.is_ok());
    }
}

/// The effect of each kind of failed refresh on valid credentials, and the answer for a pod that never had
/// any.
#[tokio::test(start_paused = true)]
async fn only_a_confirmed_denial_of_the_role_takes_valid_credentials() {
    for kind in IssueErrorKind::ALL {
        let cold = bench();
        cold.issuer.fail(kind, 1);
        let error = cold.error(&session("a")).await;
        assert_eq!(error.kind(), ErrorKind::Issue(kind));

        let [once, always] = [1, 1000].map(|times| async move {
            let bench = bench();
            bench.ask(&session("a")).await.unwrap();
            bench.claim(&["a"]);
            bench.issuer.fail(kind, times);
            bench.answered_for(&session("a")).await
        });
        let (once, always) = (once.await, always.await);

        assert!(once >= minutes(60), "{kind:?}: one refusal must not cost anything, {once:?}");
        let (denied, ends) = match kind.is_transient() {
            true => (false, minutes(59)..minutes(60)),
            // Refreshed after 24 to 28.5 minutes, and confirmed a minute later.
            false => (true, minutes(25)..minutes(30)),
        };
        assert_eq!(error.is_transient(), !denied, "{kind:?}");
        assert!(ends.contains(&always), "{kind:?}: {always:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_between_two_denials_keeps_the_doubt() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.claim(&["a"]);
    bench.issuer.fail(IssueErrorKind::Denied, 1);
    bench.issuer.fail(IssueErrorKind::Unavailable, 3);
    bench.issuer.fail(IssueErrorKind::NoSuchRole, 1);

    let answered = bench.answered_for(&session("a")).await;

    assert!((minutes(25)..minutes(35)).contains(&answered), "{answered:?}");
}

#[tokio::test(start_paused = true)]
async fn when_throttling_ends_nobody_waits_out_an_old_pause() {
    let bench = bench();
    let throttled = (IssueErrorKind::Throttled, Some(Duration::from_secs(300)));
    bench.issuer.failures.lock().unwrap().extend([throttled; 8]);
    bench.claim_all((0..20).map(|n| (session(&format!("r{n}")), pod(n), true)), Duration::ZERO);
    sleep(Duration::from_secs(5)).await;
    let paused = bench.issuer.calls();

    // A pod that asks for the first time is not held back, and finds STS in order.
    assert!(bench.ask(&session("another")).await.is_ok());
    sleep(Duration::from_secs(12)).await;

    assert!(paused <= 8, "{paused}");
    assert_eq!(bench.issuer.calls(), paused + 1 + 20, "all of them");
    for n in 0..20 {
        assert!(bench.ask(&session(&format!("r{n}"))).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_waits_for_another_attempt_reads_why_the_last_one_failed() {
    let bench = bench();
    bench.issuer.fail(IssueErrorKind::Throttled, 1000);
    let mut kinds = Vec::new();

    for _ in 0..200 {
        kinds.push(bench.error(&session("a")).await.kind());
        sleep(Duration::from_millis(500)).await;
    }

    assert!(kinds.iter().all(|kind| *kind == ErrorKind::Issue(IssueErrorKind::Throttled)), "{kinds:?}");
}

#[tokio::test(start_paused = true)]
async fn throttling_is_waited_out_as_long_as_sts_asks() {
    let bench = bench();
    let asked = Duration::from_secs(90);
    bench.issuer.failures.lock().unwrap().push_back((IssueErrorKind::Throttled, Some(asked)));

    let first = bench.error(&session("a")).await;
    sleep(Duration::from_secs(89)).await;
    let second = bench.error(&session("a")).await;
    let calls = bench.issuer.calls();
    // The node's pause is twice a minute at the most.
    sleep(Duration::from_secs(35)).await;

    assert_eq!(first.kind(), ErrorKind::Issue(IssueErrorKind::Throttled));
    assert_eq!(calls, 1);
    assert!((asked..asked * 5 / 4).contains(&first.retry_after().unwrap()), "spread over a quarter more");
    assert!(second.retry_after().unwrap() <= first.retry_after().unwrap() - Duration::from_secs(89));
    assert!(bench.ask(&session("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn credentials_that_expire_at_once_are_a_failure() {
    let bench = bench();
    let short = RoleSession { duration: Duration::from_secs(5), ..session("a") };
    let enough = RoleSession { duration: Duration::from_secs(7), ..session("a") };

    assert_eq!(bench.error(&short).await.kind(), ErrorKind::Issue(IssueErrorKind::Unavailable));
    assert!(bench.ask(&enough).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_forward_brings_fresh_credentials() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    bench.clock.jump_seconds.store(7200, Ordering::SeqCst);
    let answer = bench.ask(&session("a")).await.unwrap();

    assert_eq!(&*answer.access_key_id, "STS.2");
    assert!(answer.expires_at > bench.clock.now());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_back_does_not_lengthen_a_life() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.claim(&["a"]);
    bench.clock.jump_seconds.store(-86_400, Ordering::SeqCst);
    bench.issuer.fail(IssueErrorKind::Unavailable, 1000);

    let answered = bench.answered_for(&session("a")).await;

    assert!((minutes(59)..LIFE).contains(&answered), "{answered:?}");
}

#[tokio::test(start_paused = true)]
async fn everything_that_changes_the_answer_is_the_key() {
    let bench = bench();
    let plain = session("a");
    let tag = Tag { key: "namespace", value: TagValue::parse("default").unwrap() };
    let others = [
        session("b"),
        RoleSession {
            grant: Grant::AssumeRole { external_id: Some(ExternalId::parse("id").unwrap()) },
            ..plain.clone()
        },
        RoleSession { policy: Some(SessionPolicy::parse("{}").unwrap()), ..plain.clone() },
        RoleSession { session_name: SessionName::parse("other").unwrap(), ..plain.clone() },
        RoleSession { duration: LIFE * 2, ..plain.clone() },
        RoleSession { tags: [tag].into(), ..plain.clone() },
        RoleSession { source_identity: Some(SourceIdentity::fit("default.web")), ..plain.clone() },
    ];

    bench.ask(&plain).await.unwrap();
    for (number, other) in (2..).zip(&others) {
        assert_eq!(*bench.id(other).await, *format!("STS.{number}"));
    }

    assert_eq!(&*bench.id(&plain).await, "STS.1");
}

#[tokio::test(start_paused = true)]
async fn a_full_cache_makes_room_of_what_no_pod_has_a_claim_to() {
    let bench = Bench::new(Limits { sessions: 2, ..unlimited() });
    bench.ask(&session("a")).await.unwrap();
    bench.ask(&session("b")).await.unwrap();

    bench.claim(&["a", "b"]);
    let refused = bench.error(&session("c")).await;
    bench.claim(&["a"]);
    bench.ask(&session("b")).await.unwrap();
    let calls = bench.issuer.calls();
    let taken = bench.ask(&session("c")).await;
    bench.ask(&session("a")).await.unwrap();
    tokio::task::yield_now().await;

    assert_eq!((refused.kind(), refused.is_transient()), (ErrorKind::Full, true));
    assert!(taken.is_ok());
    assert_eq!((bench.issuer.calls(), bench.tasks.len()), (calls + 1, 2));
    assert!(bench.metrics().contains("credential_cache_entries 2"));
}

#[tokio::test(start_paused = true)]
async fn bounds_how_many_are_issued_at_once() {
    let bench = bench();
    let mut callers = JoinSet::new();
    for number in 0..50 {
        let cache = bench.cache.clone();
        callers.spawn(async move { cache.of_session(session(&format!("r{number}")), &pod(1)).await.is_ok() });
    }

    let answers = callers.join_all().await;

    assert!(answers.into_iter().all(|ok| ok));
    assert_eq!(bench.issuer.most_running.load(Ordering::SeqCst), 32);
}

#[tokio::test(start_paused = true)]
async fn after_a_shutdown_what_is_held_is_handed_out_and_nothing_runs() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    bench.shutdown.cancel();
    bench.tasks.close();
    bench.tasks.wait().await;

    assert_eq!(&*bench.id(&session("a")).await, "STS.1");
}

#[tokio::test(start_paused = true)]
async fn a_refresh_task_that_panics_leaves_no_entry_behind() {
    struct Panics(AtomicUsize);
    #[async_trait]
    impl Issuer for Panics {
        async fn issue(&self, _: &RoleSession) -> Result<Credentials, IssueError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            panic!("a bug")
        }
    }
    let issuer = Arc::new(Panics(AtomicUsize::new(0)));
    let bench = bench();
    let cache = Cache::new(
        Arc::clone(&issuer) as Arc<dyn Issuer>,
        Arc::clone(&bench.clock) as Arc<dyn Clock>,
        TaskTracker::new(),
        CancellationToken::new(),
        Limits::default(),
        Metrics::new(&mut Registry::default()),
        Trail::for_tests(),
    );

    for calls in 1..3 {
        let error = cache.of_session(session("a"), &pod(1)).await.unwrap_err();
        assert_eq!((error.kind(), issuer.0.load(Ordering::SeqCst)), (ErrorKind::NotReady, calls));
    }
}

#[tokio::test(start_paused = true)]
async fn counts_and_times_what_it_asks_of_sts() {
    let bench = bench();
    bench.issuer.fail(IssueErrorKind::Denied, 1);
    bench.error(&session("a")).await;
    bench.error(&session("a")).await;
    bench.ask(&session("b")).await.unwrap();

    let metrics = bench.metrics();

    for line in [
        r#"sts_requests_total{result="denied"} 1"#,
        r#"sts_requests_total{result="ok"} 1"#,
        "sts_request_duration_seconds_count 2",
        r#"credential_cache_requests_total{cache="failed"} 1"#,
        r#"credential_cache_requests_total{cache="miss"} 2"#,
        "credential_cache_entries 2",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn debug_output_holds_no_secret() {
    let bench = bench();

    let text = format!("{:?}", bench.ask(&session("a")).await);

    assert!(text.contains("STS.1") && !text.contains("hush"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_survey_counts_sessions_by_state_and_finds_the_first_end() {
    let bench = bench();
    let [kept, denied, failing] = ["kept", "denied", "failing"].map(session);
    assert_eq!(bench.cache.survey(), Survey::default());
    bench.id(&kept).await;
    bench.issuer.fail(IssueErrorKind::Denied, 1);
    bench.error(&denied).await;
    bench.issuer.fail(IssueErrorKind::Unavailable, usize::from(u8::MAX));
    bench.error(&failing).await;
    bench.claim(&["kept", "denied", "failing"]);
    let count = |standing| bench.cache.survey().count(standing);
    let standings = || Standing::ALL.map(count);
    assert_eq!(standings(), [0, 1, 1, 1, 0], "below the floor, denied, failing, fresh, pending");
    sleep(minutes(10)).await;
    let survey = bench.cache.survey();
    assert_eq!(survey.count(Standing::Denied), 1, "still, though nobody has asked for long");
    assert!(survey.oldest.unwrap().abs_diff(minutes(10)) < Duration::from_secs(5), "{survey:?}");
    assert!(survey.shortest_left.unwrap().abs_diff(minutes(50)) < Duration::from_secs(5), "{survey:?}");

    sleep(minutes(25)).await;
    assert_eq!((count(Standing::BelowFloor), count(Standing::Fresh)), (1, 0), "STS still fails");
    sleep(minutes(26)).await;
    let survey = bench.cache.survey();
    assert_eq!((survey.shortest_left, survey.oldest), (None, None), "nothing is valid any more");
    assert_eq!(survey.count(Standing::Failing), 2);
}
