//! Session tokens of hardened mode: what a pod gets for `PUT /<version>/api/token`, and what it proves with
//! it. Source: ECS, "Instance metadata", hardened mode. Pure; made by `app`, called by `connection`. Nothing
//! is kept for a token: it carries its expiry, and a MAC under a key of this boot that binds it to one pod.

use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use sha2::Sha256;

use crate::identity::PodUid;
use kube2ram_cloud::dialect::{Dialect, TokenHeaders};
use kube2ram_service::state_dir::Secret;

/// The MAC's prefix besides expiry and pod: no other use of the key, and no other format, gives a valid
/// token.
const DOMAIN: &[u8] = b"kube2ram metadata session token 1\0";
const EXPIRY_BYTES: usize = 8;
/// Expiry and MAC in hexadecimal digits: ASCII without blanks, because credentials-go puts it into a header
/// as it came.
const TOKEN_DIGITS: usize = 2 * (EXPIRY_BYTES + 32);

/// Why no token is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The request came through a proxy, which may have been made to forge it.
    #[error("the request came through a proxy")]
    Proxied,
    /// The number of seconds is missing, or not one that the real server takes.
    #[error("missing or invalid {0}")]
    Ttl(&'static str),
}

/// Why a request's token does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It was this pod's, once.
    #[error("expired token")]
    Expired,
    /// It is not a token of this agent, or it belongs to another pod.
    #[error("token not issued to this pod")]
    Foreign,
    /// There is none. With the status by which the real server says so.
    #[error("no token")]
    Missing(StatusCode),
}

/// Issues tokens and recognises them.
#[derive(Debug)]
pub struct Tokens {
    key: Secret,
    headers: &'static TokenHeaders,
}

impl Tokens {
    /// The name of the key's file in the state directory.
    pub const KEY_FILE: &str = "token-key";

    /// Those of one key; the next agent recognises them by the same.
    pub fn new(key: Secret, dialect: &'static Dialect) -> Self {
        Self { key, headers: &dialect.tokens }
    }

    /// A token for `pod`, as long as `headers` ask for.
    ///
    /// # Errors
    /// [`IssueError`], in this order, so that a client behind a proxy learns nothing.
    pub fn issue(&self, pod: &PodUid, headers: &HeaderMap, now: Timestamp) -> Result<String, IssueError> {
        if headers.contains_key("x-forwarded-for") || headers.contains_key(header::FORWARDED) {
            return Err(IssueError::Proxied);
        }
        let ttl = self.ttl(headers).ok_or(IssueError::Ttl(self.headers.ttl.as_str()))?;
        let expiry = now.as_second().saturating_add(ttl).to_be_bytes();
        let mac = self.mac(pod, expiry).finalize().into_bytes();
        Ok(hex::encode(expiry) + &hex::encode(mac))
    }

    /// Whether the token in `headers` was issued to `pod`. The comparison takes the same time wherever the
    /// difference is.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn check(&self, pod: &PodUid, headers: &HeaderMap, now: Timestamp) -> Result<(), TokenError> {
        let mut tokens = headers.get_all(&self.headers.token).iter();
        let token = tokens.next().ok_or(TokenError::Missing(self.headers.missing))?;
        let mut decoded = [0; TOKEN_DIGITS / 2];
        if tokens.next().is_some() || hex::decode_to_slice(token.as_bytes(), &mut decoded).is_err() {
            return Err(TokenError::Foreign);
        }
        let (expiry, mac) = decoded.split_first_chunk::<EXPIRY_BYTES>().ok_or(TokenError::Foreign)?;
        self.mac(pod, *expiry).verify_slice(mac).or(Err(TokenError::Foreign))?;
        if i64::from_be_bytes(*expiry) <= now.as_second() {
            return Err(TokenError::Expired);
        }
        Ok(())
    }

    /// From 1 to the longest, in digits; more than one header is no number.
    fn ttl(&self, headers: &HeaderMap) -> Option<i64> {
        let mut values = headers.get_all(&self.headers.ttl).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let text = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
        text.parse().ok().filter(|seconds| (1..=self.headers.longest_ttl).contains(seconds))
    }

    #[expect(clippy::expect_used, reason = "HMAC takes keys of any length (RFC 2104)")]
    fn mac(&self, pod: &PodUid, expiry: [u8; EXPIRY_BYTES]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(self.key.expose_secret()).expect("a key of any length");
        mac.chain_update(DOMAIN).chain_update(expiry).chain_update(pod.as_str())
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;
    use kube2ram_cloud::alibaba::DIALECT;

    fn tokens(key: u8) -> Tokens {
        Tokens::new(Secret::new(Box::new([key; 32])), &DIALECT)
    }

    fn pod(n: u8) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_str(text).unwrap();
        pairs.iter().map(|(name, text)| (name.clone(), value(text))).collect()
    }

    fn issue(ttl: &str) -> Result<String, IssueError> {
        tokens(1).issue(&pod(1), &headers(&[(DIALECT.tokens.ttl.clone(), ttl)]), at(0))
    }

    fn check(tokens: &Tokens, uid: &PodUid, token: &str, now: i64) -> Result<(), TokenError> {
        tokens.check(uid, &headers(&[(DIALECT.tokens.token.clone(), token)]), at(now))
    }

    #[test]
    fn recognises_a_pods_own_token_until_it_expires_and_after_a_restart() {
        let token = issue("60").unwrap();

        assert_eq!(token.len(), TOKEN_DIGITS);
        assert!(token.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        assert_eq!(check(&tokens(1), &pod(1), &token, 59), Ok(()));
        assert_eq!(check(&tokens(1), &pod(1), &token, 60), Err(TokenError::Expired));
    }

    #[test]
    fn a_token_is_worthless_to_another_pod_and_under_another_key() {
        let token = issue("60").unwrap();

        assert_eq!(check(&tokens(1), &pod(1), &token, 0), Ok(()));
        assert_eq!(check(&tokens(1), &pod(2), &token, 0), Err(TokenError::Foreign));
        assert_eq!(check(&tokens(2), &pod(1), &token, 0), Err(TokenError::Foreign));
    }

    #[test]
    fn takes_exactly_one_token() {
        let token = issue("60").unwrap();
        let own = headers(&[(DIALECT.tokens.token.clone(), &token)]);
        let mut two = own.clone();
        two.append(&DIALECT.tokens.token, HeaderValue::from_str(&token).unwrap());

        assert_eq!(tokens(1).check(&pod(1), &own, at(0)), Ok(()));
        assert_eq!(tokens(1).check(&pod(1), &two, at(0)), Err(TokenError::Foreign));
        assert_eq!(
            tokens(1).check(&pod(1), &HeaderMap::new(), at(0)),
            Err(TokenError::Missing(StatusCode::FORBIDDEN))
        );
        for other in ["", "aaa", &token[1..], &format!("{token}0"), &format!("{token} ")] {
            assert_eq!(check(&tokens(1), &pod(1), other, 0), Err(TokenError::Foreign), "{other:?}");
        }
    }

    #[test]
    fn a_ttl_is_one_to_21600_seconds_in_digits() {
        for ttl in ["1", "60", "21600"] {
            assert!(issue(ttl).is_ok(), "{ttl}");
        }
        for ttl in
            ["", "0", "21601", "21700", "-1", "+60", "6e1", "60s", "0x10", "99999999999999999999", "60, 60"]
        {
            assert_eq!(issue(ttl), Err(IssueError::Ttl(DIALECT.tokens.ttl.as_str())), "{ttl}");
        }
        let mut twice = headers(&[(DIALECT.tokens.ttl.clone(), "60")]);
        twice.append(&DIALECT.tokens.ttl, HeaderValue::from_static("60"));
        for headers in [HeaderMap::new(), twice] {
            assert_eq!(
                tokens(1).issue(&pod(1), &headers, at(0)),
                Err(IssueError::Ttl(DIALECT.tokens.ttl.as_str()))
            );
        }
    }

    #[test]
    fn a_proxy_gets_no_token_whatever_else_it_asks() {
        for name in ["x-forwarded-for", "forwarded"] {
            for ttl in ["60", "0"] {
                let headers =
                    headers(&[(DIALECT.tokens.ttl.clone(), ttl), (HeaderName::from_static(name), "")]);
                assert_eq!(
                    tokens(1).issue(&pod(1), &headers, at(0)),
                    Err(IssueError::Proxied),
                    "{name} {ttl}"
                );
            }
        }
        assert!(issue("60").is_ok());
    }

    proptest! {
        #[test]
        fn no_other_text_is_a_token(position in 0..TOKEN_DIGITS, digit in "[0-9a-f]", garbage in "[ -~]{0,100}") {
            let token = issue("60").unwrap();
            let mut forged = token.clone();
            forged.replace_range(position..=position, &digit);

            prop_assert_eq!(check(&tokens(1), &pod(1), &forged, 0).is_ok(), forged == token);
            prop_assert_eq!(check(&tokens(1), &pod(1), &garbage, 0), Err(TokenError::Foreign));
        }
    }
}
