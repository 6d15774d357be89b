//! The issuer against a scripted STS on loopback.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    net::Ipv4Addr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use jiff::ToSpan as _;
use secrecy::ExposeSecret as _;
use tokio::time::Instant;

use super::*;
use crate::{
    MetadataAddr,
    alibaba::{
        base::{BaseCredentials, of_node_role},
        metadata::{Metadata, hardened_mode},
        wire::BODY_LIMIT_BYTES,
    },
    credentials::IssueErrorKind,
    issuer::{CALL_DEADLINE, memory},
    role::{ExternalId, Grant, RoleArn, SessionName, SessionPolicy},
    sts::transport::ANSWER_TIMEOUT,
    testing::{Asked, CountingPass, Server, SetClock, answer},
    upstream::MetadataServer,
};

mod impostor;

const NOW: &str = "2026-11-21T21:30:00Z";

type Answers = Vec<Response<Full<Bytes>>>;

fn issued() -> Response<Full<Bytes>> {
    answer(
        200,
        r#"{"RequestId":"r","Credentials":{"AccessKeyId":"STS.pod","AccessKeySecret":"hush",
            "SecurityToken":"tok","Expiration":"2026-11-21T22:30:00Z"}}"#,
    )
}

fn refused(status: u16, code: &str) -> Response<Full<Bytes>> {
    answer(status, format!(r#"{{"RequestId":"r-1","Code":"{code}","Message":"as it is"}}"#))
}

/// Gives the answers in order; then issues.
async fn sts(answers: Answers) -> Server {
    let answers = Mutex::new(VecDeque::from(answers));
    Server::start(move |_| answers.lock().unwrap().pop_front().unwrap_or_else(issued)).await
}

fn endpoint(server: &Server) -> Endpoint {
    Endpoint::parse(&format!("http://{}", server.address)).unwrap()
}

fn static_base() -> Base {
    Base::of_keys(BaseCredentials {
        access_key_id: "STS.base".into(),
        access_key_secret: "base-hush".into(),
        security_token: Some("base-tok".into()),
    })
}

fn issuer_of(endpoints: Vec<Endpoint>, base: Base, clock: &Arc<SetClock>) -> StsIssuer {
    // Another test may have installed it.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    StsIssuer::new(StsClient::try_new(false).unwrap(), endpoints, base, Arc::clone(clock) as Arc<dyn Clock>)
}

fn issuer(server: &Server) -> StsIssuer {
    issuer_of(vec![endpoint(server)], static_base(), &SetClock::at(NOW))
}

fn session(seconds: u64) -> RoleSession {
    RoleSession {
        role: RoleArn::parse("acs:ram::1234567890123456:role/pod-role").unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("default_web-0.k8s@n1").unwrap(),
        duration: Duration::from_secs(seconds),
        tags: [].into(),
        source_identity: None,
    }
}

fn parameters(asked: &Asked) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(asked.uri().query().unwrap().as_bytes()).into_owned().collect()
}

fn header<'a>(asked: &'a Asked, name: &str) -> &'a str {
    asked.headers()[name].to_str().unwrap()
}

#[tokio::test]
async fn sends_a_signed_assume_role_and_takes_its_answer() {
    let server = sts(vec![]).await;
    let session = RoleSession {
        grant: Grant::AssumeRole { external_id: Some(ExternalId::parse("a+b=c").unwrap()) },
        policy: Some(SessionPolicy::parse(r#"{"Version":"1"}"#).unwrap()),
        ..session(3600)
    };

    let credentials = issuer(&server).issue(&session).await.unwrap();

    assert_eq!(&*credentials.access_key_id, "STS.pod");
    assert_eq!(credentials.security_token.expose_secret(), "tok");
    assert_eq!(credentials.issued_at.to_string(), NOW);
    assert_eq!(credentials.expires_at.to_string(), "2026-11-21T22:30:00Z");

    let asked = &server.asked()[0];
    assert_eq!((asked.method().as_str(), asked.uri().path()), ("POST", "/"));
    let expected = [
        ("DurationSeconds", "3600"),
        ("ExternalId", "a+b=c"),
        ("Format", "JSON"),
        ("Policy", r#"{"Version":"1"}"#),
        ("RoleArn", "acs:ram::1234567890123456:role/pod-role"),
        ("RoleSessionName", "default_web-0.k8s@n1"),
    ];
    assert_eq!(parameters(asked), expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    for (name, value) in [
        ("host", &*server.address.to_string()),
        ("x-acs-action", "AssumeRole"),
        ("x-acs-version", "2015-04-01"),
        ("x-acs-date", NOW),
        ("x-acs-security-token", "base-tok"),
        ("accept", "application/json"),
    ] {
        assert_eq!(header(asked, name), value);
    }
    // Signed as it arrived.
    let base = static_base().current(&issuer(&server).0.transport).await.unwrap();
    let again = RpcCall {
        host: Some(header(asked, "host")),
        action: "AssumeRole",
        version: "2015-04-01",
        canonical_query: asked.uri().query().unwrap(),
        date: NOW.parse().unwrap(),
        nonce: Some(header(asked, "x-acs-signature-nonce")),
    };
    assert_eq!(asked.headers()["authorization"], again.headers(&base).unwrap()["authorization"]);
    assert!(!format!("{asked:?}").contains("base-hush"));
}

#[tokio::test]
async fn reports_what_sts_refuses_and_asks_once_only() {
    for (status, code, kind) in [
        (403, "NoPermission", IssueErrorKind::Denied),
        (404, "EntityNotExist.Role", IssueErrorKind::NoSuchRole),
        (400, "InvalidParameter.RoleArn", IssueErrorKind::Invalid),
        (400, "InvalidParameter.DurationSeconds", IssueErrorKind::Invalid),
        (400, "SignatureDoesNotMatch", IssueErrorKind::BaseCredentials),
        (400, "InvalidAccessKeyId.NotFound", IssueErrorKind::BaseCredentials),
        (403, "Forbidden.RiskControl", IssueErrorKind::Unexpected),
        (503, "ServiceUnavailable", IssueErrorKind::Unavailable),
    ] {
        let server = sts(vec![refused(status, code)]).await;

        let error = issuer(&server).issue(&session(3600)).await.unwrap_err();

        assert_eq!((error.kind, &*error.code, &*error.message), (kind, code, "as it is"));
        assert_eq!(error.request_id.as_deref(), Some("r-1"));
        assert_eq!(server.asked().len(), 1, "{code}");
        assert!(!format!("{error:?}").contains("hush"));
    }
}

#[tokio::test]
async fn throttling_carries_how_long_to_wait() {
    let mut throttled = refused(400, "Throttling.User");
    let left = http::HeaderValue::from_static("Limit:100,Remain:0,TimeLeft:1500,Reset:2000");
    throttled.headers_mut().insert("x-ratelimit-user", left);
    let server = sts(vec![throttled]).await;

    let error = issuer(&server).issue(&session(3600)).await.unwrap_err();

    assert_eq!(error.kind, IssueErrorKind::Throttled);
    assert_eq!(error.retry_after, Some(Duration::from_millis(1500)));
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn repeats_a_used_nonce_once_with_another() {
    let used = || refused(400, "SignatureNonceUsed");
    let server = sts(vec![used(), issued(), used(), used()]).await;
    let issuer = issuer(&server);

    assert!(issuer.issue(&session(3600)).await.is_ok());
    let error = issuer.issue(&session(3600)).await.unwrap_err();

    assert_eq!(error.kind, IssueErrorKind::Unavailable);
    let nonces: Vec<_> =
        server.asked().iter().map(|a| header(a, "x-acs-signature-nonce").to_owned()).collect();
    let distinct: HashSet<_> = nonces.iter().collect();
    assert_eq!((nonces.len(), distinct.len()), (4, 4));
}

#[tokio::test]
async fn adopts_the_time_of_sts_and_remembers_it() {
    let mut expired = refused(400, "InvalidTimeStamp.Expired");
    let date = http::HeaderValue::from_static("Sat, 21 Nov 2026 22:00:00 GMT");
    expired.headers_mut().insert("date", date);
    let server = sts(vec![expired]).await;
    let issuer = issuer(&server);

    issuer.issue(&session(3600)).await.unwrap();
    issuer.issue(&session(3600)).await.unwrap();

    let dates: Vec<_> = server.asked().iter().map(|a| header(a, "x-acs-date").to_owned()).collect();
    assert_eq!(dates, [NOW, "2026-11-21T22:00:00Z", "2026-11-21T22:00:00Z"]);
}

/// What sessions of these lengths were asked for, when STS refuses all above its limit.
async fn durations_asked(limit: u64, wanted: &[u64]) -> (Vec<u64>, StsIssuer, Server) {
    let duration = |asked: &Asked| parameters(asked)["DurationSeconds"].parse::<u64>().unwrap();
    let server = Server::start(move |asked| {
        if duration(asked) > limit { refused(400, "InvalidParameter.DurationSeconds") } else { issued() }
    })
    .await;
    let issuer = issuer(&server);
    for &seconds in wanted {
        issuer.issue(&session(seconds)).await.unwrap();
    }
    let asked = server.asked().iter().map(duration).collect();
    (asked, issuer, server)
}

#[tokio::test]
async fn a_role_that_allows_no_session_as_long_as_wanted_gets_one_hour_and_at_each_refresh_the_next_one_down()
{
    const HOUR: u64 = 3600;

    for (limit, asked) in [
        (12, vec![12, 12, 12]),
        (8, vec![12, 1, 8, 8]),
        (7, vec![12, 1, 8, 1, 6, 6]),
        (2, vec![12, 1, 8, 1, 6, 1, 4, 1, 2, 2]),
        (1, vec![12, 1, 8, 1, 6, 1, 4, 1, 2, 1, 1, 1]),
    ] {
        let refreshes = asked.len() - asked.windows(2).filter(|pair| pair[0] > limit).count();
        let (durations, ..) = durations_asked(limit * HOUR, &vec![12 * HOUR; refreshes]).await;
        assert_eq!(durations, asked.iter().map(|hours| hours * HOUR).collect::<Vec<_>>(), "{limit} h");
    }
    let (durations, ..) = durations_asked(HOUR, &[2 * HOUR]).await;
    assert_eq!(durations, [2 * HOUR, HOUR], "no longer one than was wanted");

    let server = Server::start(|_| refused(400, "InvalidParameter.DurationSeconds")).await;
    let error = issuer(&server).issue(&session(12 * HOUR)).await.unwrap_err();
    assert_eq!(
        (error.kind, server.asked().len()),
        (IssueErrorKind::Invalid, 2),
        "that is no matter of length"
    );
}

#[tokio::test]
async fn what_a_role_allows_is_remembered_for_a_day() {
    let (durations, issuer, server) = durations_asked(7200, &[14_400, 14_400, 900]).await;
    assert_eq!(durations, [14_400, 3600, 7200, 900]);

    let a_day_ago = Instant::now().checked_sub(memory::MAX_AGE).unwrap();
    issuer.0.shorter.roles().values_mut().for_each(|shorter| shorter.since = a_day_ago);
    issuer.issue(&session(14_400)).await.unwrap();

    let asked = server.asked();
    let last: Vec<_> = asked[4..].iter().map(|asked| parameters(asked)["DurationSeconds"].clone()).collect();
    assert_eq!(last, ["14400", "3600"], "the limit may have been raised");
}

#[tokio::test]
async fn fetches_other_base_credentials_when_they_are_refused() {
    let fetches = AtomicUsize::new(0);
    let metadata = Server::start(move |asked| match asked.uri().path() {
        "/latest/meta-data/ram/security-credentials/" => answer(200, "node-role"),
        "/latest/meta-data/ram/security-credentials/node-role" => {
            let number = fetches.fetch_add(1, Ordering::SeqCst) + 1;
            let document = format!(
                r#"{{"AccessKeyId":"STS.{number}","AccessKeySecret":"hush","SecurityToken":"tok-{number}",
                "Expiration":"2026-11-22T03:30:00Z","Code":"Success"}}"#
            );
            answer(200, document)
        }
        _ => answer(404, ""),
    })
    .await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(metadata.address), Arc::new(CountingPass::default()));
    let metadata_client = Metadata::new(Arc::new(hardened_mode(upstream)));
    let expired = || refused(400, "InvalidSecurityToken.Expired");
    let server = sts(vec![expired(), issued(), expired(), expired()]).await;
    let clock = SetClock::at(NOW);
    let base = of_node_role(metadata_client, Arc::clone(&clock) as Arc<dyn Clock>);
    let issuer = issuer_of(vec![endpoint(&server)], base, &clock);

    assert!(issuer.issue(&session(3600)).await.is_ok());
    let error = issuer.issue(&session(3600)).await.unwrap_err();

    assert_eq!(error.kind, IssueErrorKind::BaseCredentials);
    let tokens: Vec<_> =
        server.asked().iter().map(|a| header(a, "x-acs-security-token").to_owned()).collect();
    assert_eq!(tokens, ["tok-1", "tok-2", "tok-2", "tok-3"]);
}

#[tokio::test]
async fn nonsense_is_an_outage_and_never_a_denial() {
    let stale = r#"{"Credentials":{"AccessKeyId":"STS.pod","AccessKeySecret":"hush","SecurityToken":"tok",
        "Expiration":"2026-11-21T21:30:00Z"}}"#;
    for answers in [
        answer(200, "<html>"),
        answer(200, stale),
        answer(200, "x".repeat(BODY_LIMIT_BYTES + 1)),
        answer(403, "<html>"),
        answer(302, ""),
    ] {
        let server = sts(vec![answers]).await;

        let error = issuer(&server).issue(&session(3600)).await.unwrap_err();

        assert_eq!(error.kind, IssueErrorKind::Unavailable, "{error:?}");
        assert_eq!(server.asked().len(), 1);
        assert!(!format!("{error:?}").contains("hush"));
    }
}

/// An endpoint without a listener.
fn closed() -> Endpoint {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    Endpoint::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap()
}

#[tokio::test]
async fn goes_on_to_the_next_endpoint_and_stays_there() {
    let server = sts(vec![]).await;
    let issuer = issuer_of(vec![closed(), endpoint(&server)], static_base(), &SetClock::at(NOW));

    issuer.issue(&session(3600)).await.unwrap();

    assert_eq!(issuer.0.transport.detour().map(|detour| detour.endpoint), Some(1));
    assert_eq!(header(&server.asked()[0], "host"), server.address.to_string());
    issuer.issue(&session(3600)).await.unwrap();
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn goes_round_a_silent_endpoint_and_comes_back_to_it_later() {
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let first = Endpoint::parse(&format!("http://{}", silent.local_addr().unwrap())).unwrap();
    let server = sts(vec![]).await;
    let issuer = issuer_of(vec![first, endpoint(&server)], static_base(), &SetClock::at(NOW));
    let before = Instant::now();

    issuer.issue(&session(3600)).await.unwrap();
    let round = before.elapsed();
    issuer.issue(&session(3600)).await.unwrap();
    let again = before.elapsed() - round;
    issuer.0.transport.detour().as_mut().unwrap().until = Instant::now();
    issuer.issue(&session(3600)).await.unwrap();
    let back = before.elapsed() - round - again;

    assert!(round >= ANSWER_TIMEOUT && round < CALL_DEADLINE, "{round:?}");
    assert!(again < ANSWER_TIMEOUT, "{again:?}");
    assert!(back >= ANSWER_TIMEOUT, "{back:?}");
}

#[tokio::test]
async fn the_answers_date_is_when_they_were_issued_unless_it_cannot_be() {
    for (date, issued_at) in [
        ("Sat, 21 Nov 2026 21:30:00 GMT", "2026-11-21T21:30:00Z"),
        // Our clock is ten minutes ahead, or behind.
        ("Sat, 21 Nov 2026 21:40:00 GMT", "2026-11-21T21:40:00Z"),
        ("Sat, 21 Nov 2026 21:20:00 GMT", NOW),
        ("Sat, 21 Nov 2026 23:00:00 GMT", NOW),
        ("nonsense", NOW),
    ] {
        let mut answer = issued();
        answer.headers_mut().insert("date", http::HeaderValue::from_static(date));
        let server = sts(vec![answer]).await;

        let credentials = issuer(&server).issue(&session(3600)).await.unwrap();

        assert_eq!(credentials.issued_at.to_string(), issued_at, "{date}");
    }
}

#[tokio::test]
async fn an_endpoint_out_of_reach_is_an_outage_and_its_error_shows_no_parameter() {
    let issuer = issuer_of(vec![closed()], static_base(), &SetClock::at(NOW));
    let session = RoleSession {
        grant: Grant::AssumeRole { external_id: Some(ExternalId::parse("private").unwrap()) },
        ..session(3600)
    };

    let error = issuer.issue(&session).await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unavailable, "Connect"));
    assert!(!format!("{error:?}").contains("private"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn gives_up_on_an_sts_that_is_silent() {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let silent = Endpoint::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let issuer = issuer_of(vec![silent], static_base(), &SetClock::at(NOW));
    let before = Instant::now();

    let error = issuer.issue(&session(3600)).await.unwrap_err();

    assert_eq!(error.kind, IssueErrorKind::Unavailable);
    assert!(before.elapsed() <= CALL_DEADLINE + Duration::from_millis(1), "{:?}", before.elapsed());
}

#[tokio::test]
async fn follows_the_clock_it_was_given() {
    let server = sts(vec![]).await;
    let clock = SetClock::at(NOW);
    let issuer = issuer_of(vec![endpoint(&server)], static_base(), &clock);

    issuer.issue(&session(3600)).await.unwrap();
    *clock.0.lock().unwrap() += 1.hour();
    let error = issuer.issue(&session(3600)).await.unwrap_err();

    assert_eq!(&*error.message, "credentials that have already expired");
}
