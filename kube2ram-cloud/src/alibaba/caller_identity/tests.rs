//! Signing against computed vectors, and sending to a scripted STS on loopback.

use http::{HeaderName, HeaderValue, Response};
use http_body_util::Full;

use super::*;
use crate::{
    canonical::{CanonicalRequest, sha256_hex},
    testing::{Server, SetClock, answer},
};

const NOW: &str = "2026-01-02T03:04:05Z";
const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";
const WHO: &str = r#"{"AccountId":"123456789012","Arn":"acs:ram::123456789012:user/alice","IdentityType":"RAMUser",
    "PrincipalId":"200000000000000000","UserId":"200000000000000000","RequestId":"r-1"}"#;

fn keys(security_token: Option<&str>) -> BaseCredentials {
    BaseCredentials {
        access_key_id: if security_token.is_some() { "STS.testid" } else { "testid" }.into(),
        access_key_secret: "testsecret".into(),
        security_token: security_token.map(Into::into),
    }
}

fn signed(query: &[(&str, &str)], keys: &BaseCredentials) -> HeaderMap {
    let headers = presign(query, keys, NOW.parse().unwrap());
    headers
        .iter()
        .map(|&(name, ref value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
        .collect()
}

fn canonical(query: &[(&str, &str)], headers: &HeaderMap) -> String {
    let mut pairs: Vec<_> =
        headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    pairs.retain(|(name, _)| *name != "authorization");
    let query = canonical_query(query);
    let request = CanonicalRequest {
        method: "POST",
        path: "/",
        query: &query,
        headers: &pairs,
        payload_sha256: EMPTY_PAYLOAD,
    };
    request.text().0.to_string()
}

#[test]
fn signs_no_host_and_no_nonce_as_computed_apart() {
    for (token, canonical_sha256, signature) in [
        (
            None,
            "0d1752fd019b7bf43c0aba61612fbad78eae38de5e67047bf78c93592fb24c54",
            "b141df95a60c8761ba8e518f089acf8dad259be314ac4810581918562a739fe3",
        ),
        (
            Some("stoken"),
            "8865a7b3e3061d1c0558f183cfc54dfe26243b06e2f58655b8fc0d26a60079ad",
            "27a8922a460daffa520d0133448074c357d49f9e623e202b71a8f7463ea5c184",
        ),
    ] {
        let query = [("ACKClusterId", CLUSTER)];

        let headers = signed(&query, &keys(token));

        assert_eq!(sha256_hex(canonical(&query, &headers).as_bytes()), canonical_sha256);
        let authorization = headers["authorization"].to_str().unwrap();
        assert!(authorization.ends_with(&format!(",Signature={signature}")), "{authorization}");
        assert!(!headers.contains_key("host") && !headers.contains_key("x-acs-signature-nonce"));
    }
}

#[test]
fn encodes_a_query_of_any_characters_as_computed_apart() {
    let query = [("ACKClusterId", "c1*/ +~é")];

    let headers = signed(&query, &keys(None));

    let text = canonical(&query, &headers);
    assert!(
        text.starts_with("POST\n/\nACKClusterId=c1%2A%2F%20%2B~%C3%A9\nx-acs-action:GetCallerIdentity\n")
    );
    assert_eq!(
        sha256_hex(text.as_bytes()),
        "4755af9bbb08f9a68edca3de47b3f0ced07816c97b87192436394e6aee66de01"
    );
    let authorization = headers["authorization"].to_str().unwrap();
    assert!(
        authorization.ends_with("Signature=85d908c0a16d68fa0ae6937d95026b3288e2ce33586e400190f30036d85f1deb"),
        "{authorization}"
    );
}

#[test]
fn reads_exact_dates_only() {
    assert_eq!(parse_call_date(NOW).map(|date| date.to_string()), Some(NOW.to_owned()));
    for other in ["2026-01-02T03:04:05+00:00", "2026-01-02 03:04:05Z", "2026-01-02T03:04:05.0Z", ""] {
        assert_eq!(parse_call_date(other), None, "{other}");
    }
}

fn client(endpoints: Vec<Endpoint>) -> CallerIdentityClient {
    // Another test may have installed it.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let clock: Arc<dyn Clock> = SetClock::at(NOW);
    CallerIdentityClient::new(StsClient::try_new(false).unwrap(), endpoints, clock)
}

fn at(address: impl std::fmt::Display) -> Endpoint {
    Endpoint::parse(&format!("http://{address}")).unwrap()
}

fn refused(status: u16, code: &str, message: &str) -> Response<Full<bytes::Bytes>> {
    answer(status, format!(r#"{{"RequestId":"r-1","Code":"{code}","Message":"{message}"}}"#))
}

async fn error_of(answer: impl Fn() -> Response<Full<bytes::Bytes>> + Send + Sync + 'static) -> CallError {
    let server = Server::start(move |_| answer()).await;
    let query = [("ACKClusterId", CLUSTER)];
    let signed = signed(&query, &keys(Some("a-security-token-of-sts")));
    client(vec![at(server.address)]).ask(&query, &signed).await.outcome.unwrap_err()
}

#[tokio::test]
async fn sends_the_signed_call_as_it_is_to_an_endpoint_of_ours() {
    let server = Server::start(|_| {
        let mut response = answer(200, WHO);
        let date = HeaderValue::from_static("Fri, 02 Jan 2026 03:04:09 GMT");
        response.headers_mut().insert(header::DATE, date);
        response
    })
    .await;
    let query = [("ACKClusterId", "c*1")];
    let mut headers = signed(&query, &keys(Some("stoken")));
    headers.insert(header::HOST, HeaderValue::from_static("elsewhere.example"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static("a client"));

    let answer = client(vec![at(server.address)]).ask(&query, &headers).await;

    let caller = answer.outcome.unwrap();
    assert_eq!(&*caller.arn, "acs:ram::123456789012:user/alice");
    assert_eq!(answer.server_time.unwrap().to_string(), "2026-01-02T03:04:09Z");
    let asked = &server.asked()[0];
    assert_eq!(server.targets(), ["POST /?ACKClusterId=c%2A1"]);
    assert_eq!(asked.headers()["host"], *server.address.to_string());
    assert_eq!(
        (&asked.headers()["accept"], &asked.headers()["user-agent"]),
        (&"application/json".parse::<HeaderValue>().unwrap(), &HeaderValue::from_static("a client"))
    );
    for name in ["authorization", "x-acs-action", "x-acs-date", "x-acs-security-token", "x-acs-version"] {
        assert_eq!(asked.headers()[name], headers[name], "{name}");
    }
}

#[tokio::test]
async fn asks_the_next_endpoint_when_one_is_out_of_reach() {
    let server = Server::start(|_| answer(200, WHO)).await;
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let query = [("ACKClusterId", CLUSTER)];
    let client = client(vec![at(closed), at(server.address)]);

    let answer = client.ask(&query, &signed(&query, &keys(None))).await;

    assert!(answer.outcome.is_ok(), "{answer:?}");
    assert_eq!(answer.endpoint, Some(EndpointKind::Other), "a loopback address is none of Alibaba Cloud's");
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn no_endpoint_is_named_where_none_answered_and_one_that_refused_is() {
    let server = Server::start(|_| refused(400, "SignatureDoesNotMatch", "as it is")).await;
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let query = [("ACKClusterId", CLUSTER)];
    let signed = signed(&query, &keys(None));

    let silent = client(vec![at(closed)]).ask(&query, &signed).await;
    let refusing = client(vec![at(server.address)]).ask(&query, &signed).await;

    assert_eq!((&*silent.outcome.unwrap_err().code, silent.endpoint), ("Connect", None));
    assert_eq!(&*refusing.outcome.unwrap_err().code, "SignatureDoesNotMatch");
    assert_eq!(refusing.endpoint, Some(EndpointKind::Other));
}

#[tokio::test]
async fn tells_definite_refusals_from_outages() {
    use CallErrorKind::*;

    for (status, code, kind) in [
        (400, "SignatureDoesNotMatch", Refused),
        (400, "InvalidTimeStamp.Expired", Refused),
        (400, "SignatureNonceUsed", Refused),
        (404, "InvalidAccessKeyId.NotFound", Refused),
        (400, "InvalidSecurityToken.Expired", Refused),
        (403, "NoPermission", Refused),
        (400, "Throttling.User", Throttled),
        (429, "Anything", Throttled),
        (503, "ServiceUnavailable", Unavailable),
        (403, "Forbidden.RiskControl", Unexpected),
    ] {
        let error = error_of(move || refused(status, code, "as it is")).await;
        assert_eq!((error.kind, &*error.code, &*error.message), (kind, code, "as it is"));
    }
    for (status, body, kind) in
        [(200, "xxxx", Unavailable), (403, " ", Unavailable), (200, "{}", Unavailable)]
    {
        assert_eq!(error_of(move || answer(status, body)).await.kind, kind, "{status} {body}");
    }
}

#[tokio::test]
async fn repeats_nothing_of_the_call() {
    let message = "server string to sign is: ACS3-HMAC-SHA256 and so on";
    let error = error_of(move || refused(400, "SignatureDoesNotMatch", message)).await;
    let other = error_of(|| refused(400, "Other", "the token is a-security-token-of-sts")).await;

    for error in [error, other] {
        let text = format!("{error} {error:?}");
        assert!(!text.contains("string to sign") && !text.contains("a-security"), "{text}");
    }
}
