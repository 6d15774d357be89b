//! What goes to the real metadata server and back. Row numbers are those of docs/predecessors.md.

use http::StatusCode;

use super::{harness::*, *};
use crate::{
    kubernetes::PodError,
    server::{
        HostNetworkPods, MetadataPolicy,
        pass_through::relay,
        path::Target,
        route::{Route, route},
    },
};
use kube2ram_cloud::{
    alibaba::DIALECT,
    aws,
    upstream::{MetadataServer, UpstreamError},
};

/// Rows 4.17 and 4.19.
#[tokio::test]
async fn passes_ordinary_items_with_their_headers() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 404 Not Found\r\nServer: real\r\nX-Item: a\r\nX-Item: b\r\nKeep-Alive: 5\r\nContent-Length: 4\r\n\r\ngone".to_vec());

    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";
    let token = harness.send("PUT", "/latest/api/token", ttl).await.into_body();

    let relayed = harness
        .send(
            "GET",
            "/latest/meta-data//spot/%74ermination-time?a=b",
            &format!("X-aliyun-ecs-metadata-token: {token}\r\n{ttl}User-Agent: sdk\r\n"),
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
    assert!(!heads[0].contains("x-aliyun"), "a pod's token means nothing there: {}", heads[0]);
    assert!(heads[0].contains("user-agent: sdk\r\n"), "{}", heads[0]);
    assert!(harness.metrics().contains(r#"pass_through_total{result="relayed"} 1"#));
}

/// Row 4.20.
#[tokio::test]
async fn passes_no_header_but_those_about_the_client_and_the_answer() {
    let harness = Harness::start().await;
    let headers = "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nForwarded: for=1.2.3.4\r\nVia: 1.1 x\r\nX-Real-IP: 1.2.3.4\r\n\
        Proxy-Authorization: x\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nConnection: x-hop\r\nX-Hop: 1\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: x\r\nConnection: upgrade, http2-settings\r\nExpect: 100-continue\r\n\
        X-Original-URL: /latest/meta-data/ram/security-credentials/\r\nX-HTTP-Method-Override: PUT\r\nCookie: x\r\nRange: bytes=0-1\r\n";

    assert_eq!(harness.send("GET", "/latest/meta-data/instance-id", headers).await.body(), UPSTREAM_BODY);

    let heads = harness.upstream_heads().join("").to_lowercase();
    for dropped in [
        "forwarded",
        "x-forwarded",
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
        "x-original-url",
        "x-http-method-override",
        "cookie",
    ] {
        assert!(!heads.contains(&format!("\r\n{dropped}")), "{dropped} in {heads}");
    }
    assert!(heads.contains("range: bytes=0-1\r\n"));
}

#[tokio::test]
async fn a_head_request_is_passed_and_its_length_kept() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n".to_vec());

    let head = harness.send("HEAD", "/latest/meta-data/instance-id", "").await;

    assert_eq!((head.status(), head.body().as_str()), (StatusCode::OK, ""));
    assert_eq!(head.headers()["content-length"], "1234");
    assert!(harness.upstream_heads()[0].starts_with("HEAD /latest/meta-data/instance-id HTTP/1.1\r\n"));
}

/// Status and headers that some clients rely on: spot instances ask until the status is no longer 404, terway
/// waits on 429.
#[tokio::test]
async fn passes_every_status_unchanged_and_adds_nothing_but_the_date() {
    let harness = Harness::start().await;
    for status in [200, 204, 301, 304, 400, 401, 403, 404, 405, 429, 500, 503] {
        *harness.world.upstream_response.lock().unwrap() = Some(
            format!("HTTP/1.1 {status} Any\r\nLocation: /x\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
                .into_bytes(),
        );

        let relayed = harness.get("/latest/meta-data/spot/termination-time").await;

        assert_eq!(relayed.status().as_u16(), status);
        assert_eq!(
            (&relayed.headers()["location"], &relayed.headers()["retry-after"]),
            (&"/x".parse().unwrap(), &"7".parse().unwrap())
        );
        let added: Vec<_> = relayed
            .headers()
            .keys()
            .filter(|name| {
                !["location", "retry-after", "content-length", "connection", "date"].contains(&name.as_str())
            })
            .collect();
        assert!(added.is_empty(), "{added:?}");
    }
}

#[tokio::test]
async fn a_large_body_is_passed_on_as_it_comes() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\nbegin".to_vec());
    let mut stream = harness.connect().await;

    stream.write_all(b"GET /latest/meta-data/ HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();

    let mut seen = String::new();
    while !seen.ends_with("\r\n\r\nbegin") {
        seen.push(char::from(stream.read_u8().await.unwrap()));
    }
}

#[tokio::test]
async fn one_pod_cannot_use_up_the_real_server_for_all() {
    let harness = Harness::start_with(None, |config| config.pass_through_rate = 1).await;
    let ask = async || harness.get("/latest/meta-data/instance-id").await;

    let mut passed = 0;
    let throttled = loop {
        let answer = ask().await;
        if answer.status() != StatusCode::OK {
            break answer;
        }
        passed += 1;
    };

    assert!((2..20).contains(&passed), "two seconds' worth at once, but not {passed}");
    assert_eq!(throttled.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(throttled.headers()["retry-after"], "1");
    assert_eq!(harness.upstream_heads().len(), passed);
    assert!(harness.metrics().contains(r#"pass_through_total{result="throttled"} 1"#));
    assert_eq!(harness.get(LIST).await.body(), "my-role", "what the agent answers itself is not limited");
    *harness.world.cgroup.lock().unwrap() = Some(OTHER_POD_CGROUP);
    assert_eq!(ask().await.status(), StatusCode::OK, "nor are others");
}

#[tokio::test]
async fn the_strict_policy_opens_its_list_and_nothing_else() {
    let harness = Harness::start_with(None, |config| config.metadata_policy = MetadataPolicy::Strict).await;

    for closed in ["/latest/meta-data/public-keys/", "/latest/user-data", "/latest/meta-data/Instance-Id"] {
        let refused = harness.get(closed).await;
        assert_eq!(
            (refused.status(), refused.body().as_str()),
            (StatusCode::FORBIDDEN, "this item is closed to pods\n"),
            "{closed}"
        );
    }

    assert!(harness.upstream_heads().is_empty());
    let metrics = harness.metrics();
    assert!(metrics.contains(r#"denials_total{reason="not_listed"} 2"#), "{metrics}");
    assert!(metrics.contains(r#"denials_total{reason="sensitive"} 1"#), "{metrics}");
    assert_eq!(harness.get("/latest/meta-data/instance-id").await.body(), UPSTREAM_BODY);
    assert_eq!(harness.get(LIST).await.body(), "my-role", "credentials are the agent's");
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
async fn who_may_have_the_nodes_role_reads_what_belongs_to_it_and_no_secrets() {
    let document = "/latest/dynamic/instance-identity/document";
    let items =
        [document, "/latest/dynamic/instance-identity/pkcs7?audience=x", "/latest/meta-data/image-id"];
    for policy in [MetadataPolicy::Standard, MetadataPolicy::Strict] {
        let start = async |host_network_pods| {
            Harness::start_with(None, |config| {
                (config.metadata_policy, config.host_network_pods) = (policy, host_network_pods);
            })
            .await
        };
        let (pass, deny) = (start(HostNetworkPods::Pass).await, start(HostNetworkPods::Deny).await);
        let host_network =
            |annotations: &[(&str, &str)]| crate::pod::Pod { host_network: true, ..pod(annotations) };

        *pass.world.pod.lock().unwrap() = Ok(host_network(&[]));
        for target in items {
            assert_eq!(pass.get(target).await.body(), UPSTREAM_BODY, "{policy:?} {target}");
        }
        assert!(pass.upstream_heads()[1].starts_with(&format!("GET {} HTTP/1.1\r\n", items[1])));
        for secret in ["/latest/user-data", "/latest/vendor-data", "/latest/meta-data/all"] {
            assert_eq!(pass.get(secret).await.status(), StatusCode::FORBIDDEN, "{policy:?} {secret}");
        }

        // The other pods: with their own role, in their own network, with the flag deny, and unknown ones.
        for other in [host_network(&[(ROLE_KEY, "my-role")]), pod(&[]), pod(&[(ROLE_KEY, "my-role")])] {
            *pass.world.pod.lock().unwrap() = Ok(other);
            let refused = pass.get(document).await;
            assert_eq!(
                (refused.status(), refused.body().as_str()),
                (StatusCode::FORBIDDEN, "this item is closed to pods\n")
            );
        }
        *pass.world.pod.lock().unwrap() = Err(|| PodError::Unknown(PodUid::parse(UID).unwrap()));
        assert_eq!(pass.get(document).await.status(), StatusCode::FORBIDDEN);
        *deny.world.pod.lock().unwrap() = Ok(host_network(&[]));
        assert_eq!(deny.get(document).await.status(), StatusCode::FORBIDDEN);
        *deny.world.pod_never_comes.lock().unwrap() = true;
        assert_eq!(deny.get(document).await.status(), StatusCode::FORBIDDEN, "whoever it is");
        assert!(deny.upstream_heads().is_empty());
        assert_eq!(pass.upstream_heads().len(), items.len());
    }
}

#[tokio::test]
async fn an_item_next_to_the_credentials_is_the_nodes_and_does_not_exist_for_other_pods() {
    let info = "/latest/meta-data/iam/info";
    let start = async |policy, host_network_pods| {
        Harness::start_with(None, |config| {
            config.dialect = &aws::DIALECT;
            (config.metadata_policy, config.host_network_pods) = (policy, host_network_pods);
        })
        .await
    };
    let host_network =
        |annotations: &[(&str, &str)]| crate::pod::Pod { host_network: true, ..pod(annotations) };
    for policy in [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict] {
        let (pass, deny) =
            (start(policy, HostNetworkPods::Pass).await, start(policy, HostNetworkPods::Deny).await);

        *pass.world.pod.lock().unwrap() = Ok(host_network(&[]));
        assert_eq!(pass.get(&format!("{info}?x=y")).await.body(), UPSTREAM_BODY, "{policy:?}");
        assert!(pass.upstream_heads()[0].starts_with(&format!("GET {info} HTTP/1.1\r\n")));

        for other in [host_network(&[(ROLE_KEY, "my-role")]), pod(&[]), pod(&[(ROLE_KEY, "my-role")])] {
            *pass.world.pod.lock().unwrap() = Ok(other);
            assert_eq!(pass.get(info).await.status(), StatusCode::NOT_FOUND, "{policy:?}");
        }
        *deny.world.pod.lock().unwrap() = Ok(host_network(&[]));
        assert_eq!(deny.get(info).await.status(), StatusCode::NOT_FOUND, "{policy:?}");
        assert!(deny.upstream_heads().is_empty());
        assert_eq!(pass.upstream_heads().len(), 1, "{policy:?}");
    }
}

#[tokio::test]
async fn a_broken_upstream_is_502_without_details() {
    let harness = Harness::start().await;
    for broken in [
        &b"garbage\r\n\r\n"[..],
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    ] {
        *harness.world.upstream_response.lock().unwrap() = Some(broken.to_vec());

        let failed = harness.get("/latest/meta-data/instance-id").await;

        assert_eq!(failed.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(failed.body(), "the metadata server is not available\n");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_upstream_is_504_before_sdks_give_up() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() = Some(Vec::new());

    let started = Instant::now();
    let late = harness.get("/latest/meta-data/instance-id").await;

    assert_eq!(late.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(harness.metrics().contains(r#"pass_through_total{result="timed_out"} 1"#));
}

#[tokio::test(start_paused = true)]
async fn a_large_body_that_stalls_is_cut_off() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\nbegin".to_vec());

    let started = Instant::now();
    let cut = harness.get("/latest/meta-data/instance-id").await;

    assert_eq!(cut.body(), "begin");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

/// While nothing of the answer has been passed on, the status can still report the error.
#[tokio::test(start_paused = true)]
async fn a_small_body_that_stalls_or_breaks_off_is_an_error_and_no_half_answer() {
    use tokio::io::AsyncWriteExt as _;
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() =
        Some(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin".to_vec());

    let started = Instant::now();
    let stalled = harness.get("/latest/meta-data/instance-id").await;

    assert_eq!(stalled.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let SocketAddr::V4(addr) = listener.local_addr().unwrap() else { unreachable!() };
    let breaking_off = MetadataServer::new(MetadataAddr::v4_only(addr), Arc::clone(&harness.world) as _);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin").await);
        }
    });
    let target = route(
        &http::Method::GET,
        &Target::parse(b"/latest/meta-data/instance-id", MetadataAddr::v4_only(addr), &DIALECT).unwrap(),
        MetadataPolicy::Standard,
        &DIALECT,
    );
    let Route::PassThrough(target) = target else { panic!("{target:?}") };
    let share = PassThroughLimiter::new(0).take(&PodUid::parse(UID).unwrap()).unwrap();

    let broken = relay(&breaking_off, &Request::new(()), &target, share).await;

    assert!(matches!(broken, Err(UpstreamError::Exchange(_))));
}

/// An occasional byte is no stall, but the answer does not end either.
#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_end_is_cut_off() {
    let harness = Harness::start().await;
    *harness.world.upstream_drips.lock().unwrap() = true;

    let started = Instant::now();
    let cut = harness.get("/latest/meta-data/instance-id").await;

    assert!(cut.body().len() > 10, "{}", cut.body());
    let took = started.elapsed().as_secs();
    assert!((30..=35).contains(&took), "{took}");
}
