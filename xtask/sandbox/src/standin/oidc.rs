//! A cluster's OIDC issuer, which signs its service accounts' tokens (ES256), and what a cloud knows of it.
//! Pure but for the key's making. Used by the account and STS stand-ins, and by tests to mint tokens.

use anyhow::{Result, anyhow};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        UnparsedPublicKey,
    },
};
use serde_json::{Value, json};

use crate::Cloud;

/// The side of the cluster.
#[derive(Debug)]
pub struct OidcIssuer {
    keys: EcdsaKeyPair,
    url: String,
}

/// The side of the cloud: an OIDC provider.
#[derive(Clone, Debug)]
pub struct OidcProvider {
    audience: String,
    issuer: String,
    public_key: Vec<u8>,
}

/// A role's trust policy for tokens: the provider, and `oidc:sub`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcTrust {
    /// The provider's ARN.
    pub provider: String,
    /// `system:serviceaccount:<namespace>:<name>`.
    pub subject: String,
}

/// What is wrong with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenFault {
    Audience,
    Expired,
    Invalid,
}

impl OidcIssuer {
    /// The audience of RRSA's tokens.
    pub const AUDIENCE: &str = Cloud::Alibaba.audience();

    /// Makes a cluster's issuer, with its own key.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(url: &str) -> Result<Self> {
        let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random)
            .map_err(|error| anyhow!("cannot make a key: {error}"))?;
        let keys = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random)
            .map_err(|error| anyhow!("cannot use a key: {error}"))?;
        Ok(Self { keys, url: url.to_owned() })
    }

    /// An administrator's settings of it in RAM.
    pub fn provider(&self) -> OidcProvider {
        self.provider_in(Cloud::Alibaba)
    }

    /// An administrator's settings of it in a cloud.
    pub fn provider_in(&self, cloud: Cloud) -> OidcProvider {
        OidcProvider {
            audience: cloud.audience().to_owned(),
            issuer: self.url.clone(),
            public_key: self.keys.public_key().as_ref().to_vec(),
        }
    }

    /// A token as the kubelet has it made for a service account.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn token(&self, subject: &str, audience: &str, expires: Timestamp) -> Result<String> {
        let header = json!({ "alg": "ES256", "kid": "sandbox", "typ": "JWT" });
        let claims =
            json!({ "aud": [audience], "exp": expires.as_second(), "iss": self.url, "sub": subject });
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.keys.sign(&SystemRandom::new(), signed.as_bytes());
        let signature = signature.map_err(|error| anyhow!("cannot sign: {error}"))?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

impl OidcProvider {
    /// The subject of a token that this provider vouches for.
    pub(super) fn subject(&self, token: &str, now: Timestamp) -> Result<String, TokenFault> {
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).ok();
        let json = |part: &str| serde_json::from_slice::<Value>(&decode(part)?).ok();
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenFault::Invalid)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenFault::Invalid)?;
        let signature = decode(signature).ok_or(TokenFault::Invalid)?;
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.public_key);
        let is_signed = key.verify(signed.as_bytes(), &signature).is_ok();
        let header = json(header).ok_or(TokenFault::Invalid)?;
        let claims = json(claims).ok_or(TokenFault::Invalid)?;
        if !is_signed || header["alg"] != "ES256" || claims["iss"] != self.issuer.as_str() {
            return Err(TokenFault::Invalid);
        }
        if claims["exp"].as_i64().is_none_or(|exp| exp <= now.as_second()) {
            return Err(TokenFault::Expired);
        }
        if !claims["aud"].as_array().is_some_and(|all| all.iter().any(|one| one == self.audience.as_str())) {
            return Err(TokenFault::Audience);
        }
        claims["sub"].as_str().map(str::to_owned).ok_or(TokenFault::Invalid)
    }
}
