//! Rules of netfilter between a pod and the host, as network plugins, service meshes and pods themselves have
//! them.

use std::process::Command;

use crate::{
    LIST,
    listener::{end, holding},
    pods,
    support::{Lab, output},
};

/// Rules in a pod's network namespace, or the node's; removed when dropped.
struct Rules {
    /// `ip` or `ip6`.
    family: &'static str,
    prefix: Vec<String>,
}

impl Rules {
    fn load(netns: Option<&str>, family: &'static str, chain: &str) -> Self {
        let prefix = netns.map(|netns| vec!["ip".into(), "netns".into(), "exec".into(), netns.into()]);
        let rules = Self { family, prefix: prefix.unwrap_or_default() };
        assert_eq!(rules.nft(&format!("table {family} kube2ram-test {{ chain way {{ {chain}; }}; }}")), "");
        rules
    }

    fn nft(&self, rules: &str) -> String {
        let words: Vec<_> = self.prefix.iter().map(String::as_str).chain(["nft", rules]).collect();
        output(Command::new(words[0]).args(&words[1..]))
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        self.nft(&format!("delete table {} kube2ram-test", self.family));
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn rules_between_pod_and_host_do_not_come_between_a_pod_and_its_role() {
    let lab = Lab::with_agent("in-pod-rules", &pods());
    let target = lab.own_target("orders");
    let pod = lab.pod("orders").unwrap().pod();
    let netns = pod.netns().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let (node, pod) = (lab.node().ip(), pod.ip());
    let cases = [
        // An egress policy, as plugins enforce it: on the host, or in the pod.
        (None, format!("type filter hook input priority -200; ip saddr {pod} drop")),
        (None, format!("type filter hook prerouting priority -200; ip saddr {pod} ip daddr {node} reject")),
        (Some(&netns), "type filter hook output priority 0; oifname \"eth0\" drop".to_owned()),
        // Translation of the source on either side: the host listener would see another connection than the
        // one that was recorded.
        (Some(&netns), "type nat hook postrouting priority 100; oifname \"eth0\" meta l4proto tcp masquerade to :20000-29999".into()),
        (None, format!("type nat hook input priority 100; ip saddr {pod} meta l4proto tcp snat to 10.99.0.9:20000-29999")),
        // A mesh that sends everything to a proxy, which is not there, but what goes to 127.0.0.1 (as Istio's
        // and Consul's rules do).
        (
            Some(&netns),
            "type nat hook output priority -100; ip daddr != 127.0.0.1 meta l4proto tcp redirect to :15001".into(),
        ),
    ];

    for (place, chain) in cases {
        let rules = Rules::load(place.map(String::as_str), "ip", &chain);

        assert_eq!(lab.role("orders"), "orders-role", "{chain}");
        lab.remove_target("orders");
        assert_ne!(lab.role("orders"), "orders-role", "the control, through the host listener: {chain}");

        lab.set_target("orders", &target);
        drop(rules);
    }
    // And both twins without any rules.
    assert_eq!(lab.role("orders"), "orders-role");
    lab.remove_target("orders");
    assert_eq!(lab.role("orders"), "orders-role", "the host listener serves where nothing is in the way");
}

/// The user id of a mesh's proxy.
const PROXY_UID: u32 = 1337;

/// A proxy of both families to which the rules below lead: it answers everything in the same way.
const PROXY: &str = "import socket\nl = socket.create_server(('::', 15001), family=socket.AF_INET6, dualstack_ipv6=True)\n\
                     print('held', flush=True)\nwhile True:\n  c = l.accept()[0]\n  c.recv(4096)\n  \
                     c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nproxy')\n  c.close()";

/// The rules of meshes for a pod's outgoing connections: FAMILY is `ip` or `ip6`, and LOOPBACK is the only
/// address that they exclude.
const MESHES: [(&str, &str); 2] = [
    ("Consul", "meta skuid 1337 return; FAMILY daddr LOOPBACK return; meta l4proto tcp redirect to :15001"),
    // It sends what its proxy dials on the loopback device to the proxy's port for incoming connections.
    (
        "Istio",
        "oifname lo FAMILY daddr != LOOPBACK meta l4proto tcp meta skuid 1337 redirect to :15001; \
         oifname lo meta skuid != 1337 return; meta skuid 1337 return; FAMILY daddr LOOPBACK return; \
         meta l4proto tcp redirect to :15001",
    ),
];

/// What a process of a pod with this user id is answered; nothing without an answer.
fn answer(lab: &Lab, pod: &str, uid: u32, url: &str) -> String {
    let mut command = lab.pod(pod).unwrap().pod().command("app", "setpriv").unwrap();
    command.args([format!("--reuid={uid}"), format!("--regid={uid}")]);
    output(command.args(["--clear-groups", "curl", "--silent", "--globoff", "--max-time", "3", url]))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_of_a_mesh_gets_no_request_of_its_pod_for_the_metadata_server() {
    let mut lab = Lab::with_agent("in-pod-mesh", &pods());
    lab.own_target("orders");
    let netns = lab.pod("orders").unwrap().pod().netns().unwrap();
    let netns = netns.file_name().unwrap().to_str().unwrap().to_owned();
    let proxy = holding(&lab, "orders", PROXY);
    let addresses = ["100.100.100.200", "[::ffff:100.100.100.200]", "[fd00:100::100:200]"];
    let metadata = addresses.map(|address| format!("http://{address}{LIST}"));
    // Nothing listens there.
    let elsewhere = [format!("http://{}/", lab.node().ip()), format!("http://[{}]/", lab.node().ip6())];

    for (mesh, chain) in MESHES {
        let _rules = [("ip", "127.0.0.1"), ("ip6", "::1")].map(|(family, loopback)| {
            let chain = chain.replace("FAMILY", family).replace("LOOPBACK", loopback);
            Rules::load(Some(&netns), family, &format!("type nat hook output priority -100; {chain}"))
        });
        for order in ["the listener, then the rules", "the rules, then the listener"] {
            if order.starts_with("the rules") {
                lab.agent().unwrap().restart(None).unwrap();
                lab.own_target("orders");
            }
            for uid in [0, PROXY_UID] {
                for url in &metadata {
                    let answered = answer(&lab, "orders", uid, url);
                    assert_eq!(answered, "orders-role", "{mesh}, {order}: user {uid} at {url}");
                }
                for url in &elsewhere {
                    let answered = answer(&lab, "orders", uid, url);
                    let expected = if uid == PROXY_UID { "" } else { "proxy" };
                    assert_eq!(answered, expected, "the control, {mesh}, {order}: user {uid} at {url}");
                }
                // Consul redirects the application there, and Istio its proxy.
                let answered = answer(&lab, "orders", uid, "http://127.0.0.2/");
                let is_redirected = (mesh == "Istio") == (uid == PROXY_UID);
                assert_eq!(answered == "proxy", is_redirected, "the control, {mesh}, {order}: user {uid}");
            }
        }
    }
    end(proxy);
}
