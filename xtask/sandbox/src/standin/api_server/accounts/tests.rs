//! Requests for tokens as the real server takes and refuses them, next to the same request allowed.

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::{
    Cloud, client,
    standin::{Bind, PodManifest},
};

const NODE: &str = "node-1";
const AUDIENCE: &str = Cloud::Alibaba.audience();
const URL: &str = "https://oidc.example.com/c0";

/// A server with a pod of the ServiceAccount shop/web on the agent's node, and one on another.
fn server() -> ApiServer {
    let server = ApiServer::with_issuer(Bind::loopback(), OidcIssuer::new(URL).unwrap()).unwrap();
    server.bind_agent(Some(NODE));
    server.apply_service_account("shop", "web", &[("role", "web-role")]).unwrap();
    server.apply_service_account("shop", "elsewhere", &[]).unwrap();
    server.apply(json!({ "kind": "Node", "metadata": { "name": NODE, "uid": "u-node" } })).unwrap();
    for (name, node, account) in [("web-0", NODE, "web"), ("far-0", "node-2", "elsewhere")] {
        server.apply(pod(name, node, account)).unwrap();
    }
    server
}

fn pod(name: &str, node: &str, account: &str) -> Value {
    PodManifest {
        name: name.into(),
        namespace: "shop".into(),
        node: node.into(),
        service_account: account.into(),
        uid: format!("u-{name}"),
        ..Default::default()
    }
    .to_json()
}

/// What the agent sends.
fn sound() -> Value {
    json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {
            "audiences": [AUDIENCE], "expirationSeconds": 600,
            "boundObjectRef": { "apiVersion": "v1", "kind": "Pod", "name": "web-0", "uid": "u-web-0" },
        },
    })
}

const AS_NODE: &[(&str, &str)] = &[("Impersonate-User", "system:node:node-1")];

fn send(
    server: &ApiServer,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> client::Reply {
    let mut request = client::Request::get(server.url() + path);
    for &(name, value) in headers {
        request = request.header(name, value);
    }
    request.method = method.into();
    request.body = body.to_string().into_bytes();
    request.send().unwrap()
}

fn ask(server: &ApiServer, account: &str, headers: &[(&str, &str)], body: &Value) -> client::Reply {
    let path = format!("/api/v1/namespaces/shop/serviceaccounts/{account}/token");
    send(server, "POST", &path, headers, body)
}

/// The status and the message of a refusal, or the token.
fn outcome(reply: &client::Reply) -> (u16, String) {
    let body: Value = serde_json::from_str(&reply.body).unwrap();
    let text = if reply.status == 201 { &body["status"]["token"] } else { &body["message"] };
    (reply.status, text.as_str().unwrap().to_owned())
}

fn asked_as_node(server: &ApiServer, change: impl FnOnce(&mut Value)) -> (u16, String) {
    let mut body = sound();
    change(&mut body);
    outcome(&ask(server, "web", AS_NODE, &body))
}

#[test]
fn a_node_gets_a_token_of_a_pods_account_with_the_claims_of_both() {
    let server = server();

    let reply = ask(&server, "web", AS_NODE, &sound());

    let (status, token) = outcome(&reply);
    assert_eq!(status, 201);
    let answer: Value = serde_json::from_str(&reply.body).unwrap();
    let end: Timestamp = answer["status"]["expirationTimestamp"].as_str().unwrap().parse().unwrap();
    let left = end.duration_since(Timestamp::now());
    assert!(left > SignedDuration::from_secs(590) && left <= SignedDuration::from_secs(600), "{left}");
    let verified = server.issuer().provider().verify(&token, Timestamp::now()).unwrap();
    assert_eq!(verified.subject, "system:serviceaccount:shop:web");
    let claims = token.split('.').nth(1).unwrap();
    let claims = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    let bound = &claims["kubernetes.io"];
    assert_eq!(bound["pod"], json!({ "name": "web-0", "uid": "u-web-0" }));
    assert_eq!(bound["node"], json!({ "name": NODE, "uid": "u-node" }));
    assert_eq!((&claims["iss"], &claims["aud"]), (&URL.into(), &json!([AUDIENCE])));
    assert_eq!(server.issued_tokens(), [token]);
    let calls = server.token_requests_of("shop", "web");
    assert_eq!((calls.len(), calls[0].status, calls[0].expiration_seconds), (1, 201, Some(600)));
    assert_eq!(calls[0].impersonates.as_deref(), Some("system:node:node-1"));
    assert_eq!(calls[0].pod, Some(("web-0".to_owned(), "u-web-0".to_owned())));
}

#[test]
fn each_rule_of_the_nodes_way_is_needed() {
    let server = server();
    let status = || outcome(&ask(&server, "web", AS_NODE, &sound()));

    for missing in [Right::CreateTokensAsNode, Right::ImpersonateNode, Right::RequestAudience] {
        let rights: Vec<_> = Right::AS_NODE.into_iter().filter(|right| *right != missing).collect();
        server.set_rights(&rights);
        let (code, message) = status();
        assert_eq!(code, 403, "{missing:?}: {message}");
    }
    server.set_rights(&Right::AS_NODE);
    assert_eq!(status().0, 201);
    server.bind_agent(Some("node-2"));
    assert!(status().1.contains("cannot impersonate resource \"users\""), "its own node alone");
    server.bind_agent(None);
    assert_eq!(status().0, 403);
    server.bind_agent(Some(NODE));
    let group = [AS_NODE[0], ("Impersonate-Group", "system:masters")];
    assert_eq!(ask(&server, "web", &group, &sound()).status, 403, "the user's name alone");
    let user = [("Impersonate-User", "admin")];
    assert_eq!(ask(&server, "web", &user, &sound()).status, 403);
    assert_eq!(send(&server, "GET", "/api/v1/pods", AS_NODE, &Value::Null).status, 403, "for this alone");
    assert_eq!(status().0, 201);
}

#[test]
fn a_node_is_restricted_to_its_pods_and_to_one_audience() {
    let server = server();
    let refused = |change: &dyn Fn(&mut Value)| {
        let (status, message) = asked_as_node(&server, change);
        assert_ne!(status, 201, "{message}");
        (status, message)
    };
    let bound = |name: &'static str, value: Value| {
        refused(&move |body| body["spec"]["boundObjectRef"][name] = value.clone())
    };

    assert!(refused(&|body| body["spec"]["boundObjectRef"] = Value::Null).1.contains("not bound to a pod"));
    assert!(bound("kind", "Node".into()).1.contains("not bound to a pod"));
    assert!(bound("uid", Value::Null).1.contains("without a uid"));
    let (status, message) = bound("uid", "u-other".into());
    assert!(status == 403 && message.contains("does not match the UID in record"), "{message}");
    assert_eq!(bound("name", "none".into()), (404, "pod \"none\" not found".to_owned()));
    let two = refused(&|body| body["spec"]["audiences"] = json!([AUDIENCE, "other"]));
    assert!(two.1.contains("0 or 1 audiences"), "{}", two.1);
    let far = outcome(&ask(&server, "elsewhere", AS_NODE, &sound()));
    assert!(far.1.contains("no relationship found between node 'node-1'"), "{}", far.1);
    server.apply_service_account("shop", "other", &[]).unwrap();
    server.apply(pod("other-0", NODE, "other")).unwrap();
    let wrong = outcome(&ask(&server, "other", AS_NODE, &sound()));
    assert_eq!(wrong.0, 400, "{}", wrong.1);
    assert_eq!(asked_as_node(&server, |_| {}).0, 201);
}

#[test]
fn the_agents_own_right_is_checked_by_the_server_alone() {
    let server = server();
    let own = |change: &dyn Fn(&mut Value)| {
        let mut body = sound();
        change(&mut body);
        outcome(&ask(&server, "web", &[], &body))
    };

    let (status, message) = own(&|_| {});
    assert!(
        status == 403 && message.contains("cannot create resource \"serviceaccounts/token\""),
        "{message}"
    );
    server.set_rights(&Right::AS_AGENT);
    assert_eq!(own(&|_| {}).0, 201);
    assert_eq!(own(&|body| body["spec"]["boundObjectRef"]["name"] = "none".into()).0, 404);
    let (status, message) = own(&|body| body["spec"]["boundObjectRef"]["uid"] = "u-other".into());
    assert!(status == 409 && message.contains("does not match the UID in record"), "{message}");
    assert_eq!(own(&|body| body["metadata"]["uid"] = "u-other".into()).0, 409);
    for seconds in [0, 599] {
        assert_eq!(own(&|body| body["spec"]["expirationSeconds"] = seconds.into()).0, 422, "{seconds}");
    }
    assert_eq!(own(&|body| body["kind"] = "Pod".into()).0, 400);
    server.delete_service_account("shop", "web");
    assert_eq!(own(&|_| {}), (404, "serviceaccounts \"web\" not found".to_owned()));
}

#[test]
fn a_lifetime_is_cut_and_dated_by_its_own_clock() {
    let server = server();
    let life = |server: &ApiServer| {
        let mut body = sound();
        body["spec"]["expirationSeconds"] = 7200.into();
        let reply = ask(server, "web", AS_NODE, &body);
        let answer: Value = serde_json::from_str(&reply.body).unwrap();
        let end: Timestamp = answer["status"]["expirationTimestamp"].as_str().unwrap().parse().unwrap();
        end.duration_since(Timestamp::now()).as_secs()
    };

    assert!((7190..=7200).contains(&life(&server)));
    server.set_max_expiration(Some(Duration::from_secs(3600)));
    assert!((3590..=3600).contains(&life(&server)));
    server.clock().shift(SignedDuration::from_secs(-1000));
    assert!((2590..=2600).contains(&life(&server)));
}

#[test]
fn fails_as_told_and_succeeds_again() {
    let server = server();
    let status = || ask(&server, "web", AS_NODE, &sound());
    let busy = TokenRequestFault::Refuse(
        StatusCode::TOO_MANY_REQUESTS,
        "too many requests, please try again",
        Some(1),
    );

    server.set_token_faults(&[busy, TokenRequestFault::PodUnknown]);
    let throttled = status();
    assert_eq!((throttled.status, &*throttled.headers["retry-after"]), (429, "1"));
    let body: Value = serde_json::from_str(&throttled.body).unwrap();
    assert_eq!(
        (&body["reason"], &body["details"]["retryAfterSeconds"]),
        (&"TooManyRequests".into(), &1.into())
    );
    assert_eq!(outcome(&status()), (404, "pod \"web-0\" not found".to_owned()));
    assert_eq!(status().status, 201);

    let verify = || {
        let (_, token) = outcome(&status());
        server.issuer().provider().verify(&token, Timestamp::now()).is_ok()
    };
    for fault in
        [TokenRequestFault::UnknownKey, TokenRequestFault::WrongAudience, TokenRequestFault::WrongIssuer]
    {
        server.fail_tokens(Some(fault.clone()));
        assert!(!verify() && !verify(), "{fault:?}");
    }
    server.fail_tokens(None);
    assert!(verify());

    server.set_token_faults(&[TokenRequestFault::Cut]);
    let path = "/api/v1/namespaces/shop/serviceaccounts/web/token";
    let mut request = client::Request::get(server.url() + path).header(AS_NODE[0].0, AS_NODE[0].1);
    request.method = "POST".into();
    request.body = sound().to_string().into_bytes();
    assert!(request.send().is_err());
    assert_eq!(server.token_requests().last().unwrap().status, 0);
}

#[test]
fn an_account_is_read_by_name_and_made_again_as_another_one() {
    let server = server();
    let path = "/api/v1/namespaces/shop/serviceaccounts/web";
    let read = |headers: &[(&str, &str)]| {
        let accept = ("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1");
        let reply = send(&server, "GET", path, &[&[accept][..], headers].concat(), &Value::Null);
        (reply.status, serde_json::from_str::<Value>(&reply.body).unwrap())
    };
    let uid = || read(&[]).1["metadata"]["uid"].clone();

    let (status, account) = read(AS_NODE);
    assert_eq!((status, &account["kind"]), (200, &"PartialObjectMetadata".into()));
    assert_eq!(account["metadata"]["annotations"], json!({ "role": "web-role" }));
    let first = uid();
    server.apply_service_account("shop", "web", &[("role", "other")]).unwrap();
    assert_eq!(uid(), first, "the same one with other annotations");
    server.delete_service_account("shop", "web");
    assert_eq!(read(&[]).0, 404);
    server.apply_service_account("shop", "web", &[]).unwrap();
    assert_ne!(uid(), first);

    server.set_rights(&[]);
    assert_eq!((read(&[]).0, read(AS_NODE).0), (403, 403));
    assert_eq!(send(&server, "GET", "/api/v1/serviceaccounts", &[], &Value::Null).status, 404, "no list");
    assert_eq!(server.service_account_reads("shop", "web"), 7);
}

#[test]
fn reports_the_agents_own_node_and_its_keys() {
    let server = server();
    let review = || {
        let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
        let reply = send(&server, "POST", path, &[], &json!({ "kind": "SelfSubjectReview" }));
        assert_eq!(reply.status, 201);
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        body["status"]["userInfo"]["extra"]["authentication.kubernetes.io/node-name"].clone()
    };

    assert_eq!(review(), json!([NODE]));
    server.bind_agent(None);
    assert_eq!(review(), Value::Null);
    let get =
        |path| serde_json::from_str::<Value>(&send(&server, "GET", path, &[], &Value::Null).body).unwrap();
    assert_eq!(get("/.well-known/openid-configuration")["issuer"], URL);
    assert_eq!(get("/openid/v1/jwks"), server.issuer().jwks());
}
