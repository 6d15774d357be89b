//! AWS's request signature, Signature Version 4, as its documents define it, written apart from the agent's
//! signer on purpose. Pure. Called by the STS stand-in (to verify) and by the sandbox's own clients (to
//! sign).
//!
//! Source: IAM user guide, "Create a signed AWS API request".

use std::fmt::Write as _;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use url::form_urlencoded;

use super::signature::{hex_sha256, pe};

/// A request, as far as it is signed.
#[derive(Debug)]
pub struct V4Request<'a> {
    /// The method, upper case.
    pub method: &'a str,
    /// The path, as it is sent.
    pub path: &'a str,
    /// The query, as it is sent.
    pub query: &'a str,
    /// The signed headers: lower-case name, value; where a name comes twice, both are given.
    pub headers: &'a [(String, String)],
    /// The body.
    pub payload: &'a [u8],
}

/// What a signature is good for.
#[derive(Clone, Copy, Debug)]
pub struct V4Scope<'a> {
    /// The value of `x-amz-date`: `YYYYMMDDThhmmssZ`.
    pub date: &'a str,
    /// The region.
    pub region: &'a str,
    /// The service.
    pub service: &'a str,
}

/// The header `Authorization`, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Authorization {
    pub(super) access_key_id: String,
    /// `YYYYMMDD`.
    pub(super) day: String,
    pub(super) region: String,
    pub(super) service: String,
    pub(super) signed_headers: Vec<String>,
    pub(super) signature: String,
}

impl V4Request<'_> {
    /// The names that go into `SignedHeaders=`.
    pub fn signed_headers(&self) -> String {
        let mut names: Vec<_> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names.join(";")
    }

    fn canonical(&self) -> String {
        let mut canonical = format!("{}\n{}\n{}\n", self.method, self.path, canonical_query(self.query));
        let signed = self.signed_headers();
        for name in signed.split(';') {
            let values = self.headers.iter().filter(|(known, _)| known == name);
            let values = values.map(|(_, value)| folded(value)).collect::<Vec<_>>();
            // Writing to a String cannot fail.
            let _ = writeln!(canonical, "{name}:{}", values.join(","));
        }
        let _ = write!(canonical, "\n{signed}\n{}", hex_sha256(self.payload));
        canonical
    }
}

impl V4Scope<'_> {
    fn text(&self) -> String {
        format!("{}/{}/{}/{TERMINATOR}", self.day(), self.region, self.service)
    }

    fn day(&self) -> &str {
        self.date.split('T').next().unwrap_or_default()
    }

    /// Derived step by step: the secret itself signs nothing.
    fn key(&self, secret: &str) -> Vec<u8> {
        let parts = [self.day(), self.region, self.service, TERMINATOR];
        parts.iter().fold(format!("AWS4{secret}").into_bytes(), |key, part| hmac(&key, part))
    }
}

/// Signs; hex.
pub fn v4_signature(secret: &str, scope: V4Scope<'_>, request: &V4Request<'_>) -> String {
    let hash = hex_sha256(request.canonical().as_bytes());
    let to_sign = format!("{ALGORITHM}\n{}\n{}\n{hash}", scope.date, scope.text());
    hex::encode(hmac(&scope.key(secret), &to_sign))
}

/// Signs; the value of the header `Authorization`.
pub fn v4_authorization(
    access_key_id: &str,
    secret: &str,
    scope: V4Scope<'_>,
    request: &V4Request<'_>,
) -> String {
    format!(
        "{ALGORITHM} Credential={access_key_id}/{}, SignedHeaders={}, Signature={}",
        scope.text(),
        request.signed_headers(),
        v4_signature(secret, scope, request)
    )
}

impl Authorization {
    /// `None` when it is none of this signature.
    pub(super) fn parse(value: &str) -> Option<Self> {
        let fields = value.strip_prefix(ALGORITHM)?.strip_prefix(' ')?;
        let field = |name: &str| {
            let mut fields = fields.split(',').filter_map(|field| field.trim().split_once('='));
            fields.find(|(known, _)| *known == name).map(|(_, value)| value)
        };
        let mut scope = field("Credential")?.rsplitn(5, '/');
        if scope.next() != Some(TERMINATOR) {
            return None;
        }
        let (service, region, day) = (scope.next()?, scope.next()?, scope.next()?);
        Some(Self {
            access_key_id: scope.next()?.to_owned(),
            day: day.to_owned(),
            region: region.to_owned(),
            service: service.to_owned(),
            signed_headers: field("SignedHeaders")?.split(';').map(str::to_owned).collect(),
            signature: field("Signature")?.to_owned(),
        })
    }
}

/// Sorted by encoded name and value.
fn canonical_query(query: &str) -> String {
    let pairs = form_urlencoded::parse(query.as_bytes());
    let mut pairs = pairs.map(|(name, value)| (pe(&name), pe(&value))).collect::<Vec<_>>();
    pairs.sort_unstable();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

/// Without blanks around it, and with one blank where several stand.
fn folded(value: &str) -> String {
    value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const TERMINATOR: &str = "aws4_request";

#[cfg(test)]
mod tests;
