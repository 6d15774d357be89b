//! The client against a real server on loopback.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4},
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::testing::{CountingPass, Server, answer};

fn get(target: &str) -> Request<Full<Bytes>> {
    Request::get(target).body(Full::default()).unwrap()
}

async fn text(response: Response<ResponseBody>) -> Bytes {
    read_bounded(response.into_body(), 1024, Duration::from_secs(5)).await.unwrap()
}

#[tokio::test]
async fn passes_a_request_on_as_it_is_but_for_its_host() {
    let server = Server::start(|_| answer(404, "no")).await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    let request = Request::put("/latest/../a%2Fb?")
        .header("Host", "evil.example")
        .header("x-own", "1")
        .body(Full::default())
        .unwrap();

    let response = upstream.send(request).await.unwrap();

    assert_eq!((response.status().as_u16(), &*text(response).await), (404, &b"no"[..]));
    let asked = &server.asked()[0];
    assert_eq!(format!("{} {}", asked.method(), asked.uri()), "PUT /latest/../a%2Fb?");
    assert_eq!(asked.headers()["host"], server.address.to_string());
    let mut names: Vec<&str> = asked.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    assert!(matches!(names[..], ["host", "x-own"] | ["content-length", "host", "x-own"]), "{names:?}");
}

#[tokio::test]
async fn dials_its_own_address_whatever_the_target() {
    let server = Server::start(|_| answer(200, "ours")).await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));

    let response = upstream.send(get("http://192.0.2.1:9/latest/")).await.unwrap();

    assert_eq!(&*text(response).await, b"ours");
    assert_eq!(server.targets(), ["GET /latest/"]);
}

#[tokio::test]
async fn grants_the_pass_once_per_connection_and_reuses_connections() {
    let server = Server::start(|_| answer(200, "ok")).await;
    let pass = Arc::new(CountingPass::default());
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::clone(&pass) as Arc<dyn PassGrant>);

    for _ in 0..5 {
        text(upstream.send(get("/")).await.unwrap()).await;
    }

    assert_eq!(server.asked().len(), 5);
    let connections = server.connections.load(Ordering::SeqCst);
    assert_eq!(pass.granted.load(Ordering::SeqCst), connections);
    assert!(connections < 5);
}

#[tokio::test]
async fn never_connects_without_the_pass() {
    let server = Server::start(|_| answer(200, "ok")).await;
    let pass = CountingPass { refuse: true, ..CountingPass::default() };
    let upstream = MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(pass));

    let error = upstream.send(get("/")).await.unwrap_err();

    assert!(matches!(error, UpstreamError::Connect(_)), "{error:?}");
    assert_eq!(server.connections.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_closed_port_is_a_connect_error() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let upstream = MetadataServer::new(
        MetadataAddr::v4_only(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)),
        Arc::new(CountingPass::default()),
    );

    let error = upstream.send(get("/")).await.unwrap_err();

    assert!(matches!(error, UpstreamError::Connect(_)), "{error:?}");
}

#[tokio::test]
async fn gives_up_on_a_server_that_is_silent() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let upstream = MetadataServer::new(
        MetadataAddr::v4_only(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)),
        Arc::new(CountingPass::default()),
    );

    let error = upstream.send(get("/")).await.unwrap_err();

    assert!(matches!(error, UpstreamError::Timeout), "{error:?}");
}

/// Answers the configured number of requests of each connection, and closes the connection at the next one
/// without an answer.
async fn start_hanging_up(answers: usize) -> (MetadataServer, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let mut buffer = [0; 1024];
            for _ in 0..answers {
                assert_ne!(stream.read(&mut buffer).await.unwrap(), 0);
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
            assert_ne!(stream.read(&mut buffer).await.unwrap(), 0);
        }
    });
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    (MetadataServer::new(MetadataAddr::v4_only(address), Arc::new(CountingPass::default())), connections)
}

#[tokio::test]
async fn a_pooled_connection_that_went_stale_does_not_fail_a_get() {
    let (upstream, connections) = start_hanging_up(1).await;

    for _ in 0..3 {
        assert_eq!(&*text(upstream.send(get("/")).await.unwrap()).await, b"ok");
    }

    assert_eq!(connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn repeats_a_get_once_and_a_put_never() {
    for (method, tries) in [(Method::GET, 2), (Method::PUT, 1)] {
        let (upstream, connections) = start_hanging_up(0).await;
        let request = Request::builder().method(method).uri("/").body(Full::default()).unwrap();

        let error = upstream.send(request).await.unwrap_err();

        assert!(matches!(error, UpstreamError::Exchange(_)), "{error:?}");
        assert_eq!(connections.load(Ordering::SeqCst), tries);
    }
}

#[tokio::test]
async fn reads_bodies_up_to_the_limit_only() {
    let body = |length| Full::new(Bytes::from(vec![b'x'; length]));

    assert_eq!(read_bounded(body(10), 10, Duration::from_secs(1)).await.unwrap().len(), 10);
    let error = read_bounded(body(11), 10, Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(error, UpstreamError::Exchange(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn gives_up_on_a_body_that_stalls() {
    struct Stalled;
    impl Body for Stalled {
        type Data = Bytes;
        type Error = io::Error;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<io::Result<hyper::body::Frame<Bytes>>>> {
            Poll::Pending
        }
    }

    let error = read_bounded(Stalled, 10, Duration::from_secs(1)).await.unwrap_err();

    assert!(matches!(error, UpstreamError::Timeout), "{error:?}");
}

#[tokio::test]
async fn the_ipv6_address_is_asked_only_while_there_is_no_route_to_the_ipv4_address() {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 512];
            let _read = stream.read(&mut head).await;
            drop(
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nv6")
                    .await,
            );
        }
    });
    // ENETUNREACH wherever this runs: the kernel connects to no multicast address (tcp_v4_connect).
    let v4 = SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 1), port);
    let pass = Arc::new(CountingPass::default());
    let metadata = MetadataAddr { v4, v6: Some(Ipv6Addr::LOCALHOST) };
    let upstream = MetadataServer::new(metadata, Arc::clone(&pass) as Arc<dyn PassGrant>);

    for _ in 0..2 {
        assert_eq!(&*text(upstream.send(get("/")).await.unwrap()).await, b"v6");
    }

    // Each of the two connections was tried over IPv4 first.
    assert_eq!(pass.granted.load(Ordering::SeqCst), 4);
    let none = MetadataServer::new(MetadataAddr::v4_only(v4), Arc::clone(&pass) as Arc<dyn PassGrant>);
    assert!(matches!(none.send(get("/")).await, Err(UpstreamError::Connect(_))));
    // With a route to the IPv4 address, the server at the IPv6 address is not used: the IPv4 address belongs
    // to the platform.
    let refused =
        MetadataAddr { v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), v6: Some(Ipv6Addr::LOCALHOST) };
    let refused = MetadataServer::new(refused, pass);
    assert!(matches!(refused.send(get("/")).await, Err(UpstreamError::Connect(_))));
}
