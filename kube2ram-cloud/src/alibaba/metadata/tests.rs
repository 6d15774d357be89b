//! The metadata client against a stand-in server, with and without hardened mode.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;

use super::*;
use crate::{
    MetadataAddr,
    testing::{Asked, CountingPass, Server, answer},
    upstream::MetadataServer,
    wire::BODY_LIMIT_BYTES,
};

const TOKEN: &str = "x-aliyun-ecs-metadata-token";

fn metadata(server: &Server) -> Metadata {
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    Metadata::new(Arc::new(hardened_mode(upstream)))
}

fn item(asked: &Asked) -> Response<Full<Bytes>> {
    match asked.uri().path() {
        "/latest/meta-data/region-id" => answer(200, "cn-hangzhou"),
        "/latest/meta-data/owner-account-id" => answer(200, "1234567890123456"),
        "/latest/meta-data/ram/security-credentials/" => answer(200, "node-role"),
        "/latest/meta-data/ram/security-credentials/node-role" => answer(
            200,
            r#"{"AccessKeyId":"STS.node","AccessKeySecret":"hush","Expiration":"2026-11-22T03:30:00Z",
                "SecurityToken":"tok","LastUpdated":"2026-11-21T21:30:00Z","Code":"Success"}"#,
        ),
        _ => answer(404, "<html>404</html>"),
    }
}

/// A server that answers items as configured, and PUTs for tokens with `status`.
async fn serve(
    status: u16,
    item: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static,
) -> Server {
    let tokens = AtomicUsize::new(0);
    Server::start(move |asked| {
        if asked.method() != http::Method::PUT {
            return item(asked);
        }
        assert_eq!(asked.uri().path(), "/latest/api/token");
        assert_eq!(asked.headers()["x-aliyun-ecs-metadata-token-ttl-seconds"], "21600");
        let number = tokens.fetch_add(1, Ordering::SeqCst) + 1;
        answer(status, format!("token-{number}\n"))
    })
    .await
}

#[tokio::test]
async fn returns_what_the_node_is() {
    let server = serve(200, item).await;
    let metadata = metadata(&server);

    assert_eq!(metadata.region_id().await.unwrap().to_string(), "cn-hangzhou");
    assert_eq!(metadata.base_arn().await.unwrap().as_str(), "acs:ram::1234567890123456:role/");
    assert_eq!(metadata.node_role_name().await.unwrap().as_deref(), Some("node-role"));
    let issued = metadata.node_credentials("node-role").await.unwrap();

    assert_eq!(&*issued.access_key_id, "STS.node");
    assert!(!format!("{issued:?}").contains("hush"));
}

#[tokio::test]
async fn fetches_one_token_and_sends_it_with_every_request() {
    let server = serve(200, item).await;
    let metadata = metadata(&server);

    metadata.region_id().await.unwrap();
    metadata.region_id().await.unwrap();

    let asked = server.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked[1..].iter().all(|asked| asked.headers()[TOKEN] == "token-1"));
}

#[tokio::test]
async fn renews_a_token_that_is_refused_once() {
    let server = serve(200, |asked| match asked.headers().get(TOKEN) {
        Some(token) if token == "token-1" => answer(401, ""),
        _ => item(asked),
    })
    .await;
    let always = serve(200, |_| answer(401, "")).await;

    assert!(metadata(&server).region_id().await.is_ok());
    let error = metadata(&always).region_id().await.unwrap_err();

    assert!(matches!(error, MetadataError::Status { status: StatusCode::UNAUTHORIZED, .. }));
    assert_eq!((server.asked().len(), always.asked().len()), (4, 4));
}

#[tokio::test]
async fn works_without_tokens_where_none_are_issued() {
    for status in [403, 404] {
        let server = serve(status, item).await;
        let metadata = metadata(&server);

        metadata.region_id().await.unwrap();
        metadata.region_id().await.unwrap();

        let asked = server.asked();
        assert_eq!(asked.len(), 3, "asks for a token once only");
        assert!(asked[1..].iter().all(|asked| !asked.headers().contains_key(TOKEN)));
    }
}

#[tokio::test]
async fn asks_again_for_a_token_after_a_passing_fault() {
    let server = serve(503, item).await;
    let metadata = metadata(&server);

    metadata.region_id().await.unwrap();
    metadata.region_id().await.unwrap();

    assert_eq!(server.asked().len(), 4);
}

#[tokio::test]
async fn an_empty_token_is_none_and_is_asked_for_again() {
    let server = Server::start(|asked| match asked.method() == http::Method::PUT {
        true => answer(200, "\n"),
        false => item(asked),
    })
    .await;
    let metadata = metadata(&server);

    metadata.region_id().await.unwrap();
    metadata.region_id().await.unwrap();

    let asked = server.asked();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|asked| !asked.headers().contains_key(TOKEN)));
}

#[tokio::test]
async fn a_token_of_a_pod_goes_no_further() {
    let server = serve(403, item).await;
    let upstream =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    let request = Request::get("/").header(TOKEN, "of a pod").body(Full::default()).unwrap();

    hardened_mode(upstream).send(request).await.unwrap();

    assert!(!server.asked()[1].headers().contains_key(TOKEN));
}

#[tokio::test]
async fn a_node_without_role_has_none() {
    let server = serve(200, |_| answer(404, "<html>404</html>")).await;
    let broken = serve(200, |_| answer(500, "")).await;

    assert_eq!(metadata(&server).node_role_name().await.unwrap(), None);
    let failed = metadata(&broken).node_role_name().await.unwrap_err();
    assert!(matches!(failed, MetadataError::Status { status: StatusCode::INTERNAL_SERVER_ERROR, .. }));
}

#[tokio::test]
async fn takes_no_value_of_another_form() {
    for body in ["../x", "a/b", "a b", &"a".repeat(65), "é"] {
        let text = body.to_owned();
        let server = serve(200, move |_| answer(200, text.clone())).await;
        let metadata = metadata(&server);

        assert!(metadata.node_role_name().await.is_err(), "{body}");
        assert!(metadata.owner_account_id().await.is_err(), "{body}");
        assert!(metadata.node_credentials("r").await.is_err(), "{body}");
    }
    let long = serve(200, |_| answer(200, "a".repeat(BODY_LIMIT_BYTES + 1))).await;
    assert!(matches!(metadata(&long).region_id().await.unwrap_err(), MetadataError::Upstream { .. }));
}
