//! Alibaba Cloud's two request signatures as its documents define them, written apart from the agent's signer
//! on purpose. Pure. Called by the STS stand-in (to verify) and by the sandbox's own clients (to sign).
//!
//! Sources: "Signature method V3 (ACS3-HMAC-SHA256)" and "RPC signature mechanism",
//! help.aliyun.com/document_detail/{2712195,25492}.

use std::{collections::BTreeMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, Mac as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// What RFC 3986 calls unreserved stays; everything else is encoded, space as `%20` and `*` as `%2A`.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Percent-encodes a name or value for a canonical query.
pub fn pe(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// Signs with V1 (HMAC-SHA1): `params` are those of query and form together, without `Signature`.
pub fn v1_signature(secret: &str, method: &str, params: &BTreeMap<String, String>) -> String {
    let to_sign = format!("{method}&%2F&{}", pe(&canonical_query(params)));
    let mut mac = keyed::<Hmac<Sha1>>(&format!("{secret}&"));
    mac.update(to_sign.as_bytes());

    STANDARD.encode(mac.finalize().into_bytes())
}

/// What V3 signs of a request.
#[derive(Debug)]
pub struct V3Request<'a> {
    /// The method, upper case.
    pub method: &'a str,
    /// Decoded query parameters.
    pub query: &'a BTreeMap<String, String>,
    /// The signed headers: lower-case name, value; where a name comes twice, both are given.
    pub headers: &'a [(String, String)],
    /// SHA-256 of the body, in hex: the value of `x-acs-content-sha256`.
    pub payload_hash: &'a str,
}

impl V3Request<'_> {
    /// The names that go into `SignedHeaders=`.
    pub fn signed_headers(&self) -> String {
        self.sorted_headers().into_keys().collect::<Vec<_>>().join(";")
    }

    fn sorted_headers(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut sorted = BTreeMap::<_, Vec<_>>::new();
        for (name, value) in self.headers {
            sorted.entry(name.as_str()).or_default().push(value.trim());
        }
        sorted.values_mut().for_each(|values| values.sort_unstable());
        sorted
    }

    fn canonical(&self) -> String {
        let mut canonical = format!("{}\n/\n{}\n", self.method, canonical_query(self.query));
        for (name, values) in self.sorted_headers() {
            // Writing to a String cannot fail.
            let _ = writeln!(canonical, "{name}:{}", values.join(","));
        }
        let _ = write!(canonical, "\n{}\n{}", self.signed_headers(), self.payload_hash);
        canonical
    }
}

/// Signs with V3 (ACS3-HMAC-SHA256); hex.
pub fn v3_signature(secret: &str, request: &V3Request<'_>) -> String {
    let to_sign = format!("ACS3-HMAC-SHA256\n{}", hex_sha256(request.canonical().as_bytes()));
    let mut mac = keyed::<Hmac<Sha256>>(secret);
    mac.update(to_sign.as_bytes());

    hex::encode(mac.finalize().into_bytes())
}

/// SHA-256 in lower-case hex.
pub(crate) fn hex_sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn canonical_query(params: &BTreeMap<String, String>) -> String {
    // Sorted by name, as the map is: encoding keeps the order of the characters that names are made of.
    params.iter().map(|(name, value)| format!("{}={}", pe(name), pe(value))).collect::<Vec<_>>().join("&")
}

#[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
fn keyed<M: hmac::KeyInit>(secret: &str) -> M {
    M::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length")
}

#[cfg(test)]
mod tests;
