//! What pods meet on EC2 and not on ECS: other headers and statuses of session tokens, another document,
//! other closed items. Each with its twin on ECS where there is one.

use http::StatusCode;

use super::{harness::*, *};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const TOKEN: &str = "/latest/api/token";
const DOCUMENT: &str = "/latest/dynamic/instance-identity/document";
const SIGNED: [&str; 3] = [
    "/latest/dynamic/instance-identity/pkcs7",
    "/latest/dynamic/instance-identity/rsa2048",
    "/latest/dynamic/instance-identity/signature",
];
const SECRETS: [&str; 3] = [
    "/latest/user-data",
    "/latest/meta-data/managed-ssh-keys/",
    "/latest/meta-data/managed-ssh-keys/signer-key",
];

fn host_network() -> crate::pod::Pod {
    crate::pod::Pod { host_network: true, ..pod(&[]) }
}

async fn under(policy: MetadataPolicy) -> Harness {
    Harness::start_on_aws(|config| config.metadata_policy = policy).await
}

#[tokio::test]
async fn a_pod_gets_its_own_role_in_every_spelling_that_sdks_have() {
    let harness = Harness::start_on_aws(|_| {}).await;

    for target in [LIST, LIST.trim_end_matches('/'), "/2021-07-15/meta-data//iam/security-credentials/"] {
        let list = harness.get(target).await;
        assert_eq!((list.status(), list.body().as_str()), (StatusCode::OK, "my-role"), "{target}");
        assert_eq!(list.headers()["server"], "EC2ws");
    }
    for role in ["my-role", "my-role/", "arn:aws:iam::123456789012:role/my-role"] {
        let answer = harness.get(&format!("{LIST}{role}")).await;
        assert_eq!(answer.status(), StatusCode::OK, "{role}");
        let document: serde_json::Value = serde_json::from_str(answer.body()).unwrap();
        for (key, value) in [
            ("Code", "Success"),
            ("Type", "AWS-HMAC"),
            ("AccessKeyId", "STS.arn:aws:iam::123456789012:role/my-role"),
            ("SecretAccessKey", "fake-secret"),
            ("Token", "fake-token"),
        ] {
            assert_eq!(document[key], value, "{role}");
        }
    }
    assert_eq!(harness.get(&format!("{LIST}node")).await.status(), StatusCode::FORBIDDEN);
    assert!(harness.upstream_heads().is_empty());
}

/// The Rust SDK fails without the header, and the Go SDK falls back to version 1. botocore and the JavaScript
/// SDK fail on a line feed.
#[tokio::test]
async fn the_answer_with_a_token_repeats_how_long_it_lasts_as_the_real_server_does() {
    let (aws, alibaba) = (Harness::start_on_aws(|_| {}).await, Harness::start().await);
    let (aws_ttl, alibaba_ttl) =
        ("x-aws-ec2-metadata-token-ttl-seconds", "x-aliyun-ecs-metadata-token-ttl-seconds");
    let put = async |harness: &Harness, headers: &str| {
        harness.send("PUT", TOKEN, &format!("Content-Length: 0\r\n{headers}")).await
    };

    for (harness, header, repeated) in [(&aws, aws_ttl, Some("21600")), (&alibaba, alibaba_ttl, None)] {
        let issued = put(harness, &format!("{header}: 21600\r\n")).await;
        assert_eq!(issued.status(), StatusCode::OK, "{header}");
        assert_eq!(issued.headers().get(header).map(|ttl| ttl.to_str().unwrap()), repeated, "{header}");
        assert!(issued.body().bytes().all(|byte| byte.is_ascii_alphanumeric()), "{:?}", issued.body());
    }
    for headers in ["", &format!("{aws_ttl}: 21601\r\n"), &format!("{alibaba_ttl}: 60\r\n")] {
        let refused = put(&aws, headers).await;
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST, "{headers}");
        assert!(!refused.headers().contains_key(aws_ttl), "{headers}");
    }
    assert!(aws.upstream_heads().is_empty());
}

#[tokio::test]
async fn a_missing_token_has_the_status_of_the_real_server() {
    let aws = Harness::start_on_aws(|config| config.require_token = true).await;
    let alibaba = Harness::start_with(None, |config| config.require_token = true).await;
    let instance_id = "/latest/meta-data/instance-id";
    for (harness, list, prefix, status) in [
        (&aws, LIST, "x-aws-ec2-metadata", StatusCode::UNAUTHORIZED),
        (&alibaba, harness::LIST, "x-aliyun-ecs-metadata", StatusCode::FORBIDDEN),
    ] {
        for target in [list, &format!("{list}my-role"), instance_id] {
            let refused = harness.get(target).await;
            assert_eq!(
                (refused.status(), refused.body().as_str()),
                (status, "a session token is required\n"),
                "{target}"
            );
        }
        assert!(harness.metrics().contains(r#"denials_total{reason="token_missing"} 3"#), "{prefix}");
        let ttl = format!("{prefix}-token-ttl-seconds: 60\r\nContent-Length: 0\r\n");
        let token = harness.send("PUT", TOKEN, &ttl).await.into_body();
        for (token, status) in [(&*token, StatusCode::OK), (&token[1..], StatusCode::UNAUTHORIZED)] {
            let header = format!("{prefix}-token: {token}\r\n");
            assert_eq!(harness.send("GET", list, &header).await.status(), status, "{header}");
        }
    }
    let optional = Harness::start_on_aws(|_| {}).await;
    assert_eq!(optional.get(LIST).await.status(), StatusCode::OK, "the twin");
}

/// On 403 some SDKs do not go on to the usual tree of credentials.
#[tokio::test]
async fn other_trees_of_credentials_do_not_exist_for_any_pod() {
    for policy in [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict] {
        let harness = under(policy).await;
        for caller in [pod(&[(ROLE_KEY, "my-role")]), pod(&[]), host_network()] {
            *harness.world.pod.lock().unwrap() = Ok(caller);
            for target in [
                "/latest/meta-data/iam/security-credentials-extended",
                "/latest/meta-data/iam/security-credentials-extended/",
                "/latest/meta-data//iam/security-credentials-extended/my-role",
                "/latest/meta-data/security-credentials-node/",
                "/latest/meta-data/identity-credentials/",
                "/latest/meta-data/identity-credentials/ec2/info",
                "/latest/meta-data//identity-credentials/ec2/security-credentials/ec2-instance",
            ] {
                let absent = harness.get(target).await;
                assert_eq!(
                    (absent.status(), absent.body().as_str()),
                    (StatusCode::NOT_FOUND, "not found\n"),
                    "{policy:?} {target}"
                );
            }
        }
        assert!(harness.upstream_heads().is_empty(), "{policy:?}");
        assert_eq!(harness.get("/latest/meta-data/instance-id").await.body(), UPSTREAM_BODY, "the twin");
    }
}

/// The SDKs for Go, Java and .NET read the region in the document.
#[tokio::test]
async fn the_unsigned_identity_document_is_open_and_its_signatures_are_closed() {
    for policy in [MetadataPolicy::Standard, MetadataPolicy::Strict] {
        let harness = under(policy).await;
        for closed in SIGNED.into_iter().chain(SECRETS) {
            let refused = harness.get(closed).await;
            assert_eq!(
                (refused.status(), refused.body().as_str()),
                (StatusCode::FORBIDDEN, "this item is closed to pods\n"),
                "{policy:?} {closed}"
            );
        }
        assert!(harness.upstream_heads().is_empty(), "{policy:?}");
        for open in
            [DOCUMENT, "/latest/meta-data/placement/region", "/latest/meta-data/placement/availability-zone/"]
        {
            assert_eq!(harness.get(open).await.body(), UPSTREAM_BODY, "{policy:?} {open}");
        }
    }
}

#[tokio::test]
async fn who_may_have_the_nodes_role_reads_its_credentials_and_its_identity_and_no_secrets() {
    for policy in [MetadataPolicy::Standard, MetadataPolicy::Strict] {
        let harness = under(policy).await;
        *harness.world.pod.lock().unwrap() = Ok(host_network());
        let role = format!("{LIST}node");
        let items = SIGNED.into_iter().chain([DOCUMENT, LIST, &role]);

        for target in items.clone() {
            assert_eq!(harness.get(target).await.body(), UPSTREAM_BODY, "{policy:?} {target}");
        }

        let asked = harness.upstream_heads();
        for (head, target) in asked.iter().zip(items) {
            assert!(head.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{head}");
        }
        for secret in SECRETS {
            assert_eq!(harness.get(secret).await.status(), StatusCode::FORBIDDEN, "{policy:?} {secret}");
        }
        assert_eq!(harness.upstream_heads().len(), asked.len());

        let denying = Harness::start_on_aws(|config| {
            (config.metadata_policy, config.host_network_pods) = (policy, HostNetworkPods::Deny);
        })
        .await;
        *denying.world.pod.lock().unwrap() = Ok(host_network());
        for (target, status) in [(SIGNED[0], StatusCode::FORBIDDEN), (LIST, StatusCode::NOT_FOUND)] {
            assert_eq!(denying.get(target).await.status(), status, "{policy:?} {target}");
        }
        assert!(denying.upstream_heads().is_empty());
    }
}

/// The Go SDK gives up after 500 ms.
#[tokio::test(start_paused = true)]
async fn a_pod_that_is_not_known_yet_is_503_within_half_a_second() {
    let harness = Harness::start_on_aws(|_| {}).await;
    *harness.world.pod_never_comes.lock().unwrap() = true;
    let started = Instant::now();

    let early = harness.get(&format!("{LIST}my-role")).await;

    assert_eq!(early.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(early.headers().contains_key("retry-after"));
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 0\r\n";
    let token = harness.send("PUT", TOKEN, ttl).await;
    assert_eq!(token.status(), StatusCode::OK, "a token waits for nothing");
}
