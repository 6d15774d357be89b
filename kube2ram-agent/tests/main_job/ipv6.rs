//! The metadata server's IPv6 address serves the same as its IPv4 address: to pods of both families, to pods
//! without an IPv4 address, and to pods in the host's network, on nodes of both families and on nodes without
//! IPv4.

use std::process::Command;

use kube2ram_sandbox::{
    client::{Family, Reply},
    node::PodSpec,
    standin::Accounts,
};

use crate::support::{INSTANCE_ID, LIST, Lab, eventually, owner, run, url, url6};

/// A pod of both families, one of IPv6 alone, and one in the host's network.
const PODS: [&str; 3] = ["dual", "six", "daemon"];

fn lab(name: &str, extra: &[&str]) -> Lab {
    let pod = |name: &str| PodSpec::new(name).role(&format!("{name}-role"));
    let mut lab =
        Lab::with_agent(name, &[pod("dual"), pod("six").ipv6_only(), pod("daemon").host_network()], extra);
    // Until its own listener is there, a pod without IPv4 cannot reach the host's.
    eventually(2.0, || lab.metric("kube2ram_pod_listeners"));
    lab
}

fn ask6(lab: &Lab, pod: &str, target: &str) -> Reply {
    lab.pod(pod).unwrap().curl6(target).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_pod_gets_its_own_role_over_ipv6() {
    let lab = lab("ipv6", &[]);

    for pod in PODS {
        let role = format!("{pod}-role");
        assert_eq!(ask6(&lab, pod, LIST).body, role, "{pod}");
        assert_eq!(owner(&ask6(&lab, pod, &format!("{LIST}{role}"))), role, "{pod}");
        for other in PODS.iter().filter(|other| **other != pod) {
            assert_eq!(
                ask6(&lab, pod, &format!("{LIST}{other}-role")).status,
                403,
                "{pod} asks for {other}'s"
            );
        }
        assert_eq!(ask6(&lab, pod, &format!("{LIST}{}", Accounts::NODE_ROLE)).status, 403, "{pod}");
        assert_eq!(ask6(&lab, pod, INSTANCE_ID).status, 200, "{pod}: passed through");
        // The IPv4 twins.
        assert_eq!(lab.ask(pod, LIST).body, role, "{pod}");
        let mapped = lab.pod(pod).unwrap().curl_from("app", Family::V6Mapped, &url(LIST)).unwrap();
        assert_eq!(mapped.body, role, "{pod}");
    }
    assert_eq!(lab.leaks(), []);
    // The control: processes of the host reach the server itself.
    assert_eq!(lab.host_curl_url(&url6(LIST)).unwrap().body, Accounts::NODE_ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn unmodified_clients_are_redirected_and_see_the_ipv6_address_as_their_peer() {
    let mut lab = lab("ipv6-clients", &[]);
    let agent = lab.agent().unwrap().app_addr();
    let host = format!("::ffff:{}", agent.ip());
    let python = |pod: &str, script: &str| {
        run(lab.pod(pod).unwrap().pod().command("app", "python3").unwrap().args(["-c", script]))
    };

    for pod in PODS {
        let role = format!("{pod}-role");
        let format = " %{http_code} %{remote_ip} %{remote_port}";
        let curl = lab.curl(pod, &["--silent", "--globoff", "--write-out", format, &url6(LIST)]);
        // At the host listener it is that one's.
        let (peer, port) =
            if pod == "daemon" { (host.as_str(), agent.port()) } else { ("fd00:100::100:200", 80) };
        assert_eq!(curl, (Some(0), format!("{role} 200 {peer} 80")), "{pod}");

        let urllib = format!(
            "from urllib.request import urlopen; print(urlopen('{}', timeout=1).read().decode())",
            url6(LIST)
        );
        assert_eq!(python(pod, &urllib), (Some(0), role), "{pod}");

        let script = "import socket\ns = socket.socket(socket.AF_INET6); s.connect(('fd00:100::100:200', 80)); print(s.getpeername()[:2])";
        assert_eq!(python(pod, script), (Some(0), format!("('{peer}', {port})")), "{pod}");
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_an_ipv6_address_the_agent_leaves_it_alone() {
    let lab = lab("ipv6-off", &["--metadata-addr6="]);

    let reply = ask6(&lab, "dual", LIST);

    assert_eq!(reply.body, Accounts::NODE_ROLE, "the server itself answers");
    assert!(!lab.leaks().is_empty());
    assert_eq!(lab.ask("dual", LIST).body, "dual-role");
}

/// Takes the loopback device down, without which a pod has no in-pod listener.
fn take_down_loopback(lab: &Lab, pod: &str) {
    let netns = lab.pod(pod).unwrap().pod().netns().unwrap();
    let mut ip = Command::new("ip");
    ip.arg("-n").arg(netns.file_name().unwrap()).args(["link", "set", "lo", "down"]);
    assert_eq!(run(&mut ip).0, Some(0));
}

/// `status.hostIP` of a node whose first address is IPv6.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_ipv6_host_address_is_replaced_and_the_host_listener_serves_the_ipv6_address() {
    let pods =
        [PodSpec::new("daemon").role("daemon-role").host_network(), PodSpec::new("bare").role("bare-role")];
    let mut lab = Lab::new("ipv6-host-ip", &pods);
    take_down_loopback(&lab, "bare");
    let host_ip = format!("--host-ip={}", lab.node().ip6());
    lab.start(&[&host_ip]);
    eventually(true, || lab.metric(r#"kube2ram_pod_listener_failures_total{step="listen"}"#) >= 1.0);

    for pod in ["daemon", "bare"] {
        let role = format!("{pod}-role");
        assert_eq!(owner(&ask6(&lab, pod, &format!("{LIST}{role}"))), role, "{pod}");
        assert_eq!(lab.credentials(pod, &role), role, "{pod}: the IPv4 twin");
    }

    let log = lab.agent().unwrap().log();
    assert!(log.contains("the configured host address is not used"), "{log}");
    assert!(!log.contains("no IPv4 address that leads outside"), "{log}");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn on_a_node_without_ipv4_pods_get_their_role_and_one_without_a_listener_is_refused() {
    let pod = |name: &str| PodSpec::new(name).role(&format!("{name}-role"));
    let pods = [pod("six").ipv6_only(), pod("daemon").host_network(), pod("bare").ipv6_only()];
    let mut lab = Lab::new("ipv6-node", &pods);
    take_down_loopback(&lab, "bare");
    let flushed = run(lab.node().host_command("ip").args(["-4", "addr", "flush", "scope", "global"]));
    assert_eq!(flushed.0, Some(0), "{}", flushed.1);
    let ip6 = lab.node().ip6();
    lab.prepare(&[&format!("--host-ip={ip6}")]);
    lab.agent().unwrap().spawn().unwrap();
    lab.agent().unwrap().await_ready().unwrap();

    // Metrics are served over IPv6, too.
    let metrics = format!("http://[{ip6}]:{}/metrics", lab.agent().unwrap().admin_addr().port());
    eventually(true, || {
        lab.host_curl_url(&metrics).is_ok_and(|reply| reply.body.contains("\nkube2ram_pod_listeners 1\n"))
    });
    for pod in ["six", "daemon"] {
        let role = format!("{pod}-role");
        assert_eq!(ask6(&lab, pod, LIST).body, role, "{pod}");
        assert_eq!(owner(&ask6(&lab, pod, &format!("{LIST}{role}"))), role, "{pod}");
        assert_eq!(ask6(&lab, pod, &format!("{LIST}{}", Accounts::NODE_ROLE)).status, 403, "{pod}");
        assert_eq!(ask6(&lab, pod, INSTANCE_ID).status, 200, "{pod}: passed through");
        assert_eq!(lab.ask(pod, LIST).body, role, "{pod}: by the IPv4 address");
    }
    // The host listener is at the node's loopback device, which a pod with its own network cannot reach.
    let denied = lab.pod("bare").unwrap().curl6(LIST);
    assert!(denied.is_err(), "{denied:?}");
    assert_eq!(lab.leaks(), []);
    // The control: processes of the host reach the server itself.
    assert_eq!(lab.host_curl_url(&url6(LIST)).unwrap().body, Accounts::NODE_ROLE);
}
