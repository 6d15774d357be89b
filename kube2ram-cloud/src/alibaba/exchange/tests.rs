//! The exchange for pods' roles, against a scripted STS on loopback. What a real one checks of a token is the
//! sandbox's.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Mutex,
    time::Duration,
};

use async_trait::async_trait;
use http::Response;
use http_body_util::Full;
use secrecy::ExposeSecret as _;
use tokio::time::Instant;

use super::*;
use crate::{
    alibaba::{
        base::{Base, BaseCredentials},
        sts::StsIssuer,
    },
    credentials::{AccountToken, Credentials, IssueError, Issuer as _},
    issuer::CALL_DEADLINE,
    role::{Grant, RoleSession, ServiceAccount, SourceIdentity, Tag, TagKeys, TagValue},
    testing::{Asked, Server, SetClock, Tokens, answer, body},
};

const NOW: &str = "2026-11-21T21:30:00Z";
const ROLE: &str = "acs:ram::1234567890123456:role/pod-role";
const PROVIDER: &str = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123";
const SUBJECT: &str = "system:serviceaccount:shop:web";
const SESSION_ARN: &str = "acs:ram::1234567890123456:assumed-role/pod-role/shop.web";

fn issued_to(holder: &str) -> Response<Full<Bytes>> {
    answer(
        200,
        format!(
            r#"{{"RequestId":"r-7",{holder}"Credentials":{{"AccessKeyId":"STS.pod","AccessKeySecret":"hush",
            "SecurityToken":"tok","Expiration":"2026-11-21T22:30:00Z"}}}}"#
        ),
    )
}

fn holder(subject: &str, session_arn: &str) -> String {
    format!(
        r#""OIDCTokenInfo":{{"Subject":"{subject}","ClientIds":"sts.aliyuncs.com","VerificationInfo":"Success"}},
        "AssumedRoleUser":{{"Arn":"{session_arn}","AssumedRoleId":"3:shop.web"}},"#
    )
}

fn issued() -> Response<Full<Bytes>> {
    issued_to(&holder(SUBJECT, SESSION_ARN))
}

/// Repeats the token in its message.
fn refused(status: u16, code: &str, asked: &Asked) -> Response<Full<Bytes>> {
    let token = &sent(asked)["OIDCToken"];
    answer(status, format!(r#"{{"RequestId":"r-1","Code":"{code}","Message":"{token} is refused"}}"#))
}

struct Bench {
    issuer: RoleIssuer<AccountCall, TokenExchange>,
    tokens: Arc<Tokens>,
    server: Server,
}

/// Refuses with each of these, then issues.
async fn bench(refusals: &[(u16, &'static str)]) -> Bench {
    let refusals = Mutex::new(VecDeque::from(refusals.to_vec()));
    bench_of(vec![], move |asked| {
        let refusal = refusals.lock().unwrap().pop_front();
        refusal.map_or_else(issued, |(status, code)| refused(status, code, asked))
    })
    .await
}

async fn bench_of(
    tokens: Vec<Result<String, IssueErrorKind>>,
    answer: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static,
) -> Bench {
    let clock = SetClock::at(NOW);
    let (server, tokens) = (Server::start(answer).await, Tokens::new(&clock, tokens));
    let provider = OidcProviderArn::parse(PROVIDER).unwrap();
    let source = Arc::clone(&tokens) as Arc<dyn TokenSource>;
    let issuer = issuer(client(), vec![endpoint(&server)], Some(provider), source, clock);
    Bench { issuer, tokens, server }
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

fn decoded(form: &[u8]) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(form).into_owned().collect()
}

fn sent(asked: &Asked) -> BTreeMap<String, String> {
    decoded(body(asked))
}

fn public(asked: &Asked) -> BTreeMap<String, String> {
    decoded(asked.uri().query().unwrap().as_bytes())
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
    let policy = r#"{"Version":"1","Statement":[]}"#;
    let session = RoleSession { policy: Some(SessionPolicy::parse(policy).unwrap()), ..session(2) };

    let credentials = bench.issuer.issue(&session).await.unwrap();

    assert_eq!(&*credentials.access_key_id, "STS.pod");
    assert_eq!(credentials.access_key_secret.expose_secret(), "hush");
    assert_eq!(credentials.security_token.expose_secret(), "tok");
    assert_eq!(credentials.request_id.as_deref(), Some("r-7"));
    assert_eq!(
        (credentials.issued_at.to_string(), credentials.expires_at.to_string().as_str()),
        (NOW.to_owned(), "2026-11-21T22:30:00Z")
    );
    assert_eq!(bench.tokens.asked(), [(SUBJECT.to_owned(), "sts.aliyuncs.com".to_owned(), 600)]);

    let (asked, token) = (&bench.server.asked()[0], Tokens::numbered(1));
    assert_eq!((asked.method().as_str(), asked.uri().path()), ("POST", "/"));
    let expected = [
        ("DurationSeconds", "7200"),
        ("OIDCProviderArn", PROVIDER),
        ("OIDCToken", &*token),
        ("Policy", policy),
        ("RoleArn", ROLE),
        ("RoleSessionName", "shop.web"),
    ];
    assert_eq!(sent(asked), expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    let public = public(asked);
    assert_eq!((&*public["Action"], &*public["Timestamp"]), ("AssumeRoleWithOIDC", NOW));
    assert!(!asked.headers().contains_key("authorization") && !asked.uri().to_string().contains("eyJ"));
}

#[tokio::test]
async fn each_exchange_has_a_token_of_its_own() {
    let bench = bench(&[]).await;

    bench.issue().await.unwrap();
    bench.issue().await.unwrap();

    assert_eq!(bench.sent("OIDCToken"), [Tokens::numbered(1), Tokens::numbered(2)]);
}

#[tokio::test]
async fn follows_the_table_and_repeats_nothing_of_the_token() {
    use IssueErrorKind::{ClusterConfiguration, Denied, Invalid, NoSuchRole, Throttled, Token, Unavailable};

    for (status, code, kind, lifetimes) in [
        (400, "AuthenticationFail.OIDCToken.Expired", Token, vec![600, 3600]),
        (400, "AuthenticationFail.OIDCToken.Invalid", ClusterConfiguration, vec![600, 600]),
        (400, "AuthenticationFail.OIDCToken.AudienceNotMatch", ClusterConfiguration, vec![600]),
        (400, "AuthenticationFail.OIDCToken.IssuerNotMatch", ClusterConfiguration, vec![600]),
        (400, "AuthenticationFail.OIDCToken.PublicKeyFingerprintMismatch", ClusterConfiguration, vec![600]),
        (400, "AuthenticationFail.OIDCToken.IssuerConfigurationBroken", Unavailable, vec![600]),
        (404, "EntityNotExist.OIDCProvider", ClusterConfiguration, vec![600]),
        (403, "AuthenticationFail.NoPermission", Denied, vec![600]),
        (404, "EntityNotExist.Role", NoSuchRole, vec![600]),
        (400, "InvalidParameter.DurationSeconds", Invalid, vec![600]),
        (400, "Throttling.User", Throttled, vec![600]),
        (503, "ServiceUnavailable", Unavailable, vec![600]),
    ] {
        let bench = bench(&[(status, code); 2]).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (kind, code));
        assert_eq!(
            (&*error.message, error.request_id.as_deref()),
            ("withheld, because it repeats the token", Some("r-1"))
        );
        assert!(!format!("{error:?}").contains("eyJ"), "{error:?}");
        assert_eq!(bench.tokens.lifetimes(), lifetimes, "{code}");
        assert_eq!(bench.server.asked().len(), lifetimes.len(), "{code}");
    }
}

#[tokio::test]
async fn another_token_is_sent_once_and_may_help() {
    for (code, lifetimes) in [
        ("AuthenticationFail.OIDCToken.Expired", [600, 3600]),
        ("AuthenticationFail.OIDCToken.Invalid", [600, 600]),
    ] {
        let bench = bench(&[(400, code)]).await;

        assert!(bench.issue().await.is_ok(), "{code}");

        assert_eq!(bench.tokens.lifetimes(), lifetimes, "{code}");
        assert_eq!(bench.sent("OIDCToken"), [Tokens::numbered(1), Tokens::numbered(2)], "{code}");
    }
}

#[tokio::test]
async fn a_used_nonce_and_a_wrong_time_take_the_same_token_again() {
    let bench = bench(&[(400, "SignatureNonceUsed")]).await;
    assert!(bench.issue().await.is_ok());
    let nonces: Vec<_> =
        bench.server.asked().iter().map(|asked| public(asked)["SignatureNonce"].clone()).collect();
    assert!(nonces.len() == 2 && nonces[0] != nonces[1], "{nonces:?}");
    assert_eq!(bench.sent("OIDCToken"), [Tokens::numbered(1), Tokens::numbered(1)]);

    let late = Mutex::new(true);
    let bench = bench_of(vec![], move |asked| {
        if !std::mem::take(&mut *late.lock().unwrap()) {
            return issued();
        }
        let mut refusal = refused(400, "InvalidTimeStamp.Expired", asked);
        let date = http::HeaderValue::from_static("Sat, 21 Nov 2026 22:00:00 GMT");
        refusal.headers_mut().insert("date", date);
        refusal
    })
    .await;
    assert!(bench.issue().await.is_ok());
    let times: Vec<_> = bench.server.asked().iter().map(|asked| public(asked)["Timestamp"].clone()).collect();
    assert_eq!(times, [NOW, "2026-11-21T22:00:00Z"]);
    assert_eq!(bench.tokens.lifetimes(), [600]);
}

#[tokio::test]
async fn a_role_that_allows_no_session_as_long_as_wanted_gets_one_hour_and_then_the_next_one_down() {
    let bench = bench_of(vec![], |asked| match sent(asked)["DurationSeconds"].parse::<u64>().unwrap() {
        0..=7200 => issued(),
        _ => refused(400, "InvalidParameter.DurationSeconds", asked),
    })
    .await;

    for _ in 0..2 {
        bench.issuer.issue(&session(4)).await.unwrap();
    }

    assert_eq!(bench.sent("DurationSeconds"), ["14400", "3600", "7200"]);
    assert_eq!(bench.tokens.lifetimes(), [600, 600], "a token for each exchange, not for each call");
}

#[tokio::test]
async fn an_answer_to_another_call_is_refused_as_nonsense() {
    let other_role = "acs:ram::1234567890123456:assumed-role/other/shop.web";
    let other_account = "acs:ram::9999999999999999:assumed-role/pod-role/shop.web";
    for (subject, session_arn) in [
        ("system:serviceaccount:shop:other", SESSION_ARN),
        ("system:serviceaccount:other:web", SESSION_ARN),
        ("", SESSION_ARN),
        (SUBJECT, other_role),
        (SUBJECT, other_account),
        (SUBJECT, ""),
    ] {
        let holder = holder(subject, session_arn);
        let bench = bench_of(vec![], move |_| issued_to(&holder)).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!(
            (error.kind, &*error.code),
            (IssueErrorKind::Unavailable, "Nonsense"),
            "{subject} {session_arn}"
        );
        assert!(!format!("{error:?}").contains("hush"));
        assert_eq!(bench.server.asked().len(), 1);
    }
    // An STS that names neither is taken at its word, as for AssumeRole.
    assert!(bench_of(vec![], |_| issued_to("")).await.issue().await.is_ok());
}

#[tokio::test]
async fn without_a_token_nothing_is_sent() {
    for kind in [IssueErrorKind::Token, IssueErrorKind::Throttled, IssueErrorKind::ClusterConfiguration] {
        let bench = bench_of(vec![Err(kind)], |_| issued()).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (kind, "Scripted"));
        assert_eq!(error.retry_after, Some(Duration::from_secs(7)));
        assert_eq!(bench.server.asked().len(), 0);
        assert!(bench.issue().await.is_ok(), "the twin");
    }
}

#[tokio::test]
async fn a_second_token_that_is_not_given_ends_the_exchange() {
    let script = vec![Ok(Tokens::numbered(1)), Err(IssueErrorKind::Token)];
    let bench = bench_of(script, |asked| refused(400, "AuthenticationFail.OIDCToken.Expired", asked)).await;

    let error = bench.issue().await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "Scripted"));
    assert_eq!(bench.server.asked().len(), 1);
}

#[tokio::test]
async fn what_is_no_token_is_not_sent() {
    for text in ["", "abc", "eyJ&RoleArn=acs", "eyJ e30", "eyJ\ne30", "é.é.é.é", &"a".repeat(20_001)] {
        let bench = bench_of(vec![Ok(text.to_owned())], |_| issued()).await;

        let error = bench.issue().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "Token"), "{text:.20}");
        assert_eq!(bench.server.asked().len(), 0);
    }
}

#[tokio::test]
async fn a_session_that_is_not_for_an_exchange_is_refused_before_a_token_is_requested() {
    let bench = bench(&[]).await;
    let tag = Tag { key: TagKeys::EKS.namespace, value: TagValue::parse("shop").unwrap() };
    for refused in [
        RoleSession { grant: Grant::ASSUME_ROLE, ..session(1) },
        RoleSession { tags: [tag].into(), ..session(1) },
        RoleSession { source_identity: Some(SourceIdentity::fit("shop.web")), ..session(1) },
    ] {
        let error = bench.issuer.issue(&refused).await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unexpected, "Grant"));
    }
    assert_eq!((bench.tokens.asked().len(), bench.server.asked().len()), (0, 0));
    assert!(bench.issue().await.is_ok(), "the twin");
}

#[tokio::test]
async fn the_agents_own_identity_never_stands_in_for_a_service_account() {
    let server = Server::start(|_| issued()).await;
    let base = Base::of_keys(BaseCredentials {
        access_key_id: "STS.base".into(),
        access_key_secret: "base-hush".into(),
        security_token: None,
    });
    let signing = StsIssuer::new(client(), vec![endpoint(&server)], base, SetClock::at(NOW));

    let error = signing.issue(&session(1)).await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unexpected, "Grant"));
    assert_eq!(server.asked().len(), 0);
    let own = RoleSession { grant: Grant::ASSUME_ROLE, ..session(1) };
    assert!(signing.issue(&own).await.is_ok(), "the twin");
}

#[tokio::test]
async fn without_a_provider_nothing_is_issued() {
    let server = Server::start(|_| issued()).await;
    let clock = SetClock::at(NOW);
    let tokens = Tokens::new(&clock, vec![]);
    let issuer = issuer(client(), vec![endpoint(&server)], None, tokens, clock);

    let error = issuer.issue(&session(1)).await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::ClusterConfiguration, "OidcProvider"));
    assert_eq!(server.asked().len(), 0);
}

/// An API server that never answers.
struct Silent;

#[async_trait]
impl TokenSource for Silent {
    async fn token(&self, _: &ServiceAccount, _: &str, _: Duration) -> Result<AccountToken, IssueError> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_holds_for_both_servers_together() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = Endpoint::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let provider = OidcProviderArn::parse(PROVIDER).unwrap();
    let clock = SetClock::at(NOW);
    let tokens = Tokens::new(&clock, vec![]);
    for source in [Arc::new(Silent) as Arc<dyn TokenSource>, tokens] {
        let issuer =
            issuer(client(), vec![silent.clone()], Some(provider.clone()), source, Arc::clone(&clock) as _);
        let before = Instant::now();

        let error = issuer.issue(&session(1)).await.unwrap_err();

        assert_eq!(error.kind, IssueErrorKind::Unavailable);
        assert!(before.elapsed() <= CALL_DEADLINE + Duration::from_millis(1), "{:?}", before.elapsed());
    }
}
