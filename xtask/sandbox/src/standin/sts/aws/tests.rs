//! Each refusal, next to the same call allowed.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::{
    client::{self, Credentials, Reply, assume_role, call_v4, caller_identity},
    clock::Clock,
    standin::{
        Bind, OidcIssuer, OidcTrust, Sts, StsMode, V4Request, V4Scope, account::Role, v4_authorization,
    },
};

const ARN: &str = "arn:aws:iam::123456789012:role/shop/orders-role";
const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";

/// STS, and the keys of the node.
fn sts() -> (Sts, Credentials) {
    let accounts = Arc::new(Accounts::of(Cloud::Aws, Clock::default()));
    accounts.add_role(ARN, Role::default());
    let node = accounts.issue(Principal::Node, Some(Duration::from_secs(6 * 3600)));
    (Sts::start(Bind::loopback(), accounts).unwrap(), Credentials::from(&node))
}

fn accounts(sts: &Sts) -> &Accounts {
    &sts.server.handler.accounts
}

/// The status, and the code of an error.
fn code(reply: &Reply) -> (u16, String) {
    (reply.status, xml_text(&reply.body, "Code").unwrap_or("OK").to_owned())
}

fn assume(sts: &Sts, credentials: &Credentials, extra: &[(&str, &str)]) -> (u16, String) {
    code(&assumed(sts, credentials, extra))
}

fn assumed(sts: &Sts, credentials: &Credentials, extra: &[(&str, &str)]) -> Reply {
    let mut params = vec![("RoleArn", ARN), ("RoleSessionName", "shop.orders")];
    for (name, value) in extra {
        params.retain(|(known, _)| known != name);
        params.push((name, value));
    }
    assume_role(&sts.url(), credentials, &params).unwrap()
}

/// The credentials in an answer.
fn issued(reply: &Reply) -> Credentials {
    let text = |name| xml_text(&reply.body, name).unwrap().to_owned();
    Credentials {
        access_key_id: text("AccessKeyId"),
        access_key_secret: text("SecretAccessKey"),
        security_token: Some(text("SessionToken")),
    }
}

fn refused(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

fn ok() -> (u16, String) {
    refused(200, "OK")
}

#[test]
fn issues_credentials_that_identify_themselves_and_cannot_assume_further() {
    let (sts, node) = sts();

    let reply = assumed(&sts, &node, &[]);

    // Without the role's path.
    let arn = "arn:aws:sts::123456789012:assumed-role/orders-role/shop.orders";
    assert_eq!(xml_text(&reply.body, "Arn"), Some(arn));
    assert_eq!(xml_text(&reply.body, "Expiration").unwrap().len(), "2026-11-28T11:00:00Z".len());
    assert_eq!(reply.headers["content-type"], "text/xml");
    assert_eq!(Some(&*reply.headers["x-amzn-requestid"]), xml_text(&reply.body, "RequestId"));
    let issued = issued(&reply);
    assert_eq!(issued.role(), "orders-role");
    assert_eq!(caller_identity(&sts.url(), &issued).unwrap(), arn);
    assert_eq!(assume(&sts, &issued, &[]), refused(403, "AccessDenied"));
    let calls = sts.assumed(ARN);
    assert_eq!((calls.len(), calls[0].signature, &*calls[0].outcome), (2, "V4", "OK"));
    assert_eq!(calls[0].access_key_id, node.access_key_id);
    let of_node = caller_identity(&sts.url(), &node).unwrap();
    assert!(of_node.ends_with(&format!("assumed-role/{}/i-0123456789abcdef0", Accounts::NODE_ROLE)));
}

#[test]
fn refuses_keys_and_tokens_that_do_not_belong_together() {
    let (sts, node) = sts();
    let with = |change: &dyn Fn(&mut Credentials)| {
        let mut credentials = node.clone();
        change(&mut credentials);
        assume(&sts, &credentials, &[])
    };

    assert_eq!(with(&|_| {}), ok());
    let unknown = refused(403, "InvalidClientTokenId");
    assert_eq!(with(&|key| key.access_key_id.push('x')), unknown);
    assert_eq!(with(&|key| key.security_token = None), unknown);
    assert_eq!(with(&|key| key.security_token = Some("x".into())), unknown);
    assert_eq!(with(&|key| key.access_key_secret.push('x')), refused(403, "SignatureDoesNotMatch"));
}

#[test]
fn refuses_a_clock_five_minutes_off_and_expired_keys() {
    let (sts, node) = sts();
    let params = [("RoleArn", ARN), ("RoleSessionName", "shop.orders")];
    let now = Timestamp::now();
    let at = |seconds| {
        let at = now + SignedDuration::from_secs(seconds);
        let reply = call_v4(&sts.url(), &node, "AssumeRole", &params, at).unwrap();
        (code(&reply), xml_text(&reply.body, "Message").unwrap_or_default().to_owned())
    };

    assert_eq!(at(-290).0, ok());
    assert_eq!(at(290).0, ok());
    let (late, message) = at(-310);
    assert_eq!(late, refused(403, "SignatureDoesNotMatch"));
    assert!(message.starts_with("Signature expired: ") && message.contains(" is now earlier than "));
    let (early, message) = at(310);
    assert_eq!(early, refused(403, "SignatureDoesNotMatch"));
    assert!(message.starts_with("Signature not yet current: "), "{message}");

    accounts(&sts).clock().shift(SignedDuration::from_hours(7));
    assert_eq!(at(7 * 3600).0, refused(403, "ExpiredToken"));
}

/// A signed AssumeRole: its scope, what is signed of its headers, and what is changed afterwards.
struct Forged<'a> {
    day: Option<&'a str>,
    region: &'a str,
    service: &'a str,
    unsigned: &'a [&'a str],
    added: Option<(&'a str, &'a str)>,
    body: Option<&'a str>,
    host: Option<&'a str>,
}

const SOUND: Forged<'_> = Forged {
    day: None,
    region: Cloud::Aws.region(),
    service: "sts",
    unsigned: &[],
    added: None,
    body: None,
    host: None,
};

impl Forged<'_> {
    fn send(&self, sts: &Sts, key: &Credentials) -> (u16, String) {
        let body = format!(
            "Action=AssumeRole&Version=2011-06-15&RoleSessionName=shop.orders&RoleArn={}",
            ARN.replace(':', "%3A").replace('/', "%2F")
        );
        let date = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let url = sts.url();
        let headers = [
            ("content-type", FORM),
            ("host", self.host.unwrap_or(url.trim_start_matches("http://"))),
            ("x-amz-date", &*date),
            ("x-amz-security-token", key.security_token.as_deref().unwrap()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let signed: Vec<_> =
            headers.iter().filter(|(name, _)| !self.unsigned.contains(&name.as_str())).cloned().collect();
        let payload = body.as_bytes();
        let request = V4Request { method: "POST", path: "/", query: "", headers: &signed, payload };
        let scope = V4Scope { date: &date, region: self.region, service: self.service };
        let mut authorization = v4_authorization(&key.access_key_id, &key.access_key_secret, scope, &request);
        if let Some(day) = self.day {
            authorization = authorization.replacen(&date[..8], day, 1);
        }

        let mut sent = client::Request::get(url + "/").header("authorization", authorization);
        sent.method = "POST".into();
        sent.headers.extend(headers.into_iter().filter(|(name, _)| name != "host"));
        sent.headers.extend(self.added.map(|(name, value)| (name.to_owned(), value.to_owned())));
        sent.body = self.body.map_or(body, str::to_owned).into_bytes();
        code(&sent.send().unwrap())
    }
}

#[test]
fn verifies_the_signature_over_all_that_must_be_signed_in_its_scope() {
    let (sts, node) = sts();
    let mismatch = refused(403, "SignatureDoesNotMatch");

    assert_eq!(SOUND.send(&sts, &node), ok());
    // As an SDK of JavaScript does.
    assert_eq!(Forged { unsigned: &["content-type"], ..SOUND }.send(&sts, &node), ok());
    for (what, forged) in [
        ("the day", Forged { day: Some("20150830"), ..SOUND }),
        ("the region", Forged { region: "us-east-1", ..SOUND }),
        ("the service", Forged { service: "iam", ..SOUND }),
        ("the host", Forged { host: Some("sts.example.com"), ..SOUND }),
        ("an unsigned host", Forged { unsigned: &["host"], ..SOUND }),
        ("an unsigned date", Forged { unsigned: &["x-amz-date"], ..SOUND }),
        ("an unsigned token", Forged { unsigned: &["x-amz-security-token"], ..SOUND }),
        ("another header", Forged { added: Some(("x-amz-meta", "1")), ..SOUND }),
        ("another hash", Forged { added: Some(("x-amz-content-sha256", "00")), ..SOUND }),
        ("another body", Forged { body: Some("Action=GetCallerIdentity&Version=2011-06-15"), ..SOUND }),
    ] {
        assert_eq!(forged.send(&sts, &node), mismatch, "{what}");
    }
    assert_eq!(SOUND.send(&sts, &node), ok());
}

#[test]
fn refuses_calls_without_a_signature_and_other_actions() {
    let (sts, node) = sts();
    let post = |authorization: Option<&str>| {
        let mut request = client::Request::get(sts.url() + "/");
        request.method = "POST".into();
        request.headers = vec![("content-type".into(), FORM.into())];
        request.headers.extend(authorization.map(|value| ("authorization".into(), value.into())));
        request.body = "Action=GetCallerIdentity&Version=2011-06-15".into();
        code(&request.send().unwrap())
    };

    assert_eq!(post(None), refused(403, "MissingAuthenticationToken"));
    assert_eq!(post(Some("AWS4-HMAC-SHA256 Credential=x")), refused(400, "IncompleteSignature"));
    let call = |action| code(&call_v4(&sts.url(), &node, action, &[], Timestamp::now()).unwrap());
    assert_eq!(call("GetCallerIdentity"), ok());
    assert_eq!(call("GetSessionToken"), refused(400, "InvalidAction"));
}

#[test]
fn checks_the_parameters_of_assume_role() {
    let (sts, node) = sts();
    let invalid = refused(400, "ValidationError");
    let with = |name, value| assume(&sts, &node, &[(name, value)]);

    for (name, value) in [
        ("RoleArn", "orders-role"),
        ("RoleArn", "acs:ram::1234567890123456:role/orders-role"),
        ("RoleSessionName", "x"),
        ("RoleSessionName", "a b"),
        ("DurationSeconds", "899"),
        ("DurationSeconds", "43201"),
        ("DurationSeconds", "an hour"),
        ("ExternalId", "x"),
        ("ExternalId", "two words"),
        ("SourceIdentity", "two words"),
        ("Policy", "{\"Version\":\"\u{2014}\"}"),
    ] {
        assert_eq!(with(name, value), invalid, "{name}={value}");
    }
    assert_eq!(with("Policy", "{"), refused(400, "MalformedPolicyDocument"));
    for (name, value) in [
        ("RoleSessionName", "a,b=c+d@e"),
        ("DurationSeconds", "900"),
        ("ExternalId", "a+b=,.@:/-c"),
        ("Policy", "{\"Version\":\"2012-10-17\"}"),
    ] {
        assert_eq!(with(name, value), ok(), "{name}={value}");
    }
}

#[test]
fn tells_a_role_that_does_not_trust_from_none_by_nothing() {
    let (sts, node) = sts();
    let denied = refused(403, "AccessDenied");
    let none = ARN.replace("orders", "no-such");
    assert_eq!(assume(&sts, &node, &[("RoleArn", &none)]), denied);

    accounts(&sts).add_role(ARN, Role { external_id: Some("team-7".into()), ..Role::default() });
    assert_eq!(assume(&sts, &node, &[]), denied);
    assert_eq!(assume(&sts, &node, &[("ExternalId", "team-8")]), denied);
    assert_eq!(assume(&sts, &node, &[("ExternalId", "team-7")]), ok());

    accounts(&sts).add_role(ARN, Role { trusts_node: false, ..Role::default() });
    assert_eq!(assume(&sts, &node, &[("ExternalId", "team-7")]), denied);
    accounts(&sts).add_role(ARN, Role::default());
    accounts(&sts).deny_node();
    assert_eq!(assume(&sts, &node, &[]), denied);
}

#[test]
fn a_session_gets_an_hour_at_most_and_a_user_what_the_role_allows() {
    let (sts, node) = sts();
    let user = Credentials::from(&accounts(&sts).add_user("kube2ram"));
    let longest = Duration::from_secs(4 * 3600);
    accounts(&sts).add_role(ARN, Role { max_session: longest, ..Role::default() });
    let with = |key: &Credentials, seconds: &str| {
        let reply = assumed(&sts, key, &[("DurationSeconds", seconds)]);
        (code(&reply), xml_text(&reply.body, "Message").unwrap_or_default().to_owned())
    };

    assert_eq!(with(&node, "3600").0, ok());
    let (chained, message) = with(&node, "3601");
    assert_eq!(chained, refused(400, "ValidationError"));
    assert!(message.contains("1 hour session limit for roles assumed by role chaining"), "{message}");
    assert_eq!(with(&user, "14400").0, ok());
    let (long, message) = with(&user, "14401");
    assert_eq!(long, refused(400, "ValidationError"));
    assert!(message.contains("exceeds the MaxSessionDuration set for this role"), "{message}");
}

#[test]
fn tags_and_a_source_identity_need_a_permission_each_and_are_on_record() {
    let (sts, node) = sts();
    let tag = [("Tags.member.1.Key", "kubernetes-namespace"), ("Tags.member.1.Value", "shop")];
    let identity = [("SourceIdentity", "shop.orders-sa")];
    let denied = refused(403, "AccessDenied");
    assert_eq!((assume(&sts, &node, &tag), assume(&sts, &node, &identity)), (denied.clone(), denied));

    let role = Role { allows_tags: true, allows_source_identity: true, ..Role::default() };
    accounts(&sts).add_role(ARN, role);
    let transitive = [&tag[..], &identity, &[("TransitiveTagKeys.member.1", "kubernetes-namespace")]];
    let reply = assumed(&sts, &node, &transitive.concat());

    assert_eq!(code(&reply), ok());
    assert_eq!(xml_text(&reply.body, "SourceIdentity"), Some("shop.orders-sa"));
    assert!(xml_text(&reply.body, "PackedPolicySize").is_some());
    let call = sts.assumed(ARN).pop().unwrap();
    assert_eq!(call.tags().into_iter().collect::<Vec<_>>(), [("kubernetes-namespace", "shop")]);
    let two = ("Tags.member.2.Key", "Kubernetes-Namespace");
    for wrong in [
        &[("Tags.member.1.Key", "a")][..],
        &[("Tags.member.2.Key", "a"), ("Tags.member.2.Value", "b")],
        &[("Tags.member.1.Key", "aws:a"), ("Tags.member.1.Value", "b")],
        &[("Tags.member.1.Key", "a"), ("Tags.member.1.Value", "b;c")],
        &[tag[0], tag[1], two, ("Tags.member.2.Value", "x")],
        &[tag[0], tag[1], ("TransitiveTagKeys.member.1", "another")],
    ] {
        assert_eq!(assume(&sts, &node, wrong), refused(400, "ValidationError"), "{wrong:?}");
    }
}

const SUBJECT: &str = "system:serviceaccount:kube-system:kube2ram";

#[test]
fn takes_the_clusters_token_for_the_role_that_trusts_its_subject() {
    let (sts, _) = sts();
    let issuer = OidcIssuer::new("https://oidc.eks.eu-west-1.amazonaws.com/id/C0123").unwrap();
    let provider = Cloud::Aws.provider_arn("oidc.eks.eu-west-1.amazonaws.com/id/C0123");
    accounts(&sts).add_provider(&provider, issuer.provider_in(Cloud::Aws));
    let trust = OidcTrust::equals(&provider, SUBJECT);
    accounts(&sts).add_role(ARN, Role { oidc: Some(trust), ..Role::default() });
    let other = Cloud::Aws.role_arn("other");
    accounts(&sts).add_role(&other, Role::default());
    let hour = SignedDuration::from_hours(1);
    let token = |issuer: &OidcIssuer, subject: &str, audience: &str| {
        issuer.token(subject, audience, Timestamp::now() + hour).unwrap()
    };
    let ask = |token: &str, arn: &str| {
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        form.extend_pairs([("Action", "AssumeRoleWithWebIdentity"), ("Version", "2011-06-15")]);
        form.extend_pairs([("RoleArn", arn), ("RoleSessionName", "kube2ram"), ("WebIdentityToken", token)]);
        let mut request = client::Request::get(sts.url() + "/");
        request.method = "POST".into();
        request.headers = vec![("content-type".into(), FORM.into())];
        request.body = form.finish().into_bytes();
        request.send().unwrap()
    };
    let audience = Cloud::Aws.audience();
    let good = token(&issuer, SUBJECT, audience);

    let reply = ask(&good, ARN);
    assert_eq!(code(&reply), ok());
    assert_eq!(xml_text(&reply.body, "SubjectFromWebIdentityToken"), Some(SUBJECT));
    assert_eq!(issued(&reply).role(), "orders-role");
    let call = sts.calls().pop().unwrap();
    assert_eq!((call.signature, call.param("WebIdentityToken")), ("", None), "the record holds no token");
    assert_eq!(call.subject, SUBJECT);

    let denied = refused(403, "AccessDenied");
    assert_eq!(code(&ask(&good, &other)), denied);
    let neighbour = token(&issuer, "system:serviceaccount:shop:kube2ram", audience);
    assert_eq!(code(&ask(&neighbour, ARN)), denied);
    let invalid = refused(400, "InvalidIdentityToken");
    assert_eq!(code(&ask(&token(&issuer, SUBJECT, "https://kubernetes.default.svc"), ARN)), invalid);
    let stranger = OidcIssuer::new("https://oidc.eks.eu-west-1.amazonaws.com/id/C0123").unwrap();
    assert_eq!(code(&ask(&token(&stranger, SUBJECT, audience), ARN)), invalid);
    assert_eq!(code(&ask("x", ARN)), refused(400, "ValidationError"));
    issuer.set_reachable(false);
    assert_eq!(code(&ask(&good, ARN)), refused(400, "IDPCommunicationError"));
    issuer.set_reachable(true);
    accounts(&sts).add_provider(&provider, issuer.provider_in(Cloud::Aws).with_wrong_fingerprint());
    assert_eq!(code(&ask(&good, ARN)), invalid);
    accounts(&sts).add_provider(&provider, issuer.provider_in(Cloud::Aws));
    issuer.rotate().unwrap();
    assert_eq!(code(&ask(&token(&issuer, SUBJECT, audience), ARN)), invalid, "not published yet");
    issuer.publish();
    assert_eq!(code(&ask(&token(&issuer, SUBJECT, audience), ARN)), ok());
    accounts(&sts).clock().shift(SignedDuration::from_mins(61));
    assert_eq!(code(&ask(&good, ARN)), refused(400, "ExpiredTokenException"));
}

#[test]
fn fails_as_told() {
    let (sts, node) = sts();
    let in_mode = |mode| {
        sts.set_mode(mode).unwrap();
        assume(&sts, &node, &[])
    };

    assert_eq!(in_mode(StsMode::Throttle), refused(400, "Throttling"));
    assert_eq!(in_mode(StsMode::Unavailable), refused(503, "ServiceUnavailable"));
    let off = StsMode::Error(StatusCode::FORBIDDEN, "RegionDisabledException");
    assert_eq!(in_mode(off), refused(403, "RegionDisabledException"));
    assert_eq!(in_mode(StsMode::Slow(Duration::from_millis(1))), ok());
    sts.refuse(ARN, StatusCode::BAD_REQUEST, "PackedPolicyTooLarge");
    assert_eq!(assume(&sts, &node, &[]), refused(400, "PackedPolicyTooLarge"));
    sts.refuse_none();
    sts.set_lifetime(Some(Duration::from_secs(60)));
    assert_eq!(in_mode(StsMode::Ok), ok());
    let calls = sts.calls();
    assert_eq!((&*calls[0].outcome, &*calls[0].access_key_id), ("Throttling", &*node.access_key_id));
}
