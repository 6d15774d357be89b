//! The AWS4-HMAC-SHA256 request signature (SigV4). Pure: no I/O, no clock, no logs.
//! Source: IAM user guide, "AWS Signature Version 4 for API requests". Called by `sts` only.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, InvalidHeaderValue},
};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};

use crate::{
    base::BaseCredentials,
    canonical::{CanonicalRequest, hmac_sha256, sha256_hex},
};

/// A call of the query protocol: POST to `/` with everything in the body, as a form.
pub(super) struct FormCall<'a> {
    /// The value of the `Host` header.
    pub(super) host: &'a str,
    /// The endpoint's region, which is signed: the global endpoint's is `us-east-1`.
    pub(super) region: &'a str,
    pub(super) form: &'a [u8],
    /// The server takes 5 minutes of difference from its own clock.
    pub(super) date: Timestamp,
}

impl FormCall<'_> {
    /// All headers of the signed call.
    ///
    /// # Errors
    /// When a credential contains characters that a header may not have.
    pub(super) fn headers(&self, credentials: &BaseCredentials) -> Result<HeaderMap, InvalidHeaderValue> {
        let scope = Scope { date: self.date, region: self.region, service: "sts" };
        let date = scope.time();
        let mut signed = vec![("content-type", FORM), ("host", self.host), ("x-amz-date", &*date)];
        if let Some(token) = &credentials.security_token {
            signed.push((SECURITY_TOKEN, token.expose_secret()));
        }
        let request = CanonicalRequest {
            method: "POST",
            path: "/",
            query: "",
            headers: &signed,
            payload_sha256: &sha256_hex(self.form),
        };
        let authorization =
            scope.authorization(&request, &credentials.access_key_id, &credentials.access_key_secret);

        let mut headers = HeaderMap::new();
        for (name, value) in signed.into_iter().chain([(AUTHORIZATION.as_str(), &*authorization)]) {
            let mut value = HeaderValue::from_str(value)?;
            value.set_sensitive(matches!(name, "authorization" | SECURITY_TOKEN));
            headers.insert(HeaderName::from_static(name), value);
        }
        Ok(headers)
    }
}

/// What a signature is good for.
struct Scope<'a> {
    date: Timestamp,
    region: &'a str,
    service: &'a str,
}

impl Scope<'_> {
    /// `yyyyMMddTHHmmssZ`.
    fn time(&self) -> String {
        self.date.strftime("%Y%m%dT%H%M%SZ").to_string()
    }

    /// `yyyyMMdd`.
    fn day(&self) -> String {
        self.date.strftime("%Y%m%d").to_string()
    }

    /// The value of the `Authorization` header.
    fn authorization(
        &self,
        request: &CanonicalRequest<'_>,
        access_key_id: &str,
        access_key_secret: &SecretString,
    ) -> String {
        let Self { region, service, .. } = self;
        let (canonical, signed_headers) = request.text();
        let scope = format!("{}/{region}/{service}/{TERMINATOR}", self.day());
        let text = format!("{ALGORITHM}\n{}\n{scope}\n{}", self.time(), sha256_hex(canonical.as_bytes()));
        let signature = hex::encode(*hmac_sha256(&*self.key(access_key_secret), text.as_bytes()));
        format!(
            "{ALGORITHM} Credential={access_key_id}/{scope}, SignedHeaders={signed_headers}, Signature={signature}"
        )
    }

    /// The key of this scope: the secret itself signs nothing.
    fn key(&self, access_key_secret: &SecretString) -> Zeroizing<[u8; 32]> {
        let secret = Zeroizing::new([b"AWS4", access_key_secret.expose_secret().as_bytes()].concat());
        let day = hmac_sha256(&secret, self.day().as_bytes());
        let region = hmac_sha256(&*day, self.region.as_bytes());
        let service = hmac_sha256(&*region, self.service.as_bytes());
        hmac_sha256(&*service, TERMINATOR.as_bytes())
    }
}

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";
/// As botocore writes it.
pub(super) const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";
const SECURITY_TOKEN: &str = "x-amz-security-token";

#[cfg(test)]
pub(super) mod tests;
