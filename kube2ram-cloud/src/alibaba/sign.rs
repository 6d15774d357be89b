//! The ACS3-HMAC-SHA256 request signature ("V3"). Pure: no I/O, no clock, no logs.
//! Source: Alibaba Cloud, "V3 request structure and signature". Called by `sts` and `caller_identity`.

use http::{HeaderMap, HeaderName, HeaderValue, header::InvalidHeaderValue};
use secrecy::{ExposeSecret as _, SecretString};

use super::base::BaseCredentials;
use crate::canonical::{CanonicalRequest, encode, hmac_sha256, sha256_hex};

/// An RPC-style call: POST to `/` with everything in the query and an empty body.
pub(super) struct RpcCall<'a> {
    /// The value of the `Host` header. Without it, the call is valid at every endpoint.
    pub(super) host: Option<&'a str>,
    pub(super) action: &'static str,
    pub(super) version: &'static str,
    /// What [`canonical_query`] made.
    pub(super) canonical_query: &'a str,
    /// The server takes 15 minutes of difference from its own clock.
    pub(super) date: jiff::Timestamp,
    /// Never used before. Without it, the call may be sent again for as long as its date is taken.
    pub(super) nonce: Option<&'a str>,
}

impl RpcCall<'_> {
    /// All headers of the signed call.
    ///
    /// # Errors
    /// When a credential contains characters that a header may not have.
    pub(super) fn headers(&self, credentials: &BaseCredentials) -> Result<HeaderMap, InvalidHeaderValue> {
        self.sign(credentials, |signed| -> Result<HeaderMap, InvalidHeaderValue> {
            let mut headers = HeaderMap::new();
            for &(name, value) in signed {
                let mut value = HeaderValue::from_str(value)?;
                value.set_sensitive(matches!(name, "authorization" | "x-acs-security-token"));
                headers.insert(HeaderName::from_static(name), value);
            }
            Ok(headers)
        })
    }

    /// Passes all headers of the signed call to `then`.
    pub(super) fn sign<T>(
        &self,
        credentials: &BaseCredentials,
        then: impl FnOnce(&[(&'static str, &str)]) -> T,
    ) -> T {
        let date = self.date.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut signed = vec![
            ("x-acs-action", self.action),
            ("x-acs-content-sha256", EMPTY_PAYLOAD),
            ("x-acs-date", &*date),
            ("x-acs-version", self.version),
        ];
        signed.extend(self.host.map(|host| ("host", host)));
        signed.extend(self.nonce.map(|nonce| ("x-acs-signature-nonce", nonce)));
        if let Some(token) = &credentials.security_token {
            signed.push(("x-acs-security-token", token.expose_secret()));
        }
        let request = CanonicalRequest {
            method: "POST",
            path: "/",
            query: self.canonical_query,
            headers: &signed,
            payload_sha256: EMPTY_PAYLOAD,
        };
        let authorization =
            authorization(&request, &credentials.access_key_id, &credentials.access_key_secret);
        signed.push(("authorization", &*authorization));
        then(&signed)
    }
}

/// The value of the `Authorization` header. The headers to sign: every `x-acs-*`, `host`, and `content-type`
/// when it is sent.
fn authorization(
    request: &CanonicalRequest<'_>,
    access_key_id: &str,
    access_key_secret: &SecretString,
) -> String {
    let (canonical, signed_headers) = request.text();
    let text = format!("{ALGORITHM}\n{}", sha256_hex(canonical.as_bytes()));
    let signature = hex::encode(*hmac_sha256(access_key_secret.expose_secret().as_bytes(), text.as_bytes()));
    format!("{ALGORITHM} Credential={access_key_id},SignedHeaders={signed_headers},Signature={signature}")
}

/// Encodes and sorts the query; what is signed must also be what is sent.
pub(super) fn canonical_query(parameters: &[(&str, &str)]) -> String {
    let mut parameters = parameters.to_vec();
    parameters.sort_unstable();
    encode(&parameters)
}

/// The SHA-256 of an empty payload, in hex.
pub const EMPTY_PAYLOAD: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// The name of the signature.
pub const ALGORITHM: &str = "ACS3-HMAC-SHA256";

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical_sha256(request: &CanonicalRequest<'_>) -> String {
        sha256_hex(request.text().0.as_bytes())
    }

    #[test]
    fn signs_as_the_documents_example() {
        let query = canonical_query(&[
            ("RegionId", "cn-shanghai"),
            ("ImageId", "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd"),
        ]);
        let request = CanonicalRequest {
            method: "POST",
            path: "/",
            query: &query,
            headers: &[
                ("x-acs-version", "2014-05-26"),
                ("host", "ecs.cn-shanghai.aliyuncs.com"),
                ("x-acs-action", "RunInstances"),
                ("x-acs-date", "2023-10-26T10:22:32Z"),
                ("x-acs-signature-nonce", "3156853299f313e23d1673dc12e1703d"),
                ("x-acs-content-sha256", EMPTY_PAYLOAD),
            ],
            payload_sha256: EMPTY_PAYLOAD,
        };

        let authorization = authorization(&request, "YourAccessKeyId", &"YourAccessKeySecret".into());

        assert_eq!(
            canonical_sha256(&request),
            "7ea06492da5221eba5297e897ce16e55f964061054b7695beedaac1145b1e259"
        );
        assert_eq!(
            authorization,
            "ACS3-HMAC-SHA256 Credential=YourAccessKeyId,\
             SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version,\
             Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
        );
    }

    #[test]
    fn signs_repeated_headers_and_empty_values_as_the_sdk() {
        let query = canonical_query(&[("test", "ok"), ("empty", "")]);
        let request = CanonicalRequest {
            method: "",
            path: "/",
            query: &query,
            headers: &[("x-acs-test", " https"), ("x-acs-test", "http")],
            payload_sha256: "55e12e91650d2fec56ec74e1d3e4ddbfce2ef3a65890c2a19ecf88a307e76a23",
        };

        let authorization = authorization(&request, "acesskey", &"secret".into());

        assert_eq!(
            authorization,
            "ACS3-HMAC-SHA256 Credential=acesskey,SignedHeaders=x-acs-test,\
             Signature=4ab59fffe3c5738ff8a2729f90cc04fe18b02a4b15b2102cbaf92f9ff3df2ea3"
        );
    }

    #[test]
    fn signs_an_assume_role_with_a_security_token_as_the_sdk() {
        let query = canonical_query(&[
            ("DurationSeconds", "3600"),
            ("RoleArn", "acs:ram::1234567890123456:role/pod-role"),
            ("RoleSessionName", "default_web-0.k8s@n1"),
        ]);
        let request = CanonicalRequest {
            method: "POST",
            path: "/",
            query: &query,
            headers: &[
                ("host", "sts-vpc.cn-hangzhou.aliyuncs.com"),
                ("x-acs-accesskey-id", "STS.NTestAccessKeyId"),
                ("x-acs-action", "AssumeRole"),
                ("x-acs-content-sha256", EMPTY_PAYLOAD),
                ("x-acs-date", "2026-11-21T21:30:00Z"),
                ("x-acs-security-token", "CAIS+/tok=en~*"),
                ("x-acs-signature-nonce", "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"),
                ("x-acs-version", "2015-04-01"),
            ],
            payload_sha256: EMPTY_PAYLOAD,
        };

        let authorization = authorization(&request, "STS.NTestAccessKeyId", &"TestAccessKeySecret".into());

        assert_eq!(
            canonical_sha256(&request),
            "6c125b9bd33cfe66fab85bfbc272fa6bfa6f2306ec2eb79cdb6437b323d6879b"
        );
        assert!(
            authorization
                .ends_with("Signature=73d5065cf540d45bf23618bf1c644814fb771c000f7df79ec8716e3c515d721f"),
            "{authorization}"
        );
        assert!(!authorization.contains("TestAccessKeySecret"));
    }

    #[test]
    fn rpc_calls_carry_the_token_signed_and_hidden_from_debug_output() {
        let call = RpcCall {
            host: Some("sts.aliyuncs.com"),
            action: "AssumeRole",
            version: "2015-04-01",
            canonical_query: "",
            date: "2026-11-21T21:30:00.5Z".parse().unwrap(),
            nonce: Some("n"),
        };
        let mut credentials = BaseCredentials {
            access_key_id: "id".into(),
            access_key_secret: "hush".into(),
            security_token: Some("tok".into()),
        };

        let with = call.headers(&credentials).unwrap();
        credentials.security_token = None;
        let without = call.headers(&credentials).unwrap();

        assert_eq!(with["x-acs-security-token"], "tok");
        assert_eq!(with["x-acs-date"], "2026-11-21T21:30:00Z");
        let signed = with["authorization"].to_str().unwrap();
        assert!(signed.contains("x-acs-date;x-acs-security-token;x-acs-signature-nonce;"), "{signed}");
        assert!(!without.contains_key("x-acs-security-token"));
        assert!(!without["authorization"].to_str().unwrap().contains("security-token"));
        assert!(!format!("{with:?}{credentials:?}").contains("tok\""));
        assert!(!format!("{with:?}{credentials:?}").contains("hush"));
    }

    #[test]
    fn encodes_everything_but_the_unreserved_characters() {
        let query = canonical_query(&[("b", "a b*c/d+e~f-g_h.i@"), ("a", "é")]);

        assert_eq!(query, "a=%C3%A9&b=a%20b%2Ac%2Fd%2Be~f-g_h.i%40");
    }
}
