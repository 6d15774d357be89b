//! What the operator sees, what pods do not see of it, and what nobody sees: secrets.

use std::{
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Read as _},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    client::{Family, LoadReport, Request},
    node::PodSpec,
    quiet::Probes,
    situation::Situation,
    standin::AccessKey,
};
use serde_json::Value;

use crate::support::{INSTANCE_ID, LIST, Lab, SDK_PATIENCE, assert_no_secrets, eventually, owner, url};

fn orders() -> PodSpec {
    PodSpec::new("orders").namespace("shop").role("orders-role")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn health_and_metrics_are_served_on_the_admin_port() {
    let mut lab = Lab::with_agent("metrics", &[orders(), PodSpec::new("plain")], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.ask("plain", LIST).status, 404);

    let agent = lab.agent().unwrap();
    assert_eq!(agent.admin("/healthz").unwrap().status, 200);
    assert_eq!(agent.admin("/readyz").unwrap().body, "ready\n");
    let url = format!("http://{}/metrics", agent.admin_addr());
    let metrics = Request::get(url).header("Accept", "application/openmetrics-text").send().unwrap();
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(metrics.body.ends_with("# EOF\n"));
    let text = agent.admin("/metrics").unwrap();
    assert!(text.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    for sample in [
        r#"kube2ram_http_requests_total{route="credentials",status="200"} 1"#,
        r#"kube2ram_http_requests_total{route="role_list",status="404"} 1"#,
        r#"kube2ram_sts_requests_total{result="ok"} 1"#,
        "kube2ram_credential_cache_entries 1",
        "kube2ram_kubernetes_pods 3",
    ] {
        assert!(metrics.body.lines().any(|line| line == sample), "no {sample} in\n{}", metrics.body);
    }
}

/// Pods that each may cause 200 lines in ten seconds, an agent at the most talkative level, and the pipe that
/// is its standard error.
fn with_piped_log(name: &str) -> (Lab, File) {
    let pods = PODS.map(|name| PodSpec::new(name).role("orders-role"));
    let mut lab = Lab::new(name, &pods);
    lab.prepare(&["--log-level=trace"]);
    let fifo = lab.node().directory().join("stderr");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // Opened for both, or opening would wait for the agent.
    let reader = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let script = format!("exec \"$@\" 2>{}", fifo.display());
    lab.agent().unwrap().set_wrapper(&["sh", "-c", &script, "sh"]);
    lab.agent().unwrap().start().unwrap();
    for pod in PODS {
        eventually("orders-role".to_owned(), || lab.credentials(pod, "orders-role"));
    }
    (lab, reader)
}

const PODS: [&str; 4] = ["orders", "two", "three", "four"];
/// How long the log's reader stops, as containerd does while it is restarted.
const UNREAD: Duration = Duration::from_mins(1);

fn loads(lab: &Lab) -> [Child; 4] {
    PODS.map(|name| {
        let mut load = lab.pod(name).unwrap().client("app").unwrap();
        load.args(["load", "--connect=100.100.100.200:80", "--expect=orders-role"]);
        load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    })
}

/// Ends a pod's clients, and returns their report: each pod has answers.
fn report_of(load: Child) -> LoadReport {
    let report = LoadReport::of(load).unwrap();
    assert!(report.ok > 0, "no request was answered: {:?}", report.samples);
    report
}

/// The requests of all pods.
fn pooled(loads: impl IntoIterator<Item = Child>) -> LoadReport {
    loads.into_iter().map(report_of).fold(LoadReport::default(), LoadReport::plus)
}

fn await_lost_lines(lab: &mut Lab) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !lab.agent().unwrap().metric("kube2ram_log_lines_lost_total").is_ok_and(|lost| lost >= 100.0) {
        assert!(Instant::now() < deadline, "no line is lost");
        thread::sleep(Duration::from_millis(100));
    }
}

/// As while containerd is stopped: its shim holds the other end of standard error, and does not read.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_pod_waits_for_a_log_that_nobody_reads() {
    let (mut lab, mut reader) = with_piped_log("log-stall");
    let unread_since = Instant::now();
    let [lasting, others @ ..] = loads(&lab);

    await_lost_lines(&mut lab);
    let report = pooled(others);
    let (mut asked, mut alive) = (Probes::default(), Probes::default());
    while unread_since.elapsed() < UNREAD {
        let reply = lab.pod("orders").unwrap().curl(&format!("{LIST}orders-role"));
        if let Some(reply) = asked.judge("a request", reply) {
            assert_eq!(owner(&reply), "orders-role");
        }
        let live = lab.agent().unwrap().live();
        if let Some(live) = alive.judge("the liveness probe", live) {
            assert_eq!(live, "live");
        }
        thread::sleep(Duration::from_secs(1));
    }
    let report = report.plus(report_of(lasting));
    report.assert_served("a log that nobody reads", SDK_PATIENCE);

    let (mut log, mut buffer) = (String::new(), vec![0; 64 * 1024]);
    while !log.contains("log lines were lost") {
        let read = reader.read(&mut buffer).unwrap();
        log.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    println!("{} requests while nobody read; the log then: {} bytes", report.ok, log.len());
}

/// As syslog does that writes each line to a slow disk. That each line is delivered or counted is a test of
/// the writer's own.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_pod_waits_for_a_log_that_is_read_slowly() {
    // The access log of a busy pod is thinned out: all four pods write less than 100 lines a second.
    const EACH_LINE: Duration = Duration::from_millis(100);
    let (mut lab, pipe) = with_piped_log("log-slow");
    let ended = Arc::new(AtomicBool::new(false));
    let reading = thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let mut log = Vec::new();
            for line in BufReader::new(pipe).lines() {
                log.push(line.unwrap());
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                thread::sleep(EACH_LINE);
            }
            log
        }
    });
    let loads = loads(&lab);

    await_lost_lines(&mut lab);
    let mut probes = Probes::default();
    let live = loop {
        if let Some(live) = probes.judge("the liveness probe", lab.agent().unwrap().live()) {
            break live;
        }
    };
    assert_eq!(live, "live");
    let report = pooled(loads);
    report.assert_served("a log that is read slowly", SDK_PATIENCE);

    let lost = lab.metric("kube2ram_log_lines_lost_total");
    // There are lines left to read: the buffer is full.
    ended.store(true, Ordering::Relaxed);
    let log = reading.join().unwrap();
    println!("{} requests; {} lines were read meanwhile, and {lost} lost", report.ok, log.len());
    assert!(log.iter().all(|line| line.starts_with("20")), "each begins with a time: {log:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn metrics_have_one_prefix_help_and_no_labels_without_bounds() {
    let mut lab = Lab::with_agent("names", &[orders()], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.credentials("orders", "billing-role"), "403");
    let metrics = lab.agent().unwrap().admin("/metrics").unwrap().body;

    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels) = line.split_at(line.find(['{', ' ']).unwrap());
        let is_sane = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        // Those of the process have the names that they have in all programs.
        let is_ours = name.starts_with("kube2ram_") || name.starts_with("process_");
        assert!(is_ours && name.chars().all(is_sane), "{line}");
        let repeats = ["kube2ram_kube2ram", "total_total", "seconds_seconds"];
        assert!(!repeats.iter().any(|twice| name.contains(twice)), "{line}");
        for unbounded in ["orders", "shop", "billing", "pod=", "namespace=", "cgroup="] {
            assert!(!labels.contains(unbounded), "{line}");
        }
    }
    let described = |what: &str| metrics.lines().filter(|line| line.starts_with(what)).count();
    assert!(described("# HELP ") > 10);
    assert_eq!(described("# HELP "), described("# TYPE "));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_do_not_reach_health_metrics_or_debug_through_the_metadata_address() {
    let mut lab = Lab::with_agent("app-port", &[orders()], &["--debug"]);
    let app = lab.agent().unwrap().app_addr();
    let admin_port = lab.agent().unwrap().admin_addr().port();

    for path in ["/metrics", "/healthz", "/readyz", "/debug/store"] {
        let redirected = lab.ask("orders", path);
        assert_eq!(redirected.status, 404, "{path}: passed on, and unknown to the real server");
        assert_eq!(redirected.headers["server"], "ECSws");
        let pod = lab.pod("orders").unwrap();
        let direct = pod.curl_from("app", Family::V4, &format!("http://{app}{path}")).unwrap();
        assert_eq!(direct.status, 404, "{path}: so is what a pod asks the agent's port");
    }
    let other_port = lab.pod("orders").unwrap().curl_from(
        "app",
        Family::V4,
        &format!("http://100.100.100.200:{admin_port}/metrics"),
    );
    assert!(other_port.is_err(), "{other_port:?}");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_store_is_shown_to_root_by_the_control_socket_and_at_no_port() {
    let mut lab = Lab::with_agent("store", &[orders()], &["--debug", "--namespace-restrictions"]);
    let admin = lab.agent().unwrap().admin_addr();
    for ip in [Ipv4Addr::LOCALHOST, *admin.ip()] {
        let asked = Request::get(format!("http://{ip}:{}/debug/store", admin.port())).send().unwrap();
        assert_eq!(asked.status, 404, "hostNetwork pods reach it as well: {ip}");
    }

    let (code, store) = lab.kube2ram(&["store"]);

    assert_eq!(code, Some(0), "{store}");
    let store: Value = serde_json::from_str(&store).unwrap();
    for map in ["rolesByIP", "namespaceByIP", "rolesByNamespace"] {
        assert!(store[map].is_object(), "the predecessors' {map} in {store}");
    }
    assert_eq!(store["rolesByNamespace"]["kube-system"], Value::Null);
    let pods = store["pods"].as_array().unwrap();
    assert!(pods.iter().any(|pod| pod["name"] == "orders" && pod["namespace"] == "shop"), "{store}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn debug_logs_the_verdicts_of_the_ebpf_programs() {
    let mut lab = Lab::with_agent("verdicts", &[orders()], &["--debug"]);
    assert_eq!(lab.ask("orders", LIST).body, "orders-role");
    let port = lab.curl("orders", &["--silent", "http://100.100.100.200:443/"]);
    assert_ne!(port.0, Some(0), "another port is closed");

    let mut logged = |verdict: &str| {
        let log = lab.agent().unwrap().log();
        log.lines().any(|line| line.contains("kube2ram::kernel") && line.contains(verdict))
    };
    eventually((true, true), || (logged("verdict=redirect cgroup="), logged("verdict=deny cgroup=")));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_request_is_one_line_of_the_log() {
    let mut lab = Lab::with_agent("access-log", &[orders()], &["--log-format=json"]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.credentials("orders", "billing-role"), "403");

    let log = lab.agent().unwrap().log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |path: &str| {
        let mut of = lines.iter().filter(|line| line["path"] == format!("{LIST}{path}"));
        let line = of.next().unwrap();
        assert!(of.next().is_none(), "{log}");
        line
    };
    let (answered, refused) = (of("orders-role"), of("billing-role"));
    for line in [answered, refused] {
        for field in
            ["timestamp", "level", "target", "message", "pod.namespace", "pod.name", "pod.uid", "peer"]
        {
            assert!(!line[field].is_null(), "{field} in {line}");
        }
        for field in ["method", "path", "status", "latency_ms", "role"] {
            assert!(!line[field].is_null(), "{field} in {line}");
        }
        assert_eq!((&line["pod.namespace"], &line["pod.name"]), (&"shop".into(), &"orders".into()), "{line}");
    }
    assert_eq!((&answered["level"], &answered["status"]), (&"INFO".into(), &200.into()), "{answered}");
    assert_eq!((&refused["level"], &refused["kind"]), (&"WARN".into(), &"other_role".into()), "{refused}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_right_to_events_the_log_has_it_once() {
    let mut lab = Lab::new("no-events", &[]);
    Situation::set_the_stage(&mut lab).unwrap();
    lab.api().forbid_events(true);
    lab.prepare(&["--namespace-restrictions"]);
    lab.agent().unwrap().start().unwrap();

    Situation::RoleDenied.bring_about(&mut lab).unwrap();
    for _ in 0..20 {
        assert_eq!(lab.credentials("intruder", "orders-role"), "403");
        Situation::RoleDenied.go_on(&mut lab).unwrap();
    }

    let forbidden = r#"kube2ram_kubernetes_events_total{result="forbidden"}"#;
    eventually(1.0, || lab.metric(forbidden));
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("no right to create Events").count(), 1, "{log}");
    let asked = lab.api().requests().iter().filter(|request| request.contains("/events")).count();
    assert_eq!(asked, 1);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_crash_loop_of_denials_is_one_event_that_counts() {
    let mut lab = Lab::new("crash-loop", &[]);
    Situation::set_the_stage(&mut lab).unwrap();
    lab.prepare(&["--namespace-restrictions"]);
    lab.agent().unwrap().start().unwrap();

    Situation::RoleDenied.bring_about(&mut lab).unwrap();
    eventually(1, || lab.api().events().len());
    for _ in 0..30 {
        Situation::RoleDenied.go_on(&mut lab).unwrap();
    }

    // The worker looks twice a minute for what is to be counted.
    let event = || lab.api().events().remove(0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while event()["series"].is_null() {
        assert!(Instant::now() < deadline, "{}", event());
        thread::sleep(Duration::from_millis(100));
    }
    assert!(event()["series"]["count"].as_u64().unwrap() >= 2, "{}", event());
    assert_eq!(event()["reason"], "RoleDenied");
    let note = event()["note"].as_str().unwrap().to_owned();
    assert!(note.contains("role/admin-role") && note.contains("ram.aliyuncs.com/allowed-roles"), "{note}");
    let asked = lab.api().requests().iter().filter(|request| request.contains("/events")).count();
    assert_eq!(asked, 2, "one to say it, one to count it");
}

/// Every other test with a sandbox looks for secrets as well, when that goes.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_secret_is_in_the_log_the_metrics_or_the_store_at_the_most_talkative_level() {
    let mut lab = Lab::with_agent("secrets", &[orders()], &["--debug", "--log-level=trace"]);
    let credentials = lab.ask("orders", &format!("{LIST}orders-role")).body;
    assert!(credentials.contains(AccessKey::SECRET_MARKER), "this is what must not be found");
    assert_eq!(lab.credentials("orders", "billing-role"), "403");
    let token = lab.curl(
        "orders",
        &[
            "--silent",
            "-X",
            "PUT",
            "-H",
            "X-aliyun-ecs-metadata-token-ttl-seconds: 60",
            &url("/latest/api/token"),
        ],
    );
    assert!(token.1.len() == 80 && !token.1.contains("SandboxToken"), "the agent's own: {token:?}");
    let header = format!("X-aliyun-ecs-metadata-token: {}", token.1);
    assert_eq!(lab.curl("orders", &["--silent", "-H", &header, &url(INSTANCE_ID)]).0, Some(0));

    let agent = lab.agent().unwrap();
    let told = |args: &[&str]| String::from_utf8(agent.exec(args).unwrap().stdout).unwrap();
    let store = told(&["store"]);
    assert!(store.contains("orders-role"), "{store}");
    let (status, explanation) =
        (told(&["status", "-o", "json"]), told(&["explain", "shop/orders", "-o", "json"]));
    assert!(status.contains("granted") && explanation.contains("granted"), "{status} {explanation}");
    for text in [agent.log(), agent.admin("/metrics").unwrap().body, store, status, explanation] {
        assert!(text.len() > 100 && !text.contains(&token.1), "{text}");
        assert_no_secrets(&text);
    }
    let events = serde_json::to_string(&lab.api().events()).unwrap();
    assert_no_secrets(&events);
}
