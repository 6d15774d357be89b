//! Many at once: nobody is taken for another, one question to STS is enough, and a known pod is served fast.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use kube2ram_sandbox::{
    client::StormReport,
    node::PodSpec,
    standin::{Accounts, StsMode},
};

use crate::support::{LIST, Lab, url};

/// Many requests from one container.
fn storm(lab: &Lab, pod: &str, container: &str, role: &str, connects: usize, concurrency: usize) -> Child {
    let mut client = lab.pod(pod).unwrap().client(container).unwrap();
    client.arg("storm").args([
        "--connects",
        &connects.to_string(),
        "--concurrency",
        &concurrency.to_string(),
    ]);
    // IPv4, IPv4-mapped, IPv6.
    let urls = ["http://100.100.100.200", "http://[::ffff:100.100.100.200]", "http://[fd00:100::100:200]"];
    client.args(["--expect", role]).args(urls).stdout(Stdio::piped()).spawn().unwrap()
}

fn report(storm: Child) -> StormReport {
    serde_json::from_slice(&storm.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn ten_thousand_connections_of_pods_at_once_are_all_distinguished() {
    const EACH: usize = 2_500;
    let pods = [
        PodSpec::new("orders").role("orders-role").containers(&["app", "sidecar"]),
        PodSpec::new("billing").role("billing-role"),
        PodSpec::new("daemon").role("daemon-role").host_network(),
    ];
    let mut lab = Lab::with_agent("storm", &pods, &["--request-rate=0"]);

    let storms = [
        ("orders", "app", "orders-role"),
        ("orders", "sidecar", "orders-role"),
        ("billing", "app", "billing-role"),
        ("daemon", "app", "daemon-role"),
    ]
    .map(|(pod, container, role)| (pod, container, storm(&lab, pod, container, role, EACH, 8)));
    for (pod, container, storm) in storms {
        let StormReport { ok, wrong, missing, late, errors, error_samples, latencies_us } = report(storm);
        let percentile = |percent: usize| latencies_us[(latencies_us.len() - 1) * percent / 100];
        println!(
            "{pod}/{container}: ok {ok}, wrong {wrong}, missing {missing}, errors {errors}; p50 {} µs, p99 {} µs, most {} µs",
            percentile(50),
            percentile(99),
            percentile(100)
        );
        assert_eq!((ok, wrong, missing, late, errors), (EACH, 0, 0, 0, 0), "{error_samples:?}");
    }

    assert_eq!(lab.leaks(), []);
    assert_eq!(lab.metric("kube2ram_unvouched_connections_total"), 0.0);
    let assumed = lab.sts().calls().iter().filter(|call| call.action == "AssumeRole").count();
    assert_eq!(assumed, 3, "one for each role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn two_hundred_clients_of_a_cold_role_cost_one_call_to_sts() {
    // Half of a storm's requests ask for the role's name. One cgroup may have 256 connections.
    let pods = ["first", "second"].map(|name| PodSpec::new(name).role("orders-role"));
    let lab = Lab::with_agent("cold", &pods, &[]);
    lab.sts().set_mode(StsMode::Slow(Duration::from_millis(200))).unwrap();

    let storms = ["first", "second"].map(|pod| storm(&lab, pod, "app", "orders-role", 200, 200));

    for storm in storms {
        let report = report(storm);
        assert_eq!((report.ok, report.wrong, report.missing, report.errors), (200, 0, 0, 0), "{report:?}");
    }
    assert_eq!(lab.sts().assumed(&Accounts::role_arn("orders-role")).len(), 1);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_known_pod_is_served_over_keep_alive_without_a_wait() {
    const REQUESTS: usize = 1_000;
    let lab = Lab::with_agent("warm", &[PodSpec::new("orders").role("orders-role")], &["--request-rate=0"]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let calls = lab.sts().calls().len();

    for (what, target) in [("list", LIST.to_owned()), ("credentials", format!("{LIST}orders-role"))] {
        let urls = url(&format!("{target}?n=[1-{REQUESTS}]"));
        let format = "%{http_code} %{num_connects} %{time_total}\n";
        let (code, text) = lab.curl(
            "orders",
            &["--silent", "--max-time", "60", "--output", "/dev/null", "--write-out", format, &urls],
        );
        assert_eq!(code, Some(0), "{text}");
        let answers: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        let connects: usize = answers.iter().map(|answer| answer[1].parse::<usize>().unwrap()).sum();
        let mut seconds: Vec<f64> = answers.iter().map(|answer| answer[2].parse().unwrap()).collect();
        seconds.sort_by(f64::total_cmp);
        let median = Duration::from_secs_f64(seconds[REQUESTS / 2]);
        println!("{what}: p50 {median:?}, p99 {:?}", Duration::from_secs_f64(seconds[REQUESTS * 99 / 100]));

        assert!(answers.iter().all(|answer| answer[0] == "200"), "{text}");
        assert_eq!((answers.len(), connects), (REQUESTS, 1), "all over one connection");
        assert!(median < Duration::from_millis(50), "{median:?}");
    }
    assert_eq!(lab.sts().calls().len(), calls);
}
