//! The exchange, against a scripted STS on loopback. What a real one checks of the token is the sandbox's.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::future::join_all;
use jiff::ToSpan as _;

use super::*;
use crate::{
    alibaba::{
        base::{Base, BaseError, of_oidc},
        endpoint::Endpoint,
        exchange::query,
    },
    sts::{StsClient, transport::Transport},
    testing::{Server, SetClock, answer},
};
use kube2ram_service::{clock::Clock, telemetry::chain};

const NOW: &str = "2026-11-21T21:30:00Z";
const TOKEN: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl_-0";

struct Bench {
    base: Base,
    sts: Transport,
    clock: Arc<SetClock>,
    server: Server,
    issued: Arc<AtomicUsize>,
    directory: tempfile::TempDir,
}

/// Refuses with each of these, then issues: `STS.1`, `STS.2` and so on, for an hour from what its clock says
/// then.
async fn bench(refusals: &[(u16, &'static str)]) -> Bench {
    let clock = SetClock::at(NOW);
    let refusals = Mutex::new(VecDeque::from(refusals.to_vec()));
    let issued = Arc::new(AtomicUsize::new(0));
    let (count, time) = (Arc::clone(&issued), Arc::clone(&clock));
    let server = Server::start(move |_| { let refusal = refusals.lock().unwrap().pop_front(); match refusal {
        Some((status, code)) => {
            let mut refusal = answer(
                status,
                format!(r#"{{"RequestId":"r","Code":"{code}","Message":"{TOKEN} is not it"}}"#),
            );
            let date = http::HeaderValue::from_static("Sun, 22 Nov 2026 00:30:00 GMT");
            refusal.headers_mut().insert("date", date);
            refusal
        }
        None => {
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            let end = time.now() + 1.hours();
            answer(
                200,
                format!(
                    r#"{{"Credentials":{{"AccessKeyId":"STS.{number}","AccessKeySecret":"hush","SecurityToken":"tok",
                    "Expiration":"{}"}}}}"#,
                    end.strftime("%Y-%m-%dT%H:%M:%SZ")
                ),
            )
        }
    }})
    .await;
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("token"), TOKEN).unwrap();
    let base = of_oidc(settings(&directory.path().join("token")), Arc::clone(&clock) as Arc<dyn Clock>);
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let endpoint = Endpoint::parse(&format!("http://{}", server.address)).unwrap();
    let sts = Transport::new(
        StsClient::try_new(false).unwrap(),
        vec![endpoint],
        Arc::clone(&clock) as Arc<dyn Clock>,
    );
    Bench { base, sts, clock, server, issued, directory }
}

fn settings(token_file: &std::path::Path) -> OidcSettings {
    OidcSettings {
        role: RoleArn::parse("acs:ram::1234567890123456:role/kube2ram").unwrap(),
        provider: "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123".into(),
        token_file: token_file.to_owned(),
        session: SessionName::parse("kube2ram@n1").unwrap(),
    }
}

impl Bench {
    fn token_file(&self) -> PathBuf {
        self.directory.path().join("token")
    }

    async fn id(&self) -> Result<Box<str>, BaseError> {
        Ok(self.base.current(&self.sts).await?.access_key_id.clone())
    }

    /// The whole chain of the error that there must be.
    async fn failure(&self) -> String {
        let error = self.base.current(&self.sts).await.unwrap_err();
        let text = chain(&error);
        assert!(!text.contains(TOKEN) && !format!("{error:?}").contains(TOKEN), "{text}");
        text
    }
}

#[test]
fn the_wire_is_that_of_the_reference() {
    let token = SecretString::from(TOKEN);
    let form = settings(std::path::Path::new("/t")).form(&token);

    assert_eq!(
        query(NOW.parse().unwrap(), "n-1"),
        "Action=AssumeRoleWithOIDC&Format=JSON&SignatureNonce=n-1&Timestamp=2026-11-21T21%3A30%3A00Z&Version=2015-04-01"
    );
    assert_eq!(
        std::str::from_utf8(&form).unwrap(),
        format!(
            "DurationSeconds=3600&OIDCProviderArn=acs%3Aram%3A%3A1234567890123456%3Aoidc-provider%2Fack-rrsa-c0123&\
             RoleArn=acs%3Aram%3A%3A1234567890123456%3Arole%2Fkube2ram&RoleSessionName=kube2ram%40n1&OIDCToken={TOKEN}"
        )
    );
    let pairs: BTreeMap<_, _> = url::form_urlencoded::parse(&form).into_owned().collect();
    assert_eq!(pairs["OIDCToken"], TOKEN);
}

#[tokio::test]
async fn asks_without_a_signature_and_keeps_the_token_out_of_the_url() {
    let bench = bench(&[]).await;

    assert_eq!(&*bench.id().await.unwrap(), "STS.1");

    let asked = &bench.server.asked()[0];
    assert_eq!((asked.method().as_str(), asked.uri().path()), ("POST", "/"));
    assert!(!asked.headers().contains_key("authorization") && !asked.uri().to_string().contains("eyJ"));
    assert_eq!(asked.headers()["content-type"], "application/x-www-form-urlencoded");
}

#[tokio::test]
async fn concurrent_callers_cost_one_exchange_until_half_of_it_is_over() {
    let bench = bench(&[]).await;

    let ids = join_all((0..20).map(|_| bench.id())).await;
    assert!(ids.into_iter().all(|id| &*id.unwrap() == "STS.1"));
    assert_eq!((bench.issued.load(Ordering::SeqCst), bench.base.fetches()[1]), (1, ("ok", 1)));
    *bench.clock.0.lock().unwrap() += 50.minutes();
    assert_eq!(&*bench.id().await.unwrap(), "STS.1", "valid still");
    *bench.clock.0.lock().unwrap() += 10.minutes();
    assert_eq!(&*bench.id().await.unwrap(), "STS.2", "never what has expired");
}

#[tokio::test]
async fn the_token_is_read_again_each_time() {
    let bench = bench(&[]).await;
    bench.id().await.unwrap();
    *bench.clock.0.lock().unwrap() += 2.hours();

    // As the kubelet rotates it, with a moment without the file.
    fs::remove_file(bench.token_file()).unwrap();
    let gone = bench.failure().await;
    fs::write(bench.token_file(), format!("{TOKEN}\n")).unwrap();

    assert!(gone.contains("mount a serviceAccountToken") && gone.contains("No such file"), "{gone}");
    assert_eq!(bench.base.fetches(), [("error", 1), ("ok", 1)]);
    assert!(bench.base.state().failure.is_some());
    assert_eq!(&*bench.id().await.unwrap(), "STS.2");
    assert!(bench.base.state().failure.is_none());
}

#[tokio::test]
async fn what_is_no_token_is_not_sent() {
    let bench = bench(&[]).await;
    let expected = format!(
        "cannot obtain the credentials of the agent's own role (OIDC): {} holds no OIDC token: it must be a regular file of up to 20000 letters, digits and any of ._-",
        bench.token_file().display()
    );
    for text in
        ["", "abc", "a b c d", "a\nbcd", "eyJ&Action=x", "é.é.é.é", &"a".repeat(20_001), &"a".repeat(1 << 20)]
    {
        fs::write(bench.token_file(), text).unwrap();

        assert_eq!(bench.failure().await, expected, "{text:.20}");
    }
    fs::remove_file(bench.token_file()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        bench.token_file(),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert_eq!(bench.failure().await, expected, "a FIFO would have it wait");
    fs::remove_file(bench.token_file()).unwrap();
    assert_eq!(bench.server.asked().len(), 0);

    fs::write(bench.token_file(), "a".repeat(20_000)).unwrap();
    assert_eq!(&*bench.id().await.unwrap(), "STS.1");
}

#[tokio::test]
async fn each_refusal_names_the_remedy_and_repeats_nothing_of_the_token() {
    for (status, code, said) in [
        (400, "AuthenticationFail.OIDCToken.Expired", "the kubelet renews it"),
        (400, "AuthenticationFail.OIDCToken.AudienceNotMatch", "sts.aliyuncs.com"),
        (400, "AuthenticationFail.OIDCToken.Invalid", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN"),
        (404, "EntityNotExist.Role", "ALIBABA_CLOUD_ROLE_ARN"),
        (404, "EntityNotExist.OIDCProvider", "enable RRSA"),
        (403, "AuthenticationFail.NoPermission", "trust policy"),
        (403, "NoPermission", "trust policy"),
    ] {
        let bench = bench(&[(status, code)]).await;

        let text = bench.failure().await;

        assert!(text.contains(said) && text.contains(code) && text.contains("withheld"), "{text}");
        assert_eq!(bench.server.asked().len(), 1, "{code} is not asked again");
        assert_eq!(&*bench.id().await.unwrap(), "STS.1", "the twin");
    }
}

#[tokio::test]
async fn an_outage_of_sts_is_reported_as_one_and_a_refusal_as_the_agents() {
    for (status, code, kind) in [
        (400, "Throttling.User", IssueErrorKind::Throttled),
        (503, "ServiceUnavailable", IssueErrorKind::Unavailable),
        (403, "NoPermission", IssueErrorKind::BaseCredentials),
        (404, "EntityNotExist.Role", IssueErrorKind::BaseCredentials),
    ] {
        let bench = bench(&[(status, code)]).await;

        let error = bench.base.current(&bench.sts).await.unwrap_err();

        // A denial would evict what pods have, and it is not their roles that are denied.
        let error = error.into_issue_error();
        assert_eq!((error.kind, error.kind.is_transient()), (kind, true), "{code}");
    }
}

#[tokio::test]
async fn uses_the_time_of_sts_and_makes_another_nonce() {
    let bench = bench(&[(400, "InvalidTimeStamp.Expired")]).await;
    // Credentials from STS must not be expired by STS's own time.
    *bench.clock.0.lock().unwrap() += 2.hours().minutes(30);

    assert_eq!(&*bench.id().await.unwrap(), "STS.1");

    let targets = bench.server.targets();
    assert!(targets[0].contains("Timestamp=2026-11-22T00%3A00%3A00Z"), "{targets:?}");
    assert!(targets[1].contains("Timestamp=2026-11-22T00%3A30%3A00Z"), "{targets:?}");
}

#[tokio::test]
async fn a_failed_renewal_keeps_what_is_valid() {
    let bench = bench(&[]).await;
    let held = bench.base.current(&bench.sts).await.unwrap();
    fs::remove_file(bench.token_file()).unwrap();

    assert!(bench.base.refresh(&held, &bench.sts).await.is_err(), "it was refused: there is no other");
    assert_eq!(&*bench.id().await.unwrap(), "STS.1");
    assert!(bench.base.state().failure.is_some());
    fs::write(bench.token_file(), TOKEN).unwrap();
    let other = bench.base.refresh(&held, &bench.sts).await.unwrap().unwrap();
    assert_eq!(&*other.access_key_id, "STS.2");
}

#[tokio::test]
async fn a_program_of_another_purpose_gets_them_with_their_end() {
    let bench = bench(&[]).await;
    let endpoint = Endpoint::parse(&format!("http://{}", bench.server.address)).unwrap();
    let clock = Arc::clone(&bench.clock) as Arc<dyn Clock>;

    let fetched = bench.base.credentials(StsClient::try_new(false).unwrap(), vec![endpoint], clock);
    let (credentials, expires_at) = fetched.await.unwrap();

    assert_eq!(&*credentials.access_key_id, "STS.1");
    assert_eq!(expires_at.unwrap().to_string(), "2026-11-21T22:30:00Z");
}
