//! Bodies of requests to the webhook: nobody logs in without an answer of STS, as anybody else, or in an
//! answer of another version. STS, the mapping and the clock are stand-ins; all else is the real webhook.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use jiff::Timestamp;
use kube2ram_authenticator::{
    identity::{Identity, Map, Mapped, User},
    token::SignedCall,
    verify::{self, MAX_TTL, Rates, Sts, Verifier},
    webhook::{Settings, Webhook},
};
use kube2ram_cloud::alibaba::caller_identity::{Answer, CallError, CallErrorKind, CallerIdentity};
use kube2ram_service::clock::Clock;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use super::token::{check as check_token, cluster};

/// Checks the body of a request.
pub fn check(body: &[u8]) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let (status, answer, asked) = runtime.expect("a runtime of one thread").block_on(answer_to(body));
    if status != StatusCode::OK {
        assert!(asked <= 1 && REFUSALS.contains(&status.as_u16()), "{status}");
        return false;
    }
    let answer: Value = serde_json::from_slice(&answer).expect("an answer is JSON");
    let version = &answer["apiVersion"];
    assert!(VERSIONS.iter().any(|known| version == known), "{version}");
    let review: Value = serde_json::from_slice(body).expect("what is not JSON was refused");
    assert_eq!((&review["apiVersion"], &review["kind"]), (version, &json!("TokenReview")));
    let token = review["spec"]["token"].as_str().expect("a review without a token was refused");
    let denied =
        json!({ "apiVersion": version, "kind": "TokenReview", "status": { "authenticated": false } });
    if answer == denied {
        return false;
    }
    assert_eq!(answer, granted(version));
    assert_eq!(asked, 1, "STS was asked");
    assert!(check_token(token.as_bytes()), "the judge of tokens takes it, too");
    true
}

/// The only answer that lets somebody in.
fn granted(version: &Value) -> Value {
    json!({ "apiVersion": version, "kind": "TokenReview", "status": { "authenticated": true, "user": {
        "username": "alice", "uid": "ack-ram-authenticator:1:2", "groups": ["developers"],
        "extra": { "arn": [ALICE], "canonicalArn": [ALICE], "sessionName": [""] },
    } } })
}

/// The webhook's answer, and how often it asked STS.
async fn answer_to(body: &[u8]) -> (StatusCode, Bytes, usize) {
    let asked = Arc::new(AtomicUsize::new(0));
    let settings = verify::Settings { cache_ttl: MAX_TTL, rates: Rates::default() };
    let mut registry = Registry::default();
    let sts = OneUser(Arc::clone(&asked));
    let verifier =
        Verifier::new(cluster(), settings, sts, Arc::new(Stopped), TaskTracker::new(), &mut registry);
    let webhook = Webhook::new(Settings::default(), verifier, Arc::new(Alice), &mut registry);
    let request = Request::post("/authenticate").body(Full::new(Bytes::copy_from_slice(body)));
    let response = webhook.answer(request.expect("a legal request")).await;
    let status = response.status();
    let answer = response.into_body().collect().await;
    let answer = answer.unwrap_or_else(|never| match never {}).to_bytes();
    (status, answer, asked.load(Ordering::SeqCst))
}

/// Vouches for the keys of one user.
struct OneUser(Arc<AtomicUsize>);

#[async_trait]
impl Sts for OneUser {
    async fn caller(&self, call: &SignedCall) -> Answer {
        self.0.fetch_add(1, Ordering::SeqCst);
        let alice = CallerIdentity {
            account_id: "1".into(),
            arn: ALICE.into(),
            principal_id: "2".into(),
            request_id: "r".into(),
        };
        let outcome = match call.access_key_id() {
            key if key.starts_with("LTAI") => Ok(alice),
            _ => Err(CallError {
                kind: CallErrorKind::Refused,
                code: "InvalidAccessKeyId.NotFound".into(),
                message: "no such key".into(),
                request_id: None,
                retry_after: None,
            }),
        };
        Answer { outcome, endpoint: None, server_time: None }
    }
}

/// Maps Alice.
struct Alice;

impl Map for Alice {
    fn map(&self, identity: &Identity) -> Mapped {
        match &*identity.canonical_arn {
            ALICE => Mapped::User(User { username: "alice".into(), groups: vec!["developers".into()] }),
            _ => Mapped::Nobody,
        }
    }

    fn is_loaded(&self) -> bool {
        true
    }
}

/// A clock that stands still at the date of the tokens in the corpus.
struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> Timestamp {
        "2026-01-02T03:04:05Z".parse().expect("a legal time")
    }
}

const ALICE: &str = "acs:ram::1:user/alice";
const VERSIONS: [&str; 2] = ["authentication.k8s.io/v1", "authentication.k8s.io/v1beta1"];
/// No TokenReview, a body over the limit, and no decision.
const REFUSALS: [u16; 4] = [400, 413, 429, 503];
