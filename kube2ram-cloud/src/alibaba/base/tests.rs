//! Base credentials from the environment and from a stand-in metadata server.

use std::{
    collections::HashMap,
    sync::{
        LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use jiff::ToSpan as _;
use secrecy::ExposeSecret as _;
use tokio::time::Instant;

use super::*;
use crate::{
    MetadataAddr,
    alibaba::metadata::hardened_mode,
    sts::{StsClient, transport::Transport},
    testing::{CountingPass, Server, SetClock, answer},
    upstream::MetadataServer,
};

mod oidc_environment;

fn configured(variables: &[(&str, &str)]) -> Result<Configured, BaseError> {
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    Configured::from_env(|name| variables.get(name).map(ToString::to_string), "cn-hangzhou.10.0.0.1")
}

fn from_env(variables: &[(&str, &str)]) -> Result<Option<BaseCredentials>, BaseError> {
    configured(variables).map(|configured| match configured {
        Configured::NodeRole => None,
        Configured::Oidc(settings) => panic!("{settings:?}"),
        Configured::StaticKeys(keys) => Some(keys),
    })
}

/// STS is not reachable: sources that do not need it must not call it.
fn nowhere() -> &'static Transport {
    static NOWHERE: LazyLock<Transport> = LazyLock::new(|| {
        // Another test may have installed it.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        Transport::new(StsClient::try_new(false).unwrap(), Vec::new(), SetClock::at("2026-11-21T21:30:00Z"))
    });
    &NOWHERE
}

#[test]
fn reads_both_pairs_of_variables() {
    let ours = from_env(&[
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "id"),
        ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "hush"),
        ("ALIBABA_CLOUD_SECURITY_TOKEN", "tok"),
        ("ACCESS_KEY_ID", "older"),
        ("ACCESS_KEY_SECRET", "older"),
    ])
    .unwrap()
    .unwrap();
    let predecessors = from_env(&[
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", ""),
        ("ACCESS_KEY_ID", "older"),
        ("ACCESS_KEY_SECRET", "s"),
    ])
    .unwrap()
    .unwrap();

    assert_eq!((&*ours.access_key_id, ours.access_key_secret.expose_secret()), ("id", "hush"));
    assert_eq!(ours.security_token.as_ref().unwrap().expose_secret(), "tok");
    assert!(!format!("{ours:?}").contains("hush") && !format!("{ours:?}").contains("tok\""));
    assert_eq!(&*predecessors.access_key_id, "older");
    assert!(predecessors.security_token.is_none());
    assert!(from_env(&[]).unwrap().is_none());
}

#[test]
fn half_a_pair_is_an_error_that_names_the_other_half() {
    let id = from_env(&[("ACCESS_KEY_ID", "id")]).unwrap_err();
    let secret = from_env(&[
        ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "hush"),
        ("ACCESS_KEY_ID", "id"),
        ("ACCESS_KEY_SECRET", "s"),
    ])
    .unwrap_err();
    let malformed = from_env(&[("ACCESS_KEY_ID", "i d"), ("ACCESS_KEY_SECRET", "hush")]).unwrap_err();

    assert_eq!(id.to_string(), "environment variable ACCESS_KEY_ID is set, but ACCESS_KEY_SECRET is not");
    assert!(matches!(secret, BaseError::Missing { missing: "ALIBABA_CLOUD_ACCESS_KEY_ID", .. }));
    assert!(matches!(malformed, BaseError::Malformed("ACCESS_KEY_ID")));
    assert!(!format!("{secret:?}{malformed:?}").contains("hush"));
}

struct Bench {
    base: Base,
    clock: Arc<SetClock>,
    /// How many documents the server has handed out.
    fetches: Arc<AtomicUsize>,
    down: Arc<AtomicBool>,
    /// Kept because it answers only while it lives.
    _server: Server,
}

/// A metadata server with a new document for each fetch, which expires 6 h after the epoch of the test's
/// clock.
async fn bench() -> Bench {
    let (fetches, down) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, is_down) = (Arc::clone(&fetches), Arc::clone(&down));
    let server = Server::start(move |asked| match asked.uri().path() {
        _ if is_down.load(Ordering::SeqCst) => answer(500, ""),
        "/latest/meta-data/ram/security-credentials/" => answer(200, "node-role"),
        "/latest/meta-data/ram/security-credentials/node-role" => {
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            answer(
                200,
                format!(
                    r#"{{"AccessKeyId":"STS.{number}","AccessKeySecret":"hush","SecurityToken":"tok",
                    "Expiration":"2026-11-22T03:30:00Z","Code":"Success"}}"#
                ),
            )
        }
        _ => answer(404, ""),
    })
    .await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    let clock = SetClock::at("2026-11-21T21:30:00Z");
    let metadata = Metadata::new(Arc::new(hardened_mode(upstream)));
    let base = of_node_role(metadata, Arc::clone(&clock) as Arc<dyn Clock>);
    Bench { base, clock, fetches, down, _server: server }
}

impl Bench {
    async fn id(&self) -> Box<str> {
        self.base.current(nowhere()).await.unwrap().access_key_id.clone()
    }

    /// Lets the renewal fall due without waiting for it: loopback I/O does not go with paused time.
    fn make_due(&self) {
        let node = self.base.renewal().unwrap();
        node.cached().as_mut().unwrap().renew_at = Instant::now();
    }

    fn renews_in(&self) -> Duration {
        let node = self.base.renewal().unwrap();
        node.cached().as_ref().unwrap().renew_at.saturating_duration_since(Instant::now())
    }
}

#[tokio::test]
async fn concurrent_callers_cost_one_fetch() {
    let bench = bench().await;
    nowhere();

    let ids = join_all((0..20).map(|_| bench.id())).await;

    assert!(ids.iter().all(|id| &**id == "STS.1"));
    assert_eq!(bench.fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn renews_at_half_of_what_is_left() {
    let bench = bench().await;
    bench.id().await;
    let at_first = bench.renews_in();
    *bench.clock.0.lock().unwrap() += 4.hours();
    bench.make_due();

    let id = bench.id().await;

    assert_eq!(&*id, "STS.2");
    let tolerance = Duration::from_secs(60);
    assert!(Duration::from_hours(3).abs_diff(at_first) < tolerance, "{at_first:?}");
    assert!(Duration::from_hours(1).abs_diff(bench.renews_in()) < tolerance, "{:?}", bench.renews_in());
}

#[tokio::test]
async fn a_failed_renewal_keeps_what_is_valid_and_nothing_else() {
    let bench = bench().await;
    bench.id().await;
    bench.down.store(true, Ordering::SeqCst);
    bench.make_due();

    assert_eq!(&*bench.id().await, "STS.1");
    assert!(bench.renews_in() > Duration::from_secs(20), "does not ask at once again");
    *bench.clock.0.lock().unwrap() += 6.hours();
    assert!(matches!(bench.base.current(nowhere()).await.unwrap_err(), BaseError::Metadata(_)));
    bench.down.store(false, Ordering::SeqCst);
    *bench.clock.0.lock().unwrap() -= 6.hours();
    assert!(bench.base.current(nowhere()).await.is_ok());
}

#[tokio::test]
async fn a_refresh_brings_others_once_for_all_who_were_refused() {
    let bench = bench().await;
    let refused = bench.base.current(nowhere()).await.unwrap();

    let sts = nowhere();
    let refreshes = join_all((0..5).map(|_| bench.base.refresh(&refused, sts))).await;

    for fresh in refreshes {
        assert_eq!(&*fresh.unwrap().unwrap().access_key_id, "STS.2");
    }
    assert_eq!(bench.fetches.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn static_keys_have_no_others() {
    let keys = from_env(&[("ACCESS_KEY_ID", "id"), ("ACCESS_KEY_SECRET", "s")]).unwrap().unwrap();
    let base = Base::of_keys(keys);
    let current = base.current(nowhere()).await.unwrap();

    assert_eq!(&*current.access_key_id, "id");
    assert!(base.refresh(&current, nowhere()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_node_without_role_is_named_as_such() {
    let server = Server::start(|_| answer(404, "")).await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    let metadata = Metadata::new(Arc::new(hardened_mode(upstream)));
    let base = of_node_role(metadata, SetClock::at("2026-11-21T21:30:00Z"));

    assert!(matches!(base.current(nowhere()).await.unwrap_err(), BaseError::NoNodeRole));
}

#[tokio::test]
async fn returns_when_they_end_and_how_often_they_were_fetched() {
    let bench = bench().await;
    let base = &bench.base;
    assert_eq!((base.state().expires_at, base.fetches()), (None, [("error", 0), ("ok", 0)]));
    bench.base.current(nowhere()).await.unwrap();
    let left = base.state().expires_at.unwrap().duration_since(*bench.clock.0.lock().unwrap());
    assert!(left.as_secs() > 0 && base.fetches() == [("error", 0), ("ok", 1)], "{left}");

    bench.down.store(true, Ordering::SeqCst);
    *bench.clock.0.lock().unwrap() += 7.hours();
    bench.base.current(nowhere()).await.unwrap_err();

    assert_eq!(base.fetches(), [("error", 1), ("ok", 1)]);
    assert!(
        base.state().expires_at.unwrap() < *bench.clock.0.lock().unwrap(),
        "the end is past, not unknown"
    );
    let keys = from_env(&[("ACCESS_KEY_ID", "id"), ("ACCESS_KEY_SECRET", "s")]).unwrap().unwrap();
    assert_eq!(Base::of_keys(keys).state().expires_at, None);
}
