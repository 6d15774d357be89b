//! A cluster's OIDC issuer, which signs its ServiceAccounts' tokens, the place where it publishes its keys,
//! and what a cloud knows of it. Used by the API server, account and STS stand-ins, and by tests to mint
//! tokens.

mod key;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use self::key::{PublicKey, SigningKey};
use crate::{Cloud, locked};

/// The side of the cluster.
#[derive(Debug)]
pub struct OidcIssuer {
    /// All that it ever had. The last one signs.
    keys: Mutex<Vec<SigningKey>>,
    published: Arc<Published>,
    url: String,
}

/// What a cloud can fetch of an issuer.
#[derive(Debug, Default)]
struct Published {
    is_away: AtomicBool,
    keys: Mutex<Vec<PublicKey>>,
}

/// The side of the cloud: an OIDC provider.
#[derive(Clone, Debug)]
pub struct OidcProvider {
    client_ids: Vec<String>,
    has_fingerprint: bool,
    issuer: String,
    published: Arc<Published>,
}

/// A role's trust policy for tokens: the provider, and a condition on the subject: `oidc:sub`, on AWS
/// `<issuer>:sub`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcTrust {
    provider: String,
    subject: Condition,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    StringEquals(String),
    StringLike(String),
}

/// What a cloud has verified of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) expires_at: i64,
    pub(super) issued_at: i64,
    pub(super) issuer: String,
    pub(super) subject: String,
}

/// What is wrong with a token, or with its provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenFault {
    Audience,
    Expired,
    /// The certificates of the issuer's server are not those of the provider's settings.
    Fingerprint,
    Invalid,
    Issuer,
    /// The issuer's keys cannot be fetched.
    IssuerAway,
    /// It begins in the future.
    NotYet,
    /// It was issued longer ago than the provider allows.
    TooOld,
    /// No published key has its key's id.
    UnknownKey,
}

/// `IssuanceLimitTime` of a provider, in RAM's examples.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(12);

impl OidcIssuer {
    /// The audience of RRSA's tokens.
    pub const AUDIENCE: &str = Cloud::Alibaba.audience();

    /// Makes a cluster's issuer, with an ES256 key of its own that is published.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(url: &str) -> Result<Self> {
        Ok(Self::with(url, SigningKey::es256()?))
    }

    /// The same with an RS256 key, which is the same for all.
    ///
    /// # Errors
    /// Never in practice.
    pub fn with_rsa(url: &str) -> Result<Self> {
        Ok(Self::with(url, SigningKey::rs256()?))
    }

    fn with(url: &str, key: SigningKey) -> Self {
        let keys = Mutex::new(vec![key]);
        let issuer = Self { keys, published: Arc::default(), url: url.to_owned() };
        issuer.publish();
        issuer
    }

    /// Its `iss`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Signs with a new ES256 key from now on, which nobody else knows until [`Self::publish`].
    ///
    /// # Errors
    /// When no key can be made.
    pub fn rotate(&self) -> Result<()> {
        let key = SigningKey::es256()?;
        locked(&self.keys).push(key);
        Ok(())
    }

    /// The same with an RS256 key.
    ///
    /// # Errors
    /// Never in practice.
    pub fn rotate_to_rsa(&self) -> Result<()> {
        let key = SigningKey::rs256()?;
        locked(&self.keys).push(key);
        Ok(())
    }

    /// Publishes all keys, as an operator does before and after a rotation.
    pub fn publish(&self) {
        let keys = locked(&self.keys).iter().map(|key| key.public().clone()).collect();
        *locked(&self.published.keys) = keys;
    }

    /// Publishes the key that signs, and no longer those before it.
    pub fn retire(&self) {
        let keys = locked(&self.keys).last().map(|key| key.public().clone()).into_iter().collect();
        *locked(&self.published.keys) = keys;
    }

    /// Whether clouds can fetch its keys from now on.
    pub fn set_reachable(&self, reachable: bool) {
        self.published.is_away.store(!reachable, Ordering::Relaxed);
    }

    /// The document at `/openid/v1/jwks`.
    pub fn jwks(&self) -> Value {
        let keys: Vec<_> = locked(&self.published.keys).iter().map(|key| key.jwk().clone()).collect();
        json!({ "keys": keys })
    }

    /// The document at `/.well-known/openid-configuration`.
    pub fn configuration(&self) -> Value {
        json!({
            "issuer": self.url,
            "jwks_uri": format!("{}/openid/v1/jwks", self.url),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256", "RS256"],
        })
    }

    /// An administrator's settings of it in RAM.
    pub fn provider(&self) -> OidcProvider {
        self.provider_in(Cloud::Alibaba)
    }

    /// An administrator's settings of it in a cloud.
    pub fn provider_in(&self, cloud: Cloud) -> OidcProvider {
        OidcProvider::new(&self.url, Arc::clone(&self.published), cloud)
    }

    /// A token as the kubelet has it made for a ServiceAccount: of an hour.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn token(&self, subject: &str, audience: &str, expires: Timestamp) -> Result<String> {
        let issued = expires.as_second().saturating_sub(3600);
        self.sign(&json!({
            "aud": [audience], "exp": expires.as_second(), "iat": issued, "iss": self.url, "nbf": issued,
            "sub": subject,
        }))
    }

    /// Signs any claims with the key that signs.
    ///
    /// # Errors
    /// When they cannot be signed.
    pub fn sign(&self, claims: &Value) -> Result<String> {
        self.sign_as(claims, None)
    }

    /// The same with any `kid` in the header.
    ///
    /// # Errors
    /// As [`Self::sign`].
    pub(super) fn sign_as(&self, claims: &Value, id: Option<&str>) -> Result<String> {
        let keys = locked(&self.keys);
        let key = keys.last().context("the issuer has no key")?;
        let header =
            json!({ "alg": key.public().algorithm(), "kid": id.unwrap_or(key.public().id.as_str()) });
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(&header), encode(claims));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes())?);
        Ok(format!("{signed}.{signature}"))
    }
}

impl OidcProvider {
    /// An administrator's settings in a cloud of an issuer that is no stand-in, by its URL and by the JWKS
    /// that it publishes at `/openid/v1/jwks`. Keys that it publishes later are not known.
    ///
    /// # Errors
    /// When the JWKS has no keys, or one that is not on P-256, or one with another id than the API server
    /// computes.
    pub fn of_jwks(issuer: &str, jwks: &Value, cloud: Cloud) -> Result<Self> {
        let keys = jwks["keys"].as_array().filter(|keys| !keys.is_empty());
        let keys = keys.context("the JWKS has no keys")?.iter().map(PublicKey::of_jwk);
        let keys = Mutex::new(keys.collect::<Result<Vec<_>>>()?);
        Ok(Self::new(issuer, Arc::new(Published { keys, ..Published::default() }), cloud))
    }

    fn new(issuer: &str, published: Arc<Published>, cloud: Cloud) -> Self {
        let client_ids = vec![cloud.audience().to_owned()];
        Self { client_ids, has_fingerprint: true, issuer: issuer.to_owned(), published }
    }

    /// With no other client id than this one.
    #[must_use]
    pub fn with_audience(mut self, audience: &str) -> Self {
        self.client_ids = vec![audience.to_owned()];
        self
    }

    /// As after a move of the issuer's server to another certificate authority.
    #[must_use]
    pub fn with_wrong_fingerprint(mut self) -> Self {
        self.has_fingerprint = false;
        self
    }

    /// With another issuer's URL than its keys are of.
    #[must_use]
    pub fn with_issuer(mut self, url: &str) -> Self {
        self.issuer = url.to_owned();
        self
    }

    /// Whether a token names this provider's issuer. Nothing of it is verified.
    pub(super) fn is_named_by(&self, token: &str) -> bool {
        Jwt::parse(token).is_some_and(|jwt| jwt.claims["iss"] == self.issuer.as_str())
    }

    /// Verifies a token, in STS's order: key, signature, issuer, audience, times.
    pub(super) fn verify(&self, token: &str, now: Timestamp) -> Result<Verified, TokenFault> {
        let jwt = Jwt::parse(token).ok_or(TokenFault::Invalid)?;
        let algorithm = jwt.header["alg"].as_str().unwrap_or_default();
        if !matches!(algorithm, "ES256" | "RS256") {
            return Err(TokenFault::Invalid);
        }
        if self.published.is_away.load(Ordering::Relaxed) {
            return Err(TokenFault::IssuerAway);
        }
        if !self.has_fingerprint {
            return Err(TokenFault::Fingerprint);
        }
        let keys = locked(&self.published.keys).clone();
        let key = keys.iter().find(|key| jwt.header["kid"] == key.id.as_str());
        let key = key.ok_or(TokenFault::UnknownKey)?;
        if algorithm != key.algorithm() || !key.has_signed(jwt.signed.as_bytes(), &jwt.signature) {
            return Err(TokenFault::Invalid);
        }
        let claims = &jwt.claims;
        if claims["iss"] != self.issuer.as_str() {
            return Err(TokenFault::Issuer);
        }
        let is_client = |one: &Value| self.client_ids.iter().any(|id| one == id.as_str());
        if !claims["aud"].as_array().is_some_and(|all| all.iter().any(is_client)) {
            return Err(TokenFault::Audience);
        }
        let second = |name: &str| claims[name].as_i64().ok_or(TokenFault::Invalid);
        let (expires_at, issued_at, now) = (second("exp")?, second("iat")?, now.as_second());
        if expires_at <= now {
            return Err(TokenFault::Expired);
        }
        if second("nbf")?.max(issued_at) > now {
            return Err(TokenFault::NotYet);
        }
        if now.saturating_sub(issued_at) > MAX_AGE.as_secs() {
            return Err(TokenFault::TooOld);
        }
        let subject = claims["sub"].as_str().ok_or(TokenFault::Invalid)?.to_owned();
        Ok(Verified { expires_at, issued_at, issuer: self.issuer.clone(), subject })
    }
}

impl OidcTrust {
    /// StringEquals: exactly this subject, `system:serviceaccount:<namespace>:<name>`.
    pub fn equals(provider: impl Into<String>, subject: impl Into<String>) -> Self {
        Self { provider: provider.into(), subject: Condition::StringEquals(subject.into()) }
    }

    /// StringLike: `*` stands for any text, `?` for any character.
    pub fn like(provider: impl Into<String>, pattern: impl Into<String>) -> Self {
        Self { provider: provider.into(), subject: Condition::StringLike(pattern.into()) }
    }

    /// Whether a token of this subject, which a provider vouches for, fulfils it.
    pub(super) fn holds(&self, provider: &str, subject: &str) -> bool {
        let fits = match &self.subject {
            Condition::StringEquals(expected) => expected == subject,
            Condition::StringLike(pattern) => is_like(pattern.as_bytes(), subject.as_bytes()),
        };
        fits && self.provider == provider
    }
}

/// A token taken apart.
struct Jwt<'a> {
    claims: Value,
    header: Value,
    signature: Vec<u8>,
    signed: &'a str,
}

impl<'a> Jwt<'a> {
    fn parse(token: &'a str) -> Option<Self> {
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).ok();
        let json = |part: &str| serde_json::from_slice::<Value>(&decode(part)?).ok();
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        Some(Self { claims: json(claims)?, header: json(header)?, signature: decode(signature)?, signed })
    }
}

/// Whether a text fits a pattern of `*` and `?`.
fn is_like(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), None) => is_like(rest, text),
        (Some((b'*', rest)), Some((_, shorter))) => is_like(rest, text) || is_like(pattern, shorter),
        (Some((b'?', pattern)), Some((_, text))) => is_like(pattern, text),
        (Some((expected, pattern)), Some((given, text))) => expected == given && is_like(pattern, text),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests;
