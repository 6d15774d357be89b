//! The vectors of AWS's own signing test suite, and two calls of STS that botocore's signer signs alike.

use super::*;

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const ID: &str = "AKIDEXAMPLE";
const SERVICE: V4Scope<'_> = V4Scope { date: "20150830T123600Z", region: "us-east-1", service: "service" };
const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";

/// With what goes from a call of STS into its signature.
struct Vector<'a> {
    method: &'a str,
    scope: V4Scope<'a>,
    headers: &'a [(&'a str, &'a str)],
    payload: &'a str,
}

impl Vector<'_> {
    /// The hash of the canonical request, the key in hex, and the signature.
    fn sign(&self) -> [String; 3] {
        let headers: Vec<_> =
            self.headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let payload = self.payload.as_bytes();
        let request = V4Request { method: self.method, path: "/", query: "", headers: &headers, payload };
        let signature = v4_signature(SECRET, self.scope, &request);
        let authorization = Authorization::parse(&v4_authorization(ID, SECRET, self.scope, &request));
        assert_eq!(authorization.unwrap().signature, signature);
        [hex_sha256(request.canonical().as_bytes()), hex::encode(self.scope.key(SECRET)), signature]
    }
}

#[test]
fn matches_get_vanilla() {
    let headers = [("host", "example.amazonaws.com"), ("x-amz-date", SERVICE.date)];
    let vector = Vector { method: "GET", scope: SERVICE, headers: &headers, payload: "" };

    assert_eq!(
        vector.sign(),
        [
            "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
            "938127b5336810ddb6a5d6af445fcac9e371f9ed418ed386b022aed82901be75",
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ]
    );
}

#[test]
fn matches_post_x_www_form_urlencoded() {
    let headers = [
        ("content-length", "13"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("host", "example.amazonaws.com"),
        ("x-amz-content-sha256", "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e"),
        ("x-amz-date", SERVICE.date),
    ];
    let vector = Vector { method: "POST", scope: SERVICE, headers: &headers, payload: "Param1=value1" };

    let [canonical, _, signature] = vector.sign();

    assert_eq!(canonical, "b1edd1d03544c25390e32085d55b57acc9a3961bb59415ff86c45c3d89d16cfb");
    assert_eq!(signature, "d3875051da38690788ef43de4db0d8f280229d82040bfac253562e56c3f20e0b");
}

/// The suite's post-sts-header-after: a token that is added after the signing is not in the signature.
#[test]
fn matches_post_sts_header_after() {
    let headers = [("host", "example.amazonaws.com"), ("x-amz-date", SERVICE.date)];
    let vector = Vector { method: "POST", scope: SERVICE, headers: &headers, payload: "" };

    let [canonical, _, signature] = vector.sign();

    assert_eq!(canonical, "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87");
    assert_eq!(signature, "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b");
}

#[test]
fn matches_an_assume_role_with_a_token() {
    let scope = V4Scope { date: "20150830T123600Z", region: "eu-west-1", service: "sts" };
    let headers = [
        ("content-type", FORM),
        ("host", "sts.eu-west-1.amazonaws.com"),
        ("x-amz-date", scope.date),
        ("x-amz-security-token", "TOKEN/with+marks=="),
    ];
    let payload = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fteam%2Fapp&RoleSessionName=shop.checkout&DurationSeconds=3600&ExternalId=a%2Bb%3D%2C.%40%3A%2F-c";
    let vector = Vector { method: "POST", scope, headers: &headers, payload };
    let expected = [
        "0dc0bf54519cbc93913eab0c9aba0189c7bd30dbc4765223a9b527707177e983",
        "d12a4a2cda0ef616ec540ad5452f5b0c0ecddade0e737266a439f64b775c2de6",
        "1f06efad8e61ff28855f79883954c44bab2cab40e36816df0ebdb48d9b1ca146",
    ];
    assert_eq!(vector.sign(), expected);

    // Anything else is signed in another way.
    let later = V4Scope { date: "20150830T123601Z", ..scope };
    let elsewhere = V4Scope { region: "eu-west-2", ..scope };
    for other in [
        Vector { scope: later, ..vector },
        Vector { scope: elsewhere, ..vector },
        Vector { payload: "Action=AssumeRole", ..vector },
        Vector { headers: &headers[..3], ..vector },
        Vector { method: "GET", ..vector },
    ] {
        assert_ne!(other.sign()[2], expected[2]);
    }
}

#[test]
fn matches_an_assume_role_with_tags() {
    let scope = V4Scope { date: "20261128T000000Z", region: "us-east-1", service: "sts" };
    let headers = [("content-type", FORM), ("host", "sts.amazonaws.com"), ("x-amz-date", scope.date)];
    let payload = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fapp&RoleSessionName=a%2Cb%3Dc&DurationSeconds=900&Tags.member.1.Key=kubernetes-namespace&Tags.member.1.Value=shop&TransitiveTagKeys.member.1=kubernetes-namespace";
    let vector = Vector { method: "POST", scope, headers: &headers, payload };

    assert_eq!(
        vector.sign(),
        [
            "24d61dc3cdae37071d03d58ac3e5904a459c9e0d2493b0103d928a5098587b90",
            "32f6208703993d673b205dc1d924d99075bd8098e4544f450212e4ee250b4ea3",
            "4c20729024b973cfca5e6abb15caada982203f3fdef9b8f34e4e617dc5496fac",
        ]
    );
}

/// The suite's get-header-value-trim and get-vanilla-query-order-key-case, in short.
#[test]
fn folds_blanks_joins_repeated_headers_and_sorts_queries() {
    let headers = [("my-header", " a   b  c "), ("host", "x"), ("my-header", "d")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let request =
        V4Request { method: "GET", path: "/", query: "b=2&a=%2F+x&b=1", headers: &headers, payload: b"" };

    let canonical = request.canonical();

    let expected = "GET\n/\na=%2F%20x&b=1&b=2\nhost:x\nmy-header:a b c,d\n\nhost;my-header\n";
    assert!(canonical.starts_with(expected), "{canonical}");
}

#[test]
fn takes_the_header_apart_and_refuses_other_schemes() {
    let value = "AWS4-HMAC-SHA256 Credential=ASIA.orders-role.1/20150830/us-east-1/sts/aws4_request, \
                 SignedHeaders=host;x-amz-date, Signature=5fa0";

    let parsed = Authorization::parse(value).unwrap();

    assert_eq!((&*parsed.access_key_id, &*parsed.day), ("ASIA.orders-role.1", "20150830"));
    assert_eq!((&*parsed.region, &*parsed.service), ("us-east-1", "sts"));
    assert_eq!(parsed.signed_headers, ["host", "x-amz-date"]);
    for (from, to) in [
        ("AWS4-HMAC-SHA256 ", "ACS3-HMAC-SHA256 "),
        ("aws4_request", "aws4"),
        ("/20150830", ""),
        ("SignedHeaders", "Signed"),
        ("Signature", "Sign"),
    ] {
        assert_eq!(Authorization::parse(&value.replacen(from, to, 1)), None, "{from}");
    }
}
