//! The cache as its callers see it, on paused time.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
};

use jiff::SignedDuration;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::*;
use crate::{
    clock::Clock,
    role::{ExternalId, RoleArn, SessionName, SessionPolicy},
};

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
        let cache = Cache::new(
            Arc::clone(&issuer) as Arc<dyn Issuer>,
            Arc::clone(&clock) as Arc<dyn Clock>,
            tasks.clone(),
            shutdown.clone(),
            limits,
            Metrics::new(&mut registry),
        );
        Self { cache, issuer, clock, registry, tasks, shutdown }
    }

    async fn ask(&self, session: &RoleSession) -> Result<Arc<Credentials>, CredentialError> {
        self.cache.of_session(session.clone()).await
    }

    async fn id(&self, session: &RoleSession) -> Box<str> {
        self.ask(session).await.unwrap().access_key_id.clone()
    }

    async fn error(&self, session: &RoleSession) -> CredentialError {
        self.ask(session).await.unwrap_err()
    }

    /// Asks every second until there is an answer no more, and tells how long there was one: at most two lifetimes.
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

fn bench() -> Bench {
    Bench::new(Limits::default())
}

fn session(role: &str) -> RoleSession {
    RoleSession {
        role: RoleArn::parse(&format!("acs:ram::1234567890123456:role/{role}")).unwrap(),
        external_id: None,
        policy: None,
        session_name: SessionName::parse("default.web").unwrap(),
        duration: LIFE,
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
        callers.spawn(async move { cache.of_session(session("a")).await.unwrap().access_key_id.clone() });
    }

    let ids = callers.join_all().await;

    assert!(ids.len() == 200 && ids.iter().all(|id| &**id == "STS.1"));
    assert_eq!(bench.issuer.calls(), 1);
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

    sleep(minutes(26)).await;
    let before = bench.id(&session("a")).await;
    sleep(minutes(8)).await;
    let calls = bench.issuer.calls();
    let after = bench.id(&session("a")).await;

    assert_eq!((&*before, calls, &*after), ("STS.1", 2, "STS.2"));
}

#[tokio::test(start_paused = true)]
async fn refreshes_are_spread() {
    let bench = Bench::new(Limits { concurrent_issues: 100, ..Limits::default() });
    for number in 0..40 {
        bench.ask(&session(&format!("r{number}"))).await.unwrap();
    }
    let mut calls_by_minute = Vec::new();

    for _ in 0..34 {
        sleep(minutes(1)).await;
        calls_by_minute.push(bench.issuer.calls());
    }

    assert_eq!((calls_by_minute[25], calls_by_minute[33]), (40, 80));
    calls_by_minute.dedup();
    assert!(calls_by_minute.len() > 3, "{calls_by_minute:?}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_entry_is_not_refreshed_and_goes_after_its_lifetime() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    // One refresh, as it was used after the first fetch; then none.
    sleep(minutes(75)).await;
    let (calls, tasks) = (bench.issuer.calls(), bench.tasks.len());
    sleep(minutes(60)).await;

    assert_eq!((calls, tasks), (2, 1));
    assert_eq!((bench.issuer.calls(), bench.tasks.len()), (2, 0));
    assert!(bench.metrics().contains("credential_cache_entries 0"));
}

#[tokio::test(start_paused = true)]
async fn an_idle_entry_that_is_asked_again_brings_fresh_credentials() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();

    sleep(minutes(80)).await;
    let answer = bench.ask(&session("a")).await.unwrap();

    assert_eq!((&*answer.access_key_id, bench.issuer.calls()), ("STS.3", 3));
    assert!(bench.metrics().contains(r#"credential_cache_requests_total{cache="refresh"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn stale_credentials_are_better_than_none_when_sts_is_slow() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    sleep(minutes(80)).await;
    *bench.issuer.delay.lock().unwrap() = Duration::from_secs(5);

    let answer = bench.ask(&session("a")).await.unwrap();

    assert_eq!(&*answer.access_key_id, "STS.2");
}

#[tokio::test(start_paused = true)]
async fn a_transient_failure_keeps_what_is_valid_and_nothing_else() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
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

#[tokio::test(start_paused = true)]
async fn a_denied_refresh_evicts_what_is_still_valid() {
    let bench = bench();
    bench.ask(&session("a")).await.unwrap();
    bench.issuer.fail(IssueErrorKind::Denied, 1);

    let answered = bench.answered_for(&session("a")).await;

    assert!((minutes(26)..minutes(34)).contains(&answered), "{answered:?}");
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
    sleep(Duration::from_secs(2)).await;

    assert_eq!(first.kind(), ErrorKind::Issue(IssueErrorKind::Throttled));
    assert_eq!((first.retry_after(), calls), (Some(asked), 1));
    assert!(second.retry_after().unwrap() <= Duration::from_secs(1));
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
    bench.clock.jump_seconds.store(-86_400, Ordering::SeqCst);
    bench.issuer.fail(IssueErrorKind::Unavailable, 1000);

    let answered = bench.answered_for(&session("a")).await;

    assert!((minutes(59)..LIFE).contains(&answered), "{answered:?}");
}

#[tokio::test(start_paused = true)]
async fn everything_that_changes_the_answer_is_the_key() {
    let bench = bench();
    let plain = session("a");
    let others = [
        session("b"),
        RoleSession { external_id: Some(ExternalId::parse("id").unwrap()), ..plain.clone() },
        RoleSession { policy: Some(SessionPolicy::parse("{}").unwrap()), ..plain.clone() },
        RoleSession { session_name: SessionName::parse("other").unwrap(), ..plain.clone() },
        RoleSession { duration: LIFE * 2, ..plain.clone() },
    ];

    bench.ask(&plain).await.unwrap();
    for (number, other) in (2..).zip(&others) {
        assert_eq!(*bench.id(other).await, *format!("STS.{number}"));
    }

    assert_eq!(&*bench.id(&plain).await, "STS.1");
}

#[tokio::test(start_paused = true)]
async fn a_full_cache_makes_room_of_what_is_idle_only() {
    let bench = Bench::new(Limits { sessions: 2, ..Limits::default() });
    bench.ask(&session("a")).await.unwrap();
    bench.ask(&session("b")).await.unwrap();

    let refused = bench.error(&session("c")).await;
    // Both are refreshed; then only one of them is used.
    sleep(minutes(34)).await;
    bench.ask(&session("a")).await.unwrap();
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
        callers.spawn(async move { cache.of_session(session(&format!("r{number}"))).await.is_ok() });
    }

    let answers = callers.join_all().await;

    assert!(answers.into_iter().all(|ok| ok));
    assert_eq!(bench.issuer.most_running.load(Ordering::SeqCst), 8);
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
async fn a_keeper_that_panics_leaves_no_entry_behind() {
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
    );

    for calls in 1..3 {
        let error = cache.of_session(session("a")).await.unwrap_err();
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
