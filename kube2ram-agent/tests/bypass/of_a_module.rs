//! What few kernels have built in, and distributions' have as modules: protocols, and kube-proxy's IPVS.
//! `cargo xtask test --kernels` runs these where the modules are, and where it would be a failure if they
//! were not.

use std::{fs, process::Command};

use kube2ram_sandbox::{Sandbox, standin::Accounts};

use super::{
    LIST, REDIRECTED, Row, command, ip, is_skipped, no_packet_arrives, openings, outcome, restart_guarded,
    sandbox, say, start_unguarded,
};

const PROTOCOLS: [Row; 5] = [
    ("sctp", false, "timeout"),
    // These two do not wait for an answer.
    ("sctp_one_to_many", false, "sent"),
    ("sctp_connectx", false, "EINPROGRESS"),
    ("dccp", false, "timeout"),
    ("smc", false, REDIRECTED),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_protocol_of_a_pod_reaches_the_metadata_server() {
    let sandbox = sandbox("bypass-protocol");
    let ip = ip(&sandbox);
    no_packet_arrives(sandbox, &PROTOCOLS, &ip);
}

/// Masqueraded is what the node itself sends; and what pods send to the second one, as with
/// `--masquerade-all`.
const VIRTUAL: [&str; 2] = ["10.96.0.10", "10.96.0.11"];
const MASQUERADE: &str = "table ip kube2ram-test { \
    chain output { type nat hook output priority -100; ip daddr { 10.96.0.10, 10.96.0.11 } meta mark set 0x4000; }; \
    chain prerouting { type nat hook prerouting priority dstnat; ip daddr 10.96.0.11 meta mark set 0x4000; }; \
    chain postrouting { type nat hook postrouting priority srcnat; meta mark 0x4000 masquerade; }; }";
const CONNECTION_TRACKING: &str = "/proc/sys/net/ipv4/vs/conntrack";
const DEVICE: &str = "k2ripvs";

/// Makes the node one of kube-proxy's IPVS mode, with Services whose endpoint is the metadata server: its
/// addresses on a device that is down, a virtual server each, connection tracking, and masquerading of what
/// its own rules have marked. Returns whether there is IPVS.
fn serve_virtually(sandbox: &Sandbox) -> bool {
    let serve = |address| outcome(sandbox.node().host_command("python3"), "serve", &[address]);
    if is_skipped("ipvs", &serve(VIRTUAL[0])) {
        return false;
    }
    assert_eq!(serve(VIRTUAL[1]), "sent");
    fs::write(CONNECTION_TRACKING, "1").unwrap();
    run("ip", &["link", "add", DEVICE, "type", "dummy"]);
    for address in VIRTUAL {
        run("ip", &["addr", "add", &format!("{address}/32"), "dev", DEVICE]);
    }
    run("nft", &[MASQUERADE]);
    true
}

fn run(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
}

/// How many packets the rule has dropped.
fn dropped_as_untracked() -> String {
    let chain = ["list", "chain", "ip", "kube2ram", "postrouting"];
    let output = Command::new("nft").args(chain).output().unwrap();
    let chain = String::from_utf8(output.stdout).unwrap();
    let (_, rest) = chain.split_once("ct state untracked counter packets ").unwrap();
    rest.split(' ').next().unwrap().to_owned()
}

/// Whose, the way, its argument.
const SERVED: [(&str, &str, &str); 4] = [
    ("pod", "service", VIRTUAL[0]),
    ("pod", "service", VIRTUAL[1]),
    // A virtual server of the pod's own.
    ("pod", "own_server", "10.96.0.12"),
    // What IPVS sends for a socket passes no hook of its cgroup.
    ("host-pod", "service", VIRTUAL[0]),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_virtual_server_leads_a_pod_to_the_metadata_server() {
    let mut sandbox = sandbox("bypass-ipvs");
    if !serve_virtually(&sandbox) {
        return;
    }
    let attempt = |sandbox: &Sandbox, (pod, way, address): (&str, &str, &str), when: &str| {
        let before = openings(sandbox);
        let outcome = outcome(command(sandbox, pod, way), way, &[address]);
        let packets = openings(sandbox) - before;
        say(&format!("row ipvs {pod} {way} {address} {when}: {outcome}, {packets} packets"));
        (outcome, packets)
    };
    let untracked = |sandbox: &Sandbox, when: &str| {
        fs::write(CONNECTION_TRACKING, "0").unwrap();
        let (outcome, packets) = attempt(sandbox, SERVED[3], &format!("untracked, {when}"));
        fs::write(CONNECTION_TRACKING, "1").unwrap();
        (outcome, packets)
    };
    let of_the_node =
        |sandbox: &Sandbox| anyhow::Ok(sandbox.host_curl_url(&format!("http://{}{LIST}", VIRTUAL[0]))?.body);

    // The control: the rest of the ring does not see these.
    start_unguarded(&mut sandbox);
    for row in SERVED {
        let (outcome, packets) = attempt(&sandbox, row, "without the guard");
        assert!(packets > 0, "{row:?} without the guard: {outcome}");
    }
    assert_eq!(of_the_node(&sandbox).unwrap(), Accounts::NODE_ROLE);
    assert!(untracked(&sandbox, "without the guard").1 > 0);
    restart_guarded(&mut sandbox);
    for row in SERVED {
        assert_eq!(attempt(&sandbox, row, "with the guard"), ("timeout".to_owned(), 0), "{row:?}");
    }
    assert_eq!(dropped_as_untracked(), "0");
    assert_eq!(untracked(&sandbox, "with the guard"), ("timeout".to_owned(), 0));
    assert_ne!(dropped_as_untracked(), "0");
    // The node's own use of a virtual server cannot be distinguished from that of a pod in its network.
    let before = openings(&sandbox);
    assert!(of_the_node(&sandbox).is_err());
    assert_eq!(openings(&sandbox), before);
    assert_eq!(sandbox.pod("pod").unwrap().curl(LIST).unwrap().body, REDIRECTED);
    assert_eq!(sandbox.host_curl(LIST).unwrap().body, Accounts::NODE_ROLE);
}
