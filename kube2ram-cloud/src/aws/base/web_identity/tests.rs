//! The exchange, against a scripted STS on loopback. Reading the token file is tested with Alibaba Cloud's.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::Response;
use http_body_util::Full;

use super::*;
use crate::{
    aws::sign::FORM,
    base::{Base, BaseSource, Oidc},
    role::BaseArn,
    sts::{StsClient, transport::Transport},
    testing::{Asked, Server, SetClock, answer, body},
};
use kube2ram_service::{clock::Clock, telemetry::chain};

const NOW: &str = "2026-11-28T10:00:00Z";
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl_-0";
/// What the kubelet replaces it with.
const NEWER: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJuZXdlciJ9.bmV3ZXI_-1";

struct Bench {
    base: Base,
    sts: Transport,
    server: Server,
    /// Asked after the other one.
    second: Server,
    directory: tempfile::TempDir,
}

fn error_document(code: &str, token: &str) -> String {
    format!(
        "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{token} is refused</Message></Error>\
         <RequestId>r-1</RequestId></ErrorResponse>"
    )
}

fn refused(status: u16, code: &str) -> Response<Full<Bytes>> {
    answer(status, error_document(code, TOKEN))
}

/// For an hour.
fn issued() -> Response<Full<Bytes>> {
    answer(
        200,
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
         <AccessKeyId>ASIAOWN</AccessKeyId><SecretAccessKey>hush</SecretAccessKey><SessionToken>tok</SessionToken>\
         <Expiration>2026-11-28T11:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
         </AssumeRoleWithWebIdentityResponse>",
    )
}

/// Its first endpoint refuses with each of these; both issue.
async fn bench(refusals: &[(u16, &'static str)]) -> Bench {
    let refusals = Mutex::new(VecDeque::from(refusals.to_vec()));
    bench_of(move |_| {
        let refusal = refusals.lock().unwrap().pop_front();
        refusal.map_or_else(issued, |(status, code)| refused(status, code))
    })
    .await
}

/// Its first endpoint answers so; the second issues.
async fn bench_of(answer: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static) -> Bench {
    let (server, second) = (Server::start(answer).await, Server::start(|_| issued()).await);
    let directory = tempfile::tempdir().unwrap();
    let token_file = directory.path().join("token");
    fs::write(&token_file, TOKEN).unwrap();
    let clock: Arc<dyn Clock> = SetClock::at(NOW);
    let identity = WebIdentity {
        role: RoleArn::parse("arn:aws:iam::123456789012:role/team/kube2ram").unwrap(),
        token_file,
        session: SessionName::parse("kube2ram@n1").unwrap(),
    };
    let base = Base::renewed(Oidc(identity), Arc::clone(&clock));
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let endpoint = |server: &Server| Endpoint::parse(&format!("http://{}", server.address)).unwrap();
    let endpoints = vec![endpoint(&server), endpoint(&second)];
    let sts = Transport::new(StsClient::try_new(false).unwrap(), endpoints, clock);
    Bench { base, sts, server, second, directory }
}

#[tokio::test]
async fn sends_the_token_in_an_unsigned_form_of_the_documented_parameters() {
    let bench = bench(&[]).await;

    let credentials = bench.base.current(&bench.sts).await.unwrap();

    assert_eq!(&*credentials.access_key_id, "ASIAOWN");
    let state = bench.base.state();
    let account = bench.base.account();
    assert_eq!(account.as_ref().map(BaseArn::as_str), Some("arn:aws:iam::123456789012:role/"));
    assert_eq!(state.role.as_deref(), Some("team/kube2ram"));
    assert_eq!(state.source, BaseSource::Oidc);
    let asked = &bench.server.asked()[0];
    assert_eq!((asked.method().as_str(), asked.uri().to_string().as_str()), ("POST", "/"));
    assert_eq!(asked.headers()["content-type"], FORM);
    assert!(!asked.headers().contains_key("authorization"));
    let sent: BTreeMap<_, _> = url::form_urlencoded::parse(body(asked)).into_owned().collect();
    let expected = [
        ("Action", "AssumeRoleWithWebIdentity"),
        ("DurationSeconds", "3600"),
        ("RoleArn", "arn:aws:iam::123456789012:role/team/kube2ram"),
        ("RoleSessionName", "kube2ram@n1"),
        ("Version", "2011-06-15"),
        ("WebIdentityToken", TOKEN),
    ];
    assert_eq!(sent, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
}

#[tokio::test]
async fn each_refusal_says_what_to_correct_and_repeats_nothing_of_the_token() {
    for (status, code, advice) in [
        (400, "ExpiredTokenException", "the kubelet renews it"),
        (400, "InvalidIdentityToken", "OIDC provider"),
        (403, "IDPRejectedClaim", "trust policy"),
        (403, "AccessDenied", "AWS_ROLE_ARN"),
        (400, "ValidationError", "trust policy"),
    ] {
        let bench = bench(&[(status, code)]).await;

        let error = bench.base.current(&bench.sts).await.unwrap_err();

        let text = chain(&error);
        assert!(text.contains(advice) && text.contains(code) && text.contains("withheld"), "{text}");
        assert!(!text.contains(TOKEN) && !format!("{error:?}").contains(TOKEN), "{text}");
        assert_eq!(bench.server.asked().len(), 1, "{code} is not asked again");
        assert!(bench.base.current(&bench.sts).await.is_ok(), "the twin");
    }
}

#[tokio::test]
async fn an_outage_of_sts_is_reported_as_one_and_a_refusal_as_the_agents_own() {
    for (status, code, calls, kind) in [
        (400, "Throttling", 1, IssueErrorKind::Throttled),
        (503, "ServiceUnavailable", 1, IssueErrorKind::Unavailable),
        (400, "IDPCommunicationError", 2, IssueErrorKind::Unavailable),
        (403, "AccessDenied", 1, IssueErrorKind::BaseCredentials),
        (400, "InvalidIdentityToken", 1, IssueErrorKind::BaseCredentials),
    ] {
        let bench = bench(&[(status, code); 2]).await;

        let error = bench.base.current(&bench.sts).await.unwrap_err();

        // A denial would evict what pods have, and it is not their roles that are denied.
        let error = error.into_issue_error();
        assert_eq!((error.kind, error.kind.is_transient()), (kind, true), "{code}");
        assert_eq!(bench.server.asked().len(), calls, "{code}");
    }
}

#[tokio::test]
async fn a_provider_that_sts_did_not_reach_is_worth_one_more_call() {
    let bench = bench(&[(400, "IDPCommunicationError")]).await;

    assert!(bench.base.current(&bench.sts).await.is_ok());

    assert_eq!((bench.server.asked().len(), bench.second.asked().len()), (2, 0));
}

#[tokio::test]
async fn an_expired_token_is_read_again_and_sent_when_it_is_another() {
    for code in ["ExpiredToken", "ExpiredTokenException"] {
        // The kubelet replaces the token while the call is under way.
        let replaced = Arc::new(OnceLock::<PathBuf>::new());
        let file = Arc::clone(&replaced);
        let bench = bench_of(move |asked| {
            let sent: BTreeMap<_, _> = url::form_urlencoded::parse(body(asked)).into_owned().collect();
            if sent["WebIdentityToken"] == NEWER {
                return issued();
            }
            fs::write(file.get().unwrap(), NEWER).unwrap();
            refused(400, code)
        })
        .await;
        replaced.set(bench.directory.path().join("token")).unwrap();

        assert_eq!(&*bench.base.current(&bench.sts).await.unwrap().access_key_id, "ASIAOWN");

        assert_eq!(bench.server.asked().len(), 2, "{code}");
    }
}

#[tokio::test]
async fn a_newer_token_that_has_expired_too_is_sent_once_and_repeated_nowhere() {
    let number = AtomicUsize::new(0);
    let replaced = Arc::new(OnceLock::<PathBuf>::new());
    let file = Arc::clone(&replaced);
    let bench = bench_of(move |_| {
        let number = number.fetch_add(1, Ordering::SeqCst);
        fs::write(file.get().unwrap(), format!("{number}{NEWER}")).unwrap();
        let newer = format!("0{NEWER}");
        answer(400, error_document("ExpiredTokenException", if number == 0 { TOKEN } else { &newer }))
    })
    .await;
    replaced.set(bench.directory.path().join("token")).unwrap();

    let error = bench.base.current(&bench.sts).await.unwrap_err();

    let text = chain(&error);
    assert!(text.contains("the kubelet renews it") && text.contains("withheld"), "{text}");
    assert!(!format!("{error:?}").contains(NEWER));
    assert_eq!(bench.server.asked().len(), 2);
}

#[tokio::test]
async fn a_region_where_sts_is_off_leads_to_the_next_endpoint() {
    let bench = bench(&[(403, "RegionDisabledException")]).await;

    assert!(bench.base.current(&bench.sts).await.is_ok());

    assert_eq!((bench.server.asked().len(), bench.second.asked().len()), (1, 1));
    let detour = bench.sts.detour().map(|detour| detour.endpoint);
    assert_eq!(detour, Some(1), "it is the agent's own account: all calls go there");
}

#[tokio::test]
async fn a_missing_token_names_its_audience_and_variable() {
    let bench = bench(&[]).await;
    fs::remove_file(bench.directory.path().join("token")).unwrap();

    let text = chain(&bench.base.current(&bench.sts).await.unwrap_err());

    assert!(text.contains("sts.amazonaws.com") && text.contains("AWS_WEB_IDENTITY_TOKEN_FILE"), "{text}");
    assert_eq!(bench.server.asked().len(), 0);
}
