//! Against AWS's published test suite, vectors that botocore confirms, and a computation that shares no code
//! with ours.

use percent_encoding::percent_decode_str;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;

/// Of AWS's "Signature Version 4 Test Suite", as are the id, the secret, the time, and the scope.
const TOKEN: &str = "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==";
const ID: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const SUITE_TIME: &str = "2015-08-30T12:36:00Z";
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

const FORM_A: &str = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fteam%2Fapp&RoleSessionName=shop.checkout&DurationSeconds=3600&ExternalId=a%2Bb%3D%2C.%40%3A%2F-c";
const FORM_B: &str = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fapp&RoleSessionName=a%2Cb%3Dc&DurationSeconds=900&Tags.member.1.Key=kubernetes-namespace&Tags.member.1.Value=shop&TransitiveTagKeys.member.1=kubernetes-namespace";

fn scope() -> Scope<'static> {
    Scope { date: SUITE_TIME.parse().unwrap(), region: "us-east-1", service: "service" }
}

fn keys(token: Option<&str>) -> BaseCredentials {
    BaseCredentials {
        access_key_id: ID.into(),
        access_key_secret: SECRET.into(),
        security_token: token.map(Into::into),
    }
}

#[test]
fn signs_as_the_published_test_suite() {
    let (host, date) = (("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z"));
    let payload = "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e";
    let form = ("content-type", "application/x-www-form-urlencoded");
    let posted = [("x-amz-content-sha256", payload), date, host, form, ("content-length", "13")];
    for (case, method, headers, payload_sha256, canonical_sha256, names, signature) in [
        (
            "get-vanilla",
            "GET",
            &[host, date][..],
            EMPTY,
            "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
            "host;x-amz-date",
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        (
            "post-x-www-form-urlencoded",
            "POST",
            &posted[..],
            payload,
            "b1edd1d03544c25390e32085d55b57acc9a3961bb59415ff86c45c3d89d16cfb",
            "content-length;content-type;host;x-amz-content-sha256;x-amz-date",
            "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b",
        ),
        (
            "post-sts-header-before",
            "POST",
            &[host, date, ("x-amz-security-token", TOKEN)][..],
            EMPTY,
            "c237e1b440d4c63c32ca95b5b99481081cb7b13c7e40434868e71567c1a882f6",
            "host;x-amz-date;x-amz-security-token",
            "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead",
        ),
        (
            "post-sts-header-after",
            "POST",
            &[host, date][..],
            EMPTY,
            "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87",
            "host;x-amz-date",
            "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ),
    ] {
        let request = CanonicalRequest { method, path: "/", query: "", headers, payload_sha256 };

        assert_eq!(sha256_hex(request.text().0.as_bytes()), canonical_sha256, "{case}");
        assert_eq!(
            scope().authorization(&request, ID, &SECRET.into()),
            format!(
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, \
                 SignedHeaders={names}, Signature={signature}"
            ),
            "{case}"
        );
    }
    assert_eq!(sha256_hex(b"Param1=value1"), payload);
    assert_eq!(
        hex::encode(*scope().key(&SECRET.into())),
        "938127b5336810ddb6a5d6af445fcac9e371f9ed418ed386b022aed82901be75"
    );
}

#[test]
fn signs_assume_role_as_botocore_does() {
    let regional = FormCall {
        host: "sts.eu-west-1.amazonaws.com",
        region: "eu-west-1",
        form: FORM_A.as_bytes(),
        date: SUITE_TIME.parse().unwrap(),
    };
    let global = FormCall {
        host: "sts.amazonaws.com",
        region: "us-east-1",
        form: FORM_B.as_bytes(),
        date: "2026-11-28T00:00:00Z".parse().unwrap(),
    };

    let with_token = regional.headers(&keys(Some("TOKEN/with+marks=="))).unwrap();
    let of_static_keys = global.headers(&keys(None)).unwrap();

    assert_eq!(
        with_token["authorization"],
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/eu-west-1/sts/aws4_request, \
         SignedHeaders=content-type;host;x-amz-date;x-amz-security-token, \
         Signature=1f06efad8e61ff28855f79883954c44bab2cab40e36816df0ebdb48d9b1ca146"
    );
    assert_eq!(
        of_static_keys["authorization"],
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20261128/us-east-1/sts/aws4_request, \
         SignedHeaders=content-type;host;x-amz-date, \
         Signature=4c20729024b973cfca5e6abb15caada982203f3fdef9b8f34e4e617dc5496fac"
    );
    assert_eq!(with_token["x-amz-security-token"], "TOKEN/with+marks==");
    assert_eq!(with_token["content-type"], "application/x-www-form-urlencoded; charset=utf-8");
    assert!(!of_static_keys.contains_key("x-amz-security-token"));
}

#[test]
fn nothing_secret_is_in_debug_output_and_what_cannot_be_sent_is_refused() {
    let call = FormCall { host: "h", region: "r", form: b"", date: SUITE_TIME.parse().unwrap() };

    let headers = call.headers(&keys(Some("the-token"))).unwrap();
    let broken = call.headers(&keys(Some("the\ntoken")));

    let text = format!("{headers:?}");
    assert!(!text.contains("the-token") && !text.contains("Signature") && !text.contains(SECRET), "{text}");
    assert!(broken.is_err());
}

/// RFC 2104, by its own words, and not by the crate that the agent uses.
fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let mut block = [0; 64];
    match key.len() {
        0..=64 => block[..key.len()].copy_from_slice(key),
        _ => block[..32].copy_from_slice(&Sha256::digest(key)),
    }
    let padded = |pad: u8| block.map(|byte| byte ^ pad).to_vec();
    let inner = Sha256::digest([&padded(0x36), text].concat());
    Sha256::digest([&padded(0x5c)[..], &inner].concat()).to_vec()
}

/// The signature as a server computes it: from what arrived, and the secret.
pub(in crate::aws) fn verify(headers: &HeaderMap, body: &[u8], secret: &str) -> bool {
    let text = |name: &str| headers[name].to_str().unwrap();
    let (_, credential) = text("authorization").split_once("Credential=").unwrap();
    let (credential, rest) = credential.split_once(", SignedHeaders=").unwrap();
    let (names, signature) = rest.split_once(", Signature=").unwrap();
    let mut scope = credential.splitn(5, '/').skip(1);
    let [day, region, service] = [(); 3].map(|()| scope.next().unwrap());
    let lines: String = names.split(';').map(|name| format!("{name}:{}\n", text(name))).collect();
    let canonical = format!("POST\n/\n\n{lines}\n{names}\n{}", hex::encode(Sha256::digest(body)));
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{}\n{day}/{region}/{service}/aws4_request\n{}",
        text("x-amz-date"),
        hex::encode(Sha256::digest(canonical))
    );
    let mut key = [b"AWS4", secret.as_bytes()].concat();
    for part in [day, region, service, "aws4_request"] {
        key = hmac(&key, part.as_bytes());
    }
    hex::encode(hmac(&key, to_sign.as_bytes())) == signature
}

proptest! {
    #[test]
    fn a_verifier_of_its_own_accepts_what_was_signed_and_nothing_else(
        secret in "[!-~]{1,80}",
        token in proptest::option::of("[!-~]{1,300}"),
        region in "[a-z0-9-]{1,32}",
        body in "[ -~]{0,200}",
        second in 0_i64..4_000_000_000,
    ) {
        let date = Timestamp::from_second(second).unwrap();
        let host = format!("sts.{region}.amazonaws.com");
        let credentials =
            BaseCredentials { access_key_secret: secret.as_str().into(), ..keys(token.as_deref()) };
        let call = FormCall { host: &host, region: &region, form: body.as_bytes(), date };

        let mut headers = call.headers(&credentials).unwrap();
        let (other_body, other_secret) = (format!("{body}x"), format!("{secret}x"));

        prop_assert!(verify(&headers, body.as_bytes(), &secret));
        prop_assert!(!verify(&headers, other_body.as_bytes(), &secret));
        prop_assert!(!verify(&headers, body.as_bytes(), &other_secret));
        headers.insert("host", HeaderValue::from_static("sts.elsewhere.amazonaws.com"));
        prop_assert!(!verify(&headers, body.as_bytes(), &secret));
    }
}

#[test]
fn forms_read_back_as_they_were_written() {
    let parameters =
        [("RoleSessionName", "a,b=c +&"), ("ExternalId", "a+b=,.@:/-c"), ("Policy", "{\"é\": 1}\n")];

    let form = crate::canonical::encode(&parameters);

    let read: Vec<_> = form
        .split('&')
        .map(|pair| pair.split_once('=').unwrap())
        .map(|(name, value)| (name, percent_decode_str(value).decode_utf8().unwrap().into_owned()))
        .collect();
    assert_eq!(read, parameters.map(|(name, value)| (name, value.to_owned())));
    assert!(form.contains("ExternalId=a%2Bb%3D%2C.%40%3A%2F-c"), "{form}");
}
