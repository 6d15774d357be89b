//! `kube2ram status` and `kube2ram explain` in each situation that an operator may find, through upgrades,
//! and the log meanwhile.

use std::{
    fs,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{node::PodSpec, situation::Situation};
use serde_json::Value;

use crate::support::{LIST, Lab, eventually};

/// A sandbox in a situation.
fn lab(situation: Situation) -> Lab {
    let mut lab = Lab::new(&format!("s-{}", situation.name()), &[]);
    Situation::set_the_stage(&mut lab).unwrap();
    lab.add_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), Situation::FLAGS).unwrap();
    lab.agent().unwrap().start().unwrap();
    situation.bring_about(&mut lab).unwrap();
    lab
}

fn explain(lab: &mut Lab, pod: &str) -> (Option<i32>, Value) {
    lab.document(&["explain", &format!("{}/{pod}", Situation::NAMESPACE)])
}

fn pod<'s>(status: &'s Value, name: &str) -> &'s Value {
    status["pods"].as_array().unwrap().iter().find(|pod| pod["name"] == name).unwrap()
}

/// The parts that have problems.
fn parts(status: &Value) -> Vec<&str> {
    status["problems"].as_array().unwrap().iter().map(|problem| problem["part"].as_str().unwrap()).collect()
}

/// Shows what an operator sees, for those who read the tests' output.
#[expect(clippy::print_stdout, reason = "as the tests themselves print what they saw")]
fn show(lab: &mut Lab, pods: &[&str]) -> String {
    let mut seen = lab.kube2ram(&["status"]).1;
    for pod in pods {
        seen += &lab.kube2ram(&["explain", &format!("{}/{pod}", Situation::NAMESPACE)]).1;
    }
    println!("{seen}");
    assert!(!seen.contains('\x1b'), "no colours where there is no terminal");
    seen
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in\n{text}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn all_is_well_and_each_step_of_a_pod_is_explained() {
    let mut lab = lab(Situation::AllWell);

    let (code, status) = lab.document(&["status"]);

    assert_eq!((code, parts(&status)), (Some(0), vec![]), "{status:#}");
    assert_eq!((&status["schema"], &status["agent"]["pending"]), (&1.into(), &Value::Array(vec![])));
    assert_eq!(status["agent"]["node"], "sandbox-node");
    assert_eq!(status["agent"]["pid"], lab.agent().unwrap().pid().unwrap());
    let datapath = &status["datapath"];
    assert!(datapath["programs"].as_array().unwrap().len() >= 9, "{datapath}");
    assert!(datapath["outcomes"]["redirected"].as_u64().unwrap() >= 3, "{datapath}");
    assert!(datapath["interception"]["arrived_at"].is_string(), "{datapath}");
    assert_eq!(status["base_credentials"]["source"], "node_role");
    assert!(
        status["base_credentials"]["account"].is_string()
            && status["base_credentials"]["expires_at"].is_string()
    );
    assert!(status["sts"]["succeeded_at"].is_string());
    let orders = pod(&status, "orders");
    assert_eq!((&orders["verdict"], &orders["identified_by"]), (&"granted".into(), &"uid".into()));
    assert!(orders["cgroup"].as_str().unwrap().contains(orders["uid"].as_str().unwrap()), "{orders}");
    assert!(orders["listener"].as_str().unwrap().starts_with("127."), "{orders}");
    assert!(orders["expires_at"].is_string() && orders["issued_at"].is_string());

    let (code, why) = explain(&mut lab, "orders");
    assert_eq!(
        (code, &why["verdict"], &why["remedy"]),
        (Some(0), &"granted".into(), &Value::Null),
        "{why:#}"
    );
    let stages: Vec<_> =
        why["steps"].as_array().unwrap().iter().map(|step| step["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["pod", "identity", "role", "rule", "sts", "answer"]);
    assert!(why["steps"].as_array().unwrap().iter().all(|step| step["outcome"] == "passed"), "{why:#}");
    assert_eq!(why["steps"][2]["facts"]["completed_by"], "--auto-discover-base-arn");
    assert_eq!(why["steps"][3]["facts"]["pattern"], "orders-role");
    let seen = show(&mut lab, &["orders"]);
    assert_says(
        &seen,
        &["all is well", "active", "shop/orders", "GRANTED: it gets credentials of acs:ram::"],
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_boot_guard_that_could_not_be_installed_is_a_problem_and_keeps_no_agent_away() {
    let mut lab = Lab::new("no-boot-guard", &[]);
    lab.prepare(&[]);
    let pod = lab.agent().unwrap().pod_dir_path();
    fs::create_dir_all(&pod).unwrap();
    // What `boot-guard install --optional` leaves there.
    fs::write(pod.join("boot-guard"), "cannot create opt/kube2ram: Read-only file system").unwrap();

    lab.agent().unwrap().start().unwrap();

    let (code, status) = lab.document(&["status"]);
    assert_eq!((code, parts(&status)), (Some(1), vec!["boot_guard"]), "{status:#}");
    assert_says(&show(&mut lab, &[]), &["could not be installed: cannot create opt/kube2ram"]);
    lab.agent().unwrap().await_metric("kube2ram_boot_guard_installation_failed", 1.0).unwrap();
    assert_says(&lab.agent().unwrap().log(), &["the boot guard could not be installed on this node"]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cilium_that_may_fail_at_kube2rams_links_is_a_hint() {
    let mut lab = lab(Situation::AllWell);
    assert!(!show(&mut lab, &[]).contains("Cilium"));

    fs::create_dir(lab.node().bpffs().join("cilium")).unwrap();

    let (code, status) = lab.document(&["status"]);
    assert_eq!((code, parts(&status)), (Some(0), vec![]), "{status:#}");
    assert_says(&show(&mut lab, &[]), &["has no socket load balancer", "cilium/cilium#43877"]);
}

/// The kubelet made the pod's cgroup, and a runtime with another cgroup driver put its processes elsewhere.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_running_pod_outside_of_the_pods_cgroup_is_reported_after_a_minute() {
    let mut lab = Lab::with_agent("outside", &[PodSpec::new("inside")], &[]);
    let uid = "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a";
    let running = |name: &str, uid: &str, state: &str| {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": "default", "name": name, "uid": uid },
            "spec": { "nodeName": "sandbox-node", "hostNetwork": true },
            "status": { "phase": "Running", "containerStatuses": [{ "state": { state: {} } }] },
        })
    };
    let elsewhere = lab.node().pods_cgroup().parent().unwrap().join(format!("containerd.service-pod{uid}"));
    fs::create_dir(&elsewhere).unwrap();
    let inside = lab.pod("inside").unwrap().pod().spec().uid.clone();
    lab.api().apply(running("inside", &inside, "running")).unwrap();
    lab.api().apply(running("starting", "1c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a", "waiting")).unwrap();
    let begun = Instant::now();
    lab.api().apply(running("outside", uid, "running")).unwrap();

    let gauge = r#"kube2ram_pods_outside_cgroup{network="host"}"#;
    while lab.metric(gauge) == 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(120), "{}", lab.agent().unwrap().log());
        std::thread::sleep(Duration::from_millis(200));
    }

    assert!(begun.elapsed() >= Duration::from_secs(60));
    fs::remove_dir(&elsewhere).unwrap();
    assert_eq!(lab.metric(gauge), 1.0, "neither of the other two");
    let (code, status) = lab.document(&["status"]);
    assert_eq!((code, parts(&status)), (Some(1), vec!["datapath"]), "{status:#}");
    let pods = status["datapath"]["outside_pods"].as_array().unwrap();
    assert_eq!((pods.len(), &pods[0]["name"]), (1, &"outside".into()), "{pods:?}");
    assert_eq!(pods[0]["cgroup"], elsewhere.to_str().unwrap());
    assert_says(
        &show(&mut lab, &[]),
        &["default/outside: the pod's processes are not below", "reaches the node's role"],
    );
    eventually(true, || {
        lab.api().events().iter().any(|event| event.to_string().contains("OutsidePodsCgroup"))
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_role_that_is_denied_is_the_pods_problem_and_not_the_agents() {
    let mut lab = lab(Situation::RoleDenied);

    let (code, status) = lab.document(&["status"]);

    assert_eq!((code, parts(&status)), (Some(0), vec![]), "{status:#}");
    assert_eq!(pod(&status, "orders")["verdict"], "granted", "the allowed twin");
    let intruder = pod(&status, "intruder");
    assert_eq!((&intruder["verdict"], &intruder["expires_at"]), (&"denied".into(), &Value::Null));
    let (code, why) = explain(&mut lab, "intruder");
    assert_eq!((code, &why["verdict"]), (Some(1), &"denied".into()), "{why:#}");
    assert_eq!(why["steps"][3]["facts"]["rule"], "namespace_forbids");
    assert_eq!(why["steps"][4]["facts"]["status"], "403");
    let seen = show(&mut lab, &["intruder"]);
    assert_says(
        &seen,
        &[
            "1 denied",
            "DENIED: the namespace does not allow acs:ram::",
            "→ if the pod should have it, add the role to the annotation ram.aliyuncs.com/allowed-roles of namespace shop",
        ],
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_sts_that_throttles_is_reported_with_its_code() {
    let mut lab = lab(Situation::StsThrottling);

    let (code, status) = lab.document(&["status"]);

    assert_eq!((code, parts(&status)), (Some(1), vec!["sts"]), "{status:#}");
    assert_eq!(
        (&status["sts"]["is_throttled"], &status["sts"]["last_failure"]["kind"]),
        (&true.into(), &"throttled".into())
    );
    assert_eq!(pod(&status, "orders")["verdict"], "granted", "what is cached stays");
    assert_eq!(pod(&status, "late")["verdict"], "unavailable");
    let (code, why) = explain(&mut lab, "late");
    assert_eq!((code, &why["verdict"]), (Some(1), &"unavailable".into()), "{why:#}");
    let sts = &why["steps"][4];
    assert!(sts["facts"]["code"].as_str().unwrap().starts_with("Throttling"), "{sts}");
    assert!(sts["facts"]["failed_at"].is_string() && sts["facts"]["request_id"].is_string(), "{sts}");
    assert_eq!(why["steps"][5]["facts"]["status"], "503");
    let seen = show(&mut lab, &["late"]);
    assert_says(
        &seen,
        &["STS throttles", "UNAVAILABLE: STS issues no credentials of acs:ram::", "Throttling", "→ "],
    );

    Situation::StsThrottling.end(&mut lab).unwrap();
    eventually("late-role".to_owned(), || lab.credentials("late", "late-role"));
    assert_eq!(lab.document(&["status"]).0, Some(0), "all is well again");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_api_server_that_is_away_is_reported_with_its_lag() {
    let mut lab = lab(Situation::ApiServerAway);
    eventually(vec!["api_server".to_owned()], || {
        parts(&lab.document(&["status"]).1).into_iter().map(ToOwned::to_owned).collect::<Vec<_>>()
    });

    let (code, status) = lab.document(&["status"]);

    assert_eq!(code, Some(1), "{status:#}");
    let watch = &status["api_server"]["watches"][0];
    assert_eq!(watch["resource"], "pods");
    assert!(
        watch["failing_since"].is_string() && watch["failure"].is_string() && watch["heard_at"].is_string(),
        "{watch}"
    );
    assert_eq!(pod(&status, "orders")["verdict"], "granted", "what is known stays");
    let (code, why) = explain(&mut lab, "unheard");
    assert_eq!((code, &why["verdict"]), (Some(66), &"unknown".into()), "{why:#}");
    assert_eq!(explain(&mut lab, "orders").0, Some(0));
    let seen = show(&mut lab, &["unheard"]);
    assert_says(&seen, &["does not answer (pods, since", "the API server is not available", "it gets 503"]);
    // Whatever the part of it that failed, no cause is there twice.
    let failure = watch["failure"].as_str().unwrap();
    let mut causes: Vec<_> = failure.split(": ").collect();
    causes.sort_unstable();
    causes.dedup();
    assert_eq!(causes.len(), failure.split(": ").count(), "{failure}");
    assert_eq!(status["api_server"]["address"], lab.api().url().trim_end_matches('/'));

    Situation::ApiServerAway.end(&mut lab).unwrap();
    eventually(Some(0), || lab.document(&["status"]).0);
    eventually(Some(0), || explain(&mut lab, "unheard").0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn drift_in_the_kernel_is_repaired_and_reported() {
    let mut lab = lab(Situation::Drift);
    eventually(true, || lab.document(&["status"]).1["datapath"]["repairs"]["detached"].as_u64() >= Some(1));

    let (code, status) = lab.document(&["status"]);

    assert_eq!((code, &status["datapath"]["is_in_force"]), (Some(0), &true.into()), "{status:#}");
    let last = &status["datapath"]["last_repair"];
    assert_eq!((&last["kind"], &last["of"]), (&"detached".into(), &"k2r_egress".into()));
    assert_eq!(explain(&mut lab, "orders").0, Some(0));
    assert_says(&show(&mut lab, &["orders"]), &["drift repaired", "k2r_egress detached"]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn base_credentials_that_have_expired_are_reported_as_the_cause() {
    let mut lab = lab(Situation::BaseCredentialsExpired);

    let (code, status) = lab.document(&["status"]);

    assert_eq!((code, parts(&status)), (Some(1), vec!["base_credentials"]), "{status:#}");
    assert_eq!(status["sts"]["last_failure"]["kind"], "base_credentials");
    assert_eq!(pod(&status, "orders")["verdict"], "granted", "what is cached stays");
    let (code, why) = explain(&mut lab, "late");
    assert_eq!((code, &why["verdict"]), (Some(1), &"unavailable".into()), "{why:#}");
    let seen = show(&mut lab, &["late"]);
    assert_says(&seen, &["✗ base_credentials", "attach a role to the node", "UNAVAILABLE"]);

    Situation::BaseCredentialsExpired.end(&mut lab).unwrap();
    eventually("late-role".to_owned(), || lab.credentials("late", "late-role"));
    assert_eq!(lab.document(&["status"]).0, Some(0), "all is well again");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn whoever_serves_answers_through_an_upgrade() {
    let mut lab = Lab::with_agent("s-upgrade", &[PodSpec::new("orders").role("orders-role")], &[]);
    let former = lab.agent().unwrap().pid().unwrap();
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();
    let next_pid = next.pid().unwrap();
    let who = |lab: &mut Lab| {
        let (code, status) = lab.document(&["status"]);
        assert!(matches!(code, Some(0 | 1)), "{status}");
        status["agent"]["pid"].as_u64().unwrap()
    };
    assert_eq!(who(&mut lab), u64::from(former), "the one that stands by serves nobody");

    let former_agent = lab.replace_agent(next).unwrap();
    former_agent.signal(kube2ram_sandbox::agent::Signal::TERM).unwrap();
    // Not for a moment is there nobody to ask.
    eventually(u64::from(next_pid), || who(&mut lab));
    let mut former_agent = former_agent;
    assert_eq!(former_agent.wait().unwrap().code(), Some(0));

    assert_eq!(who(&mut lab), u64::from(next_pid));
    eventually(Some(0), || lab.document(&["status"]).0);
    // It waits until the former one accepts nothing more.
    eventually(true, || lab.metric(r#"kube2ram_interceptions_total{result="arrived"}"#) >= 1.0);
    assert_eq!(lab.document(&["explain", "default/orders"]).0, Some(0));
    lab.remove_agent(former_agent).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_an_agent_and_for_others_than_root_the_exit_code_differs() {
    let mut lab = Lab::with_agent("s-codes", &[PodSpec::new("orders").role("orders-role")], &[]);
    assert_eq!(lab.kube2ram(&["status"]).0, Some(0), "the twin");

    lab.agent().unwrap().kill().unwrap();

    for args in [&["status"][..], &["explain", "default/orders"], &["log-level"]] {
        let (code, text) = lab.kube2ram(args);
        assert_eq!(code, Some(69), "{args:?}: {text}");
        assert!(text.contains("no agent runs") && text.lines().count() == 1, "{text}");
    }
    assert_eq!(lab.kube2ram(&["explain", "orders"]).0, Some(64));
    lab.agent().unwrap().start().unwrap();
    let nobody = lab
        .pod("orders")
        .unwrap()
        .pod()
        .command("app", "setpriv")
        .unwrap()
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_kube2ram"), "status"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&nobody.stderr);
    // A binary below root's home cannot even be started by others.
    assert!(nobody.status.code() == Some(77) || said.contains("Permission denied"), "{said}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_log_has_more_for_a_while_and_then_by_itself_what_it_had() {
    let mut lab = Lab::with_agent("s-log", &[PodSpec::new("orders").role("orders-role")], &[]);
    let has_debug = |lab: &mut Lab| lab.agent().unwrap().log().contains("DEBUG");
    assert_eq!(lab.kube2ram(&["log-level"]), (Some(0), "info, as set by the flags\n".to_owned()));
    assert_eq!(lab.ask("orders", LIST).status, 200);
    assert!(!has_debug(&mut lab));

    let began = Instant::now();
    let (code, said) = lab.kube2ram(&["log-level", "debug", "--for", "3s"]);

    assert!(code == Some(0) && said.starts_with("debug until "), "{said}");
    lab.add(&PodSpec::new("new").role("new-role"));
    eventually(true, || has_debug(&mut lab));
    eventually("info, as set by the flags\n".to_owned(), || lab.kube2ram(&["log-level"]).1);
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
    let log = lab.agent().unwrap().log();
    assert!(
        log.contains("log level changed") && log.contains("log level reset to that of the flags"),
        "{log}"
    );
    lab.kube2ram(&["log-level", "error"]);
    assert_eq!(lab.kube2ram(&["log-level", "reset"]).1, "info, as set by the flags\n");
}
