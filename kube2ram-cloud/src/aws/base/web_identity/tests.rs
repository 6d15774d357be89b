//! The exchange, against a scripted STS on loopback. Reading the token file is tested with Alibaba Cloud's.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    sync::{Arc, Mutex},
};

use super::*;
use crate::{
    base::{Base, BaseSource, Oidc},
    sts::{StsClient, transport::Transport},
    testing::{Server, SetClock, answer, body},
};
use kube2ram_service::{clock::Clock, telemetry::chain};

const NOW: &str = "2026-11-28T10:00:00Z";
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl_-0";

struct Bench {
    base: Base,
    sts: Transport,
    server: Server,
    /// Asked after the other one.
    second: Server,
    directory: tempfile::TempDir,
}

/// Refuses with each of these, then issues for an hour.
async fn server(refusals: &[(u16, &'static str)]) -> Server {
    let refusals = Mutex::new(VecDeque::from(refusals.to_vec()));
    Server::start(move |_| { let refusal = refusals.lock().unwrap().pop_front(); match refusal {
        Some((status, code)) => answer(
            status,
            format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{TOKEN} is refused</Message></Error>\
                 <RequestId>r-1</RequestId></ErrorResponse>"
            ),
        ),
        None => answer(
            200,
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
             <AccessKeyId>ASIAOWN</AccessKeyId><SecretAccessKey>hush</SecretAccessKey><SessionToken>tok</SessionToken>\
             <Expiration>2026-11-28T11:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
             </AssumeRoleWithWebIdentityResponse>",
        ),
    }})
    .await
}

/// Its first endpoint refuses with each of these; both issue.
async fn bench(refusals: &[(u16, &'static str)]) -> Bench {
    let (server, second) = (server(refusals).await, server(&[]).await);
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
    assert_eq!((bench.base.account(), state.role.as_deref()), (Some("123456789012"), Some("team/kube2ram")));
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
    for (status, code, kind) in [
        (400, "Throttling", IssueErrorKind::Throttled),
        (503, "ServiceUnavailable", IssueErrorKind::Unavailable),
        (400, "IDPCommunicationError", IssueErrorKind::Unavailable),
        (403, "AccessDenied", IssueErrorKind::BaseCredentials),
        (400, "InvalidIdentityToken", IssueErrorKind::BaseCredentials),
    ] {
        let bench = bench(&[(status, code)]).await;

        let error = bench.base.current(&bench.sts).await.unwrap_err();

        // A denial would evict what pods have, and it is not their roles that are denied.
        let error = error.into_issue_error();
        assert_eq!((error.kind, error.kind.is_transient()), (kind, true), "{code}");
    }
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
