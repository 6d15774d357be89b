//! What the tests of several modules share: a clock, tokens, and an STS that is a closure.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use jiff::Timestamp;
use kube2ram_cloud::{
    BaseCredentials,
    alibaba::{
        caller_identity::{Answer, CallError, CallErrorKind, CallerIdentity},
        endpoint::EndpointKind,
    },
};
use secrecy::ExposeSecret as _;

use crate::{
    identity::{Identity, Map, Mapped},
    token::{ClusterId, SignedCall, presign},
    verify::Sts,
};
use kube2ram_service::clock::Clock;

pub(crate) const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";
pub(crate) const NOW: &str = "2026-01-02T03:04:05Z";

/// Stands still until it is set.
pub(crate) struct SetClock(pub(crate) Mutex<Timestamp>);

impl SetClock {
    pub(crate) fn at(text: &str) -> Arc<Self> {
        Arc::new(Self(Mutex::new(text.parse().unwrap())))
    }
}

impl Clock for SetClock {
    fn now(&self) -> Timestamp {
        *self.0.lock().unwrap()
    }
}

pub(crate) fn cluster() -> ClusterId {
    ClusterId::parse(CLUSTER).unwrap()
}

/// A token that was signed by the key of this id at this time.
pub(crate) fn token_at(access_key_id: &str, at: Timestamp) -> String {
    let keys = BaseCredentials {
        access_key_id: access_key_id.into(),
        access_key_secret: "testsecret".into(),
        security_token: None,
    };
    presign(&cluster(), &keys, at, "a client").unwrap().expose_secret().to_owned()
}

pub(crate) fn token(access_key_id: &str) -> String {
    token_at(access_key_id, NOW.parse().unwrap())
}

/// The RAM user of this name.
pub(crate) fn user(name: &str) -> CallerIdentity {
    CallerIdentity {
        account_id: "123456789012".into(),
        arn: format!("acs:ram::123456789012:user/{name}").into(),
        principal_id: "200000000000000000".into(),
        request_id: "r-1".into(),
    }
}

pub(crate) fn granted(name: &str) -> Answer {
    Answer { outcome: Ok(user(name)), endpoint: Some(EndpointKind::Vpc), server_time: None }
}

pub(crate) fn refused(kind: CallErrorKind, code: &str) -> Answer {
    let error = CallError {
        kind,
        code: code.into(),
        message: "as the test wants it".into(),
        request_id: Some("r-1".into()),
        retry_after: None,
    };
    Answer { outcome: Err(error), endpoint: Some(EndpointKind::Vpc), server_time: None }
}

/// An STS, by what it answers to a call, and how often it was asked.
pub(crate) struct Scripted<F> {
    answer: F,
    asked: Arc<AtomicUsize>,
}

impl<F> Scripted<F>
where
    F: Fn(&SignedCall) -> Answer + Send + Sync + 'static,
{
    pub(crate) fn new(answer: F) -> (Self, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        (Self { answer, asked: Arc::clone(&asked) }, asked)
    }
}

#[async_trait]
impl<F> Sts for Scripted<F>
where
    F: Fn(&SignedCall) -> Answer + Send + Sync + 'static,
{
    async fn caller(&self, call: &SignedCall) -> Answer {
        self.asked.fetch_add(1, Ordering::SeqCst);
        // As an answer over the network: others run meanwhile.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        (self.answer)(call)
    }
}

/// A mapping that is a closure, and loaded.
pub(crate) struct Mapping<F>(pub(crate) F);

impl<F: Fn(&Identity) -> Mapped + Send + Sync> Map for Mapping<F> {
    fn map(&self, identity: &Identity) -> Mapped {
        (self.0)(identity)
    }

    fn is_loaded(&self) -> bool {
        true
    }
}
