//! Requests as the API server sends them, against an STS and a mapping that are closures.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use kube2ram_cloud::alibaba::caller_identity::{Answer, CallErrorKind};
use kube2ram_service::clock::Clock;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use super::*;
use crate::{
    testing::{Mapping, NOW, Scripted, SetClock, cluster, granted, refused, token},
    token::SignedCall,
    verify::{MAX_TTL, Rates, Settings as VerifySettings},
};

struct Bench {
    webhook: Webhook,
    asked: Arc<AtomicUsize>,
    registry: Registry,
}

fn bench_with(
    settings: Settings,
    answer: impl Fn(&SignedCall) -> Answer + Send + Sync + 'static,
    map: impl Map + 'static,
) -> Bench {
    let (sts, asked) = Scripted::new(answer);
    let mut registry = Registry::default();
    let clock: Arc<dyn Clock> = SetClock::at(NOW);
    let verify = VerifySettings { cache_ttl: MAX_TTL, rates: Rates::default() };
    let verifier = Verifier::new(cluster(), verify, sts, clock, TaskTracker::new(), &mut registry);
    let webhook = Webhook::new(settings, verifier, Arc::new(map), &mut registry);
    Bench { webhook, asked, registry }
}

/// Alice is mapped, nobody else.
fn alice_alone(identity: &Identity) -> Mapped {
    match &*identity.canonical_arn {
        "acs:ram::123456789012:user/alice" => {
            Mapped::User(User { username: "alice".into(), groups: vec!["developers".into()] })
        }
        "acs:ram::123456789012:user/twice" => Mapped::Conflict("two objects name it".into()),
        _ => Mapped::Nobody,
    }
}

fn bench(answer: impl Fn(&SignedCall) -> Answer + Send + Sync + 'static) -> Bench {
    bench_with(Settings::default(), answer, Mapping(alice_alone))
}

fn review(token: &str) -> String {
    json!({
        "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1",
        "metadata": { "creationTimestamp": null },
        "spec": { "token": token, "audiences": ["https://kubernetes.default.svc"] },
        "status": { "user": {} },
    })
    .to_string()
}

impl Bench {
    async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
        let request = Request::builder().method(method).uri(path).body(Full::new(body.into())).unwrap();
        self.webhook.answer(request).await
    }

    async fn login(&self, token: &str) -> (u16, Option<String>, Bytes) {
        use http_body_util::BodyExt as _;
        let response = self.send(Method::POST, "/authenticate", review(token)).await;
        let retry_after =
            response.headers().get("retry-after").map(|after| after.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        (status, retry_after, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// The status of a review that was decided.
    async fn decided(&self, token: &str) -> Value {
        let (status, _, body) = self.login(token).await;
        assert_eq!(status, 200, "{body:?}");
        let mut answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(answer["apiVersion"], "authentication.k8s.io/v1");
        assert_eq!(answer["kind"], "TokenReview");
        answer["status"].take()
    }
}

#[tokio::test(start_paused = true)]
async fn grants_who_is_mapped() {
    let bench = bench(|call| granted(call.access_key_id()));

    let status = bench.decided(&token("alice")).await;

    assert_eq!(
        status,
        json!({
            "authenticated": true,
            "user": {
                "username": "alice",
                "uid": "ack-ram-authenticator:123456789012:200000000000000000",
                "groups": ["developers"],
                "extra": {
                    "arn": ["acs:ram::123456789012:user/alice"],
                    "canonicalArn": ["acs:ram::123456789012:user/alice"],
                    "sessionName": [""],
                },
            },
        })
    );
}

#[tokio::test(start_paused = true)]
async fn definite_denials_have_no_error_so_that_the_api_server_remembers_them() {
    let bench = bench(|call| match call.access_key_id() {
        "mallory" => refused(CallErrorKind::Refused, "SignatureDoesNotMatch"),
        name => granted(name),
    });
    let tampered = token("alice").replacen("k8s-ack-v2.e", "k8s-ack-v2.f", 1);
    let other_cluster = {
        let other = crate::token::ClusterId::parse("another-cluster").unwrap();
        let keys = kube2ram_cloud::BaseCredentials {
            access_key_id: "alice".into(),
            access_key_secret: "s".into(),
            security_token: None,
        };
        let token = crate::token::presign(&other, &keys, NOW.parse().unwrap(), "a").unwrap();
        secrecy::ExposeSecret::expose_secret(&token).to_owned()
    };

    for denied in [
        token("bob"),
        token("twice"),
        token("mallory"),
        tampered,
        other_cluster,
        "eyJhbGciOiJSUzI1NiJ9.e30.c2ln".into(),
        String::new(),
    ] {
        assert_eq!(bench.decided(&denied).await, json!({ "authenticated": false }), "{denied}");
    }
}

#[tokio::test(start_paused = true)]
async fn tells_the_reason_when_it_is_asked_to() {
    let settings = Settings { deny_with_error: true, ..Settings::default() };
    let bench = bench_with(settings, |call| granted(call.access_key_id()), Mapping(alice_alone));

    let denied = bench.decided(&token("bob")).await;

    let reason = "[ack-ram-authenticator] invalid token. ARN is not mapped";
    assert_eq!(denied, json!({ "authenticated": false, "error": reason }));
    assert_eq!(bench.decided(&token("alice")).await["authenticated"], true);
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_sts_is_never_a_denial_and_login_works_once_it_is_over() {
    for (kind, status, repeats) in [
        (CallErrorKind::Unavailable, 503, true),
        (CallErrorKind::Throttled, 429, true),
        (CallErrorKind::Unexpected, 503, false),
    ] {
        let away = AtomicBool::new(true);
        let bench = bench(move |_| match away.swap(false, Ordering::SeqCst) {
            true => refused(kind, "As.It.Is"),
            false => granted("alice"),
        });

        let (answered, retry_after, body) = bench.login(&token("alice")).await;

        assert_eq!((answered, retry_after.is_some()), (status, repeats), "{kind:?}");
        assert!(serde_json::from_slice::<Value>(&body).is_err(), "no TokenReview: {body:?}");
        assert_eq!(bench.decided(&token("alice")).await["authenticated"], true);
    }
}

/// As the API server: repeats an answer with `Retry-After` up to ten times, in 30 s.
async fn logs_in(bench: &Bench, token: &str) -> bool {
    let begun = Instant::now();
    for _ in 0..=10 {
        let (status, retry_after, body) = bench.login(token).await;
        let Some(seconds) = retry_after else {
            assert_eq!(status, 200, "no decision after {:?}", begun.elapsed());
            let answer: Value = serde_json::from_slice(&body).unwrap();
            return answer["status"]["authenticated"] == true;
        };
        tokio::time::sleep(Duration::from_secs(seconds.parse().unwrap())).await;
        assert!(begun.elapsed() < Duration::from_secs(30), "the API server has given up");
    }
    false
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_fresh_sessions_gets_in_in_the_end() {
    let everybody = |identity: &Identity| {
        Mapped::User(User { username: identity.canonical_arn.clone(), groups: Vec::new() })
    };
    let bench = bench_with(Settings::default(), |call| granted(call.access_key_id()), Mapping(everybody));
    let bench = Arc::new(bench);

    let mut jobs = tokio::task::JoinSet::new();
    for n in 0..500 {
        let bench = Arc::clone(&bench);
        jobs.spawn(async move { logs_in(&bench, &token(&format!("job{n}"))).await });
    }

    assert!(jobs.join_all().await.into_iter().all(|is_in| is_in));
    assert_eq!(bench.asked.load(Ordering::SeqCst), 500);
}

#[tokio::test(start_paused = true)]
async fn a_flood_gets_no_decision_and_is_not_repeated() {
    let bench = Arc::new(bench(|_| refused(CallErrorKind::Refused, "InvalidAccessKeyId.NotFound")));
    let mut flood = tokio::task::JoinSet::new();
    for n in 0..1500 {
        let bench = Arc::clone(&bench);
        flood.spawn(async move { bench.login(&token(&format!("invented{n}"))).await });
    }
    let answers = flood.join_all().await;
    let answers: Vec<_> = answers.iter().map(|(status, after, _)| (*status, after.is_some())).collect();

    let count = |answer| answers.iter().filter(|other| **other == answer).count();

    assert_eq!((count((200, false)), count((429, true)), count((503, false))), (60, 900, 540));
}

#[tokio::test(start_paused = true)]
async fn a_mapping_counts_at_once_although_the_identity_is_remembered() {
    let is_mapped = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&is_mapped);
    let map = Mapping(move |identity: &Identity| match switch.load(Ordering::SeqCst) {
        true => alice_alone(identity),
        false => Mapped::Nobody,
    });
    let bench = bench_with(Settings::default(), |_| granted("alice"), map);
    assert_eq!(bench.decided(&token("alice")).await["authenticated"], true);

    is_mapped.store(false, Ordering::SeqCst);

    assert_eq!(bench.decided(&token("alice")).await["authenticated"], false);
    assert_eq!(bench.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_denied_because_mappings_are_not_loaded_yet() {
    struct Unloaded;
    impl Map for Unloaded {
        fn map(&self, _: &Identity) -> Mapped {
            Mapped::Nobody
        }
        fn is_loaded(&self) -> bool {
            false
        }
    }
    let bench = bench_with(Settings::default(), |_| granted("alice"), Unloaded);

    let (status, retry_after, _) = bench.login(&token("alice")).await;

    assert_eq!((status, retry_after.is_some()), (503, true));
    assert_eq!(bench.decided("not a token").await, json!({ "authenticated": false }));
}

#[tokio::test(start_paused = true)]
async fn answers_nothing_else() {
    let bench = bench(|_| granted("alice"));

    for (method, path, body, status) in [
        (Method::GET, "/authenticate", String::new(), 405),
        (Method::PUT, "/authenticate", review(&token("alice")), 405),
        (Method::POST, "/authenticate", String::new(), 400),
        (Method::POST, "/authenticate", "{}".into(), 400),
        (Method::POST, "/authenticate", review(&"x".repeat(BODY_LIMIT_BYTES)), 413),
        (Method::POST, "/authenticate/", review(&token("alice")), 404),
        (Method::POST, "/", review(&token("alice")), 404),
        (Method::GET, "/metrics", String::new(), 404),
        (Method::GET, "/healthz", String::new(), 200),
        (Method::POST, "/healthz", String::new(), 405),
    ] {
        let response = bench.send(method.clone(), path, body).await;
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        assert_eq!(response.headers().contains_key("allow"), status == 405);
    }
    assert_eq!(bench.asked.load(Ordering::SeqCst), 0);
}

/// Comes never.
struct Late;

impl Body for Late {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        std::task::Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let bench = bench(|_| granted("alice"));
    let request = Request::builder().method(Method::POST).uri("/authenticate").body(Late).unwrap();

    let response = bench.webhook.answer(request).await;

    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn counts_each_result_by_a_name_from_the_list() {
    let bench = bench(|call| match call.access_key_id() {
        "mallory" => refused(CallErrorKind::Refused, "SignatureDoesNotMatch"),
        name => granted(name),
    });
    for token in [token("alice"), token("bob"), token("twice"), token("mallory"), "foreign".into()] {
        drop(bench.login(&token).await);
    }

    let exposition = kube2ram_service::admin::Exposition::Text.encode(&bench.registry).unwrap();

    for result in ["success", "unknown_user", "conflict", "sts_refused", "foreign_token"] {
        let line = format!("logins_total{{result=\"{result}\"}} 1");
        assert!(exposition.lines().any(|other| other == line), "{line} in {exposition}");
    }
    assert_eq!(exposition.matches("logins_total{").count(), Refusal::LABELS.len() + 1);
}

/// What is logged, as text.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<String>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Fields<'a>(&'a mut String);
        impl tracing::field::Visit for Fields<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
                self.0.push_str(&format!(" {field}={value:?}"));
            }
        }
        let mut text = self.0.lock().unwrap();
        event.record(&mut Fields(&mut text));
        text.push('\n');
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn logs_who_came_and_no_token_and_nothing_of_other_authenticators() {
    const KEY: &str = "STS.NUgYrLnoC37mZZCNnAbez";
    // A log statement that a test without a log reaches first, at the same time, would stay off.
    for warm_up in [token(KEY), format!("{}AAAA", crate::token::PREFIX)] {
        bench(|_| granted("alice")).decided(&warm_up).await;
    }
    let bench = bench(|_| granted("alice"));
    let lines = Lines::default();
    let guard = tracing::subscriber::set_default(lines.clone());

    bench.decided(&token(KEY)).await;
    let granted = std::mem::take(&mut *lines.0.lock().unwrap());
    bench.decided("eyJhbGciOiJSUzI1NiJ9.e30.c2ln").await;
    let foreign = std::mem::take(&mut *lines.0.lock().unwrap());
    for _ in 0..1000 {
        bench.decided(&format!("{}AAAA", crate::token::PREFIX)).await;
    }
    drop(guard);

    assert!(granted.contains("access granted") && granted.contains("STS.…Abez"), "{granted}");
    assert!(granted.contains("acs:ram::123456789012:user/alice"), "{granted}");
    assert!(!granted.contains(KEY) && !granted.contains("Signature"), "{granted}");
    assert_eq!(foreign, "");
    let denials = lines.0.lock().unwrap().matches("access denied").count();
    assert_eq!(denials, 100, "few of a thousand");
}
