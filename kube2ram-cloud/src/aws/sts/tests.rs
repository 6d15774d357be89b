//! The issuer against a scripted STS on loopback, which verifies signatures by its own computation.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use secrecy::ExposeSecret as _;

use super::*;
use crate::{
    aws::{base::BaseCredentials, sign::tests::verify},
    credentials::IssueErrorKind,
    role::{
        ArnStyle, BaseArn, ExternalId, Grant, SessionName, SessionPolicy, SessionRules, TagKeys, TagValue,
    },
    testing::{Asked, Server, SetClock, answer, body},
    wire::BODY_LIMIT_BYTES,
};

const NOW: &str = "2026-11-28T10:00:00Z";
const SECRET: &str = "base-hush";
const CHAINING: &str =
    "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining.";
const LONGEST: &str = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";

fn issued_until(expiration: &str) -> Response<Full<Bytes>> {
    answer(
        200,
        format!(
            "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult><Credentials>\
             <AccessKeyId>ASIAPOD</AccessKeyId><SecretAccessKey>hush</SecretAccessKey><SessionToken>tok</SessionToken>\
             <Expiration>{expiration}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
        ),
    )
}

fn issued() -> Response<Full<Bytes>> {
    issued_until("2026-11-28T11:00:00Z")
}

fn refused(status: u16, code: &str, message: &str) -> Response<Full<Bytes>> {
    answer(
        status,
        format!(
            "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
             <Code>{code}</Code><Message>{message}</Message></Error><RequestId>r-1</RequestId></ErrorResponse>"
        ),
    )
}

/// Gives the answers in order; then issues.
async fn sts(answers: Vec<Response<Full<Bytes>>>) -> Server {
    let answers = Mutex::new(VecDeque::from(answers));
    Server::start(move |asked| {
        assert!(verify(asked.headers(), body(asked), SECRET));
        answers.lock().unwrap().pop_front().unwrap_or_else(issued)
    })
    .await
}

fn endpoint(server: &Server) -> Endpoint {
    Endpoint::parse(&format!("http://{}", server.address)).unwrap()
}

fn issuer_with(endpoints: Vec<Endpoint>, token: Option<&str>) -> StsIssuer {
    // Another test may have installed it.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let base = Base::of_keys(BaseCredentials {
        access_key_id: "ASIABASE".into(),
        access_key_secret: SECRET.into(),
        security_token: token.map(Into::into),
    });
    let (client, region) = (StsClient::try_new(false).unwrap(), Region::parse("eu-west-1").unwrap());
    StsIssuer::new(client, endpoints, region, base, SetClock::at(NOW))
}

fn issuer_of(servers: &[&Server]) -> StsIssuer {
    issuer_with(servers.iter().map(|server| endpoint(server)).collect(), Some("base-tok"))
}

fn session(hours: u64) -> RoleSession {
    let base = BaseArn::parse_in(ArnStyle::Aws, "arn:aws:iam::123456789012:role/team").unwrap();
    RoleSession {
        role: base.arn_for("app").unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("shop.checkout").unwrap(),
        duration: Duration::from_hours(hours),
        tags: [].into(),
        source_identity: None,
    }
}

fn sent(asked: &Asked) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(body(asked)).into_owned().collect()
}

fn seconds(asked: &Asked) -> u64 {
    sent(asked)["DurationSeconds"].parse().unwrap()
}

#[tokio::test]
async fn sends_a_signed_assume_role_and_takes_its_answer() {
    let server = sts(vec![]).await;
    let rules = &SessionRules::AWS;
    let session = RoleSession {
        grant: Grant::AssumeRole { external_id: Some(ExternalId::parse("a+b=,.@:/-c").unwrap()) },
        policy: Some(SessionPolicy::parse_in(rules, "{\"Version\": \"2012-10-17\"}\n").unwrap()),
        session_name: SessionName::parse_in(rules, "a+b=c,d").unwrap(),
        ..session(1)
    };

    let credentials = issuer_of(&[&server]).issue(&session).await.unwrap();

    assert_eq!(&*credentials.access_key_id, "ASIAPOD");
    assert_eq!(credentials.access_key_secret.expose_secret(), "hush");
    assert_eq!(credentials.security_token.expose_secret(), "tok");
    assert_eq!(
        (credentials.issued_at.to_string(), credentials.expires_at.to_string().as_str()),
        (NOW.to_owned(), "2026-11-28T11:00:00Z")
    );

    let asked = &server.asked()[0];
    assert_eq!((asked.method().as_str(), asked.uri().to_string().as_str()), ("POST", "/"));
    let expected = [
        ("Action", "AssumeRole"),
        ("DurationSeconds", "3600"),
        ("ExternalId", "a+b=,.@:/-c"),
        ("Policy", "{\"Version\": \"2012-10-17\"}\n"),
        ("RoleArn", "arn:aws:iam::123456789012:role/team/app"),
        ("RoleSessionName", "a+b=c,d"),
        ("Version", "2011-06-15"),
    ];
    assert_eq!(sent(asked), expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    for (name, value) in [
        ("host", &*server.address.to_string()),
        ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
        ("x-amz-date", "20261128T100000Z"),
        ("x-amz-security-token", "base-tok"),
    ] {
        assert_eq!(asked.headers()[name], value);
    }
    let authorization = asked.headers()["authorization"].to_str().unwrap();
    assert!(
        authorization.contains("Credential=ASIABASE/20261128/eu-west-1/sts/aws4_request, "),
        "{authorization}"
    );
    assert!(!format!("{asked:?}").contains(SECRET));
}

#[tokio::test]
async fn sends_tags_that_all_later_sessions_inherit_and_the_source_identity() {
    let server = sts(vec![]).await;
    let keys = TagKeys::EKS;
    let tags = [
        (keys.cluster, "my cluster/1"),
        (keys.namespace, "shop"),
        (keys.service_account, "checkout"),
        (keys.pod_name, "web-0"),
        (keys.pod_uid, "0a1b2c3d-0000-4000-8000-000000000001"),
    ];
    let tag = |(key, value)| Tag { key, value: TagValue::parse(value).unwrap() };
    let plain = session(1);
    let full = RoleSession {
        tags: tags.map(tag).into(),
        source_identity: Some(SourceIdentity::fit("shop.checkout")),
        ..plain.clone()
    };
    let issuer = issuer_of(&[&server]);

    issuer.issue(&full).await.unwrap();
    issuer.issue(&plain).await.unwrap();

    let asked = server.asked();
    let (full, plain) = (sent(&asked[0]), sent(&asked[1]));
    assert_eq!(full["SourceIdentity"], "shop.checkout");
    for (index, (key, value)) in tags.into_iter().enumerate() {
        let member = |list: &str| full[&format!("{list}.member.{}", index + 1)].as_str();
        let part = |part: &str| full[&format!("Tags.member.{}.{part}", index + 1)].as_str();
        assert_eq!((part("Key"), part("Value"), member("TransitiveTagKeys")), (key, value, key));
    }
    assert_eq!(full.len(), plain.len() + 3 * tags.len() + 1);
    assert!(!plain.keys().any(|name| name.contains("Tag") || name.contains("Identity")), "{plain:?}");
}

#[tokio::test]
async fn reports_what_sts_refuses_and_asks_once_only() {
    for (status, code, kind) in [
        (403, "AccessDenied", IssueErrorKind::Denied),
        (400, "MalformedPolicyDocument", IssueErrorKind::Invalid),
        (400, "PackedPolicyTooLarge", IssueErrorKind::Invalid),
        (403, "SignatureDoesNotMatch", IssueErrorKind::BaseCredentials),
        // Static keys have no others.
        (403, "InvalidClientTokenId", IssueErrorKind::BaseCredentials),
        (403, "ExpiredToken", IssueErrorKind::BaseCredentials),
        (403, "OptInRequired", IssueErrorKind::Unexpected),
        (400, "Throttling", IssueErrorKind::Throttled),
        (503, "ServiceUnavailable", IssueErrorKind::Unavailable),
    ] {
        let server = sts(vec![refused(status, code, "as it is")]).await;

        let error = issuer_of(&[&server]).issue(&session(1)).await.unwrap_err();

        assert_eq!((error.kind, &*error.code, &*error.message), (kind, code, "as it is"));
        assert_eq!(error.request_id.as_deref(), Some("r-1"));
        assert_eq!(server.asked().len(), 1, "{code}");
        assert!(!format!("{error:?}").contains("hush"));
    }
}

#[tokio::test]
async fn a_chained_role_gets_one_hour_at_once_and_from_then_on() {
    let server = Server::start(|asked| match seconds(asked) {
        0..=3600 => issued(),
        _ => refused(400, "ValidationError", CHAINING),
    })
    .await;
    let issuer = issuer_of(&[&server]);

    for _ in 0..3 {
        issuer.issue(&session(12)).await.unwrap();
    }

    let asked: Vec<_> = server.asked().iter().map(seconds).collect();
    assert_eq!(asked, [43_200, 3600, 3600, 3600]);
}

#[tokio::test]
async fn a_role_with_a_shorter_maximum_gets_one_hour_and_at_each_refresh_the_next_one_down() {
    let server = Server::start(|asked| match seconds(asked) {
        0..=14_400 => issued(),
        _ => refused(400, "ValidationError", LONGEST),
    })
    .await;
    let issuer = issuer_of(&[&server]);

    for _ in 0..4 {
        issuer.issue(&session(12)).await.unwrap();
    }

    let asked: Vec<_> = server.asked().iter().map(|asked| seconds(asked) / 3600).collect();
    assert_eq!(asked, [12, 1, 8, 1, 6, 1, 4]);
    let always = Server::start(|_| refused(400, "ValidationError", LONGEST)).await;
    let error = issuer_of(&[&always]).issue(&session(1)).await.unwrap_err();
    assert_eq!((error.kind, always.asked().len()), (IssueErrorKind::Invalid, 1), "no shorter one to ask for");
}

#[tokio::test]
async fn adopts_the_time_of_sts_when_the_signature_is_too_old_and_remembers_it() {
    let mut expired =
        refused(403, "SignatureDoesNotMatch", "Signature expired: 20261128T100000Z is now earlier");
    expired.headers_mut().insert("date", http::HeaderValue::from_static("Sat, 28 Nov 2026 10:30:00 GMT"));
    let server = sts(vec![expired]).await;
    let issuer = issuer_of(&[&server]);

    issuer.issue(&session(1)).await.unwrap();
    issuer.issue(&session(1)).await.unwrap();

    let asked = server.asked();
    let dates: Vec<_> = asked.iter().map(|asked| asked.headers()["x-amz-date"].to_str().unwrap()).collect();
    assert_eq!(dates, ["20261128T100000Z", "20261128T103000Z", "20261128T103000Z"]);
}

/// STS is off in its region for the role `foreign`, and on for all others.
async fn off_for_a_foreign_account() -> Server {
    Server::start(|asked| match sent(asked)["RoleArn"].ends_with("/foreign") {
        true => refused(403, "RegionDisabledException", "STS is not activated"),
        false => issued(),
    })
    .await
}

fn session_of(role: &str) -> RoleSession {
    let base = BaseArn::parse_in(ArnStyle::Aws, "arn:aws:iam::123456789012:role/team").unwrap();
    RoleSession { role: base.arn_for(role).unwrap(), ..session(1) }
}

#[tokio::test]
async fn a_region_that_is_off_moves_the_role_it_was_refused_for_and_no_other() {
    let (regional, global) = (off_for_a_foreign_account().await, sts(vec![]).await);
    let issuer = issuer_of(&[&regional, &global]);

    for _ in 0..2 {
        issuer.issue(&session_of("foreign")).await.unwrap();
        issuer.issue(&session_of("own")).await.unwrap();
    }

    let roles = |server: &Server| -> Vec<String> {
        let of = |asked: &Asked| sent(asked)["RoleArn"].rsplit('/').next().unwrap().to_owned();
        server.asked().iter().map(of).collect()
    };
    assert_eq!(roles(&regional), ["foreign", "own", "own"], "the second call for the first role goes by");
    assert_eq!(roles(&global), ["foreign", "foreign"]);
    assert_eq!(global.asked()[0].headers()["host"], global.address.to_string());
    assert!(issuer.0.transport.detour().is_none(), "the detour is for all roles");
}

#[tokio::test]
async fn a_role_is_refused_where_sts_is_off_and_no_other_endpoint_is_left() {
    let off = off_for_a_foreign_account().await;

    for servers in [&[&off][..], &[&off, &off]] {
        let error = issuer_of(servers).issue(&session_of("foreign")).await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unavailable, "RegionDisabledException"));
    }
}

#[tokio::test]
async fn a_role_goes_back_to_the_first_endpoint_when_its_own_does_not_answer() {
    let is_off = Arc::new(AtomicBool::new(true));
    let off = Arc::clone(&is_off);
    let regional = Server::start(move |_| match off.load(Ordering::SeqCst) {
        true => refused(403, "RegionDisabledException", "STS is not activated"),
        false => issued(),
    })
    .await;
    let global = sts(vec![issued(), refused(503, "ServiceUnavailable", "")]).await;
    let issuer = issuer_of(&[&regional, &global]);
    issuer.issue(&session(1)).await.unwrap();

    is_off.store(false, Ordering::SeqCst);
    let error = issuer.issue(&session(1)).await.unwrap_err();
    issuer.issue(&session(1)).await.unwrap();

    assert_eq!(error.kind, IssueErrorKind::Unavailable);
    assert_eq!((regional.asked().len(), global.asked().len()), (2, 2));
}

#[tokio::test]
async fn goes_on_to_the_next_endpoint_when_one_cannot_be_reached() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = Endpoint::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    drop(listener);
    let server = sts(vec![]).await;
    let issuer = issuer_with(vec![closed.clone(), endpoint(&server)], None);

    issuer.issue(&session(1)).await.unwrap();
    issuer.issue(&session(1)).await.unwrap();

    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert!(!asked[1].headers().contains_key("x-amz-security-token"), "static keys have no token");
    let error = issuer_with(vec![closed], None).issue(&session(1)).await.unwrap_err();
    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unavailable, "Connect"));
}

#[tokio::test]
async fn nonsense_is_an_outage_and_never_a_denial() {
    let document = "<!DOCTYPE x [<!ENTITY e \"AccessDenied\">]><ErrorResponse><Error><Code>&e;</Code></Error></ErrorResponse>";
    for wrong in [
        answer(200, "<html>"),
        answer(200, r#"{"AssumeRoleResponse":{}}"#),
        issued_until(NOW),
        answer(200, "x".repeat(BODY_LIMIT_BYTES + 1)),
        answer(403, "<html>"),
        answer(403, document),
        answer(302, ""),
    ] {
        let server = sts(vec![wrong]).await;

        let error = issuer_of(&[&server]).issue(&session(1)).await.unwrap_err();

        assert_eq!(error.kind, IssueErrorKind::Unavailable, "{error:?}");
        assert_eq!(server.asked().len(), 1);
        assert!(!format!("{error:?}").contains("hush"));
    }
}
