//! Hardened mode as pods see it: session tokens of the agent's own, and what the policies leave of the real
//! server.

use kube2ram_sandbox::node::PodSpec;

use crate::support::{INSTANCE_ID, LIST, Lab, run, url};

const TOKEN: &str = "/latest/api/token";

fn pods() -> [PodSpec; 2] {
    [PodSpec::new("orders").role("orders-role"), PodSpec::new("billing").role("billing-role")]
}

fn token(lab: &Lab, pod: &str) -> String {
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds: 300";
    let (code, token) = lab.curl(pod, &["--silent", "--fail", "-X", "PUT", "-H", ttl, &url(TOKEN)]);
    assert_eq!((code, token.len()), (Some(0), 80), "{token}");
    token
}

/// The body and the status; with no token when it is empty.
fn ask(lab: &Lab, pod: &str, token: &str, target: &str) -> String {
    let header = format!("X-aliyun-ecs-metadata-token: {token}");
    let args = ["--silent", "--write-out", " %{http_code}", &url(target), "-H", &header];
    lab.curl(pod, &args[..if token.is_empty() { 4 } else { 6 }]).1
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_outlives_the_agent_and_is_of_use_to_its_own_pod_only() {
    let mut lab = Lab::with_agent("tokens", &pods(), &["--require-token"]);
    let (own, others) = (token(&lab, "orders"), token(&lab, "billing"));
    assert_ne!(own, others);

    // Terminated, as for an upgrade, and killed.
    for kill in [false, true] {
        if kill {
            lab.agent().unwrap().kill().unwrap();
            lab.agent().unwrap().start().unwrap();
        } else {
            lab.agent().unwrap().restart(None).unwrap();
        }
        assert_eq!(ask(&lab, "orders", &own, LIST), "orders-role 200");
        assert_eq!(ask(&lab, "orders", &own, INSTANCE_ID), "i-bp1sandbox0000000001 200");
        for target in [LIST, &format!("{LIST}orders-role"), INSTANCE_ID] {
            let stolen = ask(&lab, "orders", &others, target);
            assert_eq!(stolen, "the session token is not valid\n 401", "{target}");
            let without = ask(&lab, "orders", "", target);
            assert_eq!(without, "a session token is required\n 403", "{target}");
        }
        assert_eq!(ask(&lab, "billing", &others, LIST), "billing-role 200");
    }

    assert_eq!(lab.metric("kube2ram_denials_total{reason=\"token_foreign\"}"), 3.0);
    assert_eq!(lab.metric("kube2ram_denials_total{reason=\"token_missing\"}"), 3.0);
    let log = lab.agent().unwrap().log();
    assert!(!log.contains(&own) && !log.contains(&others), "{log}");
    assert!(lab.metadata().seen().iter().all(|seen| !format!("{seen:?}").contains(&own)));
}

/// Python's `alibabacloud-credentials` in short: the standard library, and a new token for each request.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_client_that_takes_a_token_first_is_served_where_tokens_are_required() {
    let lab = Lab::with_agent("tokens-python", &pods(), &["--require-token"]);
    let script = format!(
        "from urllib.request import Request, urlopen\nbase = '{}'\n\
         def ask(method, path, headers): return urlopen(Request(base + path, None, headers, method=method), timeout=1).read().decode()\n\
         def token(): return ask('PUT', '{TOKEN}', {{'X-aliyun-ecs-metadata-token-ttl-seconds': '21600', 'Content-Length': '0'}})\n\
         def get(path): return ask('GET', path, {{'X-aliyun-ecs-metadata-token': token()}})\n\
         print(get('{LIST}'), 'Success' in get('{LIST}orders-role'))",
        url("")
    );

    let mut python = lab.pod("orders").unwrap().pod().command("app", "python3").unwrap();

    assert_eq!(run(python.args(["-c", &script])), (Some(0), "orders-role True".into()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn tokens_are_not_for_proxies_and_last_one_second_to_six_hours() {
    let lab = Lab::with_agent("tokens-rules", &pods(), &[]);
    let put = |headers: &[&str]| {
        let headers: Vec<_> = headers.iter().flat_map(|header| ["-H", header]).collect();
        let args =
            ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "-X", "PUT", &url(TOKEN)];
        lab.curl("orders", &[&args[..], &headers].concat()).1
    };
    let ttl = |seconds: &str| put(&[&format!("X-aliyun-ecs-metadata-token-ttl-seconds: {seconds}")]);

    assert_eq!([ttl("1"), ttl("21600")], ["200", "200"]);
    assert_eq!([ttl("0"), ttl("21601"), ttl("x"), put(&[])], ["400", "400", "400", "400"]);
    assert_eq!(put(&["X-aliyun-ecs-metadata-token-ttl-seconds: 60", "X-Forwarded-For: 10.0.0.1"]), "403");
    assert_eq!(lab.ask("orders", TOKEN).status, 405);
    assert_eq!(lab.ask("orders", LIST).body, "orders-role", "no token is needed");
    assert!(lab.metadata().seen().iter().all(|seen| !format!("{seen:?}").contains("10.0.0.1")));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_strict_policy_shows_a_pod_where_it_runs_and_no_more() {
    let mut lab = Lab::with_agent("strict", &pods(), &["--metadata-policy=strict"]);

    for (target, status) in [
        (INSTANCE_ID, 200),
        ("/latest/meta-data/region-id", 200),
        ("/latest/meta-data/", 200),
        ("/latest/meta-data/image-id", 403),
        ("/latest/meta-data/public-keys/", 403),
        ("/latest/user-data", 403),
        ("/latest/dynamic/instance-identity/document", 403),
        ("/latest/meta-data/all", 403),
    ] {
        assert_eq!(lab.ask("orders", target).status, status, "{target}");
    }

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.metric("kube2ram_denials_total{reason=\"not_listed\"}"), 2.0);
    assert_eq!(lab.metric("kube2ram_denials_total{reason=\"sensitive\"}"), 3.0);
    let log = lab.agent().unwrap().log();
    let denied = log.lines().find(|line| line.contains("/latest/meta-data/image-id")).unwrap();
    assert!(
        denied.contains("WARN") && denied.contains("not_listed") && denied.contains("orders"),
        "{denied}"
    );
}
