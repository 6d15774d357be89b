//! The resolver against a name server that loses datagrams, in a network and mount namespace of the test's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::UdpSocket,
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{super::transport::CONNECT_TIMEOUT, *};

const NAME: &str = "sts-vpc.cn-hangzhou.aliyuncs.com";
const PINNED: &str = "sts.pinned.example.com";
const ADDRESS: [u8; 4] = [127, 0, 0, 9];
/// What the wildcard record of a search domain answers.
const WILDCARD: [u8; 4] = [127, 0, 0, 66];
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
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kustomize/base/daemonset.yaml");
    let manifest: Value = serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let pod = &manifest["spec"]["template"]["spec"];
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
    let asked = serve();

    let started = Instant::now();
    let found: BTreeSet<_> = look_up(NAME).unwrap().map(|addr| addr.ip().to_string()).collect();
    let took = started.elapsed();
    let pinned: BTreeSet<_> = look_up(PINNED).unwrap().map(|addr| addr.ip().to_string()).collect();

    let asked = asked.lock().unwrap().clone();
    assert_eq!(asked.keys().collect::<Vec<_>>(), [NAME], "{asked:?}");
    assert!(asked[NAME] > 2, "A and AAAA were lost once: {asked:?}");
    assert_eq!(found, ["127.0.0.9".to_owned()].into());
    assert!(took < CONNECT_TIMEOUT, "{took:?}");
    assert_eq!(pinned, ["127.0.0.7".to_owned()].into(), "the node's hosts file");
}

/// A name server that loses the first datagram of each question, and whose search domain has a wildcard record.
fn serve() -> Arc<Mutex<BTreeMap<String, usize>>> {
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let asked = Arc::<Mutex<BTreeMap<String, usize>>>::default();
    let log = Arc::clone(&asked);
    thread::spawn(move || {
        let mut seen = BTreeSet::new();
        let mut query = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            let query = &query[..length];
            let (name, end) = question(query);
            *log.lock().unwrap().entry(name.clone()).or_default() += 1;
            if seen.insert(query[12..end].to_vec()) {
                continue;
            }
            socket.send_to(&answer(query, end, &name), peer).unwrap();
        }
    });
    asked
}

/// The name that is asked for, and where the question ends (RFC 1035, 4.1.2).
fn question(query: &[u8]) -> (String, usize) {
    let (mut labels, mut at) = (Vec::new(), 12);
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    (labels.join("."), at + 5)
}

fn answer(query: &[u8], end: usize, name: &str) -> Vec<u8> {
    const A: u16 = 1;
    let address = match name {
        NAME => Some(ADDRESS),
        _ if name.ends_with(".corp.example") => Some(WILDCARD),
        _ => None,
    };
    let address = address.filter(|_| query[end - 4..end - 2] == A.to_be_bytes());
    let mut reply = query[..2].to_vec();
    // A response without an error, to one question.
    reply.extend([0x81, 0x80, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    reply.extend(&query[12..end]);
    if let Some(address) = address {
        // The question's name, A, IN, a minute, four bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend(address);
    }
    reply
}
