//! What a pod gets for itself: lists, credentials, denials. Row numbers are those of docs/predecessors.md.

use std::net::SocketAddr;

use http::StatusCode;
use tokio::{io::AsyncWriteExt as _, sync::watch};

use super::harness::*;
use crate::{
    datapath::AgentAddr,
    identity::CgroupId,
    policy::PatternFormat,
    server::{CONNECTIONS_OF_NODE, CONNECTIONS_PER_POD, HostNetworkPods},
};
use kube2ram_cloud::{Cloud, credentials::IssueErrorKind};
use kube2ram_service::telemetry::lossy::{LossyWriter, Room};

#[tokio::test]
async fn requests_are_counted_by_route_and_status() {
    let harness = Harness::start().await;

    for target in [LIST.to_owned(), format!("{LIST}my-role"), format!("{LIST}my-role/")] {
        assert_eq!(harness.get(&target).await.status(), StatusCode::OK, "{target}");
    }

    let metrics = harness.metrics();
    assert!(metrics.contains(r#"http_requests_total{route="role_list",status="200"} 1"#), "{metrics}");
    assert!(metrics.contains(r#"http_requests_total{route="credentials",status="200"} 2"#), "{metrics}");
}

#[tokio::test]
async fn answers_nobody_whom_the_kernel_does_not_vouch_for() {
    let harness = Harness::start().await;
    *harness.world.cgroup.lock().unwrap() = None;

    let both = "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    let denied = harness.raw(both).await;

    assert_eq!(denied.matches("HTTP/1.1").count(), 1, "the connection ends after one answer: {denied}");
    assert_eq!(response(&denied).status(), StatusCode::FORBIDDEN);
    assert!(harness.upstream_heads().is_empty());
    assert!(harness.metrics().contains("unvouched_connections_total 1"));
    assert!(harness.metrics().contains(r#"connection_identities_total{outcome="unvouched"} 1"#));
    *harness.world.cgroup.lock().unwrap() = Some(POD_CGROUP);
    assert_eq!(harness.get(LIST).await.status(), StatusCode::OK);
}

/// The probes of kube2iam's chart.
#[tokio::test]
async fn the_node_learns_at_the_host_listener_that_the_agent_answers_and_nothing_else() {
    let harness = Harness::start().await;
    let SocketAddr::V4(here) = harness.addr else { panic!("{}", harness.addr) };
    let (moved, host_listener) = watch::channel(AgentAddr("127.0.0.2:1".parse().unwrap()));
    harness.server.answer_health_checks(host_listener);
    *harness.world.cgroup.lock().unwrap() = None;
    assert_eq!(harness.get("/healthz").await.status(), StatusCode::FORBIDDEN, "not where pods are recorded");

    moved.send_replace(AgentAddr(here));
    let healthy = harness.get("/healthz").await;

    assert_eq!((healthy.status(), healthy.body().as_str()), (StatusCode::OK, "ok\n"));
    assert!(harness.metrics().contains("unvouched_connections_total 1"), "that was no intruder");
    let others = [
        ("POST", "/healthz"),
        ("GET", "/healthz?all"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", LIST),
    ];
    for (method, target) in others {
        let denied = harness.send(method, target, "").await;
        assert_eq!(denied.status(), StatusCode::FORBIDDEN, "{method} {target}");
    }
    let counted = format!("unvouched_connections_total {}", 1 + others.len());
    assert!(harness.metrics().contains(&counted), "{}", harness.metrics());
    assert!(harness.upstream_heads().is_empty());
    // Whoever has a record is asked who it is: a process of no pod, and a pod on the host's network.
    *harness.world.cgroup.lock().unwrap() = Some(CgroupId(99));
    assert_eq!(harness.get("/healthz").await.status(), StatusCode::FORBIDDEN);
    *harness.world.cgroup.lock().unwrap() = Some(POD_CGROUP);
    assert_eq!(harness.get("/healthz").await.body(), UPSTREAM_BODY);
}

/// They may be pods, by another address of the node than the agent's.
#[tokio::test]
async fn clients_that_nobody_vouches_for_take_no_place_from_the_nodes_health_check() {
    let harness = Harness::start().await;
    let SocketAddr::V4(here) = harness.addr else { panic!("{}", harness.addr) };
    let (moved, host_listener) = watch::channel(AgentAddr("127.0.0.2:1".parse().unwrap()));
    harness.server.answer_health_checks(host_listener);
    *harness.world.cgroup.lock().unwrap() = None;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_POD {
        let mut stream = harness.connect().await;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").await.unwrap();
        held.push(stream);
    }
    let counted = format!("unvouched_connections_total {CONNECTIONS_PER_POD}");
    eventually(async || harness.metrics().contains(&counted)).await;

    moved.send_replace(AgentAddr(here));

    for _ in 0..2 * CONNECTIONS_OF_NODE {
        assert_eq!(harness.get("/healthz").await.status(), StatusCode::OK);
    }
    drop(held);
}

/// Rows 4.12 and 4.13.
#[tokio::test]
async fn obeys_the_namespaces_allow_list() {
    let harness = Harness::start_with(Some(PatternFormat::Glob), |_| {}).await;

    for (allow_list, status, reasons) in [
        (None, StatusCode::SERVICE_UNAVAILABLE, &[][..]),
        (Some(None), StatusCode::FORBIDDEN, &["RoleDenied"]),
        (Some(Some(r#"["other-*"]"#.into())), StatusCode::FORBIDDEN, &["RoleDenied"]),
        (Some(Some("my-role".into())), StatusCode::FORBIDDEN, &["MalformedAllowList", "RoleDenied"]),
        (Some(Some(r#"["my-*"]"#.into())), StatusCode::OK, &[]),
    ] {
        *harness.world.allow_list.lock().unwrap() = allow_list.clone();
        for target in [format!("{LIST}my-role"), LIST.to_owned(), "/latest/meta-data/ram/".to_owned()] {
            harness.world.notices.lock().unwrap().clear();
            let answer = harness.get(&target).await;
            assert_eq!(answer.status(), status, "{target} {allow_list:?}");
            if status == StatusCode::FORBIDDEN {
                assert_eq!(answer.body(), "the pod's namespace does not allow the pod's role\n");
            }
            assert_eq!(harness.notice_reasons(), reasons, "{target} {allow_list:?}");
            for notice in harness.world.notices.lock().unwrap().iter() {
                assert!(
                    notice.message.contains("annotation ram.aliyuncs.com/allowed-roles of namespace"),
                    "{notice:?}"
                );
            }
        }
    }
}

/// Row 4.14: STS's text appears in the log and in an Event, but not in the answer to the pod.
#[tokio::test]
async fn distinguishes_transient_from_final_failures_of_sts() {
    for (kind, status, reasons) in [
        (IssueErrorKind::Denied, StatusCode::FORBIDDEN, &["AssumeRoleDenied"][..]),
        (IssueErrorKind::NoSuchRole, StatusCode::FORBIDDEN, &["AssumeRoleDenied"]),
        (IssueErrorKind::Throttled, StatusCode::SERVICE_UNAVAILABLE, &["CredentialsUnavailable"]),
        (IssueErrorKind::Unavailable, StatusCode::SERVICE_UNAVAILABLE, &["CredentialsUnavailable"]),
        (IssueErrorKind::BaseCredentials, StatusCode::SERVICE_UNAVAILABLE, &["CredentialsUnavailable"]),
        (IssueErrorKind::Invalid, StatusCode::FORBIDDEN, &["AssumeRoleDenied"]),
        (IssueErrorKind::Unexpected, StatusCode::SERVICE_UNAVAILABLE, &["CredentialsUnavailable"]),
    ] {
        for dialect in Cloud::ALL.map(Cloud::dialect) {
            let list = format!("/latest/{}/security-credentials/", dialect.credentials.join("/"));
            let harness = Harness::start_with(None, |config| config.dialect = dialect).await;
            *harness.world.refusal.lock().unwrap() = Some(kind);

            let failed = harness.get(&format!("{list}my-role")).await;

            assert_eq!(failed.status(), status, "{kind:?}");
            let body = failed.body();
            assert!(!body.contains("SomeCode") && !body.contains("STS"), "{body}");
            let may_retry = status == StatusCode::SERVICE_UNAVAILABLE;
            assert_eq!(failed.headers().contains_key("retry-after"), may_retry);
            assert_eq!(harness.notice_reasons(), reasons);
            let message = harness.world.notices.lock().unwrap()[0].message.clone();
            assert!(
                message.contains("role/my-role (SomeCode): "),
                "names the role and STS's code: {message}"
            );
            assert!(message.ends_with((dialect.advice)(kind)), "{message}");
            assert_eq!(harness.get(&list).await.body(), "my-role", "the list needs no STS");
            assert!(harness.upstream_heads().is_empty());
        }
    }
}

/// As docs/troubleshooting.md promises ("503 for minutes"), also while the STS scheduler holds back what STS
/// has throttled.
#[tokio::test(start_paused = true)]
async fn each_log_line_about_a_refusal_by_sts_has_the_code_of_sts() {
    const REQUESTS: usize = 30;
    for (kind, status) in [
        (IssueErrorKind::Denied, StatusCode::FORBIDDEN),
        (IssueErrorKind::Throttled, StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let log = Log::default();
        let _guard = log.capture();
        let harness = Harness::start().await;
        *harness.world.refusal.lock().unwrap() = Some(kind);

        let mut waits = 0;
        for _ in 0..REQUESTS {
            let begun = tokio::time::Instant::now();
            assert_eq!(harness.get(&credentials_of("my-role")).await.status(), status);
            waits += usize::from(begun.elapsed() > std::time::Duration::from_millis(700));
            // As the prefetch does for each pod of the node. Without a claim, the failure would be forgotten.
            harness.claim();
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        }

        let lines: Vec<_> = log.lines().into_iter().filter(|line| line.contains("request refused")).collect();
        assert_eq!(lines.len(), REQUESTS, "{lines:#?}");
        for line in &lines {
            assert!(line.contains("SomeCode: a message of STS\""), "{line}");
        }
        // Some of them waited until their deadline, and STS was not asked meanwhile.
        assert!(kind == IssueErrorKind::Denied || waits > 0, "no request waited for the STS scheduler");
    }
}

/// What owners read on AWS is about their own cloud, and says the form of its ARNs.
#[tokio::test]
async fn events_speak_of_the_agents_own_cloud() {
    let aws = Cloud::Aws.dialect();
    let list = "/latest/meta-data/iam/security-credentials/";
    let harness = Harness::start_with(None, |config| config.dialect = aws).await;
    for (annotations, refusal, words) in [
        (&[(ROLE_KEY, "arn:aws:iam::1:role/x")][..], None, "arn:<partition>:iam::<12 digits>:role/<name>"),
        (&[(ROLE_KEY, "acs:ram::1:role/x")], None, "only letters, digits and any of +=,.@_-/ are allowed"),
        (&[(ROLE_KEY, "r"), ("session-name", "a/b")], None, "letters, digits and any of _+=,.@- are allowed"),
        (
            &[(ROLE_KEY, "r")],
            Some(IssueErrorKind::Denied),
            "arn:aws:iam::123456789012:role/r (SomeCode): create the IAM role",
        ),
    ] {
        *harness.world.pod.lock().unwrap() = Ok(pod(annotations));
        *harness.world.refusal.lock().unwrap() = refusal;
        harness.world.notices.lock().unwrap().clear();

        let denied = harness.get(&format!("{list}r")).await;

        assert_eq!(denied.status(), StatusCode::FORBIDDEN, "{annotations:?}");
        let notices = harness.world.notices.lock().unwrap().clone();
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(notices[0].message.contains(words), "{notices:?}");
        assert!(
            !["RAM", "acs:ram::<account>", "ActionTrail"]
                .iter()
                .any(|other| notices[0].message.contains(other))
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_role_that_the_real_server_listed_a_moment_ago_raises_no_event_and_what_goes_on_does() {
    let harness = Harness::start_with(Some(PatternFormat::Glob), |_| {}).await;
    *harness.world.allow_list.lock().unwrap() = Some(Some(r#"["my-*"]"#.into()));
    harness.server.expect_former_answers();
    let of_the_node = format!("{LIST}KubernetesWorkerRole");

    assert_eq!(harness.get(&of_the_node).await.status(), StatusCode::FORBIDDEN);
    assert!(harness.notice_reasons().is_empty());
    assert!(harness.metrics().contains(r#"denials_total{reason="other_role"} 1"#), "it is counted");
    assert_eq!(harness.get(LIST).await.body(), "my-role", "and the client lists again");

    *harness.world.allow_list.lock().unwrap() = Some(None);
    assert_eq!(harness.get(LIST).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(harness.notice_reasons(), ["RoleDenied"], "other denials are reported at once");
    *harness.world.allow_list.lock().unwrap() = Some(Some(r#"["my-*"]"#.into()));
    tokio::time::advance(std::time::Duration::from_mins(1)).await;
    assert_eq!(harness.get(&of_the_node).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(harness.notice_reasons(), ["RoleDenied"; 2]);
}

#[tokio::test]
async fn a_role_that_is_not_the_pods_raises_an_event_at_once_under_any_other_agent() {
    let harness = Harness::start().await;

    assert_eq!(harness.get(&format!("{LIST}KubernetesWorkerRole")).await.status(), StatusCode::FORBIDDEN);

    assert_eq!(harness.notice_reasons(), ["RoleDenied"]);
}

#[tokio::test]
async fn an_annotation_on_the_namespace_instead_of_the_pod_is_named_by_an_event() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[]));
    assert_eq!(harness.get(LIST).await.status(), StatusCode::NOT_FOUND);
    assert!(harness.notice_reasons().is_empty(), "SDKs of pods without role ask, too");

    *harness.world.has_misplaced_role.lock().unwrap() = true;
    assert_eq!(harness.get(LIST).await.status(), StatusCode::NOT_FOUND);

    assert_eq!(harness.notice_reasons(), ["MisplacedAnnotation"]);
    let message = harness.world.notices.lock().unwrap()[0].message.clone();
    assert!(message.contains("the annotation ram.aliyuncs.com/role is on its namespace team-a"), "{message}");
    assert!(message.contains("put it on the pod"), "{message}");
    *harness.world.pod.lock().unwrap() = Ok(pod(&[(ROLE_KEY, "my-role")]));
    assert_eq!(harness.get(LIST).await.body(), "my-role");
    assert_eq!(harness.notice_reasons().len(), 1, "a pod that has a role needs no advice");
}

#[tokio::test]
async fn a_malformed_annotation_denies_and_is_reported() {
    let harness = Harness::start().await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[(ROLE_KEY, "")]));

    let denied = harness.get(LIST).await;

    assert_eq!(denied.status(), StatusCode::FORBIDDEN);
    assert_eq!(denied.body(), "the pod's annotation ram.aliyuncs.com/role is malformed\n");
    assert_eq!(harness.notice_reasons(), ["MalformedAnnotation"]);
}

#[tokio::test]
async fn only_an_unannotated_host_network_pod_keeps_the_nodes_role() {
    let host_network =
        |annotations: &[(&str, &str)]| Ok(crate::pod::Pod { host_network: true, ..pod(annotations) });
    let pass = Harness::start().await;
    let deny = Harness::start_with(None, |config| config.host_network_pods = HostNetworkPods::Deny).await;
    for harness in [&pass, &deny] {
        *harness.world.pod.lock().unwrap() = host_network(&[]);
    }

    let role = credentials_of("node-role");
    assert_eq!(pass.get(LIST).await.body(), UPSTREAM_BODY);
    assert_eq!(pass.get(&role).await.body(), UPSTREAM_BODY);
    assert_eq!(deny.get(LIST).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(deny.get(&role).await.status(), StatusCode::NOT_FOUND);
    let heads = pass.upstream_heads();
    assert_eq!(heads.len(), 2);
    assert!(heads[1].starts_with("GET /latest/meta-data/ram/security-credentials/node-role HTTP/1.1\r\n"));

    *pass.world.pod.lock().unwrap() = host_network(&[(ROLE_KEY, "my-role")]);
    assert_eq!(pass.get(LIST).await.body(), "my-role");
    assert_eq!(pass.get(&role).await.status(), StatusCode::FORBIDDEN);
    *pass.world.pod.lock().unwrap() = host_network(&[(ROLE_KEY, "")]);
    assert_eq!(pass.get(LIST).await.status(), StatusCode::FORBIDDEN, "a broken annotation is no missing one");
    assert_eq!(pass.upstream_heads().len(), 2);
    assert!(deny.upstream_heads().is_empty());
}

fn credentials_of(role: &str) -> String {
    format!("{LIST}{role}")
}

#[tokio::test]
async fn an_annotation_that_changes_applies_to_a_kept_connection() {
    use tokio::io::AsyncWriteExt as _;
    let harness = Harness::start().await;
    let mut stream = harness.connect().await;

    stream.write_all(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let first = read_response(&mut stream).await;
    *harness.world.pod.lock().unwrap() = Ok(pod(&[(ROLE_KEY, "new-role")]));
    stream.write_all(format!("GET {LIST} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let second = read_response(&mut stream).await;

    assert_eq!((first.body().as_str(), second.body().as_str()), ("my-role", "new-role"));
}

#[tokio::test(start_paused = true)]
async fn answers_503_before_sdks_give_up() {
    let harness = Harness::start().await;
    *harness.world.pod_never_comes.lock().unwrap() = true;

    let started = tokio::time::Instant::now();
    let late = harness.get(LIST).await;

    assert_eq!(late.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(late.headers()["retry-after"], "1");
    assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
}

/// containerd keeps standard error open without reading it while it is stopped.
#[tokio::test]
async fn a_log_that_nobody_reads_stops_no_request() {
    let (reader, output) = std::io::pipe().unwrap();
    // What is beyond the pipe's 64 KiB is lost.
    let room = Room { lines_bytes: 1024, errors_bytes: 0 };
    let writer = LossyWriter::start(output, room, |_| {}).unwrap();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let harness = Harness::start().await;

    let lost = writer.lost();
    let mut requests = 0;
    while lost.get() < 10 && requests < 1000 {
        assert_eq!(harness.get(&credentials_of("my-role")).await.status(), StatusCode::OK);
        requests += 1;
    }

    assert!(lost.get() >= 10, "{requests} requests filled no pipe");
    drop(reader);
}

/// One line per request, and never a secret.
#[tokio::test]
async fn the_access_log_shows_who_asked_for_what() {
    let log = Log::default();
    let _guard = log.capture();
    let harness = Harness::start().await;

    harness.get(&credentials_of("my-role")).await;
    harness.get(&credentials_of("other%00")).await;
    harness.get(&credentials_of("other")).await;

    let lines: Vec<String> = log.lines().into_iter().filter(|line| line.contains("request ")).collect();
    let [answered, malformed, refused] = lines.as_slice() else { panic!("{lines:#?}") };
    for field in [
        "INFO",
        "request answered",
        "pod.namespace=\"team-a\"",
        "pod.name=\"web-0\"",
        "cgroup.id=7",
        "method=\"GET\"",
        "path=\"/latest/meta-data/ram/security-credentials/my-role\"",
        "status=200",
        "latency_ms=",
        "role=\"acs:ram::123456789012:role/my-role\"",
    ] {
        assert!(answered.contains(field), "{field} in {answered}");
    }
    for field in ["WARN", "status=400", "kind=\"malformed_target\"", "ambiguous escape"] {
        assert!(malformed.contains(field), "{field} in {malformed}");
    }
    for field in
        ["WARN", "pod.name=\"web-0\"", "status=403", "kind=\"other_role\"", "\\\"other\\\" was requested"]
    {
        assert!(refused.contains(field), "{field} in {refused}");
    }
    assert!(log.lines().iter().all(|line| !line.contains("fake-")), "{:#?}", log.lines());
}
