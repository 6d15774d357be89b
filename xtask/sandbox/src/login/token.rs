//! Tokens in the form of ack-ram-tool, signed by the stand-in's own code: at any time, for any cluster, and
//! changed afterwards. Pure. Used by `show` and by tests.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::json;

use crate::{
    clock::iso8601,
    standin::{AccessKey, V3Request, v3_signature},
};

/// What `ack-ram-tool credential-plugin get-token` prints at this time with this key.
pub fn token_of(cluster: &str, key: &AccessKey, at: Timestamp) -> String {
    let query = BTreeMap::from([("ACKClusterId".to_owned(), cluster.to_owned())]);
    let mut headers = vec![
        ("x-acs-action".to_owned(), "GetCallerIdentity".to_owned()),
        ("x-acs-content-sha256".to_owned(), NO_BODY.to_owned()),
        ("x-acs-date".to_owned(), iso8601(at)),
        ("x-acs-version".to_owned(), "2015-04-01".to_owned()),
    ];
    if let Some(token) = &key.security_token {
        headers.push(("x-acs-security-token".to_owned(), token.clone()));
    }
    let request = V3Request { method: "POST", query: &query, headers: &headers, payload_hash: NO_BODY };
    let authorization = format!(
        "ACS3-HMAC-SHA256 Credential={},SignedHeaders={},Signature={}",
        key.id,
        request.signed_headers(),
        v3_signature(&key.secret, &request)
    );
    let mut sent: BTreeMap<_, _> = headers.into_iter().collect();
    sent.insert("Authorization".to_owned(), authorization);
    sent.insert("user-agent".to_owned(), "ack-ram-tool/v0.0.0 (linux/amd64)".to_owned());
    // In the order of its fields.
    let document = format!(
        r#"{{"clusterId":{},"method":"POST","path":"/","query":{},"headers":{}}}"#,
        json!(cluster),
        json!(query),
        json!(sent)
    );
    format!("{PREFIX}{}", STANDARD.encode(document))
}

/// The token with `to` in the place of `from`.
///
/// # Errors
/// When `from` is not in the token, or the token is none.
pub fn tampered(token: &str, from: &str, to: &str) -> Result<String> {
    let document = STANDARD.decode(token.strip_prefix(PREFIX).context("the token has no prefix")?)?;
    let document = String::from_utf8(document)?;
    ensure!(document.contains(from), "no {from} in {document}");
    Ok(format!("{PREFIX}{}", STANDARD.encode(document.replace(from, to))))
}

const PREFIX: &str = "k8s-ack-v2.";
/// SHA-256 of nothing.
const NO_BODY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standin::Principal;

    /// The signatures were computed by a script that shares no code with this.
    #[test]
    fn signs_as_another_implementation_does() {
        let at: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        for (id, security_token, signature) in [
            ("testid", None, "b141df95a60c8761ba8e518f089acf8dad259be314ac4810581918562a739fe3"),
            (
                "STS.testid",
                Some("stoken"),
                "27a8922a460daffa520d0133448074c357d49f9e623e202b71a8f7463ea5c184",
            ),
        ] {
            let key = AccessKey {
                id: id.to_owned(),
                secret: "testsecret".to_owned(),
                security_token: security_token.map(str::to_owned),
                issued: at,
                expires: None,
                principal: Principal::User("alice".to_owned()),
            };

            let token = token_of("c0123456789abcdef0123456789abcdef", &key, at);

            assert!(tampered(&token, &format!("Signature={signature}\""), "").is_ok(), "{id}");
            assert!(tampered(&token, "Signature=b141df96", "").is_err(), "the twin");
        }
    }
}
