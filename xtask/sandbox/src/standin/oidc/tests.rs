//! Published vectors, and each thing that a provider looks at.

use super::*;

const URL: &str = "https://oidc.example.com/c0";
const SUBJECT: &str = "system:serviceaccount:shop:web";

fn claims(now: Timestamp) -> Value {
    let now = now.as_second();
    json!({
        "aud": [OidcIssuer::AUDIENCE], "exp": now + 600, "iat": now, "iss": URL, "nbf": now, "sub": SUBJECT,
    })
}

/// Signs changed claims, and has them verified now.
fn judge(issuer: &OidcIssuer, change: impl FnOnce(&mut Value)) -> Result<String, TokenFault> {
    let now = Timestamp::now();
    let mut claims = claims(now);
    change(&mut claims);
    let token = issuer.sign(&claims).unwrap();
    issuer.provider().verify(&token, now).map(|verified| verified.subject)
}

/// RFC 7515, A.2 and A.3, with the ids that the API server gives these keys.
#[test]
fn a_keys_id_is_the_hash_of_its_info() {
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let x = decode("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU");
    let y = decode("x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0");

    let ec = PublicKey::es256(&[&[4], x.as_slice(), &y].concat()).unwrap();
    let rsa = SigningKey::rs256().unwrap();

    assert_eq!(ec.id, "K9G7DESol8MKeqCZHN442AYv5EHeUNoPRoJTRPYC6Cc");
    assert_eq!(rsa.public().id, "b9E8JDWjYefFiM0X9V9a098Bd6ZsFyemogCEX016uIw");
}

/// Computed by another implementation.
#[test]
fn an_rs256_token_is_the_same_byte_for_byte() {
    let issuer = OidcIssuer::with_rsa(URL).unwrap();
    let claims = json!({
        "aud": ["sts.aliyuncs.com"], "exp": 1_767_326_645, "iat": 1_767_323_045, "iss": URL,
        "jti": "00000000-0000-4000-8000-000000000001",
        "kubernetes.io": {
            "namespace": "shop", "node": { "name": "n1", "uid": "u-node" },
            "pod": { "name": "web-0", "uid": "u-pod" }, "serviceaccount": { "name": "web", "uid": "u-sa" },
        },
        "nbf": 1_767_323_045, "sub": SUBJECT,
    });

    let token = issuer.sign(&claims).unwrap();

    assert_eq!(token.len(), 906);
    assert_eq!(
        crate::standin::hex_sha256(token.as_bytes()),
        "35792dc6f9ec67d24d722ffdfb8263b61e4728dc834f47f7c865cc1dcbd6504f"
    );
    let at = Timestamp::from_second(1_767_323_100).unwrap();
    let verified = issuer.provider().verify(&token, at).unwrap();
    assert_eq!((verified.subject.as_str(), verified.issuer.as_str()), (SUBJECT, URL));
}

#[test]
fn a_provider_looks_at_issuer_audience_and_times() {
    let issuer = OidcIssuer::new(URL).unwrap();
    let now = Timestamp::now().as_second();
    let with = |name: &'static str, value: Value| judge(&issuer, |claims| claims[name] = value);

    assert_eq!(judge(&issuer, |_| {}), Ok(SUBJECT.to_owned()));
    assert_eq!(with("iss", "https://oidc.example.com/c1".into()), Err(TokenFault::Issuer));
    assert_eq!(with("aud", json!(["https://kubernetes.default.svc"])), Err(TokenFault::Audience));
    assert_eq!(with("aud", json!(["other", OidcIssuer::AUDIENCE])), Ok(SUBJECT.to_owned()));
    assert_eq!(with("exp", (now - 1).into()), Err(TokenFault::Expired));
    assert_eq!(with("nbf", (now + 60).into()), Err(TokenFault::NotYet));
    assert_eq!(with("iat", (now + 60).into()), Err(TokenFault::NotYet));
    assert_eq!(with("iat", (now - 13 * 3600).into()), Err(TokenFault::TooOld));
    assert_eq!(with("iat", Value::Null), Err(TokenFault::Invalid));
    assert_eq!(with("sub", Value::Null), Err(TokenFault::Invalid));
}

#[test]
fn a_token_is_as_good_as_its_key_is_known() {
    let issuer = OidcIssuer::new(URL).unwrap();
    let ok = Ok(SUBJECT.to_owned());
    let provider = issuer.provider();
    let now = Timestamp::now();
    let of_the_first_key = issuer.sign(&claims(now)).unwrap();

    issuer.rotate_to_rsa().unwrap();
    assert_eq!(judge(&issuer, |_| {}), Err(TokenFault::UnknownKey));
    issuer.publish();
    assert_eq!(judge(&issuer, |_| {}), ok);
    assert_eq!(issuer.jwks()["keys"].as_array().unwrap().len(), 2);
    assert!(provider.verify(&of_the_first_key, now).is_ok(), "both keys are published");
    issuer.retire();
    assert_eq!(judge(&issuer, |_| {}), ok);
    assert_eq!(provider.verify(&of_the_first_key, now), Err(TokenFault::UnknownKey));

    issuer.set_reachable(false);
    assert_eq!(judge(&issuer, |_| {}), Err(TokenFault::IssuerAway));
    issuer.set_reachable(true);
    let token = issuer.sign(&claims(now)).unwrap();
    let fault = |provider: OidcProvider| provider.verify(&token, now).err();
    assert_eq!(fault(issuer.provider()), None);
    assert_eq!(fault(issuer.provider().with_wrong_fingerprint()), Some(TokenFault::Fingerprint));
    assert_eq!(fault(issuer.provider().with_audience("other")), Some(TokenFault::Audience));
    assert_eq!(fault(issuer.provider().with_issuer("https://other.example.com")), Some(TokenFault::Issuer));
}

#[test]
fn a_published_key_set_is_all_that_a_provider_needs() {
    let (issuer, stranger) = (OidcIssuer::new(URL).unwrap(), OidcIssuer::new(URL).unwrap());
    let now = Timestamp::now();
    let token = issuer.sign(&claims(now)).unwrap();
    let provider = |jwks: &Value| OidcProvider::of_jwks(URL, jwks, Cloud::Alibaba);

    let verified = provider(&issuer.jwks()).unwrap().verify(&token, now).unwrap();
    assert_eq!((verified.subject.as_str(), verified.issuer.as_str()), (SUBJECT, URL));

    let of_stranger = provider(&stranger.jwks()).unwrap();
    assert_eq!(of_stranger.verify(&token, now), Err(TokenFault::UnknownKey));
    let on_aws = OidcProvider::of_jwks(URL, &issuer.jwks(), Cloud::Aws).unwrap();
    assert_eq!(on_aws.verify(&token, now), Err(TokenFault::Audience));
    let mut renamed = issuer.jwks();
    renamed["keys"][0]["kid"] = stranger.jwks()["keys"][0]["kid"].clone();
    for unusable in [renamed, OidcIssuer::with_rsa(URL).unwrap().jwks(), json!({ "keys": [] }), Value::Null] {
        assert!(provider(&unusable).is_err(), "{unusable}");
    }
}

#[test]
fn neither_a_foreign_key_nor_no_key_signs() {
    let (issuer, stranger) = (OidcIssuer::new(URL).unwrap(), OidcIssuer::new(URL).unwrap());
    let now = Timestamp::now();
    let id = locked(&issuer.keys)[0].public().id.clone();
    let forged = stranger.sign_as(&claims(now), Some(&id)).unwrap();
    let good = issuer.sign(&claims(now)).unwrap();
    let (_, rest) = good.split_once('.').unwrap();
    let headed = |header: &Value| format!("{}.{rest}", URL_SAFE_NO_PAD.encode(header.to_string()));
    let judge = |token: &str| issuer.provider().verify(token, now).map(drop);

    assert_eq!(judge(&good), Ok(()));
    assert_eq!(judge(&forged), Err(TokenFault::Invalid));
    for algorithm in ["none", "HS256", "RS256"] {
        assert_eq!(judge(&headed(&json!({ "alg": algorithm, "kid": id }))), Err(TokenFault::Invalid));
    }
    for token in ["", "a.b.c", good.rsplit_once('.').unwrap().0] {
        assert_eq!(judge(token), Err(TokenFault::Invalid), "{token}");
    }
}

#[test]
fn a_star_is_a_star_in_string_equals_only() {
    let (provider, other) = ("acs:ram::1:oidc-provider/c0", "acs:ram::1:oidc-provider/c1");

    let equals = OidcTrust::equals(provider, SUBJECT);
    assert!(equals.holds(provider, SUBJECT));
    assert!(!equals.holds(other, SUBJECT));
    assert!(!equals.holds(provider, "system:serviceaccount:shop:web2"));
    assert!(!OidcTrust::equals(provider, "system:serviceaccount:shop:*").holds(provider, SUBJECT));

    let like = OidcTrust::like(provider, "system:serviceaccount:shop:w*b");
    for (subject, fits) in [(SUBJECT, true), ("system:serviceaccount:shop:api", false), ("", false)] {
        assert_eq!(like.holds(provider, subject), fits, "{subject}");
    }
    assert!(OidcTrust::like(provider, "*:we?").holds(provider, SUBJECT));
    assert!(!OidcTrust::like(provider, "*:we?").holds(other, SUBJECT));
}
