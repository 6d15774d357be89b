//! Clients that do not play by the rules: bounded, answered or cut off, and never passed on.

use std::time::Duration;

use http::StatusCode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use super::harness::*;
use crate::{
    identity::CgroupId,
    server::{CONNECTIONS_PER_POD, QUIET},
};
use kube2ram_service::listener::{
    CONNECTION_MAX_AGE, DRAIN_DEADLINE, HEAD_TIMEOUT, MAX_REQUESTS, WRITE_TIMEOUT,
};

#[tokio::test]
async fn a_smuggled_request_is_not_a_request_of_its_own() {
    let harness = Harness::start().await;
    let smuggled = "GET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n";
    let length = 5 + smuggled.len();
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n";

    for head in [
        format!("{put}Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{put}Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{put}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{put}Content-Length: 0\r\nContent-Length: {length}\r\n\r\n{smuggled}"),
        format!("{put}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{smuggled}"),
        format!("{put}Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"),
    ] {
        let answers = harness.raw(&head).await;
        assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{head:?}: {answers}");
    }
    for head in harness.upstream_heads() {
        assert!(head.starts_with("PUT /latest/api/token HTTP/1.1\r\n"), "{head}");
        assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_and_each_by_its_own_route() {
    let harness = Harness::start().await;

    let answers = harness
        .raw(format!(
            "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\nGET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n\
             GET /latest/user-data HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ))
        .await;

    let at = |text: &str| answers.find(text).unwrap_or_else(|| panic!("no {text} in {answers}"));
    assert!(at(UPSTREAM_BODY) < at("my-role") && at("my-role") < at("closed to pods"), "{answers}");
}

#[tokio::test]
async fn speaks_http_1_0_without_host() {
    let harness = Harness::start().await;

    let list = harness.raw(format!("GET {LIST} HTTP/1.0\r\n\r\n")).await;

    assert_eq!(response(&list).body(), "my-role");
}

#[tokio::test]
async fn refuses_to_tunnel_and_ignores_upgrades() {
    let harness = Harness::start().await;

    let tunnel = harness
        .raw(
            "CONNECT 100.100.100.200:80 HTTP/1.1\r\nHost: 100.100.100.200\r\n\r\n\
             GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        .await;
    assert_eq!(tunnel.matches("HTTP/1.1 ").count(), 1, "{tunnel}");
    assert_eq!(response(&tunnel).status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(response(&tunnel).headers()["allow"], "GET, HEAD");
    // The JDK's client offers h2c on every plain request.
    for headers in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\n",
    ] {
        let upgrade = harness.send("GET", LIST, headers).await;
        assert_eq!((upgrade.status(), upgrade.body().as_str()), (StatusCode::OK, "my-role"));
    }
    assert!(harness.upstream_heads().is_empty());
}

/// The request of a client whose http_proxy is the agent.
#[tokio::test]
async fn serves_as_a_proxy_for_the_metadata_server_and_no_other() {
    let harness = Harness::start().await;
    let proxied = async |host: &str, path: &str| {
        harness.send("GET", &format!("http://{host}{path}"), "Proxy-Connection: keep-alive\r\n").await
    };

    assert_eq!(proxied("100.100.100.200", LIST).await.body(), "my-role");
    assert_eq!(proxied("100.100.100.200", "/latest/meta-data/instance-id").await.body(), UPSTREAM_BODY);
    assert!(!harness.upstream_heads()[0].to_lowercase().contains("proxy"), "{:?}", harness.upstream_heads());
    for other in ["example.com", "100.100.100.200:8080", "127.0.0.1", "x@100.100.100.200"] {
        let refused = proxied(other, LIST).await;
        assert_eq!(
            (refused.status(), refused.body().as_str()),
            (StatusCode::BAD_REQUEST, "only the metadata server is served\n"),
            "{other}"
        );
    }
    assert_eq!(harness.upstream_heads().len(), 1);
}

#[tokio::test]
async fn cuts_off_garbage_and_oversized_heads() {
    let harness = Harness::start().await;

    for (what, bytes, status) in [
        ("garbage", "\u{16}\u{3}\u{1}\u{2}\r\n\r\n".to_owned(), "400"),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), ""),
        ("long target", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000)), "4"),
        ("long header", format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(20_000)), "431"),
        ("many headers", format!("GET / HTTP/1.1\r\n{}\r\n", "X: 1\r\n".repeat(200)), "431"),
    ] {
        let answer = harness.raw(bytes).await;
        assert!(answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status}")), "{what}: {answer}");
    }
    let mut endless = harness.connect().await;
    let mut sent = 0;
    while endless.write_all(&[b'a'; 1024]).await.is_ok() {
        sent += 1024;
        assert!(sent < 16 * 1024 * 1024, "an endless head must be cut off");
    }
    assert!(harness.upstream_heads().is_empty());
    assert_eq!(harness.get(LIST).await.status(), StatusCode::OK, "and the others are still served");
}

#[tokio::test]
async fn a_body_nobody_asked_for_is_not_waited_for() {
    let harness = Harness::start().await;

    let answer =
        harness.raw(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\npart")).await;

    assert_eq!(response(&answer).body(), "my-role");
}

#[tokio::test(start_paused = true)]
async fn a_half_sent_head_costs_bounded_time() {
    let harness = Harness::start().await;
    for part in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: x\r\n"] {
        let started = Instant::now();

        let answer = harness.raw(part).await;

        assert!(!answer.contains("200 OK"), "{answer}");
        assert!(
            started.elapsed() <= HEAD_TIMEOUT + Duration::from_secs(1),
            "{part:?} {:?}",
            started.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_kept_busy_ends_of_age() {
    let harness = Harness::start().await;
    let started = Instant::now();
    let mut stream = harness.connect().await;
    let request = format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n");

    while stream.write_all(request.as_bytes()).await.is_ok() {
        let answer =
            tokio::time::timeout(Duration::from_secs(1), try_read_response(&mut stream)).await.unwrap();
        if answer.is_none() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(started.elapsed() < 2 * CONNECTION_MAX_AGE);
    }

    assert!(started.elapsed() >= CONNECTION_MAX_AGE, "{:?}", started.elapsed());
}

#[tokio::test]
async fn one_pod_cannot_take_all_connections_whatever_cgroups_it_makes() {
    let harness = Harness::start().await;
    let come_from = |cgroup| *harness.world.cgroup.lock().unwrap() = Some(cgroup);
    let mut held: Vec<TcpStream> = Vec::new();
    for turn in 0..CONNECTIONS_PER_POD {
        come_from([POD_CGROUP, NESTED_CGROUP][turn % 2]);
        held.push(harness.connect().await);
        ask_for_list(held.last_mut().unwrap()).await.expect("an answer");
    }
    let open = format!("connections {CONNECTIONS_PER_POD}\n");
    eventually(async || harness.metrics().contains(&open)).await;

    tokio::time::sleep(QUIET).await;
    let mut more = Vec::new();
    for cgroup in [POD_CGROUP, NESTED_CGROUP] {
        come_from(cgroup);
        more.push(harness.connect().await);
        ask_for_list(more.last_mut().unwrap()).await.expect("an answer");
    }

    eventually(async || harness.metrics().contains(&open)).await;
    for (index, stream) in held.iter_mut().enumerate().rev() {
        assert_eq!(ask_for_list(stream).await.is_some(), index >= 2, "its two oldest were closed: {index}");
    }
    assert!(harness.metrics().contains("connections_displaced_total 2"), "{}", harness.metrics());
    assert!(harness.metrics().contains("connections_refused_total 0"), "{}", harness.metrics());
    come_from(CgroupId(8));
    assert_eq!(harness.get(LIST).await.status(), StatusCode::FORBIDDEN, "others are still heard");
}

async fn ask_for_list(stream: &mut TcpStream) -> Option<http::Response<String>> {
    stream.write_all(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.ok()?;
    try_read_response(stream).await
}

#[tokio::test]
async fn a_pod_that_is_being_answered_on_all_of_its_connections_gets_no_other_one() {
    let harness = Harness::start().await;
    *harness.world.pod_never_comes.lock().unwrap() = true;
    let mut busy = Vec::new();
    for _ in 0..CONNECTIONS_PER_POD {
        let mut stream = harness.connect().await;
        stream.write_all(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        busy.push(stream);
    }
    eventually(async || harness.metrics().contains(&format!("connections {CONNECTIONS_PER_POD}\n"))).await;

    assert_eq!(harness.raw(format!("GET {LIST} HTTP/1.1\r\n\r\n")).await, "", "closed at once");

    assert!(harness.metrics().contains("connections_refused_total 1"), "{}", harness.metrics());
    for mut stream in busy {
        assert_eq!(read_response(&mut stream).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}

/// Other connections come and go meanwhile, longer than a connection that nothing is asked or answered on is
/// left alone.
#[tokio::test]
async fn a_connection_that_is_sent_a_slow_body_is_not_idle() {
    let harness = Harness::start().await;
    *harness.world.upstream_drips.lock().unwrap() = true;
    let mut slow = harness.connect().await;
    slow.write_all(b"GET /latest/meta-data/ HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut others = Vec::new();
    for _ in 1..CONNECTIONS_PER_POD {
        others.push(harness.connect().await);
    }
    eventually(async || harness.metrics().contains(&format!("connections {CONNECTIONS_PER_POD}\n"))).await;
    tokio::time::sleep(QUIET).await;

    let mut more = harness.connect().await;
    ask_for_list(&mut more).await.expect("an answer");

    assert!(harness.metrics().contains("connections_displaced_total 1"), "{}", harness.metrics());
    assert_eq!(others[0].read(&mut [0]).await.unwrap_or(0), 0, "the oldest idle one gives way");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n.") {
        head.push(slow.read_u8().await.expect("the body goes on"));
    }
    assert_eq!(slow.read_u8().await.unwrap(), b'.', "although it is the oldest of all");
}

#[tokio::test]
async fn a_pod_that_asks_too_often_gets_a_time_to_ask_again_and_is_disconnected() {
    let harness = Harness::start_with(None, |config| config.request_rate = 1).await;
    let mut stream = harness.connect().await;
    for _ in 0..2 {
        assert_eq!(ask_for_list(&mut stream).await.unwrap().status(), StatusCode::OK);
    }

    let refused = ask_for_list(&mut stream).await.unwrap();

    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        (&refused.headers()["retry-after"], &refused.headers()["connection"]),
        (&"1".parse().unwrap(), &"close".parse().unwrap())
    );
    assert_eq!(read_to_end(&mut stream).await, "");
    assert_eq!(harness.get(LIST).await.status(), StatusCode::TOO_MANY_REQUESTS, "on another connection too");
    *harness.world.cgroup.lock().unwrap() = Some(OTHER_POD_CGROUP);
    assert_eq!(harness.get(LIST).await.status(), StatusCode::OK, "another pod");
}

#[tokio::test]
async fn a_connection_carries_a_bounded_number_of_requests() {
    let harness = Harness::start().await;
    let mut stream = harness.connect().await;
    for _ in 1..MAX_REQUESTS {
        let answer = ask_for_list(&mut stream).await.unwrap();
        assert!(!answer.headers().contains_key("connection"));
    }

    assert_eq!(ask_for_list(&mut stream).await.unwrap().headers()["connection"], "close");
    assert_eq!(read_to_end(&mut stream).await, "");
}

/// Not with a paused clock: the kernel's buffering does not follow it.
#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected_and_fills_no_memory() {
    let harness = Harness::start().await;
    let client = TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(4096).unwrap();
    let mut stream = client.connect(harness.addr).await.unwrap();
    let requests = format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(1000);
    let started = Instant::now();

    let mut sent = 0;
    while stream.write_all(requests.as_bytes()).await.is_ok() {
        sent += requests.len();
        assert!(started.elapsed() < 4 * WRITE_TIMEOUT, "{sent}");
    }

    assert!(started.elapsed() + Duration::from_secs(1) >= WRITE_TIMEOUT, "{:?}", started.elapsed());
    eventually(async || harness.metrics().contains("connections 0\n")).await;
}

#[tokio::test]
async fn shutdown_answers_what_is_under_way_and_then_ends() {
    let harness = Harness::start().await;
    let mut fresh = harness.connect().await;
    let mut kept = harness.connect().await;
    let request = format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n");
    kept.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_response(&mut kept).await.body(), "my-role");

    harness.drain.close();
    fresh.write_all(request.as_bytes()).await.unwrap();

    let answer = response(&read_to_end(&mut fresh).await);
    assert_eq!(answer.body(), "my-role", "a connection accepted before the shutdown is served");
    assert_eq!(answer.headers()["connection"], "close");
    assert_eq!(read_to_end(&mut kept).await, "", "an idle connection is closed");
    harness.tasks.close();
    tokio::time::timeout(DRAIN_DEADLINE, harness.tasks.wait()).await.expect("every task ends");
    assert!(TcpStream::connect(harness.addr).await.is_err());
}

#[tokio::test]
async fn a_handover_closes_no_idle_connection_but_marks_each_next_answer_as_the_last() {
    let harness = Harness::start().await;
    let mut kept = harness.connect().await;
    let request = format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n");
    kept.write_all(request.as_bytes()).await.unwrap();
    let before = read_response(&mut kept).await;
    assert_eq!((before.body().as_str(), before.headers().get("connection")), ("my-role", None));

    harness.drain.hand_over();
    eventually(async || TcpStream::connect(harness.addr).await.is_err()).await;
    kept.write_all(request.as_bytes()).await.unwrap();

    let answer = response(&read_to_end(&mut kept).await);
    assert_eq!(
        (answer.body().as_str(), &answer.headers()["connection"]),
        ("my-role", &"close".parse().unwrap())
    );
    harness.tasks.close();
    tokio::time::timeout(DRAIN_DEADLINE, harness.tasks.wait()).await.expect("every task ends");
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_an_answer_go_on_until_the_deadline_and_then_cuts_it_off() {
    let harness = Harness::start().await;
    *harness.world.upstream_drips.lock().unwrap() = true;
    let mut endless = harness.connect().await;
    endless.write_all(b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 16];
    endless.read_exact(&mut first).await.unwrap();
    assert_eq!(&first[..12], b"HTTP/1.1 200");

    let started = Instant::now();
    harness.drain.close();
    let rest = read_to_end(&mut endless).await;

    assert!(rest.len() > 4, "it went on: {rest:?}");
    let (took, second) = (started.elapsed(), Duration::from_secs(1));
    assert!((DRAIN_DEADLINE - second..=DRAIN_DEADLINE + second).contains(&took), "{took:?}");
    harness.tasks.close();
    tokio::time::timeout(second, harness.tasks.wait()).await.expect("every task ends");
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_a_client_that_stalls() {
    let harness = Harness::start().await;
    let mut stalled = harness.connect().await;
    stalled.write_all(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\nGET /half").as_bytes()).await.unwrap();
    assert_eq!(read_response(&mut stalled).await.body(), "my-role");

    let started = Instant::now();
    harness.drain.close();
    read_to_end(&mut stalled).await;

    assert!(started.elapsed() <= DRAIN_DEADLINE + Duration::from_secs(1), "{:?}", started.elapsed());
}
