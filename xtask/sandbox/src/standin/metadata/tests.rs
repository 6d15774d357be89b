//! What a real instance answers, case by case.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::*;
use crate::{
    client::{self, Reply},
    clock::Clock,
};

fn server() -> Metadata {
    Metadata::start(Bind::loopback(), Arc::new(Accounts::new(Clock::default()))).unwrap()
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

const TTL: &str = "X-aliyun-ecs-metadata-token-ttl-seconds";
const TOKEN: &str = "X-aliyun-ecs-metadata-token";

#[test]
fn serves_items_and_listings_of_both_versions() {
    let server = server();

    assert_eq!(get(&server, "/"), (200, "2016-01-01\nlatest".into()));
    assert_eq!(get(&server, "/latest"), (200, "dynamic/\nmeta-data/\nuser-data".into()));
    assert_eq!(get(&server, "/2016-01-01/meta-data/region-id"), (200, "cn-hangzhou".into()));
    let (_, listing) = get(&server, "/latest/meta-data/");
    assert!(listing.contains("\nnetwork/\n") && listing.contains("\nram/\n"), "{listing}");
    assert_eq!(get(&server, "/latest/meta-data/no-such-item").0, 404);
    assert!(get(&server, "/latest/meta-data/no-such-item").1.contains("<h1>404 - Not Found</h1>"));
}

#[test]
fn serves_the_node_role_however_the_path_is_written() {
    let server = server();

    assert_eq!(
        get(&server, "/latest/meta-data/ram/security-credentials/"),
        (200, Accounts::NODE_ROLE.into())
    );
    for directory in [
        "/latest/meta-data/Ram/security-credentials",
        "/2016-01-01//x/../meta-data/%72am/./security-credentials",
    ] {
        let (status, body) = get(&server, &format!("{directory}/{}", Accounts::NODE_ROLE));
        assert_eq!(status, 200, "{directory}");
        let document: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(document["Code"], "Success");
        assert_eq!(document["Expiration"].as_str().unwrap().len(), 20);
    }
    assert_eq!(get(&server, "/latest/meta-data/ram/security-credentials/other").0, 404);
}

#[test]
fn issues_tokens_by_the_rules_of_hardened_mode() {
    let server = server();
    let put = |headers: &[(&str, &str)]| request(&server, "PUT", "/latest/api/token", headers).status;

    assert_eq!(put(&[]), 400);
    assert_eq!(put(&[(TTL, "21700")]), 400);
    assert_eq!(put(&[(TTL, "21600"), ("X-Forwarded-For", "10.0.0.1")]), 403);
    assert_eq!(put(&[(TTL, "21600")]), 200);
    assert_eq!(get(&server, "/latest/api/token").0, 405);
}

#[test]
fn hardened_mode_answers_with_a_token_only() {
    let server = server();
    let target = "/latest/meta-data/region-id";
    let token = request(&server, "PUT", "/latest/api/token", &[(TTL, "60")]).body;
    assert_eq!(token.trim(), token);

    server.set_tokens(Tokens::Required);

    assert_eq!(get(&server, target).0, 403);
    assert_eq!(request(&server, "GET", target, &[(TOKEN, "aaa")]).status, 401);
    assert_eq!(request(&server, "GET", target, &[(TOKEN, &token)]).status, 200);
    server.server.handler.accounts.clock().shift(jiff::SignedDuration::from_secs(61));
    assert_eq!(request(&server, "GET", target, &[(TOKEN, &token)]).status, 401);
}

#[test]
fn replaces_credentials_half_an_hour_before_their_end() {
    let server = server();
    let fetch =
        || get(&server, &format!("/latest/meta-data/ram/security-credentials/{}", Accounts::NODE_ROLE)).1;
    let clock = server.server.handler.accounts.clock();
    let first = fetch();
    clock.shift(jiff::SignedDuration::from_mins(5 * 60 + 29));
    assert_eq!(fetch(), first);

    clock.shift(jiff::SignedDuration::from_mins(2));

    assert_ne!(fetch(), first);
}

#[test]
fn records_what_arrived_as_it_arrived() {
    let server = server();
    request(&server, "GET", "/latest/./meta-data/?", &[("X-Odd", "1")]);

    let seen = server.seen().remove(0);

    assert_eq!(seen.target, "/latest/./meta-data/?");
    assert_eq!(seen.headers["x-odd"], "1");
    assert_eq!(seen.peer.ip(), Ipv4Addr::LOCALHOST);
}

#[test]
fn refuses_connections_while_down() {
    let server = server();

    server.set_mode(MetadataMode::Down).unwrap();

    let url = format!("http://{}/", server.addr());
    assert!(client::Request::get(&url).send().is_err());
    server.set_mode(MetadataMode::Up).unwrap();
    assert_eq!(client::Request::get(&url).send().unwrap().status, 200);
    assert!(
        matches!(server.addr(), SocketAddr::V4(addr) if addr != SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))
    );
}
