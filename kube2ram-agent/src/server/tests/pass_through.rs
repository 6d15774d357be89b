//! What goes to the real metadata server and back.

use http::StatusCode;

use super::harness::*;

/// Rows 4.17 and 4.19.
#[tokio::test]
async fn passes_ordinary_items_with_their_headers() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 404 Not Found\r\nServer: real\r\nX-Item: a\r\nX-Item: b\r\nKeep-Alive: 5\r\nContent-Length: 4\r\n\r\ngone".to_vec());

    let relayed = harness
        .send(
            "GET",
            "/latest/meta-data//spot/%74ermination-time?a=b",
            "X-aliyun-ecs-metadata-token: TOKEN\r\nUser-Agent: sdk\r\n",
        )
        .await;

    assert_eq!((relayed.status(), relayed.body().as_str()), (StatusCode::NOT_FOUND, "gone"));
    assert_eq!(relayed.headers()["server"], "real");
    assert_eq!(relayed.headers().get_all("x-item").iter().count(), 2);
    assert!(!relayed.headers().contains_key("keep-alive"));
    let heads = harness.upstream_heads();
    assert!(
        heads[0].starts_with("GET /latest/meta-data/spot/termination-time?a=b HTTP/1.1\r\n"),
        "{}",
        heads[0]
    );
    assert!(heads[0].contains("x-aliyun-ecs-metadata-token: TOKEN\r\n"), "{}", heads[0]);
    assert!(heads[0].contains("user-agent: sdk\r\n"), "{}", heads[0]);
    assert!(harness.metrics().contains(r#"pass_through_total{result="relayed"} 1"#));
}

/// Rows 4.18 and 4.20.
#[tokio::test]
async fn passes_no_header_that_names_a_proxy_or_the_connection() {
    let harness = Harness::start().await;
    let headers = "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nForwarded: for=1.2.3.4\r\nVia: 1.1 x\r\nX-Real-IP: 1.2.3.4\r\n\
        Proxy-Authorization: x\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nConnection: x-hop\r\nX-Hop: 1\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: x\r\nConnection: upgrade, http2-settings\r\nExpect: 100-continue\r\nX-Kept: 1\r\n";

    assert_eq!(harness.send("GET", "/latest/meta-data/instance-id", headers).await.body(), UPSTREAM_BODY);
    assert_eq!(
        harness
            .send(
                "PUT",
                "/latest/api/token",
                "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n"
            )
            .await
            .body(),
        UPSTREAM_BODY
    );

    let heads = harness.upstream_heads().join("").to_lowercase();
    for dropped in [
        "forwarded",
        "via",
        "x-real-ip",
        "proxy",
        "te:",
        "x-hop",
        "upgrade",
        "http2",
        "expect",
        "connection",
        "host: x",
    ] {
        assert!(!heads.contains(&format!("\r\n{dropped}")), "{dropped} in {heads}");
    }
    assert!(heads.contains("x-kept: 1\r\n"));
    assert!(heads.contains("put /latest/api/token http/1.1\r\n"));
    assert!(heads.contains("x-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n"));
}

#[tokio::test]
async fn refuses_a_token_to_what_came_through_a_proxy() {
    let harness = Harness::start().await;

    let refused = harness.send("PUT", "/latest/api/token", "X-Forwarded-For: 1.2.3.4\r\n").await;

    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    assert!(harness.upstream_heads().is_empty());
    assert_eq!(harness.send("PUT", "/latest/api/token", "").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn closes_sensitive_items() {
    let harness = Harness::start().await;

    for target in
        ["/latest/user-data", "/latest/meta-data/all", "/latest/dynamic/instance-identity/pkcs7?audience=x"]
    {
        let closed = harness.get(target).await;
        assert_eq!(
            (closed.status(), closed.body().as_str()),
            (StatusCode::FORBIDDEN, "this item is closed to pods\n")
        );
    }

    assert!(harness.upstream_heads().is_empty());
    assert_eq!(harness.get("/latest/meta-data/").await.body(), UPSTREAM_BODY);
}

#[tokio::test]
async fn a_broken_upstream_is_502_and_says_nothing_of_it() {
    let harness = Harness::start().await;
    for broken in [
        &b"garbage\r\n\r\n"[..],
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    ] {
        *harness.world.upstream_response.lock().unwrap() = Some(broken.to_vec());

        let failed = harness.get("/latest/meta-data/instance-id").await;

        assert_eq!(failed.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(failed.body(), "the metadata server cannot be asked\n");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_upstream_is_504_before_sdks_give_up() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() = Some(Vec::new());

    let started = tokio::time::Instant::now();
    let late = harness.get("/latest/meta-data/instance-id").await;

    assert_eq!(late.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(harness.metrics().contains(r#"pass_through_total{result="timed_out"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stalls_is_cut_off() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin".to_vec());

    let started = tokio::time::Instant::now();
    let cut = harness.get("/latest/meta-data/instance-id").await;

    assert_eq!(cut.body(), "begin");
    assert!(started.elapsed() < std::time::Duration::from_secs(10), "{:?}", started.elapsed());
}
