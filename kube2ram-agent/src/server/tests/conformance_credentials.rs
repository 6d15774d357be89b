//! Sections 5 (the document) and 6 (cache and waiting) of docs/predecessors.md, over HTTP. The clock is
//! paused in tests that wait.

use std::{sync::atomic::Ordering, time::Duration};

use http::StatusCode;
use serde_json::Value;
use tokio::{task::JoinSet, time::sleep};

use super::harness::*;
use kube2ram_cloud::credentials::IssueErrorKind;

fn my_role() -> String {
    format!("{LIST}my-role")
}

fn issued(harness: &Harness) -> u32 {
    harness.world.issued.load(Ordering::Relaxed)
}

async fn document(harness: &Harness) -> Value {
    let answer = harness.get(&my_role()).await;
    assert_eq!(answer.status(), StatusCode::OK, "{}", answer.body());
    serde_json::from_str(answer.body()).unwrap()
}

/// The order is that of Alibaba Cloud's own document, without a line end. The predecessors have other orders.
#[tokio::test]
async fn row_5_keys() {
    let harness = Harness::start().await;

    let text = harness.get(&my_role()).await.into_body();

    let keys = ["AccessKeyId", "AccessKeySecret", "Expiration", "SecurityToken", "LastUpdated", "Code"];
    let places: Vec<_> = keys.iter().map(|key| text.find(&format!("\"{key}\":\"")).expect(key)).collect();
    assert!(places.is_sorted() && text.ends_with('}'), "{text}");
    assert_eq!(text.matches("\":\"").count(), keys.len(), "all of them strings");
}

#[tokio::test]
async fn row_5_code_is_success() {
    assert_eq!(document(&Harness::start().await).await["Code"], "Success");
}

/// The predecessors print local time with a Z.
#[tokio::test]
async fn row_5_times_are_utc() {
    let before = jiff::Timestamp::now();

    let document = document(&Harness::start().await).await;

    let time = |key: &str| document[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let life = time("Expiration").duration_since(time("LastUpdated"));
    assert_eq!(life.as_secs(), 3600, "as STS said it");
    assert!(time("LastUpdated").duration_since(before).abs().as_secs() <= 60);
    for key in ["Expiration", "LastUpdated"] {
        assert_eq!(document[key].as_str().unwrap().len(), "2006-01-02T15:04:05Z".len());
    }
}

#[tokio::test]
async fn row_5_keys_of_the_ack_reader_are_not_empty() {
    let document = document(&Harness::start().await).await;

    for key in ["AccessKeyId", "AccessKeySecret"] {
        assert!(!document[key].as_str().unwrap().is_empty(), "{key}");
    }
}

#[tokio::test]
async fn row_6_1_one_call_within_the_lifetime() {
    let harness = Harness::start().await;

    for _ in 0..5 {
        document(&harness).await;
    }

    assert_eq!(issued(&harness), 1);
}

#[tokio::test(start_paused = true)]
async fn row_6_2_and_6_4_an_error_is_remembered() {
    let harness = Harness::start().await;
    *harness.world.refusal.lock().unwrap() = Some(IssueErrorKind::Denied);

    for _ in 0..5 {
        assert_eq!(harness.get(&my_role()).await.status(), StatusCode::FORBIDDEN);
    }

    assert_eq!(issued(&harness), 1);
}

#[tokio::test(start_paused = true)]
async fn row_6_3_a_remembered_error_is_asked_about_again() {
    let harness = Harness::start().await;
    *harness.world.refusal.lock().unwrap() = Some(IssueErrorKind::Denied);
    assert_eq!(harness.get(&my_role()).await.status(), StatusCode::FORBIDDEN);
    *harness.world.refusal.lock().unwrap() = None;

    sleep(Duration::from_mins(10)).await;

    document(&harness).await;
    assert_eq!(issued(&harness), 2);
}

/// The predecessors call STS up to once for each request.
#[tokio::test]
async fn row_6_5_concurrent_first_requests_share_a_call() {
    let harness = std::sync::Arc::new(Harness::start().await);
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let harness = std::sync::Arc::clone(&harness);
        callers.spawn(async move { harness.get(&my_role()).await.status() });
    }

    let statuses = callers.join_all().await;

    assert_eq!(statuses, [StatusCode::OK; 20]);
    assert_eq!(issued(&harness), 1);
}

/// The predecessors fetch only when the next request comes, which waits for STS.
#[tokio::test(start_paused = true)]
async fn row_6_6_refreshed_before_anybody_asks() {
    let harness = Harness::start().await;
    document(&harness).await;
    harness.claim();

    sleep(Duration::from_mins(40)).await;

    assert_eq!(issued(&harness), 2);
    document(&harness).await;
    assert_eq!(issued(&harness), 2);
}

/// In kube2iam, pod B gets pod A's credentials.
#[tokio::test]
async fn row_6_7_an_external_id_is_a_session_of_its_own() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[(ROLE_KEY, "my-role"), ("external-id", "tenant:7")]));
    document(&harness).await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[(ROLE_KEY, "my-role")]));

    document(&harness).await;

    assert_eq!(issued(&harness), 2);
}

/// The predecessors answer 404 after two to three seconds. SDKs have given up by then.
#[tokio::test(start_paused = true)]
async fn row_6_8_a_pod_that_is_not_known_yet() {
    let harness = Harness::start().await;
    *harness.world.pod_never_comes.lock().unwrap() = true;
    let started = tokio::time::Instant::now();

    let early = harness.get(&my_role()).await;

    assert_eq!(early.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(early.headers().contains_key("retry-after") && started.elapsed() < Duration::from_secs(1));
    *harness.world.pod_never_comes.lock().unwrap() = false;
    document(&harness).await;
}

#[tokio::test(start_paused = true)]
async fn row_6_9_a_transient_failure_keeps_what_is_valid() {
    let harness = Harness::start().await;
    document(&harness).await;
    harness.claim();
    *harness.world.refusal.lock().unwrap() = Some(IssueErrorKind::Unavailable);

    sleep(Duration::from_mins(40)).await;

    assert!(issued(&harness) > 1, "it has tried");
    document(&harness).await;
}

#[tokio::test(start_paused = true)]
async fn row_6_9_a_denial_evicts() {
    let harness = Harness::start().await;
    document(&harness).await;
    harness.claim();
    *harness.world.refusal.lock().unwrap() = Some(IssueErrorKind::Denied);

    // The refresh is due at half life, and a denial is confirmed a minute later.
    sleep(Duration::from_mins(33)).await;

    assert!(issued(&harness) > 2, "it has tried twice, and nearly half of the first life is left");
    assert_eq!(harness.get(&my_role()).await.status(), StatusCode::FORBIDDEN);
}

/// kiam: 500 and 404.
#[tokio::test]
async fn row_6_10_forbidden_and_without_role() {
    let harness = Harness::start().await;

    let forbidden = harness.get(&format!("{LIST}other")).await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[]));
    let without = harness.get(&my_role()).await;

    assert_eq!((forbidden.status(), without.status()), (StatusCode::FORBIDDEN, StatusCode::NOT_FOUND));
    assert_eq!(issued(&harness), 0);
}
