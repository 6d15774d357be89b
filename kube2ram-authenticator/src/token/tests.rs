//! Vectors of ack-ram-authenticator's own tests, vectors computed apart, and what only this reader refuses.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::ToSpan as _;
use kube2ram_cloud::BaseCredentials;
use proptest::prelude::*;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::*;

const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";
const NOW: &str = "2026-01-02T03:04:05Z";

fn cluster() -> ClusterId {
    ClusterId::parse(CLUSTER).unwrap()
}

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn keys(security_token: Option<&str>) -> BaseCredentials {
    BaseCredentials {
        access_key_id: if security_token.is_some() { "STS.testid" } else { "testid" }.into(),
        access_key_secret: "testsecret".into(),
        security_token: security_token.map(Into::into),
    }
}

fn token(security_token: Option<&str>) -> String {
    let token = presign(&cluster(), &keys(security_token), now(), "kube2ram/0.1.0").unwrap();
    token.expose_secret().to_owned()
}

fn decoded(token: &str) -> Value {
    serde_json::from_slice(&STANDARD.decode(token.strip_prefix(PREFIX).unwrap()).unwrap()).unwrap()
}

fn encoded(document: &Value) -> String {
    format!("{PREFIX}{}", STANDARD.encode(document.to_string()))
}

fn parse(token: &str) -> Result<SignedCall, TokenError> {
    SignedCall::parse(token, &cluster())
}

/// The error of a good token in which something was changed.
fn error_of(security_token: Option<&str>, change: impl FnOnce(&mut Value)) -> TokenError {
    let mut document = decoded(&token(security_token));
    assert!(parse(&encoded(&document)).is_ok(), "the allowed twin");
    change(&mut document);
    parse(&encoded(&document)).unwrap_err()
}

#[test]
fn writes_the_tokens_that_were_computed_apart() {
    for (security_token, length, sha256) in [
        (None, 771, "550796f3a9f9e670028cff0de432b9b77fc6f8295e4639e68879440688c7fb8b"),
        (Some("stoken"), 847, "8ab1bf2c7c749328b33b3d2f50602720461ebe80474ee5c065d75bce96ffdba1"),
    ] {
        let token = token(security_token);

        let digest = Sha256::digest(token.as_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((token.len(), hex.as_str()), (length, sha256));
    }
}

#[test]
fn reads_what_it_writes() {
    for security_token in [None, Some("stoken")] {
        let call = parse(&token(security_token)).unwrap();

        assert_eq!(call.query(), [("ACKClusterId", CLUSTER)]);
        assert_eq!(call.access_key_id(), &*keys(security_token).access_key_id);
        assert_eq!(call.signed_at(), now());
        let given = call.headers().get("x-acs-security-token").map(|value| value.to_str().unwrap());
        assert_eq!(given, security_token);
        assert_eq!(call.headers()["user-agent"], "kube2ram/0.1.0");
    }
}

#[test]
fn reads_a_token_of_ack_ram_tool() {
    // As its documents show it.
    let cluster = ClusterId::parse("c2faf4f7584e349cda6dda2a*********").unwrap();
    let names = "x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-version";
    let signature = "1b4dbf1a".repeat(8);
    let document = json!({
        "clusterId": cluster.as_str(), "method": "POST", "path": "/",
        "query": { "ACKClusterId": cluster.as_str() },
        "headers": {
            "Authorization": format!(
                "ACS3-HMAC-SHA256 Credential=************SJGW2B******,SignedHeaders={names},Signature={signature}"
            ),
            "user-agent": "ack-ram-tool/v0.0.0 (darwin/arm64)",
            "x-acs-action": "GetCallerIdentity",
            "x-acs-content-sha256": EMPTY_PAYLOAD,
            "x-acs-date": "2024-07-31T11:35:24Z",
            "x-acs-version": "2015-04-01",
        },
    });

    let call = SignedCall::parse(&encoded(&document), &cluster).unwrap();

    assert_eq!(call.access_key_id(), "************SJGW2B******");
    assert_eq!(call.signed_at().to_string(), "2024-07-31T11:35:24Z");
}

#[test]
fn refuses_the_tokens_of_others_by_their_beginning_alone() {
    for foreign in ["", "k8s-ack-v1.e30=", "k8s-aws-v1.abc", "eyJhbGciOi.JIUzI1NiJ9.e30", "K8S-ACK-V2.e30="] {
        assert_eq!(parse(foreign).unwrap_err(), TokenError::Foreign, "{foreign}");
    }
    assert_eq!(parse(&"x".repeat(2 * LIMIT_BYTES)).unwrap_err(), TokenError::Foreign);
    assert_eq!(parse(&format!("{PREFIX}foobar")).unwrap_err(), TokenError::Base64);
    assert_eq!(parse(&format!("{PREFIX}Zm9vYmFy")).unwrap_err(), TokenError::Json);
}

#[test]
fn refuses_a_token_over_the_limit_but_not_one_at_it() {
    let padded = |length: usize| {
        let mut document = decoded(&token(Some("stoken"))).to_string();
        while PREFIX.len() + (document.len() + 3).div_ceil(3) * 4 <= length {
            document.push_str("   ");
        }
        format!("{PREFIX}{}", STANDARD.encode(document))
    };

    let longest = padded(LIMIT_BYTES);
    assert!(longest.len() <= LIMIT_BYTES && longest.len() + 4 > LIMIT_BYTES, "{}", longest.len());
    assert!(parse(&longest).is_ok());
    let longer = padded(LIMIT_BYTES + 4);
    assert!(longer.len() > LIMIT_BYTES);
    assert_eq!(parse(&longer).unwrap_err(), TokenError::TooLarge);
    // Longer than the predecessor takes.
    assert!(parse(&token(Some(&"t".repeat(6000)))).is_ok());
}

#[test]
fn refuses_a_token_of_another_cluster_or_of_none() {
    let changes: [fn(&mut Value); 6] = [
        |document| document["query"]["ACKClusterId"] = "c1".into(),
        |document| document["query"]["ACKClusterId"] = "C0123456789ABCDEF0123456789ABCDEF".into(),
        |document| document["query"]["ACKClusterId"] = "".into(),
        |document| document["query"] = json!({}),
        |document| document["clusterId"] = "c1".into(),
        |document| drop(document.as_object_mut().unwrap().remove("query")),
    ];

    for change in changes {
        assert_eq!(error_of(None, change), TokenError::Cluster);
    }
}

#[test]
fn refuses_a_query_with_anything_else() {
    let with = |name: &'static str| {
        error_of(None, move |document| document["query"][name] = "GetCallerIdentity".into())
    };

    for name in ["x-acs-action", "ackclusterid", "Action", "extra"] {
        assert_eq!(with(name), TokenError::Query, "{name}");
    }
    let instead = error_of(None, |document| document["query"] = json!({ "ackclusterid": CLUSTER }));
    assert_eq!(instead, TokenError::Query);
}

#[test]
fn refuses_another_call_than_the_one() {
    for (header, value, error) in [
        ("x-acs-action", "GetCallerIdentityXX", TokenError::Action),
        ("x-acs-action", "getcalleridentity", TokenError::Action),
        ("x-acs-action", "AssumeRole", TokenError::Action),
        ("x-acs-version", "2015-04-02", TokenError::Action),
        (
            "x-acs-content-sha256",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b856",
            TokenError::Payload,
        ),
        ("x-acs-date", "2026-01-02T03:04:05", TokenError::Date),
        ("Authorization", "foobar", TokenError::Authorization),
    ] {
        let changed = error_of(None, |document| document["headers"][header] = value.into());
        assert_eq!(changed, error, "{header}: {value}");
        let removed =
            error_of(None, |document| drop(document["headers"].as_object_mut().unwrap().remove(header)));
        assert_eq!(removed, error, "without {header}");
    }
}

#[test]
fn refuses_headers_that_are_unknown_or_twice_or_cannot_be_sent() {
    for (name, value) in [
        ("host", "sts.example.com"),
        ("X-Acs-Action", "GetCallerIdentity"),
        ("authorization", "foobar"),
        ("x-acs-content-sm3", "x"),
        ("x-acs-region-id", "cn-hangzhou"),
        ("ACKClusterId", CLUSTER),
        ("", "x"),
        ("x-acs-signature-nonce", "a b"),
        ("user-agent", ""),
        ("user-agent", "a\r\nx-acs-action: AssumeRole"),
        ("user-agent", "a\0"),
        ("user-agent", "é"),
    ] {
        let error = error_of(None, |document| document["headers"][name] = value.into());
        assert_eq!(error, TokenError::Header, "{name}: {value:?}");
    }
    let long = error_of(None, |document| document["headers"]["user-agent"] = "a".repeat(257).into());
    assert_eq!(long, TokenError::Header);
}

#[test]
fn everything_that_sts_is_to_see_is_signed_and_no_host() {
    fn resigned(document: &mut Value, change: impl Fn(&str) -> String) {
        let authorization = document["headers"]["Authorization"].as_str().unwrap();
        document["headers"]["Authorization"] = change(authorization).into();
    }
    let cases = [
        (None, ";x-acs-date", ""),
        (None, "SignedHeaders=x-acs-action;", "SignedHeaders="),
        (None, ";x-acs-version", ""),
        (None, "SignedHeaders=", "SignedHeaders=host;"),
        (None, "x-acs-date;x-acs-version", "x-acs-version;x-acs-date"),
        (Some("stoken"), ";x-acs-security-token", ""),
    ];

    for (security_token, written, other) in cases {
        let change = |text: &str| text.replace(written, other);
        let error = error_of(security_token, |document| resigned(document, change));
        assert_eq!(error, TokenError::Unsigned);
    }
    let nonce = error_of(None, |document| document["headers"]["x-acs-signature-nonce"] = "n".into());
    assert_eq!(nonce, TokenError::Unsigned);
}

#[test]
fn a_token_is_valid_as_long_as_sts_takes_it() {
    let call = parse(&token(None)).unwrap();
    let at = |offset: i64| call.time_left(now() + offset.seconds());

    assert_eq!(at(0), Ok(Duration::from_mins(15)));
    assert_eq!(at(899), Ok(Duration::from_secs(1)));
    assert_eq!(at(900), Ok(Duration::ZERO));
    assert_eq!(at(901), Err(TokenError::Expired));
    assert_eq!(at(-900), Ok(Duration::from_mins(30)));
    assert_eq!(at(-901), Err(TokenError::Future));
    assert_eq!(call.time_left(Timestamp::MAX), Err(TokenError::Expired));
    assert_eq!(call.time_left(Timestamp::MIN), Err(TokenError::Future));
}

#[test]
fn debug_output_holds_no_secret() {
    let call = parse(&token(Some("stoken"))).unwrap();

    let text = format!("{call:?}");

    assert!(!text.contains("stoken") && !text.contains("Signature="), "{text}");
}

#[test]
fn a_cluster_id_is_one_that_keeps_clusters_apart() {
    for id in [CLUSTER, "c2faf4f7584e349cda6dda2a*********", "prod-1"] {
        assert_eq!(ClusterId::parse(id).unwrap().as_str(), id);
    }
    assert_eq!(ClusterId::parse(""), Err(ClusterIdError::Empty));
    assert_eq!(ClusterId::parse("Default"), Err(ClusterIdError::Common("default")));
    for id in ["a b", "é", "a\n", &"a".repeat(257)] {
        assert_eq!(ClusterId::parse(id), Err(ClusterIdError::Characters), "{id:?}");
    }
}

proptest! {
    #[test]
    fn never_panics(text in any::<String>(), bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        drop(parse(&text));
        drop(parse(&format!("{PREFIX}{}", STANDARD.encode(bytes))));
    }

    #[test]
    fn every_token_that_is_written_is_read(
        id in "[A-Za-z0-9.]{1,40}",
        secret in "[ -~]{1,40}",
        security_token in proptest::option::of("[!-~]{1,400}"),
        user_agent in "[!-~]([ -~]{0,100}[!-~])?",
        seconds in 0_i64..4_000_000_000,
    ) {
        let keys = BaseCredentials {
            access_key_id: id.as_str().into(),
            access_key_secret: secret.into(),
            security_token: security_token.as_deref().map(Into::into),
        };
        let at = Timestamp::from_second(seconds).unwrap();

        let token = presign(&cluster(), &keys, at, &user_agent).unwrap();
        let call = parse(token.expose_secret()).unwrap();

        prop_assert_eq!(call.access_key_id(), id);
        prop_assert_eq!(call.signed_at(), at);
        let given = call.headers().get("x-acs-security-token").map(|value| value.to_str().unwrap());
        prop_assert_eq!(given, security_token.as_deref());
    }

    /// Whatever bytes are changed: a document that is read as another one was not signed by its bearer.
    #[test]
    fn a_changed_token_never_names_another_cluster(at in 0_usize..700, byte in 32_u8..127) {
        let mut json = STANDARD.decode(token(None).strip_prefix(PREFIX).unwrap()).unwrap();
        let at = at % json.len();
        json[at] = byte;
        if let Ok(call) = parse(&format!("{PREFIX}{}", STANDARD.encode(json))) {
            prop_assert_eq!(call.query(), [("ACKClusterId", CLUSTER)]);
            prop_assert!(!call.headers().contains_key("host"));
        }
    }
}
