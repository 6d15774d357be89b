//! The metadata client against a stand-in server that requires tokens, and against ones that issue none.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;

use super::*;
use crate::{
    MetadataAddr,
    testing::{Asked, CountingPass, Server, answer},
    upstream::{MetadataServer, UpstreamError},
    wire::BODY_LIMIT_BYTES,
};

const TOKEN: &str = "x-aws-ec2-metadata-token";

fn tokens_of(server: &Server) -> SessionTokens {
    let pass = Arc::new(CountingPass::default());
    imdsv2(MetadataServer::new(MetadataAddr::v4_only(server.address), pass))
}

fn metadata(server: &Server) -> Metadata {
    Metadata::new(Arc::new(tokens_of(server)))
}

fn item(asked: &Asked) -> Response<Full<Bytes>> {
    match asked.uri().path() {
        "/latest/meta-data/placement/region" => answer(200, "eu-west-1"),
        "/latest/meta-data/services/partition" => answer(200, "aws-cn"),
        "/latest/meta-data/iam/info" => answer(
            200,
            r#"{"Code" : "Success", "LastUpdated" : "2026-11-28T10:00:00Z",
                "InstanceProfileArn" : "arn:aws-cn:iam::123456789012:instance-profile/team/other-name",
                "InstanceProfileId" : "AIPA"}"#,
        ),
        "/latest/meta-data/iam/security-credentials/" => answer(200, "node+role=a,b@c_d"),
        "/latest/meta-data/iam/security-credentials/node+role=a,b@c_d" => answer(
            200,
            r#"{"Code" : "Success", "LastUpdated" : "2026-11-28T10:00:00Z", "Type" : "AWS-HMAC",
                "AccessKeyId" : "ASIANODE", "SecretAccessKey" : "hush", "Token" : "tok",
                "Expiration" : "2026-11-28T16:00:00Z"}"#,
        ),
        _ => answer(404, "<html>404</html>"),
    }
}

/// A server that answers items as told, PUTs for tokens with `status`, and 401 without one of its tokens.
async fn serve(
    status: u16,
    item: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static,
) -> Server {
    let tokens = AtomicUsize::new(0);
    Server::start(move |asked| {
        if asked.method() != http::Method::PUT {
            let token = asked.headers().get(TOKEN).map(|token| token.to_str().unwrap());
            let is_known = token.is_some_and(|token| token.starts_with("token-"));
            return if is_known { item(asked) } else { answer(401, "<html>401 - Unauthorized</html>") };
        }
        assert_eq!(asked.uri().path(), "/latest/api/token");
        assert_eq!(asked.headers()["x-aws-ec2-metadata-token-ttl-seconds"], "21600");
        assert!(!asked.headers().contains_key("x-forwarded-for"));
        let number = tokens.fetch_add(1, Ordering::SeqCst) + 1;
        answer(status, format!("token-{number}"))
    })
    .await
}

#[tokio::test]
async fn reports_what_the_node_is() {
    let server = serve(200, item).await;
    let metadata = metadata(&server);

    assert_eq!(metadata.region().await.unwrap().as_str(), "eu-west-1");
    assert_eq!(metadata.partition().await.unwrap().name, "aws-cn");
    assert_eq!(metadata.base_arn().await.unwrap().as_str(), "arn:aws-cn:iam::123456789012:role/");
    let role = metadata.node_role_name().await.unwrap().unwrap();
    assert_eq!(&*role, "node+role=a,b@c_d", "the list's, not the profile's");
    let issued = metadata.0.node_credentials(&role).await.unwrap();

    assert_eq!(
        (&*issued.access_key_id, issued.expires_at.to_string().as_str()),
        ("ASIANODE", "2026-11-28T16:00:00Z")
    );
    assert!(!format!("{issued:?}").contains("hush"));
    let asked = server.asked();
    assert_eq!(asked.len(), 6, "one token for all");
    assert!(asked[1..].iter().all(|asked| asked.headers()[TOKEN] == "token-1"));
}

#[tokio::test]
async fn renews_a_token_that_is_refused_once() {
    let server = serve(200, |asked| match asked.headers()[TOKEN] == "token-1" {
        true => answer(401, ""),
        false => item(asked),
    })
    .await;
    let always = serve(200, |_| answer(401, "")).await;

    assert!(metadata(&server).region().await.is_ok());
    let error = metadata(&always).region().await.unwrap_err();

    assert!(matches!(error, MetadataError::Status { status: StatusCode::UNAUTHORIZED, .. }));
    assert_eq!((server.asked().len(), always.asked().len()), (4, 4));
}

#[tokio::test]
async fn never_falls_back_to_version_1() {
    for status in [400, 403, 404, 405, 500, 503] {
        let server = serve(status, |_| panic!("asked without a token")).await;
        let metadata = metadata(&server);

        for _ in 0..2 {
            let error = metadata.region().await.unwrap_err();

            let MetadataError::Upstream { source: UpstreamError::Exchange(source), .. } = error else {
                panic!("{error:?}")
            };
            assert!(source.to_string().contains(&status.to_string()), "{source}");
        }
        let methods: Vec<_> = server.asked().iter().map(|asked| asked.method().clone()).collect();
        assert_eq!(methods, [http::Method::PUT, http::Method::PUT], "asks for a token each time: {status}");
    }
}

#[tokio::test]
async fn an_empty_token_is_none() {
    for body in ["", " \r\n"] {
        let server = Server::start(move |asked| {
            assert_eq!(asked.method(), http::Method::PUT, "asked without a token");
            answer(200, body)
        })
        .await;

        let error = metadata(&server).region().await.unwrap_err();

        let MetadataError::Upstream { source: UpstreamError::Exchange(source), .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(source.to_string(), "the metadata server answers with an empty session token");
    }
}

#[tokio::test]
async fn a_token_of_a_pod_goes_no_further() {
    let server = serve(200, item).await;
    let request = |path| Request::get(path).header(TOKEN, "of a pod").body(Full::default()).unwrap();

    let response = tokens_of(&server).send(request("/latest/meta-data/placement/region")).await.unwrap();

    assert_eq!(response.status(), 200);
    let tokens: Vec<_> = server.asked()[1].headers().get_all(TOKEN).iter().cloned().collect();
    assert_eq!(tokens, ["token-1"]);
    // Without a token there is no request at all.
    let broken = serve(403, item).await;
    assert!(tokens_of(&broken).send(request("/")).await.is_err());
    assert_eq!(broken.asked().len(), 1);
}

#[tokio::test]
async fn a_node_without_a_profile_has_no_role_and_no_account() {
    let server = serve(200, |_| answer(404, "<html>404 - Not Found</html>")).await;
    let empty = serve(200, |_| answer(200, "")).await;
    let broken = serve(200, |_| answer(500, "")).await;

    assert_eq!(metadata(&server).node_role_name().await.unwrap(), None);
    assert_eq!(metadata(&empty).node_role_name().await.unwrap(), None);
    let failed = metadata(&broken).node_role_name().await.unwrap_err();
    assert!(matches!(failed, MetadataError::Status { status: StatusCode::INTERNAL_SERVER_ERROR, .. }));
    let none = metadata(&server).base_arn().await.unwrap_err();
    assert!(matches!(none, MetadataError::Status { status: StatusCode::NOT_FOUND, .. }));
}

#[tokio::test]
async fn takes_no_value_of_another_form() {
    for body in ["../x", "a/b", "a b", &"a".repeat(65), "é", ".a", "a:b"] {
        let text = body.to_owned();
        let server = serve(200, move |_| answer(200, text.clone())).await;
        let metadata = metadata(&server);

        assert!(metadata.node_role_name().await.is_err(), "{body}");
        assert!(metadata.region().await.is_err(), "{body}");
        assert!(metadata.partition().await.is_err(), "{body}");
        assert!(metadata.base_arn().await.is_err(), "{body}");
        assert!(metadata.0.node_credentials("r").await.is_err(), "{body}");
    }
    for arn in [
        "arn:aws:iam::123456789012:role/x",
        "arn:aws:iam::1:instance-profile/x",
        "arn:aws:s3::123456789012:instance-profile/x",
        "acs:ram::123456789012:instance-profile/x",
        "arn:aws:iam::123456789012:x:instance-profile/x",
    ] {
        let body = format!(r#"{{"Code":"Success","InstanceProfileArn":"{arn}"}}"#);
        let server = serve(200, move |_| answer(200, body.clone())).await;
        let error = metadata(&server).base_arn().await.unwrap_err();
        assert!(matches!(error, MetadataError::Malformed("instance profile")), "{arn}: {error:?}");
    }
    let long = serve(200, |_| answer(200, "a".repeat(BODY_LIMIT_BYTES + 1))).await;
    assert!(matches!(metadata(&long).region().await.unwrap_err(), MetadataError::Upstream { .. }));
}

#[tokio::test]
async fn a_failure_document_of_status_200_brings_no_credentials() {
    let failed =
        r#"{"Code":"AssumeRoleUnauthorizedAccess","Message":"m","LastUpdated":"2026-11-28T10:00:00Z"}"#;
    let server = serve(200, move |_| answer(200, failed)).await;

    let error = metadata(&server).0.node_credentials("node").await.unwrap_err();

    assert!(matches!(error, MetadataError::Credentials(crate::wire::WireError::Unsuccessful)), "{error:?}");
}
