//! Tokens of a cluster, verified with the cluster's key set, as STS does. Pure. Called by tests against a
//! real API server; `standin::oidc` reads keys by it.

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use serde_json::Value;

/// The claims of a JWT (RFC 7519) that a key of the set (RFC 7517) signed by ES256. Neither audience nor
/// lifetime is judged.
///
/// # Errors
/// When the token is malformed or names another algorithm, when the set has no such key, and when the
/// signature is not the key's.
pub fn verified_claims(token: &str, key_set: &Value) -> Result<Value> {
    let (signed, signature) = token.rsplit_once('.').context("the token has no signature")?;
    let (header, claims) = signed.split_once('.').context("the token has no claims")?;
    let header = object(header).context("the token's header")?;
    ensure!(header["alg"] == "ES256", "the token's algorithm is {}", header["alg"]);
    let kid = header["kid"].as_str().context("the token names no key")?;
    let keys = key_set["keys"].as_array().context("the key set has no keys")?;
    let key = keys.iter().find(|key| key["kid"] == kid).with_context(|| format!("no key {kid}"))?;
    let signature = decode(signature).context("the signature")?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point(key)?)
        .verify(signed.as_bytes(), &signature)
        .map_err(|error| anyhow!("the signature is not of the key {kid}: {error}"))?;
    object(claims).context("the token's claims")
}

/// The uncompressed point (SEC 1, 2.3.3) of a member of a key set.
///
/// # Errors
/// When it is no key on P-256.
pub(crate) fn point(key: &Value) -> Result<Vec<u8>> {
    ensure!(key["kty"] == "EC" && key["crv"] == "P-256", "the key {} is of another kind", key["kid"]);
    let coordinate = |name: &str| decode(key[name].as_str().unwrap_or_default()).context("the key");
    Ok([vec![4], coordinate("x")?, coordinate("y")?].concat())
}

fn decode(part: &str) -> Result<Vec<u8>> {
    Ok(URL_SAFE_NO_PAD.decode(part)?)
}

fn object(part: &str) -> Result<Value> {
    Ok(serde_json::from_slice(&decode(part)?)?)
}

#[cfg(test)]
mod tests {
    use ring::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use serde_json::json;

    use super::*;

    fn signer() -> EcdsaKeyPair {
        let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap()
    }

    fn key_set(kid: &str, signer: &EcdsaKeyPair) -> Value {
        let encode = |part: &[u8]| URL_SAFE_NO_PAD.encode(part);
        let point = signer.public_key().as_ref();
        json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "kid": kid, "x": encode(&point[1..33]), "y": encode(&point[33..]),
        }] })
    }

    fn token(header: &Value, signer: &EcdsaKeyPair) -> String {
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(header), encode(&json!({ "sub": "web" })));
        let signature = signer.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    #[test]
    fn only_the_named_key_of_the_set_vouches_for_claims() {
        let (signer, other) = (signer(), signer());
        let header = json!({ "alg": "ES256", "kid": "a" });
        let good = token(&header, &signer);

        assert_eq!(verified_claims(&good, &key_set("a", &signer)).unwrap(), json!({ "sub": "web" }));

        let refused = |token: &str, keys: &Value| format!("{:#}", verified_claims(token, keys).unwrap_err());
        assert!(refused(&good, &key_set("b", &signer)).contains("no key a"));
        assert!(refused(&good, &key_set("a", &other)).contains("not of the key"));
        let (head, rest) = good.split_once('.').unwrap();
        let (_, signature) = rest.split_once('.').unwrap();
        let forged = URL_SAFE_NO_PAD.encode(json!({ "sub": "admin" }).to_string());
        assert!(
            refused(&format!("{head}.{forged}.{signature}"), &key_set("a", &signer))
                .contains("not of the key")
        );
        let none = token(&json!({ "alg": "none", "kid": "a" }), &signer);
        assert!(refused(&none, &key_set("a", &signer)).contains("algorithm"));
        assert!(refused("nonsense", &key_set("a", &signer)).contains("no signature"));
    }
}
