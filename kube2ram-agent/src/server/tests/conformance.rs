//! Section 4 (requests) of docs/predecessors.md, one test or more for each row. A comment at a test gives the
//! predecessors' answer where kube2ram differs on purpose.

use http::StatusCode;

use super::harness::*;
use crate::{kubernetes::PodError, pod::Pod, policy::PatternFormat};
use kube2ram_cloud::credentials::IssueErrorKind;

const ARN: &str = "acs:ram::123456789012:role/my-role";
const INSTANCE: &str = "/latest/meta-data/instance-id";
const DENIED: &str = "the requested role is not the pod's role\n";

/// The outcome of a row: the status, the body, and the request lines that the real server sees.
type Expected<'a> = (u16, &'a str, &'a [&'a str]);

async fn expect(harness: &Harness, method: &str, target: &str, (status, body, upstream): Expected<'_>) {
    let before = harness.upstream_heads().len();

    let answer = harness.send(method, target, "").await;

    assert_eq!(answer.status().as_u16(), status, "{method} {target}: {}", answer.body());
    match body {
        CREDENTIALS => {
            let document: serde_json::Value = serde_json::from_str(answer.body()).unwrap();
            assert_eq!(document["AccessKeyId"], format!("STS.{ARN}"), "{method} {target}");
        }
        _ => assert_eq!(answer.body(), body, "{method} {target}"),
    }
    let heads = harness.upstream_heads();
    let lines: Vec<&str> =
        heads[before..].iter().filter_map(|head| head.split(" HTTP/1.1\r\n").next()).collect();
    assert_eq!(lines, upstream, "{method} {target}");
}

/// Instead of a body: credentials of the pod's own role.
const CREDENTIALS: &str = "{}";

/// A test for each row, whose caller is a pod annotated with `my-role`.
macro_rules! rows {
    ($($(#[$doc:meta])* $name:ident: $method:ident $target:expr => $expected:expr;)*) => {$(
        $(#[$doc])*
        #[tokio::test]
        async fn $name() {
            let harness = Harness::start().await;
            let target: &str = &$target;
            expect(&harness, stringify!($method), target, $expected).await;
        }
    )*};
}

rows! {
    row_4_1_list_without_slash: GET LIST.trim_end_matches('/') => (200, "my-role", &[]);
    row_4_2_list_with_slash: GET LIST => (200, "my-role", &[]);
    row_4_3_list_of_a_dated_version: GET LIST.replace("latest", "2016-01-01") => (200, "my-role", &[]);
    /// The predecessors redirect (301), which no SDK follows.
    row_4_4_list_with_empty_segments: GET "//latest//meta-data/ram/security-credentials/" => (200, "my-role", &[]);
    row_4_6_credentials_by_name: GET format!("{LIST}my-role") => (200, CREDENTIALS, &[]);
    row_4_7_credentials_by_arn: GET format!("{LIST}{ARN}") => (200, CREDENTIALS, &[]);
    row_4_8_credentials_by_arn_with_escaped_slash: GET format!("{LIST}{}", ARN.replace('/', "%2F")) => (200, CREDENTIALS, &[]);
    /// The predecessors' message repeats the requested name.
    row_4_9_another_role: GET format!("{LIST}different-role") => (403, DENIED, &[]);
    /// The predecessors: 403, because the slash counts as part of the name.
    row_4_10_trailing_slash: GET format!("{LIST}my-role/") => (200, CREDENTIALS, &[]);
    row_4_17_other_item_passes: GET INSTANCE => (200, UPSTREAM_BODY, &["GET /latest/meta-data/instance-id"]);
    row_4_23_head_on_list_reads: HEAD LIST => (200, "", &[]);
    row_4_23_head_on_credentials_reads: HEAD format!("{LIST}my-role") => (200, "", &[]);
    /// The predecessors give credentials to any method.
    row_4_23_post_on_list_is_refused: POST LIST => (405, "method not allowed\n", &[]);
    row_4_23_post_on_credentials_is_refused: POST format!("{LIST}my-role") => (405, "method not allowed\n", &[]);
}

fn annotated(role: &str) -> Result<Pod, fn() -> PodError> {
    Ok(pod(&[(ROLE_KEY, role)]))
}

#[tokio::test]
async fn row_4_5_foreign_role_is_listed_by_its_arn() {
    const FOREIGN: &str = "acs:ram::999999999999:role/cross-role";
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = annotated(FOREIGN);

    expect(&harness, "GET", LIST, (200, FOREIGN, &[])).await;
    assert_eq!(harness.get(&format!("{LIST}{FOREIGN}")).await.status(), StatusCode::OK);
}

/// The predecessors: 404, which SDKs read as "this node has no role".
#[tokio::test]
async fn row_4_11_unknown_caller() {
    let harness = Harness::start().await;
    expect(&harness, "GET", LIST, (200, "my-role", &[])).await;
    *harness.world.pod.lock().unwrap() =
        Err(|| PodError::Unknown(crate::identity::PodUid::parse(UID).unwrap()));

    for target in [LIST.to_owned(), format!("{LIST}my-role")] {
        expect(&harness, "GET", &target, (403, "the caller is no pod of this node\n", &[])).await;
    }
}

/// The predecessors: 404 with the role, the pod's address and the namespace.
#[tokio::test]
async fn row_4_12_namespace_denies() {
    let harness = Harness::start_with(Some(PatternFormat::Glob), |_| {}).await;
    *harness.world.allow_list.lock().unwrap() = Some(Some(r#"["other-*"]"#.into()));

    for target in [LIST.to_owned(), format!("{LIST}my-role")] {
        let denied = "the pod's namespace does not allow the pod's role\n";
        expect(&harness, "GET", &target, (403, denied, &[])).await;
    }
}

#[tokio::test]
async fn row_4_13_namespace_allows() {
    let harness = Harness::start_with(Some(PatternFormat::Glob), |_| {}).await;
    *harness.world.allow_list.lock().unwrap() = Some(Some(r#"["my-*"]"#.into()));

    expect(&harness, "GET", LIST, (200, "my-role", &[])).await;
    expect(&harness, "GET", &format!("{LIST}my-role"), (200, CREDENTIALS, &[])).await;
}

/// The predecessors: 500 with the text of STS.
#[tokio::test]
async fn row_4_14_sts_fails() {
    for (kind, status) in [(IssueErrorKind::Unavailable, 503), (IssueErrorKind::Denied, 403)] {
        let harness = Harness::start().await;
        *harness.world.refusal.lock().unwrap() = Some(kind);

        let failed = harness.get(&format!("{LIST}my-role")).await;

        assert_eq!(failed.status().as_u16(), status, "{kind:?}");
        assert!(!failed.body().contains("message of STS"), "{}", failed.body());
        expect(&harness, "GET", LIST, (200, "my-role", &[])).await;
    }
}

/// Also row 2.8. The predecessors: 200 with an empty body for the list.
#[tokio::test]
async fn row_4_15_pod_without_role() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[]));

    for target in [LIST.to_owned(), format!("{LIST}my-role")] {
        expect(&harness, "GET", &target, (404, "the pod has no role\n", &[])).await;
    }
}

/// The Go kube2ram assumes the node's role for any pod that requests it by name, or by any end of its ARN.
#[tokio::test]
async fn row_4_16_the_nodes_own_role() {
    let harness = Harness::start().await;

    for role in ["KubernetesWorkerRole-x", "kubernetesworkerrole-x", "Role-x", "x", "role"] {
        expect(&harness, "GET", &format!("{LIST}{role}"), (403, DENIED, &[])).await;
    }
    assert_eq!(harness.world.issued.load(std::sync::atomic::Ordering::Relaxed), 0);
    expect(&harness, "GET", &format!("{LIST}my-role"), (200, CREDENTIALS, &[])).await;
}

/// The Go kube2ram with a discovered base: the full ARN of a role of the same account.
#[tokio::test]
async fn row_4_16b_own_account_is_listed_by_bare_name() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = annotated(ARN);

    expect(&harness, "GET", LIST, (200, "my-role", &[])).await;
}

#[tokio::test]
async fn row_4_17_status_and_headers_of_other_items_pass() {
    let harness = Harness::start().await;
    *harness.world.upstream_response.lock().unwrap() = Some(
        b"HTTP/1.1 404 Not Found\r\nServer: real\r\nX-Item: a\r\nContent-Length: 4\r\n\r\ngone".to_vec(),
    );

    let relayed = harness.get(INSTANCE).await;

    assert_eq!((relayed.status().as_u16(), relayed.body().as_str()), (404, "gone"));
    assert_eq!(
        (&relayed.headers()["server"], &relayed.headers()["x-item"]),
        (&"real".parse().unwrap(), &"a".parse().unwrap())
    );
}

/// The predecessors pass the request on. Here the agent answers: no pod gets a token of the real server.
#[tokio::test]
async fn row_4_18_token_request() {
    let harness = Harness::start().await;

    let token =
        harness.send("PUT", "/latest/api/token", "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n").await;

    assert_eq!(token.status(), StatusCode::OK);
    assert!(!token.body().is_empty() && !token.body().contains('\n'), "{}", token.body());
    assert!(token.body().len() >= 32 && harness.upstream_heads().is_empty());
}

/// kube2iam adds `X-Forwarded-For` to requests without a token (4.20), the Go kube2ram to all requests.
#[tokio::test]
async fn row_4_19_and_4_20_nothing_that_names_a_proxy_reaches_the_real_server() {
    let harness = Harness::start().await;
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";
    let token = harness.send("PUT", "/latest/api/token", ttl).await.into_body();

    let with_token = format!("X-aliyun-ecs-metadata-token: {token}\r\n");
    for headers in ["", &*with_token, "X-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\n"] {
        assert_eq!(harness.send("GET", INSTANCE, headers).await.body(), UPSTREAM_BODY, "{headers}");
    }

    let heads = harness.upstream_heads();
    assert_eq!(heads.len(), 3);
    for head in heads {
        assert!(!head.to_ascii_lowercase().contains("forwarded"), "{head}");
    }
}

/// The predecessors: 500 with the text of the panic. Here the connection ends without an answer.
#[tokio::test]
async fn row_4_21_a_panic_is_not_quoted() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Err(|| panic!("inner secrets"));

    let answer = harness.raw(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n")).await;

    assert!(!answer.contains("secrets") && !answer.contains(" 200 "), "{answer}");
    harness.world.pod.clear_poison();
    *harness.world.pod.lock().unwrap() = annotated("my-role");
    expect(&harness, "GET", LIST, (200, "my-role", &[])).await;
}

/// The predecessors set no content type, so that Go's sniffing declares the document `text/plain`.
#[tokio::test]
async fn row_4_22_headers_of_the_real_server() {
    let harness = Harness::start().await;

    for (target, content_type) in
        [(LIST.to_owned(), "text/plain; charset=utf-8"), (format!("{LIST}my-role"), "application/json")]
    {
        let answer = harness.get(&target).await;
        assert_eq!(answer.headers()["server"], "ECSws");
        assert_eq!(answer.headers()["content-type"], content_type);
    }
}
