//! What a real instance of EC2 answers, case by case.

use std::sync::Arc;

use super::*;
use crate::{
    client::{self, Reply},
    clock::Clock,
    standin::{Bind, Metadata, Tokens},
};

const TOKEN: &str = Cloud::Aws.token_header();
const TTL: &str = Cloud::Aws.token_ttl_header();
const LIST: &str = Cloud::Aws.list();

fn server() -> Metadata {
    Metadata::start(Bind::loopback(), Arc::new(Accounts::of(Cloud::Aws, Clock::default()))).unwrap()
}

fn request(server: &Metadata, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
    let mut request = client::Request::get(format!("http://{}{target}", server.addr()));
    request.method = method.into();
    request.headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    request.send().unwrap()
}

fn get(server: &Metadata, target: &str) -> (u16, String) {
    let reply = request(server, "GET", target, &[]);
    (reply.status, reply.body)
}

fn json(body: &str) -> serde_json::Value {
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

#[test]
fn serves_the_nodes_role_with_and_without_slash_and_with_double_ones() {
    let server = server();
    let name = (200, Accounts::NODE_ROLE.to_owned());

    for list in [LIST, LIST.trim_end_matches('/'), "/latest/meta-data//iam/security-credentials/"] {
        assert_eq!(get(&server, list), name, "{list}");
    }
    for target in [
        format!("{LIST}{}", Accounts::NODE_ROLE),
        format!("{LIST}{}/", Accounts::NODE_ROLE),
        format!("//2018-09-24//meta-data//iam//security-credentials//{}", Accounts::NODE_ROLE),
        format!("/latest/meta-data/IAM/%73ecurity-credentials/{}", Accounts::NODE_ROLE),
    ] {
        let (status, body) = get(&server, &target);
        assert_eq!((status, &json(&body)["Type"]), (200, &"AWS-HMAC".into()), "{target}");
    }
    assert_eq!(get(&server, &format!("{LIST}other")).0, 404);
}

#[test]
fn writes_the_document_as_the_user_guide_has_it() {
    let server = server();

    let reply = request(&server, "GET", &format!("{LIST}{}", Accounts::NODE_ROLE), &[]);

    assert_eq!((&*reply.headers["content-type"], &*reply.headers["server"]), ("text/plain", "EC2ws"));
    let keys: Vec<_> = reply.body.lines().filter_map(|line| line.split('"').nth(1)).collect();
    let expected = ["Code", "LastUpdated", "Type", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"];
    assert_eq!(keys, expected);
    assert!(reply.body.starts_with("{\n  \"Code\" : \"Success\",\n") && reply.body.ends_with("\"\n}"));
    let document = json(&reply.body);
    assert!(document["AccessKeyId"].as_str().unwrap().starts_with("ASIA."), "{document}");
    assert_eq!(document["Expiration"].as_str().unwrap().len(), "2026-11-28T16:00:00Z".len());
}

#[test]
fn the_other_trees_have_keys_as_well() {
    let server = server();
    let own = "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance";
    let extended = format!("/latest/meta-data/iam/security-credentials-extended/{}", Accounts::NODE_ROLE);

    let (of_instance, of_role) = (json(&get(&server, own).1), json(&get(&server, &extended).1));

    assert!(of_instance["AccessKeyId"].as_str().unwrap().starts_with("ASIA.aws:ec2-instance."));
    assert!(of_role["AccessKeyId"].as_str().unwrap().contains(Accounts::NODE_ROLE), "{of_role}");
    assert_eq!(of_role["AccountId"], ACCOUNT);
    let directory = "/latest/meta-data/identity-credentials/ec2/security-credentials/";
    assert_eq!(get(&server, directory), (200, "ec2-instance".to_owned()));
    // Without a profile, those of the instance are there all the same.
    server.set_profile(false);
    for target in [LIST, &extended, "/latest/meta-data/iam/info"] {
        assert_eq!(get(&server, target).0, 404, "{target}");
    }
    assert_eq!(get(&server, own).0, 200);
}

#[test]
fn tells_account_and_region_and_nothing_that_is_not_planned() {
    let server = server();

    let info = json(&get(&server, "/latest/meta-data/iam/info").1);
    let arn = info["InstanceProfileArn"].as_str().unwrap();
    assert!(arn.starts_with("arn:aws:iam::123456789012:instance-profile/"), "{arn}");
    assert!(!arn.contains(Accounts::NODE_ROLE), "the profile has its own name");
    let document = json(&get(&server, "/latest/dynamic/instance-identity/document").1);
    assert_eq!((&document["region"], &document["accountId"]), (&REGION.into(), &ACCOUNT.into()));
    for (target, body) in [
        ("/latest/meta-data/placement/region", REGION),
        ("/latest/meta-data/placement/availability-zone/", ZONE),
        ("/latest/meta-data/services/domain", "amazonaws.com"),
        ("/latest/meta-data/services/partition", "aws"),
        ("/latest/", "dynamic/\nmeta-data/\nuser-data"),
        ("/latest/meta-data/events/maintenance/scheduled", "[]"),
    ] {
        assert_eq!(get(&server, target), (200, body.to_owned()), "{target}");
    }
    for target in ["spot/instance-action", "spot/termination-time", "events/recommendations/rebalance"] {
        assert_eq!(get(&server, &format!("/latest/meta-data/{target}")).0, 404, "{target}");
    }
    assert_eq!(get(&server, "/2031-01-01/meta-data/placement/region").0, 404, "no such version");
}

#[test]
fn issues_tokens_at_one_path_by_the_rules_of_version_2() {
    let server = server();
    let put = |target: &str, headers: &[(&str, &str)]| request(&server, "PUT", target, headers);
    let path = "/latest/api/token";

    let token = put(path, &[(TTL, "21600")]);
    assert_eq!((token.status, &*token.headers[TTL]), (200, "21600"));
    assert!(!token.body.is_empty() && token.body.trim() == token.body);
    assert_eq!(put(path, &[(TTL, "1")]).headers[TTL], "1");
    for ttl in [None, Some("0"), Some("21601"), Some("x")] {
        let headers = ttl.map(|seconds| (TTL, seconds));
        let refused = put(path, headers.as_slice());
        assert_eq!((refused.status, refused.headers.contains_key(TTL)), (400, false), "{ttl:?}");
    }
    assert_eq!(put(path, &[(TTL, "60"), ("X-Forwarded-For", "10.0.0.1")]).status, 403);
    for other in ["/latest/api/token/", "/2018-09-24/api/token", "//latest/api/token"] {
        assert_eq!(put(other, &[(TTL, "60")]).status, 403, "{other}");
    }
    assert_eq!(get(&server, path).0, 405);
}

#[test]
fn a_missing_token_is_401_where_tokens_are_required() {
    let server = server();
    let target = "/latest/meta-data/instance-id";
    let token = request(&server, "PUT", "/latest/api/token", &[(TTL, "60")]).body;
    assert_eq!(get(&server, target), (200, INSTANCE_ID.to_owned()));
    assert_eq!(request(&server, "GET", target, &[(TOKEN, "unknown")]).status, 401);

    server.set_tokens(Tokens::Required);

    assert_eq!(get(&server, target).0, 401);
    assert_eq!(request(&server, "GET", target, &[(TOKEN, &token)]).status, 200);
    let other_version = "/2019-10-01/meta-data/instance-id";
    assert_eq!(request(&server, "GET", other_version, &[(TOKEN, &token)]).status, 200);
    server.forget_tokens();
    assert_eq!(request(&server, "GET", target, &[(TOKEN, &token)]).status, 401);
}

#[test]
fn an_answer_that_may_make_one_hop_reaches_its_own_network() {
    let server = server();

    server.set_hop_limit(1);

    assert_eq!(request(&server, "PUT", "/latest/api/token", &[(TTL, "60")]).status, 200);
}
