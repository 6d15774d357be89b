//! Verification against an STS that is a closure, in paused time.

use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::ToSpan as _;
use tokio::{sync::Semaphore, time::advance};

use super::*;
use crate::testing::{CLUSTER, NOW, Scripted, SetClock, cluster, granted, refused, token, token_at};

struct Bench {
    verifier: Arc<Verifier>,
    clock: Arc<SetClock>,
    asked: Arc<AtomicUsize>,
    registry: Registry,
}

fn bench_of(ttl: Duration, answer: impl Fn(&SignedCall) -> Answer + Send + Sync + 'static) -> Bench {
    let (sts, asked) = Scripted::new(answer);
    let (clock, mut registry) = (SetClock::at(NOW), Registry::default());
    let settings = Settings { cache_ttl: ttl, rates: Rates { key: 5, known: 20, unknown: 10 } };
    let time = Arc::clone(&clock) as Arc<dyn Clock>;
    let verifier = Verifier::new(cluster(), settings, sts, time, TaskTracker::new(), &mut registry);
    Bench { verifier, clock, asked, registry }
}

fn bench(answer: impl Fn(&SignedCall) -> Answer + Send + Sync + 'static) -> Bench {
    bench_of(MAX_TTL, answer)
}

impl Bench {
    async fn verify(&self, token: &str) -> Result<Verified, VerifyError> {
        self.verifier.verify(token).await
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn pass(&self, time: Duration) {
        let later = self.clock.now() + jiff::SignedDuration::try_from(time).unwrap();
        *self.clock.0.lock().unwrap() = later;
        advance(time).await;
    }
}

fn code(outcome: Result<Verified, VerifyError>) -> Box<str> {
    match outcome {
        Err(VerifyError::Sts(error)) => error.code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn names_who_has_signed() {
    let bench = bench(|call| granted(call.access_key_id()));

    let verified = bench.verify(&token("alice")).await.unwrap();

    assert_eq!(&*verified.identity.canonical_arn, "acs:ram::123456789012:user/alice");
    assert_eq!((&*verified.identity.access_key_id, verified.source), ("alice", Source::Sts));
}

#[tokio::test(start_paused = true)]
async fn asks_nothing_for_what_is_no_token_of_this_cluster() {
    let bench = bench(|_| granted("alice"));
    let foreign = ["", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "k8s-aws-v1.abc"];

    for text in foreign {
        assert_eq!(bench.verify(text).await, Err(VerifyError::Token(TokenError::Foreign)));
    }
    let malformed = format!("{PREFIX}{CLUSTER}");
    assert_eq!(bench.verify(&malformed).await, Err(VerifyError::Token(TokenError::Base64)));
    let large = format!("{PREFIX}{}", "A".repeat(LIMIT_BYTES));
    assert_eq!(bench.verify(&large).await, Err(VerifyError::Token(TokenError::TooLarge)));

    assert_eq!(bench.asked(), 0);
}

#[tokio::test(start_paused = true)]
async fn many_callers_with_one_token_cost_one_call() {
    let bench = bench(|call| granted(call.access_key_id()));
    let token: Arc<str> = token("alice").into();

    let callers: Vec<_> = (0..200)
        .map(|_| {
            let (verifier, token) = (Arc::clone(&bench.verifier), Arc::clone(&token));
            tokio::spawn(async move { verifier.verify(&token).await })
        })
        .collect();
    let mut sources = [0; 3];
    for caller in callers {
        sources[caller.await.unwrap().unwrap().source as usize] += 1;
    }

    assert_eq!(bench.asked(), 1);
    assert_eq!(sources, [0, 199, 1]);
    assert_eq!(bench.verify(&token).await.unwrap().source, Source::Cached);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_ends_does_not_end_the_call_for_others() {
    let bench = bench(|_| granted("alice"));
    let token: Arc<str> = token("alice").into();
    let first = tokio::spawn({
        let (verifier, token) = (Arc::clone(&bench.verifier), Arc::clone(&token));
        async move { verifier.verify(&token).await }
    });
    tokio::task::yield_now().await;
    let second = tokio::spawn({
        let (verifier, token) = (Arc::clone(&bench.verifier), Arc::clone(&token));
        async move { verifier.verify(&token).await }
    });
    tokio::task::yield_now().await;

    first.abort();

    assert_eq!(second.await.unwrap().unwrap().source, Source::Joined);
    assert_eq!(bench.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_identity_is_remembered_for_its_time_and_no_longer() {
    let bench = bench_of(Duration::from_secs(30), |_| granted("alice"));
    let token = token("alice");
    bench.verify(&token).await.unwrap();

    bench.pass(Duration::from_secs(29)).await;
    assert_eq!(bench.verify(&token).await.unwrap().source, Source::Cached);
    bench.pass(Duration::from_secs(2)).await;
    assert_eq!(bench.verify(&token).await.unwrap().source, Source::Sts);

    assert_eq!(bench.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn zero_remembers_nothing() {
    let bench = bench_of(Duration::ZERO, |_| granted("alice"));

    for _ in 0..3 {
        assert_eq!(bench.verify(&token("alice")).await.unwrap().source, Source::Sts);
    }

    assert_eq!(bench.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn no_time_is_longer_than_the_bound() {
    let bench = bench_of(Duration::from_hours(1), |_| granted("alice"));
    let token = token("alice");
    bench.verify(&token).await.unwrap();

    bench.pass(MAX_TTL).await;

    assert_eq!(bench.verify(&token).await.unwrap().source, Source::Sts);
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_ends_with_the_tokens_own_window() {
    let bench = bench(|_| granted("alice"));
    let old = NOW.parse::<Timestamp>().unwrap() - 890.seconds();
    let token = token_at("alice", old);
    bench.verify(&token).await.unwrap();

    bench.pass(Duration::from_secs(9)).await;
    assert_eq!(bench.verify(&token).await.unwrap().source, Source::Cached);
    bench.pass(Duration::from_secs(2)).await;

    // STS, which judges now and then, would refuse it.
    for _ in 0..2 {
        assert_eq!(bench.verify(&token).await.unwrap().source, Source::Sts, "nothing is remembered");
    }
    assert_eq!(bench.verify(&token).await, Err(VerifyError::Token(TokenError::Expired)));
    assert_eq!(bench.asked(), 3, "replayed after its window");
}

#[tokio::test(start_paused = true)]
async fn a_window_is_measured_by_the_clock_of_sts() {
    let bench =
        bench(|_| Answer { server_time: Some("2026-01-02T04:04:05Z".parse().unwrap()), ..granted("alice") });
    let of_sts = NOW.parse::<Timestamp>().unwrap() + 1.hours();
    assert_eq!(bench.verifier.now(), NOW.parse().unwrap(), "nothing is known of its clock yet");

    let early = bench.verify(&token_at("alice", of_sts)).await.unwrap();

    assert_eq!((early.source, bench.verifier.now()), (Source::Sts, of_sts), "our clock is the wrong one");
    bench.verify(&token_at("alice", of_sts + 1.seconds())).await.unwrap();
    bench.verify(&token_at("bob", NOW.parse().unwrap())).await.unwrap();
    let late = bench.verify(&token_at("carol", NOW.parse().unwrap())).await;
    assert_eq!(late, Err(VerifyError::Token(TokenError::Expired)), "two doubts at once");
}

#[tokio::test(start_paused = true)]
async fn a_refused_signature_is_remembered_briefly() {
    for refusal in ["SignatureDoesNotMatch", "InvalidTimeStamp.Expired"] {
        let bench = bench(move |_| refused(CallErrorKind::Refused, refusal));
        let token = token("alice");

        for _ in 0..5 {
            assert_eq!(&*code(bench.verify(&token).await), refusal);
        }
        assert_eq!(bench.asked(), 1);
        bench.pass(Duration::from_secs(11)).await;
        assert_eq!(&*code(bench.verify(&token).await), refusal);

        assert_eq!(bench.asked(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_change_is_never_remembered() {
    for (kind, failure) in [
        (CallErrorKind::Refused, "InvalidAccessKeyId.Inactive"),
        (CallErrorKind::Refused, "InvalidSecurityToken.Expired"),
        (CallErrorKind::Throttled, "Throttling.User"),
        (CallErrorKind::Unavailable, "Timeout"),
        (CallErrorKind::Unexpected, "Forbidden.RiskControl"),
    ] {
        let failures = AtomicUsize::new(1);
        let bench = bench(move |_| match failures.fetch_sub(1, Ordering::SeqCst) {
            1 => refused(kind, failure),
            _ => granted("alice"),
        });
        let token = token("alice");

        let error = bench.verify(&token).await.unwrap_err();

        assert_eq!(error.is_definite(), kind == CallErrorKind::Refused, "{error:?}");
        assert_eq!(bench.verify(&token).await.unwrap().source, Source::Sts);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_contradicts_itself_names_nobody_and_is_no_denial() {
    let bench = bench(|_| {
        let mut answer = granted("alice");
        if let Ok(caller) = &mut answer.outcome {
            caller.account_id = "123456789013".into();
        }
        answer
    });

    let error = bench.verify(&token("alice")).await.unwrap_err();

    assert_eq!(error, VerifyError::Identity(IdentityError::Account));
    assert!(!error.is_definite());
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_invented_keys_does_not_keep_out_who_has_logged_in_before() {
    let bench = bench(|call| match call.access_key_id() {
        "alice" => granted("alice"),
        // Identities of somebody else's account, and keys that there are not.
        key if key.ends_with('7') => granted(key),
        _ => refused(CallErrorKind::Refused, "InvalidAccessKeyId.NotFound"),
    });
    bench.verify(&token("alice")).await.unwrap();
    bench.verifier.trust("alice");

    let mut limited = 0;
    for n in 0..200 {
        let flood = bench.verify(&token(&format!("invented{n}"))).await;
        limited += usize::from(matches!(flood, Err(VerifyError::Limited { budget: Budget::Unknown, .. })));
    }
    let fresh = token_at("alice", NOW.parse::<Timestamp>().unwrap() + 1.seconds());
    let verified = bench.verify(&fresh).await.unwrap();

    assert_eq!(verified.source, Source::Sts);
    assert!(limited > 50, "{limited}");
    // Two seconds' worth of unknown keys, alice, and the time that passed meanwhile.
    assert!(bench.asked() < 50, "{}", bench.asked());
}

#[tokio::test(start_paused = true)]
async fn calls_of_strangers_that_wait_for_sts_leave_room_for_users() {
    let (sts, answered) = Silent::new();
    let (clock, mut registry) = (SetClock::at(NOW), Registry::default());
    let settings = Settings { cache_ttl: MAX_TTL, rates: Rates { key: 0, known: 0, unknown: 0 } };
    let verifier = Verifier::new(cluster(), settings, sts, clock, TaskTracker::new(), &mut registry);
    verifier.trust("alice");
    let strangers: Vec<_> = (0..FLIGHTS_OF_STRANGERS)
        .map(|n| {
            let (verifier, token) = (Arc::clone(&verifier), token(&format!("stranger{n}")));
            tokio::spawn(async move { verifier.verify(&token).await })
        })
        .collect();
    while verifier.flights().of_strangers.len() < FLIGHTS_OF_STRANGERS {
        tokio::task::yield_now().await;
    }

    let another = verifier.verify(&token("another")).await;
    let alice = tokio::spawn({
        let verifier = Arc::clone(&verifier);
        async move { verifier.verify(&token("alice")).await }
    });
    tokio::task::yield_now().await;
    answered.add_permits(FLIGHTS_OF_STRANGERS + 1);

    assert!(matches!(another, Err(VerifyError::Limited { budget: Budget::Pending, .. })), "{another:?}");
    assert_eq!(&*alice.await.unwrap().unwrap().identity.access_key_id, "alice");
    for stranger in strangers {
        stranger.await.unwrap().unwrap();
    }
    let flights = verifier.flights();
    assert!(flights.all.is_empty() && flights.of_strangers.is_empty());
}

/// Answers a call for each permit.
struct Silent(Arc<Semaphore>);

impl Silent {
    fn new() -> (Self, Arc<Semaphore>) {
        let permits = Arc::new(Semaphore::new(0));
        (Self(Arc::clone(&permits)), permits)
    }
}

#[async_trait]
impl Sts for Silent {
    async fn caller(&self, call: &SignedCall) -> Answer {
        self.0.acquire().await.unwrap().forget();
        granted(call.access_key_id())
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_panics_is_an_outage_and_not_for_ever() {
    let calls = AtomicUsize::new(0);
    let bench = bench(move |_| {
        assert!(calls.fetch_add(1, Ordering::SeqCst) > 0, "the first one fails");
        granted("alice")
    });
    let token = token("alice");

    let outage = bench.verify(&token).await.unwrap_err();

    assert_eq!(outage.as_str(), "sts_unavailable");
    bench.verify(&token).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn counts_what_was_asked_and_what_was_not() {
    let bench = bench(|call| match call.access_key_id() {
        "alice" => granted("alice"),
        _ => refused(CallErrorKind::Throttled, "Throttling.User"),
    });
    for key in ["alice", "alice", "bob"] {
        drop(bench.verify(&token(key)).await);
    }

    let exposition = kube2ram_service::admin::Exposition::Text.encode(&bench.registry).unwrap();

    for line in [
        "sts_requests_total{result=\"ok\"} 1",
        "sts_answers_total{code=\"ok\",endpoint=\"vpc\"} 1",
        "sts_answers_total{code=\"Throttling.User\",endpoint=\"vpc\"} 1",
        "sts_answers_total{code=\"SignatureDoesNotMatch\",endpoint=\"global\"} 0",
        "sts_answers_total{code=\"Timeout\",endpoint=\"none\"} 0",
        "sts_requests_total{result=\"throttled\"} 1",
        "sts_requests_total{result=\"refused\"} 0",
        "verifications_total{cache=\"hit\"} 1",
        "verifications_total{cache=\"miss\"} 2",
        "remembered_answers 1",
        "rate_limited_total{budget=\"unknown_keys\"} 0",
    ] {
        assert!(exposition.lines().any(|other| other == line), "{line} in {exposition}");
    }
}

/// Whoever answers for STS chooses its codes.
#[tokio::test(start_paused = true)]
async fn no_answer_of_sts_makes_a_label() {
    let bench = bench(|call| {
        let code = format!("Invented.By\"{}\"\n", call.access_key_id());
        let endpoint = (!call.access_key_id().ends_with('0')).then_some(EndpointKind::Global);
        Answer { endpoint, ..refused(CallErrorKind::Unexpected, &code) }
    });
    let series = || {
        let text = kube2ram_service::admin::Exposition::Text.encode(&bench.registry).unwrap();
        text.lines()
            .filter(|line| line.starts_with("sts_answers_total{"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let before = series().len();

    for n in 0..10 {
        drop(bench.verify(&token(&format!("key{n}"))).await.unwrap_err());
    }

    let after = series();
    assert_eq!(bench.asked(), 10);
    assert_eq!(after.len(), before + 1, "one more, without an endpoint: {after:?}");
    for line in [
        "sts_answers_total{code=\"other\",endpoint=\"global\"} 9",
        "sts_answers_total{code=\"other\",endpoint=\"none\"} 1",
    ] {
        assert!(after.iter().any(|other| other == line), "{line} in {after:?}");
    }
}
