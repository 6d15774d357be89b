//! Hardened mode: which clients get a session token, and what it permits.

use http::{Response, StatusCode};

use super::harness::*;

const TOKEN: &str = "/latest/api/token";
const INSTANCE_ID: &str = "/latest/meta-data/instance-id";

async fn put(harness: &Harness, headers: &str) -> Response<String> {
    harness.send("PUT", TOKEN, &format!("Content-Length: 0\r\n{headers}")).await
}

async fn token(harness: &Harness) -> String {
    let issued = put(harness, "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n").await;
    assert_eq!(issued.status(), StatusCode::OK);
    issued.into_body()
}

async fn get(harness: &Harness, target: &str, token: &str) -> StatusCode {
    harness.send("GET", target, &format!("x-aliyun-ecs-metadata-token: {token}\r\n")).await.status()
}

async fn requiring_tokens() -> Harness {
    Harness::start_with(None, |config| config.require_token = true).await
}

fn items() -> [String; 4] {
    [LIST.into(), format!("{LIST}my-role"), "/latest/meta-data/ram/".into(), INSTANCE_ID.into()]
}

fn come_from(harness: &Harness, cgroup: crate::identity::CgroupId) {
    *harness.world.cgroup.lock().unwrap() = Some(cgroup);
}

/// The predecessors pass the request on. Here the agent answers: a token of the real server would be the
/// node's. docs/predecessors.md has the row.
#[tokio::test]
async fn row_4_18_token_request() {
    let harness = Harness::start().await;
    let ttl = "x-aliyun-ecs-metadata-token-ttl-seconds: 21600\r\nContent-Length: 0\r\n";

    for target in [TOKEN, "/latest/api/token?", "/2016-01-01/api/token", "/latest/api/token/"] {
        let issued = harness.send("PUT", target, ttl).await;

        assert_eq!(issued.status(), StatusCode::OK, "{target}");
        assert_eq!(issued.headers()["content-type"], "text/plain; charset=utf-8");
        let token = issued.into_body();
        assert!(token.len() >= 32 && token.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{token:?}");
        assert_eq!(get(&harness, LIST, &token).await, StatusCode::OK);
    }

    assert!(harness.upstream_heads().is_empty());
    assert!(harness.metrics().contains(r#"http_requests_total{route="token",status="200"} 4"#));
}

#[tokio::test]
async fn a_ttl_that_is_missing_or_out_of_range_is_400() {
    let harness = Harness::start().await;

    for ttl in ["0", "21601", "21700", "-1", "x", ""] {
        let refused = put(&harness, &format!("X-aliyun-ecs-metadata-token-ttl-seconds: {ttl}\r\n")).await;
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST, "{ttl:?}");
    }
    assert_eq!(put(&harness, "").await.status(), StatusCode::BAD_REQUEST);

    token(&harness).await;
    assert!(harness.upstream_heads().is_empty());
}

#[tokio::test]
async fn refuses_a_token_to_what_came_through_a_proxy() {
    let harness = Harness::start().await;
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";

    for header in ["X-Forwarded-For: 1.2.3.4", "x-forwarded-for:", "Forwarded: for=1.2.3.4"] {
        let refused = put(&harness, &format!("{ttl}{header}\r\n")).await;
        assert_eq!(
            (refused.status(), refused.body().as_str()),
            (StatusCode::FORBIDDEN, "tokens are not issued to proxies\n"),
            "{header}"
        );
    }

    assert!(harness.metrics().contains(r#"denials_total{reason="proxied"} 3"#));
    assert!(harness.upstream_heads().is_empty());
    token(&harness).await;
    let forwarded = harness.send("GET", LIST, "X-Forwarded-For: 1.2.3.4\r\n").await;
    assert_eq!(forwarded.status(), StatusCode::OK, "only tokens are kept from proxies");
}

/// credentials-nodejs before 2.3 asks with GET, and takes what is not 405 for its token.
#[tokio::test]
async fn other_methods_get_no_token() {
    let harness = Harness::start().await;

    for method in ["GET", "HEAD", "POST", "DELETE"] {
        let refused = harness
            .send(method, TOKEN, "Content-Length: 0\r\nX-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n")
            .await;
        assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED, "{method}");
        assert_eq!(refused.headers()["allow"], "PUT", "{method}");
    }
    assert!(harness.upstream_heads().is_empty());
}

#[tokio::test]
async fn a_token_of_another_pod_is_worthless() {
    let harnesses = [Harness::start().await, requiring_tokens().await];
    for harness in harnesses {
        come_from(&harness, OTHER_POD_CGROUP);
        let stolen = token(&harness).await;
        come_from(&harness, POD_CGROUP);
        let own = token(&harness).await;

        assert_ne!(stolen, own);
        for item in items() {
            assert_eq!(get(&harness, &item, &stolen).await, StatusCode::UNAUTHORIZED, "{item}");
            assert_eq!(get(&harness, &item, "aaa").await, StatusCode::UNAUTHORIZED, "{item}");
            assert_eq!(get(&harness, &item, &own).await, StatusCode::OK, "{item}");
        }
        assert!(harness.metrics().contains(r#"denials_total{reason="token_foreign"} 8"#));
        assert_eq!(harness.upstream_heads().len(), 1, "what is refused goes no further");
        come_from(&harness, NESTED_CGROUP);
        assert_eq!(get(&harness, LIST, &own).await, StatusCode::OK, "all of a pod's cgroups are the pod");
    }
}

#[tokio::test]
async fn without_a_token_nothing_is_served_where_tokens_are_required() {
    let (required, optional) = (requiring_tokens().await, Harness::start().await);

    for item in items() {
        let refused = required.get(&item).await;
        assert_eq!(
            (refused.status(), refused.body().as_str()),
            (StatusCode::FORBIDDEN, "a session token is required\n"),
            "{item}"
        );
        assert_eq!(optional.get(&item).await.status(), StatusCode::OK, "{item}");
    }
    assert!(required.metrics().contains(r#"denials_total{reason="token_missing"} 4"#));
    assert!(required.upstream_heads().is_empty());
    let own = token(&required).await;
    for item in items() {
        assert_eq!(get(&required, &item, &own).await, StatusCode::OK, "{item}");
    }
}

/// credentials-go before 1.4 asks for one token and uses it for ever.
#[tokio::test]
async fn an_expired_token_is_as_good_as_none() {
    let cases =
        [(Harness::start().await, StatusCode::OK), (requiring_tokens().await, StatusCode::UNAUTHORIZED)];
    for (harness, expected) in cases {
        let old = token(&harness).await;
        assert_eq!(get(&harness, LIST, &old).await, StatusCode::OK);

        *harness.world.now.lock().unwrap() += jiff::SignedDuration::from_secs(61);

        assert_eq!(get(&harness, LIST, &old).await, expected);
        let renewed = token(&harness).await;
        assert_eq!(get(&harness, LIST, &renewed).await, StatusCode::OK);
    }
}

/// The next agent has the same key.
#[tokio::test]
async fn a_token_outlives_the_agent_that_issued_it() {
    let issued = token(&requiring_tokens().await).await;

    assert_eq!(get(&requiring_tokens().await, LIST, &issued).await, StatusCode::OK);
}

#[tokio::test]
async fn who_is_no_pod_gets_no_token() {
    let harness = Harness::start().await;
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";

    for cgroup in [None, Some(crate::identity::CgroupId(8))] {
        *harness.world.cgroup.lock().unwrap() = cgroup;
        assert_eq!(put(&harness, ttl).await.status(), StatusCode::FORBIDDEN, "{cgroup:?}");
    }
    come_from(&harness, POD_CGROUP);
    token(&harness).await;
}

#[tokio::test]
async fn tokens_are_not_logged() {
    let log = Log::default();
    let _guard = log.capture();
    let harness = Harness::start().await;

    let token = token(&harness).await;
    get(&harness, LIST, &token).await;
    get(&harness, LIST, &token[1..]).await;

    let lines = log.lines();
    assert!(lines.iter().any(|line| line.contains(r#"path="/latest/api/token" status=200"#)), "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains(r#"kind="token_foreign""#)), "{lines:#?}");
    assert!(lines.iter().all(|line| !line.contains(&token[1..])), "{lines:#?}");
}
