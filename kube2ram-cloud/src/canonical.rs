//! The canonical form of a request, which the signatures of Alibaba Cloud (ACS3) and of AWS (SigV4) share:
//! sorted headers, an escaped query, the payload's SHA-256. Pure: no I/O, no clock, no logs. Called by each
//! cloud's `sign`.

use hmac::{Hmac, KeyInit as _, Mac as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use secrecy::zeroize::Zeroizing;
use sha2::{Digest as _, Sha256};

/// A request as it is signed.
pub(crate) struct CanonicalRequest<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    /// What [`encode`] made of sorted parameters.
    pub(crate) query: &'a str,
    /// The headers to sign, names in lower case. No value holds two blanks in a row: SigV4 would fold them.
    pub(crate) headers: &'a [(&'a str, &'a str)],
    /// The SHA-256 of the body, in hex.
    pub(crate) payload_sha256: &'a str,
}

impl CanonicalRequest<'_> {
    /// The text, which holds the security token, and the names of the headers in it.
    pub(crate) fn text(&self) -> (Zeroizing<String>, String) {
        // Sorting by (name, value) also orders the values of a repeated name, which are then joined with
        // commas.
        let mut headers: Vec<(&str, &str)> = self.headers.iter().map(|&(n, v)| (n, v.trim())).collect();
        headers.sort_unstable();

        // A name, a value and two marks each; a string that grows would leave copies of the token behind.
        let length: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        let mut lines = Zeroizing::new(String::with_capacity(length));
        let mut names = String::new();
        for group in headers.chunk_by(|(a, _), (b, _)| a == b) {
            let name = group[0].0;
            if !names.is_empty() {
                names.push(';');
            }
            names.push_str(name);
            lines.push_str(name);
            for (number, (_, value)) in group.iter().enumerate() {
                lines.push(if number == 0 { ':' } else { ',' });
                lines.push_str(value);
            }
            lines.push('\n');
        }
        let Self { method, path, query, payload_sha256, .. } = self;
        let parts = [method, "\n", path, "\n", query, "\n", &lines, "\n", &names, "\n", payload_sha256];
        // `concat` allocates once.
        (Zeroizing::new(parts.concat()), names)
    }
}

/// Escapes parameters in the order in which they stand, for a query or a form.
pub(crate) fn encode(parameters: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = parameters
        .iter()
        .map(|(name, value)| {
            format!("{}={}", utf8_percent_encode(name, RESERVED), utf8_percent_encode(value, RESERVED))
        })
        .collect();
    pairs.join("&")
}

/// The SHA-256, in hex.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The HMAC of `text` under a key of any length.
#[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
pub(crate) fn hmac_sha256(key: &[u8], text: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any key length");
    mac.update(text);
    Zeroizing::new(mac.finalize().into_bytes().into())
}

/// Everything but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_everything_but_the_unreserved_characters() {
        let query = encode(&[("b", "a b*c/d+e~f-g_h.i@"), ("a", "é")]);

        assert_eq!(query, "b=a%20b%2Ac%2Fd%2Be~f-g_h.i%40&a=%C3%A9");
    }

    #[test]
    fn authenticates_as_rfc_4231_says() {
        // RFC 4231, test case 2.
        let mac = hmac_sha256(b"Jefe", b"what do ya want for nothing?");

        assert_eq!(hex::encode(*mac), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
