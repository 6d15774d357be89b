//! A node of AWS without kube2ram: pods really reach the metadata server, by both addresses and by the rules
//! of both of its versions.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use kube2ram_sandbox::{Cloud, Sandbox, client::Reply, node::PodSpec, standin::Accounts};

const BINARY: &str = env!("CARGO_BIN_EXE_kube2ram-sandbox");
const LIST: &str = Cloud::Aws.list();

/// A `PUT` for a token from a pod, if it is answered.
fn token(sandbox: &Sandbox, pod: &str, url: &str) -> Option<Reply> {
    let mut client = sandbox.pod(pod).unwrap().client("app").unwrap();
    let header = format!("{}: 60", Cloud::Aws.token_ttl_header());
    let output = client.args(["get", "-X", "PUT", "-H", &header, url]).output().unwrap();
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_reach_both_addresses_and_a_token_makes_as_many_hops_as_it_may() {
    let mut sandbox = Sandbox::create_in("aws-reach", Cloud::Aws).unwrap();
    sandbox.add_pod(&PodSpec::new("orders").role("orders-role")).unwrap();
    sandbox.add_pod(&PodSpec::new("daemon").host_network()).unwrap();
    let urls = [
        format!("http://{}/latest/api/token", Cloud::Aws.metadata_ip()),
        format!("http://[{}]/latest/api/token", Cloud::Aws.metadata_ip6()),
    ];

    let orders = sandbox.pod("orders").unwrap();
    assert_eq!(orders.curl(LIST).unwrap().body, Accounts::NODE_ROLE);
    assert_eq!(orders.curl6(LIST).unwrap().body, Accounts::NODE_ROLE);
    let annotations = &orders.pod().spec().annotations;
    assert_eq!(annotations.keys().collect::<Vec<_>>(), ["iam.amazonaws.com/role"], "of its own cloud");
    for url in &urls {
        assert_eq!(token(&sandbox, "orders", url).unwrap().status, 200, "{url}");
    }
    let node = sandbox.node();
    let ips: [IpAddr; 2] = [orders.pod().ip().into(), orders.pod().ip6().into()];
    for ip in ips {
        let packets = node.sniffer().packets_from(ip);
        assert!(packets.iter().any(|packet| packet.port == 80), "{ip}");
    }

    sandbox.metadata().set_hop_limit(1);

    for url in &urls {
        assert!(token(&sandbox, "orders", url).is_none(), "{url}: the node is a hop");
        assert_eq!(token(&sandbox, "daemon", url).unwrap().status, 200, "{url}");
    }
    assert_eq!(sandbox.pod("orders").unwrap().curl(LIST).unwrap().status, 200, "version 1 knows no hops");
}

/// Cargo builds the examples together with the tests.
fn idle_agent() -> PathBuf {
    Path::new(BINARY).with_file_name("examples").join("idle-agent")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn shop_window_of_aws_shows_when_pods_are_not_protected() {
    let mut show = Command::new(BINARY);
    let output = show.args(["show", "--cloud", "aws", "--agent"]).arg(idle_agent()).output().unwrap();

    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(&format!("{}  (should be orders-role)", Accounts::NODE_ROLE)), "{text}");
    assert!(text.contains("at 169.254.169.254 and fd00:ec2::254"), "{text}");
    assert!(text.contains("✓ host process"), "{text}");
}
