//! Each refusal, next to the same call allowed.

use std::{collections::BTreeMap, sync::Arc};

use jiff::SignedDuration;

use super::*;
use crate::{
    client::{self, Credentials, Reply, assume_role, caller_identity},
    clock::Clock,
    standin::{
        Bind, Sts, StsMode,
        account::Role,
        signature::{V3Request, hex_sha256, v3_signature},
    },
};

const ARN: &str = "acs:ram::1234567890123456:role/orders-role";

fn sts() -> (Sts, Credentials) {
    let accounts = Arc::new(Accounts::new(Clock::default()));
    accounts.add_role(ARN, Role::default());
    let node = accounts.issue(Principal::Node, Some(Duration::from_secs(6 * 3600)));
    (Sts::start(Bind::loopback(), accounts).unwrap(), Credentials::from(&node))
}

fn accounts(sts: &Sts) -> &Accounts {
    &sts.server.handler.accounts
}

fn code(reply: &Reply) -> (u16, String) {
    let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    (reply.status, body["Code"].as_str().unwrap_or("OK").to_owned())
}

fn assume(sts: &Sts, credentials: &Credentials, extra: &[(&str, &str)]) -> (u16, String) {
    let mut params = vec![("RoleArn", ARN), ("RoleSessionName", "shop.orders")];
    for (name, value) in extra {
        params.retain(|(known, _)| known != name);
        params.push((name, value));
    }
    code(&assume_role(&sts.url(), credentials, &params).unwrap())
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
    let params = [("RoleArn", ARN), ("RoleSessionName", "shop.orders")];
    let reply = assume_role(&sts.url(), &node, &params).unwrap();
    let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    assert_eq!(body["AssumedRoleUser"]["Arn"], format!("{ARN}/shop.orders"));

    let issued: Credentials = serde_json::from_value(body["Credentials"].clone()).unwrap();

    assert_eq!(
        caller_identity(&sts.url(), &issued).unwrap(),
        "acs:ram::1234567890123456:assumed-role/orders-role/shop.orders"
    );
    assert_eq!(assume(&sts, &issued, &[]), refused(403, "NoPermission"));
    assert_eq!(sts.assumed(ARN).len(), 2);
    assert_eq!(sts.assumed(ARN)[0].param("RoleSessionName"), Some("shop.orders"));
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
    assert_eq!(with(&|key| key.access_key_id.push('x')), refused(400, "InvalidAccessKeyId.NotFound"));
    assert_eq!(with(&|key| key.security_token = None), refused(400, "MissingSecurityToken"));
    assert_eq!(
        with(&|key| key.security_token = Some("x".into())),
        refused(400, "InvalidSecurityToken.MismatchWithAccessKey")
    );
    assert_eq!(with(&|key| key.access_key_secret.push('x')), refused(400, "SignatureDoesNotMatch"));
}

#[test]
fn refuses_a_clock_a_quarter_of_an_hour_off_and_expired_keys() {
    let (sts, node) = sts();
    assert_eq!(assume(&sts, &node, &[]), ok());

    accounts(&sts).clock().shift(SignedDuration::from_mins(16));
    assert_eq!(assume(&sts, &node, &[]), refused(400, "InvalidTimeStamp.Expired"));
    accounts(&sts).clock().shift(SignedDuration::from_hours(6));
    assert_eq!(assume(&sts, &node, &[]), refused(400, "InvalidSecurityToken.Expired"));
}

#[test]
fn checks_the_parameters_of_assume_role() {
    let (sts, node) = sts();
    let with = |name, value| assume(&sts, &node, &[(name, value)]);

    assert_eq!(with("RoleArn", "orders-role"), refused(400, "InvalidParameter.RoleArn"));
    assert_eq!(with("RoleArn", "acs:ram::1:role/none"), refused(404, "EntityNotExist.Role"));
    assert_eq!(with("RoleSessionName", "x"), refused(400, "InvalidParameter.RoleSessionName"));
    assert_eq!(with("RoleSessionName", "a b"), refused(400, "InvalidParameter.RoleSessionName"));
    assert_eq!(with("DurationSeconds", "3601"), refused(400, "InvalidParameter.DurationSeconds"));
    assert_eq!(with("DurationSeconds", "900"), ok());
    assert_eq!(with("Policy", "{"), refused(400, "InvalidParameter.PolicyGrammar"));
    assert_eq!(with("Policy", "{\"Version\":\"1\"}"), ok());
}

#[test]
fn refuses_roles_that_do_not_trust_the_caller() {
    let (sts, node) = sts();
    accounts(&sts).add_role(ARN, Role { external_id: Some("team-7".into()), ..Role::default() });
    assert_eq!(assume(&sts, &node, &[]), refused(403, "NoPermission"));
    assert_eq!(assume(&sts, &node, &[("ExternalId", "team-7")]), ok());

    accounts(&sts).add_role(ARN, Role { trusts_node: false, ..Role::default() });

    assert_eq!(assume(&sts, &node, &[("ExternalId", "team-7")]), refused(403, "NoPermission"));
}

/// A V3 request to `sts`, with one header changed after it was signed.
fn v3(sts: &Sts, key: &Credentials, nonce: &str, tamper: Option<(&str, &str)>) -> (u16, String) {
    let query = BTreeMap::from([
        ("RoleArn".to_owned(), ARN.to_owned()),
        ("RoleSessionName".to_owned(), "shop.orders".to_owned()),
    ]);
    let host = sts.url().trim_start_matches("http://").to_owned();
    let mut headers = [
        ("host", host.as_str()),
        ("x-acs-action", "AssumeRole"),
        ("x-acs-content-sha256", &hex_sha256(b"")),
        ("x-acs-date", &iso8601(accounts(sts).clock().now())),
        ("x-acs-security-token", key.security_token.as_deref().unwrap()),
        ("x-acs-signature-nonce", nonce),
        ("x-acs-version", "2015-04-01"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    let payload_hash = hex_sha256(b"");
    let signed = V3Request { method: "POST", query: &query, headers: &headers, payload_hash: &payload_hash };
    let authorization = format!(
        "ACS3-HMAC-SHA256 Credential={},SignedHeaders={},Signature={}",
        key.access_key_id,
        signed.signed_headers(),
        v3_signature(&key.access_key_secret, &signed)
    );
    headers.remove(0);
    if let Some((name, value)) = tamper {
        headers.retain(|(known, _)| known != name);
        headers.push((name.into(), value.into()));
    }
    headers.push(("accept".into(), "application/json".into()));
    headers.push(("authorization".into(), authorization));
    let target = "/?RoleArn=acs%3Aram%3A%3A1234567890123456%3Arole%2Forders-role&RoleSessionName=shop.orders";
    let mut request = client::Request::get(sts.url() + target);
    request.method = "POST".into();
    request.headers = headers;
    code(&request.send().unwrap())
}

#[test]
fn verifies_v3_and_refuses_what_was_changed_added_or_sent_twice() {
    let (sts, node) = sts();

    assert_eq!(v3(&sts, &node, "n1", None), ok());
    assert_eq!(v3(&sts, &node, "n1", None), refused(400, "SignatureNonceUsed"));
    assert_eq!(
        v3(&sts, &node, "n2", Some(("x-acs-signature-nonce", "n3"))),
        refused(400, "SignatureDoesNotMatch")
    );
    assert_eq!(v3(&sts, &node, "n4", Some(("x-acs-unsigned", "1"))), refused(400, "SignatureDoesNotMatch"));
    assert_eq!(
        v3(&sts, &node, "n5", Some(("x-acs-date", "2026-11-21 10:00:00"))),
        refused(400, "InvalidTimeStamp.Format")
    );
    assert_eq!(sts.calls()[0].signature, "V3");
}

#[test]
fn fails_as_told() {
    let (sts, node) = sts();
    let in_mode = |mode| {
        sts.set_mode(mode).unwrap();
        assume(&sts, &node, &[])
    };

    assert_eq!(in_mode(StsMode::Throttle), refused(400, "Throttling.User"));
    assert_eq!(in_mode(StsMode::Unavailable), refused(503, "ServiceUnavailable"));
    assert_eq!(
        in_mode(StsMode::Error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError")),
        refused(500, "InternalError")
    );
    assert_eq!(in_mode(StsMode::Slow(Duration::from_millis(1))), ok());
    sts.set_mode(StsMode::Refuse).unwrap();
    assert!(assume_role(&sts.url(), &node, &[]).is_err());
    assert_eq!(in_mode(StsMode::Ok), ok());
    assert_eq!(sts.calls()[0].outcome, "Throttling.User");
}

/// A call that was signed without a host and a nonce.
fn presigned(sts: &Sts, key: &Credentials, action: &str, cluster: &str) -> (u16, String) {
    let query = BTreeMap::from([("ACKClusterId".to_owned(), "c1".to_owned())]);
    let payload_hash = hex_sha256(b"");
    let mut headers = [
        ("x-acs-action", action),
        ("x-acs-content-sha256", &payload_hash),
        ("x-acs-date", &iso8601(accounts(sts).clock().now())),
        ("x-acs-security-token", key.security_token.as_deref().unwrap()),
        ("x-acs-version", "2015-04-01"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec();
    let signed = V3Request { method: "POST", query: &query, headers: &headers, payload_hash: &payload_hash };
    let authorization = format!(
        "ACS3-HMAC-SHA256 Credential={},SignedHeaders={},Signature={}",
        key.access_key_id,
        signed.signed_headers(),
        v3_signature(&key.access_key_secret, &signed)
    );
    headers.push(("accept".into(), "application/json".into()));
    headers.push(("authorization".into(), authorization));
    let mut request = client::Request::get(format!("{}/?ACKClusterId={cluster}", sts.url()));
    request.method = "POST".into();
    request.headers = headers;
    code(&request.send().unwrap())
}

#[test]
fn names_who_signed_a_call_for_others_to_send_and_takes_no_other_action_so() {
    let (sts, node) = sts();

    for _ in 0..2 {
        assert_eq!(presigned(&sts, &node, "GetCallerIdentity", "c1"), ok());
    }
    assert_eq!(presigned(&sts, &node, "GetCallerIdentity", "c2"), refused(400, "SignatureDoesNotMatch"));
    assert_eq!(presigned(&sts, &node, "AssumeRole", "c1"), refused(400, "SignatureDoesNotMatch"));
}
