//! The exchange for pods' roles, against a scripted STS on loopback. What both clouds share is tested with
//! Alibaba Cloud's.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Mutex,
    time::Duration,
};

use http::Response;
use http_body_util::Full;
use secrecy::ExposeSecret as _;

use super::*;
use crate::{
    aws::{
        base::{Base, BaseCredentials},
        endpoint::Region,
        sts::StsIssuer,
    },
    credentials::{Credentials, IssueError, IssueErrorKind, Issuer as _},
    role::{Grant, RoleSession, ServiceAccount, SessionRules},
    testing::{Asked, Server, SetClock, Tokens, answer, body},
};

const NOW: &str = "2026-11-28T10:00:00Z";
const ROLE: &str = "arn:aws:iam::123456789012:role/team/app";
const SUBJECT: &str = "system:serviceaccount:shop:web";
const SESSION_ARN: &str = "arn:aws:sts::123456789012:assumed-role/app/shop.web";

fn issued_to(subject: &str, session_arn: &str) -> Response<Full<Bytes>> {
    answer(
        200,
        format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult>\
             <SubjectFromWebIdentityToken>{subject}</SubjectFromWebIdentityToken>\
             <AssumedRoleUser><Arn>{session_arn}</Arn></AssumedRoleUser>\
             <Credentials><AccessKeyId>ASIAPOD</AccessKeyId><SecretAccessKey>hush</SecretAccessKey>\
             <SessionToken>tok</SessionToken><Expiration>2026-11-28T11:00:00Z</Expiration></Credentials>\
             </AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>r-7</RequestId></ResponseMetadata>\
             </AssumeRoleWithWebIdentityResponse>"
        ),
    )
}

fn issued() -> Response<Full<Bytes>> {
    issued_to(SUBJECT, SESSION_ARN)
}

/// Repeats the token in its message, or says something else.
fn refused(status: u16, code: &str, message: Option<&str>, asked: &Asked) -> Response<Full<Bytes>> {
    let message = message.map_or_else(|| sent(asked)["WebIdentityToken"].clone(), str::to_owned);
    answer(
        status,
        format!(
            "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>\
             <RequestId>r-1</RequestId></ErrorResponse>"
        ),
    )
}

struct Bench {
    issuer: RoleIssuer<AccountCall, TokenExchange>,
    tokens: Arc<Tokens>,
    server: Server,
    /// Asked after the other one; issues always.
    second: Server,
}

/// Refuses with each of these, then issues.
async fn bench(refusals: &[(u16, &'static str)]) -> Bench {
    let refusals = Mutex::new(VecDeque::from(refusals.to_vec()));
    bench_of(move |asked| {
        let refusal = refusals.lock().unwrap().pop_front();
        refusal.map_or_else(issued, |(status, code)| refused(status, code, None, asked))
    })
    .await
}

async fn bench_of(answer: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static) -> Bench {
    let clock = SetClock::at(NOW);
    let (server, second) = (Server::start(answer).await, Server::start(|_| issued()).await);
    let tokens = Tokens::new(&clock, vec![]);
    let source = Arc::clone(&tokens) as Arc<dyn TokenSource>;
    let endpoints = vec![endpoint(&server), endpoint(&second)];
    let issuer = issuer(client(), endpoints, source, clock);
    Bench { issuer, tokens, server, second }
}

fn client() -> StsClient {
    // Another test may have installed it.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    StsClient::try_new(false).unwrap()
}

fn endpoint(server: &Server) -> Endpoint {
    Endpoint::parse(&format!("http://{}", server.address)).unwrap()
}

fn session(hours: u64) -> RoleSession {
    RoleSession {
        role: RoleArn::parse(ROLE).unwrap(),
        grant: Grant::ServiceAccount(ServiceAccount { namespace: "shop".into(), name: "web".into() }),
        policy: None,
        session_name: SessionName::parse("shop.web").unwrap(),
        duration: Duration::from_hours(hours),
        tags: [].into(),
        source_identity: None,
    }
}

fn sent(asked: &Asked) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(body(asked)).into_owned().collect()
}

impl Bench {
    async fn issue(&self) -> Result<Credentials, IssueError> {
        self.issuer.issue(&session(1)).await
    }

    /// What was sent as this parameter, call by call.
    fn sent(&self, parameter: &str) -> Vec<String> {
        self.server.asked().iter().map(|asked| sent(asked)[parameter].clone()).collect()
    }
}

#[tokio::test]
async fn exchanges_a_token_without_a_signature_and_takes_the_answer() {
    let bench = bench(&[]).await;
    let policy = "{\"Version\": \"2012-10-17\"}\n";
    let session = RoleSession {
        policy: Some(SessionPolicy::parse_in(&SessionRules::AWS, policy).unwrap()),
        session_name: SessionName::parse_in(&SessionRules::AWS, "a+b=c,d").unwrap(),
        ..session(12)
    };

    let credentials = bench.issuer.issue(&session).await.unwrap();

    assert_eq!(&*credentials.access_key_id, "ASIAPOD");
    assert_eq!(credentials.access_key_secret.expose_secret(), "hush");
    assert_eq!(credentials.security_token.expose_secret(), "tok");
    assert_eq!(credentials.request_id.as_deref(), Some("r-7"));
    assert_eq!(bench.tokens.asked(), [(SUBJECT.to_owned(), "sts.amazonaws.com".to_owned(), 600)]);

    let (asked, token) = (&bench.server.asked()[0], Tokens::numbered(1));
    assert_eq!((asked.method().as_str(), asked.uri().to_string().as_str()), ("POST", "/"));
    let expected = [
        ("Action", "AssumeRoleWithWebIdentity"),
        ("DurationSeconds", "43200"),
        ("Policy", policy),
        ("RoleArn", ROLE),
        ("RoleSessionName", "a+b=c,d"),
        ("Version", "2011-06-15"),
        ("WebIdentityToken", &*token),
    ];
    assert_eq!(sent(asked), expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert_eq!(asked.headers()["content-type"], FORM);
    for signature in ["authorization", "x-amz-security-token", "x-amz-date"] {
        assert!(!asked.headers().contains_key(signature), "{signature}");
    }
}

#[tokio::test]
async fn follows_the_table_and_repeats_nothing_of_the_token() {
    use IssueErrorKind::{ClusterConfiguration, Denied, Invalid, Throttled, Token, Unavailable};

    for (status, code, kind, lifetimes, calls) in [
        (400, "ExpiredTokenException", Token, vec![600, 3600], 2),
        (400, "InvalidIdentityToken", ClusterConfiguration, vec![600, 600], 2),
        (403, "IDPRejectedClaim", ClusterConfiguration, vec![600, 600], 2),
        (400, "IDPCommunicationError", Unavailable, vec![600], 2),
        (403, "AccessDenied", Denied, vec![600], 1),
        (400, "MalformedPolicyDocument", Invalid, vec![600], 1),
        (400, "PackedPolicyTooLarge", Invalid, vec![600], 1),
        (400, "Throttling", Throttled, vec![600], 1),
        (503, "ServiceUnavailable", Unavailable, vec![600], 1),
    ] {
        let bench = bench(&[(status, code); 2]).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (kind, code));
        assert_eq!(&*error.message, "withheld, because it repeats the token");
        assert!(!format!("{error:?}").contains("eyJ"), "{error:?}");
        assert_eq!((bench.tokens.lifetimes(), bench.server.asked().len()), (lifetimes, calls), "{code}");
    }
}

#[tokio::test]
async fn another_token_is_sent_once_and_may_help() {
    for (code, lifetimes) in [
        ("ExpiredToken", [600, 3600]),
        ("ExpiredTokenException", [600, 3600]),
        ("InvalidIdentityToken", [600, 600]),
    ] {
        let bench = bench(&[(400, code)]).await;

        assert!(bench.issue().await.is_ok(), "{code}");

        assert_eq!(bench.tokens.lifetimes(), lifetimes, "{code}");
        assert_eq!(bench.sent("WebIdentityToken"), [Tokens::numbered(1), Tokens::numbered(2)], "{code}");
    }
}

#[tokio::test]
async fn a_role_with_a_shorter_maximum_gets_one_hour_and_then_the_next_one_down() {
    let longest = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
    let bench = bench_of(move |asked| match sent(asked)["DurationSeconds"].parse::<u64>().unwrap() {
        0..=7200 => issued(),
        _ => refused(400, "ValidationError", Some(longest), asked),
    })
    .await;

    for _ in 0..2 {
        bench.issuer.issue(&session(4)).await.unwrap();
    }

    assert_eq!(bench.sent("DurationSeconds"), ["14400", "3600", "7200"]);
    assert_eq!(bench.tokens.lifetimes(), [600, 600], "a token for each exchange, not for each call");
}

#[tokio::test]
async fn a_region_where_sts_is_off_leads_to_the_next_endpoint_with_the_same_token() {
    let bench = bench(&[(403, "RegionDisabledException")]).await;

    assert!(bench.issue().await.is_ok());

    assert_eq!((bench.server.asked().len(), bench.second.asked().len()), (1, 1));
    assert_eq!(bench.tokens.lifetimes(), [600]);
}

#[tokio::test]
async fn an_answer_to_another_call_is_refused_as_nonsense() {
    for (subject, session_arn) in [
        ("system:serviceaccount:shop:other", SESSION_ARN),
        ("", SESSION_ARN),
        (SUBJECT, "arn:aws:sts::123456789012:assumed-role/other/shop.web"),
        (SUBJECT, "arn:aws:sts::210987654321:assumed-role/app/shop.web"),
        (SUBJECT, "arn:aws:sts::123456789012:federated-user/app/shop.web"),
    ] {
        let bench = bench_of(move |_| issued_to(subject, session_arn)).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unavailable, "Nonsense"), "{session_arn}");
        assert!(!format!("{error:?}").contains("hush"));
        assert_eq!(bench.server.asked().len(), 1);
    }
    assert!(bench(&[]).await.issue().await.is_ok(), "the twin");
}

#[tokio::test]
async fn each_issuer_refuses_a_session_by_the_others_right() {
    let bench = bench(&[]).await;
    let keys = BaseCredentials {
        access_key_id: "ASIABASE".into(),
        access_key_secret: "base-hush".into(),
        security_token: None,
    };
    let region = Region::parse("eu-west-1").unwrap();
    let endpoints = vec![endpoint(&bench.server)];
    let signing = StsIssuer::new(client(), endpoints, region, Base::of_keys(keys), SetClock::at(NOW));
    let own = RoleSession { grant: Grant::ASSUME_ROLE, ..session(1) };

    let errors = [signing.issue(&session(1)).await, bench.issuer.issue(&own).await].map(Result::unwrap_err);

    for error in errors {
        assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unexpected, "Grant"));
    }
    assert_eq!((bench.tokens.asked().len(), bench.server.asked().len()), (0, 0));
}
