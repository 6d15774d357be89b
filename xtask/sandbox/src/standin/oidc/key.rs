//! Keys that sign tokens, ES256 and RS256, and their public halves as a JWKS has them. Depends on ring and
//! `jwks`. Called by the parent.

use std::fmt;

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    rsa::{KeyPairComponents, PublicKeyComponents},
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
    },
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::jwks;

/// A private key.
pub(super) struct SigningKey {
    pair: Pair,
    public: PublicKey,
}

enum Pair {
    Es256(EcdsaKeyPair),
    Rs256(RsaKeyPair),
}

/// What the world may know of a key.
#[derive(Clone, Debug)]
pub(super) struct PublicKey {
    algorithm: Algorithm,
    /// As ring reads it: an uncompressed point, or the RSAPublicKey of RFC 8017.
    bytes: Vec<u8>,
    /// The key's id, as the API server computes it: of SHA-256 over the SubjectPublicKeyInfo.
    pub(super) id: String,
    jwk: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Es256,
    Rs256,
}

/// The SubjectPublicKeyInfo of a key on P-256 but for its point.
const P256_INFO: &str = "3059301306072a8648ce3d020106082a8648ce3d030107034200";
/// The same of an RSA key of 2048 bits and the exponent 65537.
const RSA_INFO: &str = "30820122300d06092a864886f70d01010105000382010f00";
/// The key of RFC 7515, appendix A.2: ring makes no RSA keys.
const RFC_7515_A2: &str = include_str!("rfc7515-a2.json");

impl SigningKey {
    /// Makes an ES256 key.
    pub(super) fn es256() -> Result<Self> {
        let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random)
            .map_err(|error| anyhow!("cannot make a key: {error}"))?;
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random)
            .map_err(|error| anyhow!("cannot use a key: {error}"))?;
        let public = PublicKey::es256(pair.public_key().as_ref())?;
        Ok(Self { pair: Pair::Es256(pair), public })
    }

    /// The one RS256 key that there is.
    pub(super) fn rs256() -> Result<Self> {
        let jwk: Value = serde_json::from_str(RFC_7515_A2)?;
        let number = |name: &str| -> Result<Vec<u8>> {
            Ok(URL_SAFE_NO_PAD.decode(jwk[name].as_str().with_context(|| format!("no {name}"))?)?)
        };
        let components = KeyPairComponents {
            public_key: PublicKeyComponents { n: number("n")?, e: number("e")? },
            d: number("d")?,
            p: number("p")?,
            q: number("q")?,
            dP: number("dp")?,
            dQ: number("dq")?,
            qInv: number("qi")?,
        };
        let pair =
            RsaKeyPair::from_components(&components).map_err(|error| anyhow!("cannot use a key: {error}"))?;
        let bytes = pair.public_key().as_ref().to_vec();
        let id = id(RSA_INFO, &bytes)?;
        let jwk = json!({
            "alg": "RS256", "e": jwk["e"], "kid": id, "kty": "RSA", "n": jwk["n"], "use": "sig",
        });
        let public = PublicKey { algorithm: Algorithm::Rs256, bytes, id, jwk };
        Ok(Self { pair: Pair::Rs256(pair), public })
    }

    pub(super) fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Signs a token's header and claims.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Es256(pair) => {
                let signature = pair.sign(&random, message);
                Ok(signature.map_err(|error| anyhow!("cannot sign: {error}"))?.as_ref().to_vec())
            }
            Pair::Rs256(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)
                    .map_err(|error| anyhow!("cannot sign: {error}"))?;
                Ok(signature)
            }
        }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("public", &self.public).finish_non_exhaustive()
    }
}

impl PublicKey {
    /// The one of an uncompressed point: a byte of its form, then two coordinates.
    pub(super) fn es256(point: &[u8]) -> Result<Self> {
        let coordinates = point.get(1..65).context("the point of a key has 65 bytes")?;
        let (x, y) = coordinates.split_at(32);
        let id = id(P256_INFO, point)?;
        let jwk = json!({
            "alg": "ES256", "crv": "P-256", "kid": id, "kty": "EC", "use": "sig",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        });
        Ok(Self { algorithm: Algorithm::Es256, bytes: point.to_vec(), id, jwk })
    }

    /// The one of a member of a JWKS, which must be on P-256 and have the id that the API server computes.
    pub(super) fn of_jwk(jwk: &Value) -> Result<Self> {
        let key = Self::es256(&jwks::point(jwk)?)?;
        ensure!(jwk["kid"] == key.id.as_str(), "the key {} is called {}", key.id, jwk["kid"]);
        Ok(key)
    }

    /// As a token's header and a JWKS name it.
    pub(super) fn algorithm(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Es256 => "ES256",
            Algorithm::Rs256 => "RS256",
        }
    }

    /// As a member of a JWKS.
    pub(super) fn jwk(&self) -> &Value {
        &self.jwk
    }

    /// Whether the key has signed a message.
    pub(super) fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::Es256 => &ECDSA_P256_SHA256_FIXED,
            Algorithm::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
        };
        UnparsedPublicKey::new(algorithm, &self.bytes).verify(message, signature).is_ok()
    }
}

/// A key's id, by the beginning of its SubjectPublicKeyInfo, in hex, and the key.
fn id(info: &str, key: &[u8]) -> Result<String> {
    let spki = [hex::decode(info)?.as_slice(), key].concat();
    Ok(URL_SAFE_NO_PAD.encode(Sha256::digest(spki)))
}
