//! Section 4 (requests) of docs/predecessors.md, one test or more for each row. A comment at a test gives the
//! predecessors' answer where kube2ram differs on purpose.

use http::StatusCode;

use super::harness::*;
use crate::{
    identity::{CgroupId, PodUid},
    kubernetes::PodError,
    pod::Pod,
};

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
            assert_eq!(document["AccessKeySecret"], "fake-secret", "{method} {target}");
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
    row_4_2_list_with_a_bare_question_mark: GET format!("{LIST}?") => (200, "my-role", &[]);
    row_4_3_list_of_a_dated_version: GET LIST.replace("latest", "2016-01-01") => (200, "my-role", &[]);
    /// The predecessors redirect (301), which no SDK follows.
    row_4_4_list_with_empty_segments: GET "//latest//meta-data/ram/security-credentials/" => (200, "my-role", &[]);
    row_4_6_credentials_by_name: GET format!("{LIST}my-role") => (200, CREDENTIALS, &[]);
    row_4_7_credentials_by_arn: GET format!("{LIST}{ARN}") => (200, CREDENTIALS, &[]);
    row_4_8_credentials_by_arn_with_escaped_slash: GET format!("{LIST}{}", ARN.replace('/', "%2F")) => (200, CREDENTIALS, &[]);
    /// The predecessors: 403, because the slash counts as part of the name.
    row_4_10_trailing_slash: GET format!("{LIST}my-role/") => (200, CREDENTIALS, &[]);
    row_4_17_other_item_passes: GET INSTANCE => (200, UPSTREAM_BODY, &["GET /latest/meta-data/instance-id"]);
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

/// The predecessors' message repeats the requested name.
#[tokio::test]
async fn row_4_9_another_role() {
    let harness = Harness::start().await;

    for other in ["different-role", "acs:ram::999999999999:role/my-role"] {
        expect(&harness, "GET", &format!("{LIST}{other}"), (403, DENIED, &[])).await;
    }

    assert!(harness.metrics().contains(r#"denials_total{reason="other_role"} 2"#));
    assert_eq!(harness.notice_reasons(), ["RoleDenied"; 2]);
    expect(&harness, "GET", &format!("{LIST}my-role"), (200, CREDENTIALS, &[])).await;
}

/// The predecessors: 404, which SDKs read as "this node has no role".
#[tokio::test]
async fn row_4_11_unknown_caller() {
    const UNKNOWN: &str = "the caller is not a pod of this node\n";
    let harness = Harness::start().await;
    expect(&harness, "GET", LIST, (200, "my-role", &[])).await;

    for (error, status) in [
        ((|| PodError::Unknown(PodUid::parse(UID).unwrap())) as fn() -> PodError, StatusCode::FORBIDDEN),
        // A static pod whose mirror does not exist yet.
        (
            || PodError::Unknown(PodUid::parse("0123456789abcdef0123456789abcdef").unwrap()),
            StatusCode::SERVICE_UNAVAILABLE,
        ),
        (|| PodError::Ambiguous(PodUid::parse(UID).unwrap()), StatusCode::FORBIDDEN),
        (
            || PodError::Unavailable { uid: PodUid::parse(UID).unwrap(), source: None },
            StatusCode::SERVICE_UNAVAILABLE,
        ),
    ] {
        *harness.world.pod.lock().unwrap() = Err(error);
        for target in [LIST.to_owned(), format!("{LIST}my-role"), "/latest/meta-data/ram".to_owned()] {
            let denied = harness.get(&target).await;
            assert_eq!(denied.status(), status, "{}", error());
            assert_eq!(
                denied.headers().contains_key("retry-after"),
                status == StatusCode::SERVICE_UNAVAILABLE
            );
            assert!(!denied.body().contains(UID), "{}", denied.body());
        }
    }
    *harness.world.pod.lock().unwrap() = Err(|| PodError::Unknown(PodUid::parse(UID).unwrap()));
    expect(&harness, "GET", LIST, (403, UNKNOWN, &[])).await;
    expect(&harness, "GET", &format!("{LIST}my-role"), (403, UNKNOWN, &[])).await;
    *harness.world.cgroup.lock().unwrap() = Some(CgroupId(8));
    assert_eq!(harness.get(LIST).await.status(), StatusCode::FORBIDDEN, "a cgroup of no pod");
    assert_eq!(harness.get(INSTANCE).await.status(), StatusCode::FORBIDDEN);
    *harness.world.cgroup.lock().unwrap() = Some(UNREADABLE_CGROUP);
    assert_eq!(harness.get(LIST).await.status(), StatusCode::SERVICE_UNAVAILABLE, "worth another try");
    for (outcome, count) in [("gone", 2), ("unreadable", 1)] {
        let sample = format!(r#"connection_identities_total{{outcome="{outcome}"}} {count}"#);
        assert!(harness.metrics().contains(&sample), "{sample}");
    }
    assert!(harness.upstream_heads().is_empty());
}

/// Also row 2.8. The predecessors: 200 with an empty body for the list.
#[tokio::test]
async fn row_4_15_pod_without_role() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[]));

    for target in [LIST.to_owned(), format!("{LIST}my-role"), "/latest/meta-data/ram/".to_owned()] {
        expect(&harness, "GET", &target, (404, "the pod has no role\n", &[])).await;
    }
    *harness.world.pod.lock().unwrap() = annotated("my-role");
    expect(&harness, "GET", "/latest/meta-data/ram/", (200, "security-credentials/", &[])).await;
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

/// kube2iam adds `X-Forwarded-For` to requests without a token (4.20), the Go kube2ram to all requests.
#[tokio::test]
async fn row_4_19_and_4_20_nothing_that_names_a_proxy_reaches_the_real_server() {
    let harness = Harness::start().await;
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";
    let token = harness.send("PUT", "/latest/api/token", ttl).await.into_body();

    let with_token = format!("X-aliyun-ecs-metadata-token: {token}\r\n");
    for headers in ["", &*with_token] {
        assert_eq!(harness.send("GET", INSTANCE, headers).await.body(), UPSTREAM_BODY, "{headers}");
    }

    let heads = harness.upstream_heads();
    assert_eq!(heads.len(), 2);
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
        assert_eq!(answer.headers()["content-length"], answer.body().len().to_string());
    }
}

/// The predecessors give credentials to any method.
#[tokio::test]
async fn row_4_23_reading_methods_only() {
    let harness = Harness::start().await;

    for target in [LIST, &format!("{LIST}my-role")] {
        expect(&harness, "HEAD", target, (200, "", &[])).await;
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
            let refused = harness.send(method, target, "Content-Length: 0\r\n").await;
            assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {target}");
            assert_eq!(refused.body(), "method not allowed\n");
            assert_eq!(refused.headers()["allow"], "GET, HEAD");
        }
    }
    assert_eq!(harness.send("HEAD", LIST, "").await.headers()["content-length"], "7");
    assert!(harness.upstream_heads().is_empty());
}
