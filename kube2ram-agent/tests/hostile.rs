//! Hostile pods against the real agent on the real kernel: what they send, and what they are annotated with,
//! harms nobody else.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "test support")]

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    client::{Holder, Reply},
    node::PodSpec,
    standin::{AccessKey, Accounts, PodManifest},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const METADATA: &str = "100.100.100.200:80";
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
const ORDINARY: &str = "/latest/meta-data/instance-id";

/// What SDKs wait for an answer.
const SDK_PATIENCE: Duration = Duration::from_secs(1);
/// Generous: the agent with both pods at its limits of connections stays far below.
const RSS_LIMIT_KIB: u64 = 64 * 1024;

/// A node with the pods `victim` and `attacker`, each with its own role, and the agent.
fn stage(name: &str, flags: &[&str]) -> Sandbox {
    let mut sandbox = Sandbox::create(name).unwrap();
    for name in ["victim", "attacker"] {
        sandbox.accounts().add_role(Accounts::role_arn(&format!("{name}-role")), Default::default());
        sandbox.add_pod(&PodSpec::new(name).role(&format!("{name}-role"))).unwrap();
    }
    let flags = [&["--auto-discover-base-arn"], flags].concat();
    sandbox.start_agent(Path::new(AGENT), &flags).unwrap();
    sandbox
}

fn agent_pid(sandbox: &mut Sandbox) -> u32 {
    let cgroup = sandbox.agent().unwrap().pod().container_cgroup("agent").unwrap().join("cgroup.procs");
    fs::read_to_string(cgroup).unwrap().trim().parse().expect("one process")
}

fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends bytes on a redirected connection of the attacker's; empty when it was cut off.
fn raw(sandbox: &Sandbox, bytes: impl AsRef<[u8]>) -> String {
    let mut client = sandbox.pod("attacker").unwrap().client("app").unwrap();
    let output = client.args(["raw", "--connect", METADATA, "--hex", &hex::encode(bytes)]).output().unwrap();
    let answer = hex::decode(str::from_utf8(&output.stdout).unwrap().trim()).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(sandbox: &Sandbox, pod: &str, target: &str) -> Reply {
    sandbox.pod(pod).unwrap().curl(target).unwrap()
}

/// A client that does nothing wrong gets its own role, in time.
fn assert_served(sandbox: &Sandbox, pod: &str) {
    let role = format!("{pod}-role");
    let list = get(sandbox, pod, LIST);
    let credentials = once_ready(sandbox, pod, &format!("{LIST}{role}"));
    assert_eq!((list.status, list.body.as_str()), (200, role.as_str()), "{list:?}");
    assert!(credentials.body.contains(&format!("STS.{role}.")), "{credentials:?}");
    for reply in [list, credentials] {
        assert!(Duration::from_micros(reply.latency_us) < SDK_PATIENCE, "{reply:?}");
    }
}

/// What is not ready in time is a 503 that asks to try again, which on a busy machine the first request of a
/// role may be.
fn once_ready(sandbox: &Sandbox, pod: &str, target: &str) -> Reply {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let reply = get(sandbox, pod, target);
        if reply.status != 503 || Instant::now() > deadline {
            return reply;
        }
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "still not so after 60 s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn garbage_is_answered_or_cut_off_and_harms_nobody() {
    let mut sandbox = stage("garbage", &[]);
    assert_served(&sandbox, "victim");
    let pid = agent_pid(&mut sandbox);
    let before = rss_kib(pid);
    let fixed_length = |head: &str| format!("{head}\r\nHost: x\r\nContent-Length: 1000000\r\n\r\npart");

    let noise: Vec<u8> = (0..16_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect();
    let cases: [(&str, Vec<u8>); 16] = [
        ("noise", noise),
        ("zeros", vec![0; 10_000]),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec()),
        (
            "the preface of HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".to_vec(),
        ),
        ("HTTP/0.9", b"GET /\r\n\r\n".to_vec()),
        ("HTTP/9.9", b"GET / HTTP/9.9\r\n\r\n".to_vec()),
        ("a long target", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(30_000)).into()),
        ("a long method", format!("{} / HTTP/1.1\r\n\r\n", "A".repeat(30_000)).into()),
        ("a long header", format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(30_000)).into()),
        ("a long name", format!("GET / HTTP/1.1\r\n{}: x\r\n\r\n", "a".repeat(30_000)).into()),
        ("many headers", format!("GET / HTTP/1.1\r\n{}\r\n", "X: 1\r\n".repeat(1_000)).into()),
        ("a folded header", b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n".to_vec()),
        (
            "bad chunks",
            b"PUT /latest/api/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n".to_vec(),
        ),
        ("two lengths", b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_vec()),
        ("a body for CONNECT", fixed_length("CONNECT 100.100.100.200:80 HTTP/1.1").into()),
        ("a body for DELETE", fixed_length("DELETE /latest/meta-data/ram HTTP/1.1").into()),
    ];
    for (what, bytes) in cases {
        let answer = raw(&sandbox, bytes);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{what}: {answer}");
        assert!(answer.lines().count() < 20, "{what}: {answer}");
    }

    assert_eq!(agent_pid(&mut sandbox), pid, "the same process");
    let after = rss_kib(pid);
    println!("agent RSS: {before} KiB before, {after} KiB after garbage");
    assert!(after < RSS_LIMIT_KIB, "{after} KiB");
    assert_served(&sandbox, "victim");
    assert_served(&sandbox, "attacker");
}

/// Slow lorises, endless heads and half-sent ones, from more cgroups than one and more connections than the
/// agent takes at all.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_holds_connections_starves_nobody_else() {
    // As a runtime without its own limits leaves it.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), ..limit }).unwrap();
    let mut sandbox = stage("holders", &[]);
    setrlimit(Resource::Nofile, limit).unwrap();
    assert_served(&sandbox, "victim");
    let pid = agent_pid(&mut sandbox);
    let before = rss_kib(pid);

    let attacker = sandbox.pod("attacker").unwrap();
    let half = "GET /latest/meta-data/ram/security-credentials/ HTTP/1.1\r\nX: ";
    let endless = "a".repeat(4096);
    let mut holders = vec![
        Holder::start(attacker.client("app").unwrap(), METADATA, 100, "", "").unwrap(),
        Holder::start(attacker.client("app").unwrap(), METADATA, 100, half, "a").unwrap(),
        Holder::start(attacker.client("app").unwrap(), METADATA, 100, "GET /", &endless).unwrap(),
    ];
    for n in 0..6 {
        let client = attacker.nested_client("app", &format!("nest-{n}")).unwrap();
        holders.push(Holder::start(client, METADATA, 200, half, "a").unwrap());
    }
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        assert_served(&sandbox, "victim");
        slowest = slowest.max(Duration::from_micros(get(&sandbox, "victim", ORDINARY).latency_us));
    }
    let metrics = sandbox.agent().unwrap().admin("/metrics").unwrap().body;
    let during = rss_kib(pid);
    drop(holders);

    println!(
        "agent RSS: {before} KiB before, {during} KiB with 1,500 connections held; slowest answer {slowest:?}"
    );
    assert!(slowest < SDK_PATIENCE);
    assert!(during < RSS_LIMIT_KIB, "{during} KiB");
    assert!(
        !metrics.contains("kube2ram_connections_displaced_total 0"),
        "the attack must have hit the bound"
    );
    assert_eq!(agent_pid(&mut sandbox), pid, "the same process");
    eventually("the attacker is served again", || {
        sandbox.pod("attacker").unwrap().curl(LIST).is_ok_and(|reply| reply.status == 200)
    });
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files: Vec<_> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split("  ").collect();
    assert!(!files.iter().any(|field| field.trim() == "1024"), "{files:?}");
}

/// The vectors of CVE-2022-23551 and its kin, raw through the redirected connection. `seen` is what the real
/// server was asked.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_spelling_of_a_credential_path_reaches_the_real_server() {
    let sandbox = stage("spellings", &[]);
    // The agent itself fetches the node's credentials when it first needs them; from here on it does not.
    assert_served(&sandbox, "attacker");
    let asked_by_agent = sandbox.metadata().seen().len();
    let node = Accounts::NODE_ROLE;
    let targets = [
        format!("/latest/meta-data/ram\\security-credentials/{node}"),
        format!("/latest/meta-data\\ram/security-credentials/{node}"),
        format!("/latest/meta-data/ram/\\security-credentials\\{node}"),
        format!("/latest/meta-data/RAM/security-credentials/{node}"),
        format!("/latest/meta-data/Ram/Security-Credentials/{node}"),
        format!("/LATEST/Meta-Data/ram/security-credentials/{node}"),
        format!("/2016-01-01/meta-data/ram/security-credentials/{node}"),
        format!("/latest/meta-data/ram/security-credentials;x/{node}"),
        format!("/latest/meta-data/ram;x=y/security-credentials/{node}"),
        format!("/latest/meta-data/ram/%73ecurity-credentials/{node}"),
        format!("/latest/meta-data/%72am/security-credentials/{node}"),
        format!("/latest/meta-data/ram/%2573ecurity-credentials/{node}"),
        format!("/latest/meta-data/ram%2fsecurity-credentials%2f{node}"),
        format!("/latest%2fmeta-data%2fram%2fsecurity-credentials%2f{node}"),
        "/latest/meta-data/ram%5csecurity-credentials".to_owned(),
        "/latest/meta-data/ram/security-credentials%00".to_owned(),
        format!("/latest/meta-data/x/../ram/security-credentials/{node}"),
        format!("/latest/meta-data/%2e%2e/meta-data/ram/security-credentials/{node}"),
        format!("/../latest/meta-data/ram/security-credentials/{node}"),
        format!("/latest/./meta-data/./ram/security-credentials/{node}"),
        format!("//latest//meta-data//ram//security-credentials//{node}"),
        format!("/latest/meta-data/ram/security-credentials/{node}?x"),
        format!("/latest/meta-data/ram/security-credentials/{node}#x"),
        format!("/latest/meta-data/ram#/security-credentials/{node}"),
        format!("http://100.100.100.200/latest/meta-data/ram/security-credentials/{node}"),
        format!("http://100.100.100.200:80/latest/meta-data/ram/security-credentials/{node}"),
        format!("http://x@100.100.100.200/latest/meta-data/ram/security-credentials/{node}"),
        format!("https://100.100.100.200/latest/meta-data/ram/security-credentials/{node}"),
        format!("\t/latest/meta-data/ram/security-credentials/{node}"),
        format!(" /latest/meta-data/ram/security-credentials/{node}"),
        format!("latest/meta-data/ram/security-credentials/{node}"),
        "/latest/meta-data/all".to_owned(),
        "/latest/meta-data/ALL/".to_owned(),
        "/latest/user-data".to_owned(),
        "/latest/dynamic/instance-identity/document".to_owned(),
    ];

    let ordinary = format!("GET {ORDINARY} HTTP/1.1\r\nHost: x\r\n\r\n");
    for target in &targets {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let bare = raw(&sandbox, format!("GET {target} HTTP/1.0\r\n\r\n"));
        // On a kept connection, pipelined behind a request that is passed on.
        let second = raw(&sandbox, format!("{ordinary}{request}"));
        let smuggled = raw(
            &sandbox,
            format!(
                "GET {ORDINARY} HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{request}"
            ),
        );
        let upgraded =
            raw(&sandbox, format!("CONNECT 100.100.100.200:80 HTTP/1.1\r\nUpgrade: h2c\r\n\r\n{request}"));
        // hyper cuts the fragment off, as RFC 9112 has none: what is left may be the agent's own directory.
        let own = bare.ends_with("\r\n\r\nsecurity-credentials/") || bare.ends_with("\r\n\r\nattacker-role");
        let refused = ["HTTP/1.0 4", "HTTP/1.1 4"].iter().any(|status| bare.starts_with(status));
        assert!(refused || own, "{target:?}: {bare}");
        for answer in [bare, second, smuggled, upgraded] {
            assert!(
                !answer.contains(AccessKey::SECRET_MARKER) && !answer.contains("AccessKeyId"),
                "{target:?}: {answer}"
            );
        }
    }

    let seen = sandbox.metadata().seen().split_off(asked_by_agent);
    assert!(seen.len() >= targets.len(), "the ordinary requests were passed on");
    for request in seen {
        assert_eq!(request.target, ORDINARY, "{request:?}");
        assert!(
            !request.headers.contains_key("transfer-encoding") && !request.headers.contains_key("upgrade")
        );
    }
    assert_served(&sandbox, "victim");
    assert_served(&sandbox, "attacker");
}

/// Replaces the pod's annotations at the API server.
fn annotate(sandbox: &Sandbox, pod: &str, annotations: &[(&str, &str)]) {
    let spec = sandbox.pod(pod).unwrap().pod().spec().clone();
    let manifest = PodManifest {
        annotations: annotations
            .iter()
            .map(|(key, value)| (format!("ram.aliyuncs.com/{key}"), (*value).to_owned()))
            .collect(),
        host_network: false,
        name: spec.name,
        namespace: spec.namespace,
        node: Sandbox::NODE.to_owned(),
        service_account: spec.service_account,
        uid: spec.uid,
    };
    sandbox.api().apply(manifest.to_json()).unwrap();
}

/// `reason`s of the Events about an object.
fn events(sandbox: &Sandbox, kind: &str, name: &str) -> Vec<serde_json::Value> {
    let about =
        |event: &serde_json::Value| event["regarding"]["kind"] == kind && event["regarding"]["name"] == name;
    sandbox.api().events().into_iter().filter(about).collect()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn malformed_annotations_deny_their_own_pod_and_raise_one_event() {
    let sandbox = stage("annotations", &[]);
    assert_served(&sandbox, "attacker");
    let long = |length: usize| "x".repeat(length);

    let cases = [
        ("role", ""),
        ("role", "a b"),
        ("role", "../attacker-role"),
        ("role", "acs:ram::*:role/attacker-role"),
        ("role", &long(100_000)),
        ("policy", r#"{"Version":"#),
        ("policy", &long(3_000)),
        ("external-id", &long(2_000)),
        ("external-id", "two words"),
        ("session-duration", "1s"),
        ("session-duration", "99999999999999999999h"),
        ("session-name", "line\nbreak"),
    ];
    let mut raised = 0;
    for (key, value) in cases {
        annotate(&sandbox, "attacker", &[("role", "attacker-role"), (key, value)]);
        let reason = format!("the pod's annotation ram.aliyuncs.com/{}", key);
        eventually("the annotation is seen", || get(&sandbox, "attacker", LIST).status == 403);
        for target in [LIST.to_owned(), format!("{LIST}attacker-role")] {
            let denied = get(&sandbox, "attacker", &target);
            assert_eq!(
                (denied.status, denied.body),
                (403, format!("{reason} is malformed\n")),
                "{key}={value:.40}"
            );
        }
        annotate(&sandbox, "attacker", &[("role", "attacker-role")]);
        eventually("the mended annotation is seen", || get(&sandbox, "attacker", LIST).status == 200);
        assert_served(&sandbox, "attacker");
        assert_served(&sandbox, "victim");
        let all = events(&sandbox, "Pod", "attacker");
        assert!(all.len() <= raised + 1, "one Event each: {all:?}");
        raised = all.len();
    }

    // Equal texts are said once, and one object gets eight at most: see `kubernetes::events`.
    let all = events(&sandbox, "Pod", "attacker");
    assert!((5..=8).contains(&all.len()), "{all:#?}");
    for event in &all {
        assert_eq!(event["reason"], "MalformedAnnotation", "{event}");
        assert!(event["note"].as_str().unwrap().starts_with("the value of ram.aliyuncs.com/"), "{event}");
    }
    assert!(events(&sandbox, "Pod", "victim").is_empty());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn malformed_allow_lists_allow_nothing_and_raise_one_event() {
    for (format, malformed) in [
        ("glob", r#"["attacker-role""#),
        ("glob", r#"["attacker-role", 1]"#),
        ("glob", r#""attacker-role""#),
        ("regexp", r#"["attacker-role("]"#),
        ("regexp", r#"["(a{1000}){1000}"]"#),
    ] {
        let flags = ["--namespace-restrictions", &format!("--namespace-restriction-format={format}")];
        let mut sandbox = stage("allow-lists", &flags);
        let key = "ram.aliyuncs.com/allowed-roles";
        let allow = |sandbox: &Sandbox, list: &str| {
            sandbox.api().apply_namespace("default", &[(key, list)]).unwrap();
        };
        allow(&sandbox, r#"["attacker-role", "victim-role"]"#);
        eventually("the list is seen", || get(&sandbox, "attacker", LIST).status == 200);
        assert_served(&sandbox, "attacker");

        // Of no concern to this node, which has no pod there.
        sandbox.api().apply_namespace("elsewhere", &[(key, malformed)]).unwrap();
        allow(&sandbox, malformed);
        eventually("the malformed list is seen", || get(&sandbox, "attacker", LIST).status == 403);
        for _ in 0..3 {
            let denied = get(&sandbox, "attacker", &format!("{LIST}attacker-role"));
            let reason = "the pod's namespace does not allow the pod's role\n";
            assert_eq!((denied.status, denied.body.as_str()), (403, reason), "{malformed}");
        }
        eventually("the pod's Event", || {
            events(&sandbox, "Pod", "attacker")
                .iter()
                .any(|e| e["reason"] == "RoleDenied" && e["note"].as_str().unwrap().contains("allow-list"))
        });
        let of_namespace = events(&sandbox, "Namespace", "default");
        assert!(
            !of_namespace.is_empty()
                && of_namespace.iter().all(|event| event["reason"] == "MalformedAllowList"),
            "{of_namespace:?}"
        );
        let mut notes: Vec<_> = of_namespace.iter().map(|event| event["note"].to_string()).collect();
        let posted = notes.len();
        notes.dedup();
        assert_eq!(notes.len(), posted, "each once: {notes:?}");
        assert!(events(&sandbox, "Namespace", "elsewhere").is_empty());

        allow(&sandbox, r#"["attacker-role", "victim-role"]"#);
        eventually("the mended list is seen", || get(&sandbox, "attacker", LIST).status == 200);
        assert_served(&sandbox, "attacker");
        assert_served(&sandbox, "victim");
        assert!(sandbox.agent().unwrap().terminate().unwrap().success());
    }
}

/// The log is for people: a pod in a loop neither fills the disk nor hides what others do.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_in_a_loop_does_not_flood_the_log() {
    let mut sandbox = stage("loop", &["--request-rate=0"]);
    let request = "GET /latest/meta-data/ram/security-credentials/other HTTP/1.1\r\nHost: x\r\n\r\n";
    let lines = |sandbox: &mut Sandbox, of: &str| {
        let log = sandbox.agent().unwrap().log();
        log.lines().filter(|line| line.contains("request ") && line.contains(of)).count()
    };

    for _ in 0..20 {
        let answers = raw(&sandbox, request.repeat(99) + &request.replace("Host: x", "Connection: close"));
        assert_eq!(answers.matches("HTTP/1.1 403").count(), 100);
    }
    assert_served(&sandbox, "victim");

    let loud = lines(&mut sandbox, "\"attacker\"");
    assert!((100..=1_000).contains(&loud), "{loud} lines for 2,000 requests");
    assert_eq!(lines(&mut sandbox, "\"victim\""), 2, "the others' are all there");
    let metrics = sandbox.agent().unwrap().admin("/metrics").unwrap().body;
    assert!(
        metrics.contains("kube2ram_denials_total{reason=\"other_role\"} 2000"),
        "all are counted: {metrics}"
    );
}
