use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use std::net::SocketAddr;

use super::*;

async fn start() -> (SocketAddr, Readiness) {
    let mut registry = Registry::with_prefix("kube2ram");
    registry.register("things", "Things", prometheus_client::metrics::counter::Counter::<u64>::default());
    let readiness = Readiness::default();
    let admin = Admin { readiness: readiness.clone(), registry, serving: Handle::current() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let tasks = TaskTracker::new();
    tasks.spawn(Arc::new(admin).serve(Arc::new(listener), tasks.clone(), Drain::new()));
    (addr, readiness)
}

async fn ask(addr: SocketAddr, request: &str) -> String {
    ask_on(TcpStream::connect(addr).await.unwrap(), request).await
}

async fn ask_on(mut stream: TcpStream, request: &str) -> String {
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
    stream.write_all(format!("{request} HTTP/1.0\r\n{accept}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn is_alive_before_it_is_ready() {
    let (addr, readiness) = start().await;
    let pods = readiness.wait_for("pods");

    assert!(ask(addr, "GET /healthz").await.starts_with("HTTP/1.0 200"));
    let unready = ask(addr, "GET /readyz").await;
    assert!(unready.starts_with("HTTP/1.0 503") && unready.ends_with("pending: pods\n"), "{unready}");
    pods.ready();
    assert!(ask(addr, "GET /readyz").await.starts_with("HTTP/1.0 200"));
}

#[tokio::test]
async fn what_is_noted_is_shown_whether_it_is_ready_or_not() {
    let (addr, readiness) = start().await;
    let pods = readiness.wait_for("pods");
    readiness.note("lists", Some("one cannot be read".into()));

    let unready = ask(addr, "GET /readyz").await;
    pods.ready();
    let ready = ask(addr, "GET /readyz").await;
    readiness.note("lists", None);
    let repaired = ask(addr, "GET /readyz").await;

    assert!(unready.starts_with("HTTP/1.0 503"), "{unready}");
    assert!(unready.ends_with("\r\n\r\npending: pods\nnote: lists: one cannot be read\n"), "{unready}");
    assert!(ready.starts_with("HTTP/1.0 200"), "{ready}");
    assert!(ready.ends_with("\r\n\r\nready\nnote: lists: one cannot be read\n"), "{ready}");
    assert!(repaired.ends_with("\r\n\r\nready\n"), "{repaired}");
}

async fn dial(addr: SocketAddr, from: &str) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
    socket.connect(addr).await.unwrap()
}

#[tokio::test]
async fn an_address_that_holds_all_of_its_connections_is_answered_and_loses_the_oldest() {
    let (addr, _) = start().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_ADDRESS {
        held.push(dial(addr, "127.0.0.1").await);
    }

    // From the same address: the client that holds them and the one that asks may be on one node.
    assert_whoever_comes_is_answered_for_the_oldest(addr, held).await;
}

#[tokio::test]
async fn addresses_that_hold_all_connections_keep_nobody_out() {
    let (addr, _) = start().await;
    let mut held = Vec::new();
    for index in 0..CONNECTIONS {
        held.push(dial(addr, &format!("127.0.1.{}", index / CONNECTIONS_PER_ADDRESS)).await);
    }

    assert_whoever_comes_is_answered_for_the_oldest(addr, held).await;
}

async fn assert_whoever_comes_is_answered_for_the_oldest(addr: SocketAddr, mut held: Vec<TcpStream>) {
    let answer = ask(addr, "GET /healthz").await;

    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    assert_eq!(held.remove(0).read(&mut [0]).await.unwrap_or(0), 0, "closed");
    for other in held {
        assert!(ask_on(other, "GET /healthz").await.starts_with("HTTP/1.0 200"), "still served");
    }
}

#[tokio::test]
async fn shows_metrics_as_open_metrics() {
    let (addr, _) = start().await;

    let metrics = ask(addr, "GET /metrics").await;

    assert!(metrics.contains("content-type: application/openmetrics-text"), "{metrics}");
    assert!(metrics.contains("kube2ram_things_total 0\n") && metrics.ends_with("# EOF\n"), "{metrics}");
}

#[tokio::test]
async fn answers_nothing_else() {
    let (addr, _) = start().await;

    for path in ["/", "/debug/store", "/debug/pprof"] {
        assert!(ask(addr, &format!("GET {path}")).await.starts_with("HTTP/1.0 404"), "{path}");
    }
    assert!(ask(addr, "GET /latest/meta-data/ram/security-credentials/").await.starts_with("HTTP/1.0 404"));
    let posted = ask(addr, "POST /healthz").await;
    assert!(posted.starts_with("HTTP/1.0 405") && posted.contains("allow: GET, HEAD"), "{posted}");
}
