//! The resolver against a name server that loses datagrams, in a network and mount namespace of the test's
//! own.

use std::{collections::BTreeSet, env, fs, net::Ipv4Addr, process::Command, thread, time::Instant};

use kube2ram_sandbox::standin::{Loss, NameServer};
use serde_json::Value;

use super::{super::transport::CONNECT_TIMEOUT, *};

const NAME: &str = "sts-vpc.cn-hangzhou.aliyuncs.com";
const PINNED: &str = "sts.pinned.example.com";
const INSIDE: &str = "KUBE2RAM_TEST_INSIDE";

#[test]
fn finds_names_that_the_hosts_file_lists() {
    let hosts =
        "127.0.0.1 localhost\n10.0.0.7\tproxy STS.aliyuncs.com # sts.cn-a.aliyuncs.com\n#10.0.0.8 off\n\n";

    for (name, expected) in [
        ("localhost", true),
        ("sts.aliyuncs.com", true),
        ("proxy", true),
        ("sts.cn-a.aliyuncs.com", false),
        ("10.0.0.7", false),
        ("off", false),
        ("aliyuncs.com", false),
        ("", false),
    ] {
        assert_eq!(is_listed(hosts, name), expected, "{name:?}");
    }
}

/// The `options` of the manifest's `dnsConfig`, as the kubelet writes them.
fn shipped_options() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/kube2ram/values.yaml");
    let pod: Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(pod["dnsPolicy"], "Default", "the node's own resolver");
    let options = pod["dnsConfig"]["options"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    options
        .iter()
        .map(|option| format!("{}:{}", text(&option["name"]), text(&option["value"])))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_lost_datagram_costs_no_detour_and_a_search_domain_is_never_asked() {
    if env::var_os(INSIDE).is_none() {
        let directory = tempfile::tempdir().unwrap();
        let (resolv, hosts) = (directory.path().join("resolv.conf"), directory.path().join("hosts"));
        let options = shipped_options();
        fs::write(&resolv, format!("nameserver 127.0.0.1\nsearch corp.example\noptions ndots:5 {options}\n"))
            .unwrap();
        fs::write(&hosts, format!("127.0.0.7 {PINNED}\n")).unwrap();
        let script = r#"ip link set lo up && mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/hosts && exec "$3" --ignored --exact --nocapture "$4""#;
        let name = thread::current().name().unwrap().to_owned();
        let output = Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", script, "sh"])
            .args([resolv, hosts, env::current_exe().unwrap()])
            .arg(name)
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("1 passed"), "{said}");
        return;
    }
    let records = [(NAME, Ipv4Addr::new(127, 0, 0, 9)), ("*.corp.example", Ipv4Addr::new(127, 0, 0, 66))];
    let server = NameServer::start(Ipv4Addr::LOCALHOST, &records, Loss::First).unwrap();

    let started = Instant::now();
    let found: BTreeSet<_> = look_up(NAME).unwrap().map(|addr| addr.ip().to_string()).collect();
    let took = started.elapsed();
    let pinned: BTreeSet<_> = look_up(PINNED).unwrap().map(|addr| addr.ip().to_string()).collect();

    let asked = server.asked();
    assert_eq!(asked.keys().collect::<Vec<_>>(), [NAME], "{asked:?}");
    assert!(asked[NAME] > 2, "A and AAAA were lost once: {asked:?}");
    assert_eq!(found, ["127.0.0.9".to_owned()].into());
    assert!(took < CONNECT_TIMEOUT, "{took:?}");
    assert_eq!(pinned, ["127.0.0.7".to_owned()].into(), "the node's hosts file");
}
