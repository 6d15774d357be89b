//! Bearer tokens: the call of an accepted token has exactly the allowed headers, with the values in the
//! token, and all that STS receives is signed. The judge reads the JSON document by itself.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::{SignedDuration, Timestamp};
use kube2ram_authenticator::token::{ClusterId, PREFIX, SignedCall};
use serde_json::Value;

/// The cluster of all tokens in the corpus.
pub(super) const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";

/// Checks a token, or else the JSON document of a token: mutations of base64 seldom change one field.
pub fn check(data: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(data) else { return false };
    let token = match text.starts_with(PREFIX) {
        true => text.to_owned(),
        false => format!("{PREFIX}{}", STANDARD.encode(text)),
    };
    let Ok(call) = SignedCall::parse(&token, &cluster()) else { return false };
    let encoded = token.strip_prefix(PREFIX).expect("another prefix was refused");
    let json = STANDARD.decode(encoded).expect("what is not base64 was refused");
    assert_eq!(STANDARD.encode(&json), encoded, "a token has one spelling");
    let document: Value = serde_json::from_slice(&json).expect("what is not JSON was refused");
    check_document(&document);
    check_call(&call, &lower_keys(&document["headers"]));
    true
}

pub(super) fn cluster() -> ClusterId {
    ClusterId::parse(CLUSTER).expect("the cluster id is legal")
}

fn check_call(call: &SignedCall, headers: &BTreeMap<String, String>) {
    assert_eq!(call.query(), [("ACKClusterId", CLUSTER)]);
    assert_eq!(call.headers().len(), headers.len());
    for (name, value) in headers {
        assert!(ALLOWED.contains(&name.as_str()), "{name}");
        assert_eq!(call.headers()[name].as_bytes(), value.as_bytes(), "{name}");
        assert!(!value.is_empty() && value.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{name}");
    }
    assert_eq!(headers["x-acs-action"], "GetCallerIdentity");
    assert_eq!(headers["x-acs-version"], "2015-04-01");
    assert_eq!(headers["x-acs-content-sha256"], HASH_OF_NOTHING);
    check_authorization(call, headers);
    let date = &headers["x-acs-date"];
    assert_eq!(date.len(), "2026-01-02T03:04:05Z".len());
    assert_eq!(date.parse::<Timestamp>().expect("a malformed date was refused"), call.signed_at());
    check_window(call);
}

fn check_document(document: &Value) {
    let object = document.as_object().expect("a document is an object");
    for (key, value) in object {
        match key.as_str() {
            // `null` is as good as no value.
            "clusterId" => assert!(value.is_null() || value == CLUSTER),
            "method" => assert!(value.is_null() || value == "POST"),
            "path" => assert!(value.is_null() || value == "/"),
            "query" => assert_eq!(*value, serde_json::json!({ "ACKClusterId": CLUSTER })),
            "headers" => assert!(value.is_object()),
            other => panic!("{other}"),
        }
    }
    assert!(object.contains_key("query"));
}

/// Panics where two keys differ only in case: two readers could take different ones.
fn lower_keys(headers: &Value) -> BTreeMap<String, String> {
    let mut lower = BTreeMap::new();
    for (name, value) in headers.as_object().expect("there are headers") {
        let value = value.as_str().expect("a header is a text");
        assert_eq!(lower.insert(name.to_ascii_lowercase(), value.to_owned()), None, "{name}");
    }
    lower
}

/// The signed headers are all headers that STS receives, and no host is among them.
fn check_authorization(call: &SignedCall, headers: &BTreeMap<String, String>) {
    let (algorithm, parts) = headers["authorization"].split_once(' ').expect("an algorithm and parts");
    assert_eq!(algorithm, "ACS3-HMAC-SHA256");
    let parts: Vec<_> =
        parts.split(',').map(|part| part.split_once('=').expect("a name and a value")).collect();
    let [("Credential", key), ("SignedHeaders", signed), ("Signature", signature)] = parts[..] else {
        panic!("{parts:?}")
    };
    assert_eq!(key, call.access_key_id());
    assert!(!key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic()));
    assert!(signature.len() == 64 && signature.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let sent: Vec<&str> =
        headers.keys().map(String::as_str).filter(|name| name.starts_with("x-acs-")).collect();
    assert_eq!(signed.split(';').collect::<Vec<_>>(), sent);
}

/// Valid for 15 minutes around its date, and in no other second.
fn check_window(call: &SignedCall) {
    for (seconds, valid) in [(-901, false), (-900, true), (0, true), (900, true), (901, false)] {
        // The first and the last second that a timestamp can be have no neighbours.
        let Ok(now) = call.signed_at().checked_add(SignedDuration::from_secs(seconds)) else { continue };
        assert_eq!(call.time_left(now).is_ok(), valid, "{seconds}");
    }
}

const ALLOWED: [&str; 8] = [
    "authorization",
    "user-agent",
    "x-acs-action",
    "x-acs-content-sha256",
    "x-acs-date",
    "x-acs-security-token",
    "x-acs-signature-nonce",
    "x-acs-version",
];
const HASH_OF_NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
