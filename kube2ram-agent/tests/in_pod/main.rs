//! Rung 2: the agent's listeners inside pods' network namespaces: nothing between pod and host can come
//! between a pod and its role, and no pod can use another's. Needs root, `bpftool`, `curl`, `ip`, `nft`,
//! `python3` and `setpriv`; depends on the agent's binary and on `kube2ram-sandbox`.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod life;
mod listener;
mod namespaces;
mod policies;
mod support;

use kube2ram_sandbox::{client::StormReport, node::PodSpec};

use crate::support::{LIST, Lab, eventually, ip_in, output};

fn pods() -> [PodSpec; 3] {
    [
        PodSpec::new("orders").role("orders-role").containers(&["app", "sidecar"]),
        PodSpec::new("billing").role("billing-role"),
        PodSpec::new("daemon").role("daemon-role").host_network(),
    ]
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_cannot_reach_the_host_gets_its_role_from_its_own_listener() {
    let mut lab = Lab::with_agent("in-pod", &pods());
    lab.own_target("orders");

    for cut in [&["route", "del", "default"][..], &["link", "set", "eth0", "down"][..]] {
        ip_in(&lab, "orders", cut);
        assert_eq!(lab.role("orders"), "orders-role", "{cut:?}");
    }
    lab.remove_target("orders");
    assert_ne!(lab.role("orders"), "orders-role", "the control: the host listener is out of reach");
    // None for the hostNetwork pod.
    lab.agent().unwrap().await_metric("kube2ram_pod_listeners", 2.0).unwrap();
    assert_eq!(lab.role("daemon"), "daemon-role");
    assert_eq!(lab.target("daemon"), None);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn ten_thousand_connects_of_two_pods_are_distinguished() {
    const EACH: usize = 5000;
    let mut lab = Lab::without_agent("in-pod-storm", &pods());
    lab.start_without_rates();
    let storms = ["orders", "billing"].map(|pod| {
        lab.own_target(pod);
        // The first credentials may come later than a request waits for them, which is then answered 503.
        eventually(|| (lab.role(pod) == format!("{pod}-role")).then_some(()));
        ip_in(&lab, pod, &["link", "set", "eth0", "down"]);
        let mut storm = lab.pod(pod).unwrap().client("app").unwrap();
        let (connects, role) = (format!("--connects={EACH}"), format!("--expect={pod}-role"));
        storm.args(["storm", &connects, "--concurrency=8", &role]);
        // IPv4, IPv4-mapped, IPv6.
        storm.args([
            "http://100.100.100.200",
            "http://[::ffff:100.100.100.200]",
            "http://[fd00:100::100:200]",
        ]);
        storm.stdout(std::process::Stdio::piped()).spawn().unwrap()
    });

    for storm in storms {
        let report: StormReport = serde_json::from_slice(&storm.wait_with_output().unwrap().stdout).unwrap();

        let StormReport { ok, wrong, missing, late, errors, error_samples, .. } = report;
        assert_eq!((ok + late, wrong, missing, errors), (EACH, 0, 0, 0), "{error_samples:?}");
        // An emulated machine next to other work.
        assert!(late <= EACH / 100, "{late}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_pod_can_use_anothers_listener() {
    let mut lab = Lab::with_agent("in-pod-other", &pods());
    let (orders, billing) = (lab.own_target("orders"), lab.own_target("billing"));
    let metadata = format!("http://100.100.100.200{LIST}");
    let direct = format!("http://127.0.0.1:{}{LIST}", orders.port);
    // A container of a pod in the network namespace of `orders`.
    let in_orders = |pod: &str, url: &str| {
        let netns = format!("--net={}", lab.pod("orders").unwrap().pod().netns().unwrap().display());
        let mut command = lab.pod(pod).unwrap().pod().command("app", "nsenter").unwrap();
        output(command.args([
            &netns,
            "curl",
            "--silent",
            "--max-time",
            "3",
            "--write-out",
            " %{http_code}",
            url,
        ]))
    };

    assert_ne!(orders.netns, billing.netns);
    assert_eq!(orders.port, billing.port, "nothing but the namespace tells them apart");
    for url in [&direct, &direct.replace("127.0.0.1", "0.0.0.0"), &direct.replace("127.0.0.1", "[::1]")] {
        assert_eq!(in_orders("billing", url), " 000", "{url}");
        assert_eq!(
            in_orders("orders", url),
            " 000",
            "nor may its owner, or a proxy in it that anybody may ask: {url}"
        );
        // As `kubectl port-forward`, which is not to give more than the pod's own ports.
        let host = lab.pod("orders").unwrap().pod().netns().unwrap();
        let mut host_process = lab.node().host_command("nsenter");
        let dialled = host_process.arg(format!("--net={}", host.display())).args([
            "curl",
            "--silent",
            "--max-time",
            "3",
            url,
        ]);
        assert_eq!(dialled.output().unwrap().status.code(), Some(7), "a process of the host may not: {url}");
    }
    assert_eq!(
        in_orders("billing", &metadata),
        "billing-role 200",
        "by the host listener, who calls is who is answered"
    );

    assert_eq!(lab.role("orders"), "orders-role");
    assert_eq!(lab.role("billing"), "billing-role");
    let counted = |outcome: &str| format!(r#"kube2ram_kernel_outcomes_total{{outcome="{outcome}"}}"#);
    assert!(lab.metric(&counted("denied_listener")) >= 9.0);
    assert_eq!(lab.metric(&counted("other_namespace")), 1.0);
}
