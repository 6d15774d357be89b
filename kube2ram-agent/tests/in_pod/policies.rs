//! Rules of netfilter between a pod and the host, as network plugins, service meshes and pods themselves have
//! them.

use std::process::Command;

use crate::{
    pods,
    support::{Lab, output},
};

/// Rules in a pod's network namespace, or the node's; removed when dropped.
struct Rules(Vec<String>);

impl Rules {
    fn load(netns: Option<&str>, chain: &str) -> Self {
        let prefix = netns.map(|netns| vec!["ip".into(), "netns".into(), "exec".into(), netns.into()]);
        let rules = Self(prefix.unwrap_or_default());
        assert_eq!(rules.nft(&format!("table ip kube2ram-test {{ chain way {{ {chain}; }}; }}")), "");
        rules
    }

    fn nft(&self, rules: &str) -> String {
        let words: Vec<_> = self.0.iter().map(String::as_str).chain(["nft", rules]).collect();
        output(Command::new(words[0]).args(&words[1..]))
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        self.nft("delete table ip kube2ram-test");
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
        let rules = Rules::load(place.map(String::as_str), &chain);

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
