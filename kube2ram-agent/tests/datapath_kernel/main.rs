//! Rung 2: the eBPF programs in the running kernel, below the rest of the agent. Each "pod" is a cgroup of
//! the test's own in the host's network namespace.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod coexistence;
mod ipv6;
mod ipv6_packets;
#[path = "../lab/mod.rs"]
mod lab;
mod socket_options;
mod wire;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::fd::{AsFd as _, AsRawFd as _},
    process::{self, Command, Output},
    thread,
    time::{Duration, Instant},
};

use kube2ram_agent::datapath::{Datapath, Origin, OriginError, Origins as _, dial_as_pod};
use kube2ram_cloud::upstream::PassGrant as _;
use kube2ram_common::{connection::addr6_be, names};
use serde_json::Value;

use self::lab::{Lab, METADATA, METADATA6, own_cgroup};

/// Waits until something is so; the kernel frees devices of a removed namespace some time later.
fn eventually(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "not within 60 s");
        thread::sleep(Duration::from_millis(10));
    }
}

#[expect(clippy::print_stderr, reason = "says what does not run here")]
fn say(what: &str) {
    eprintln!("{what}");
}

fn connect(family: &str, host: &str, port: u16) -> String {
    format!(
        "import socket\ns = socket.socket(socket.{family}, socket.SOCK_STREAM)\ns.settimeout(5)\ns.connect(('{host}', {port}))\n\
         print(s.getpeername()[:2])\ns.recv(1)"
    )
}

fn dial() -> String {
    connect("AF_INET", &METADATA.ip().to_string(), METADATA.port())
}

fn output(lab: &Lab, cgroup: &str, script: &str) -> Output {
    lab.python(cgroup, script).wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").args(["-j"]).args(arguments).output().expect("bpftool");
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_child_of_the_agent_dials_as_a_pod_does_and_is_refused_where_nobody_listens() {
    let lab = Lab::new();
    let origins = lab.attach().origins().unwrap();
    let (mut cgroup, patience) = (None, Duration::from_secs(5));

    dial_as_pod(&lab.settings(), METADATA, patience, |made| cgroup = Some(made)).unwrap();

    let origin = origins.origin_of(lab.accept().as_fd()).expect("vouched for");
    assert_eq!(Some(origin), cgroup.map(Origin::Task));
    assert!(!lab.cgroup.join("pods/kube2ram-dial").exists());
    let other_port = SocketAddrV4::new(*METADATA.ip(), 81);
    let refused = dial_as_pod(&lab.settings(), other_port, patience, |_| {}).unwrap_err();
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert!(why.contains("Operation not permitted"), "{why}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn returns_the_cgroup_that_connected() {
    let lab = Lab::new();
    let origins = lab.attach().origins().unwrap();

    for cgroup in ["pods/a", "pods/b", "pods/a/nested"] {
        for (family, host) in
            [("AF_INET", METADATA.ip().to_string()), ("AF_INET6", format!("::ffff:{}", METADATA.ip()))]
        {
            let client = lab.python(cgroup, &connect(family, &host, METADATA.port()));

            let accepted = lab.accept();
            let origin = origins.origin_of(accepted.as_fd()).expect("vouched for");
            drop(accepted);
            let output = client.wait_with_output().unwrap();

            assert_eq!(origin, lab.task(cgroup), "{cgroup} over {family}");
            let agent = host.replace(&METADATA.ip().to_string(), &lab.agent().ip().to_string());
            let peer = format!("('{agent}', {})", lab.agent().port());
            assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), peer, "nothing is kept of it");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn denies_other_ports_and_protocols() {
    let lab = Lab::new();
    let datapath = lab.attach();

    let tcp = output(&lab, "pods/a", &connect("AF_INET", &METADATA.ip().to_string(), 443));
    let udp = format!(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('{}', 80))",
        METADATA.ip()
    );
    let udp = output(&lab, "pods/a", &udp);

    for output in [tcp, udp] {
        assert!(stderr(&output).contains("PermissionError"), "{output:?}");
    }
    let counters: Vec<_> = datapath.counters().unwrap().read().collect();
    assert!(
        counters.contains(&("denied_port", 1)) && counters.contains(&("denied_protocol", 1)),
        "{counters:?}"
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn vouches_for_a_direct_dial_of_a_pod_and_of_nobody_else() {
    let lab = Lab::new();
    let datapath = lab.attach();
    let origins = datapath.origins().unwrap();
    let (ip, port) = (lab.agent().ip().to_string(), lab.agent().port());
    let direct = |cgroup: &str, script: &str| {
        let client = lab.python(cgroup, script);
        let accepted = lab.accept();
        let origin = origins.origin_of(accepted.as_fd());
        drop(accepted);
        client.wait_with_output().unwrap();
        origin
    };

    // As an http_proxy; the second as a JVM does it.
    for script in [connect("AF_INET", &ip, port), connect("AF_INET6", &format!("::ffff:{ip}"), port)] {
        assert_eq!(direct("pods/a", &script).unwrap(), lab.task("pods/a"));
        assert!(matches!(direct("host", &script), Err(OriginError::Unvouched)));
    }
    assert_eq!(direct("pods/a", &dial()).unwrap(), lab.task("pods/a"), "redirected");
    let counters: Vec<_> = datapath.counters().unwrap().read().collect();
    assert!(
        counters.contains(&("dialled_agent", 2)) && counters.contains(&("redirected", 1)),
        "{counters:?}"
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pass_lets_the_agents_own_socket_through() {
    let lab = Lab::new();
    let pass = lab.attach().pass().unwrap();
    let connects = |marked: bool| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
        if marked {
            pass.grant(socket.as_fd()).unwrap();
        }
        socket.connect(&METADATA.into()).map(|()| socket.as_raw_fd())
    };

    // A socket belongs to the cgroup in which it is made: as a pod's process for a moment.
    let home = own_cgroup(&lab.cgroup).join("cgroup.procs");
    fs::write(lab.cgroup.join("pods/b/cgroup.procs"), process::id().to_string()).unwrap();
    let (marked, plain) = (connects(true), connects(false));
    fs::write(home, process::id().to_string()).unwrap();

    assert!(marked.is_ok(), "{marked:?}");
    assert_eq!(plain.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn fails_closed_without_the_agent_and_recovers_with_it() {
    let mut lab = Lab::new();
    drop(lab.attach());
    lab.listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(); // the old one is closed

    let dead = output(&lab, "pods/a", &dial());
    assert!(stderr(&dead).contains("ConnectionRefusedError"), "{dead:?}");

    // The next agent swaps the programs under the pinned links, and writes its own address.
    let links = |lab: &Lab| -> Vec<u64> {
        let id = lab.id("pods").0;
        let all = bpftool(&["link", "show"]);
        let of_pods = all.as_array().unwrap().iter().filter(|link| link["cgroup_id"] == id);
        of_pods.map(|link| link["id"].as_u64().unwrap()).collect()
    };
    let before = links(&lab);
    let origins = lab.attach().origins().unwrap();
    let client = lab.python("pods/a", &dial());
    let origin = origins.origin_of(lab.accept().as_fd()).unwrap();

    assert_eq!(origin, lab.task("pods/a"));
    assert!(client.wait_with_output().unwrap().status.success());
    assert_eq!((before.len(), &before), (9, &links(&lab)), "the links were kept");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_recreated_pods_cgroup_gets_its_links_back() {
    let lab = Lab::new();
    drop(lab.attach());
    for cgroup in ["pods/a/nested", "pods/a", "pods/b", "pods"] {
        fs::remove_dir(lab.cgroup.join(cgroup)).unwrap();
    }
    fs::create_dir_all(lab.cgroup.join("pods/a")).unwrap();

    let origins = lab.attach().origins().unwrap();
    let client = lab.python("pods/a", &dial());
    let origin = origins.origin_of(lab.accept().as_fd()).unwrap();

    assert_eq!(origin, lab.task("pods/a"));
    client.wait_with_output().unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_second_agent_is_refused() {
    let lab = Lab::new();
    let first = lab.attach();

    let second = Datapath::attach(&lab.settings()).map(drop).unwrap_err().to_string();
    drop(first);

    assert!(second.starts_with("another agent uses "), "{second}");
    assert!(Datapath::attach(&lab.settings()).is_ok());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn names_and_types_read_well_in_bpftool() {
    let lab = Lab::new();
    let _datapath = lab.attach();
    let maps = lab.bpf_dir.join("v2/maps");
    let pin = |name: &str| maps.join(name).into_os_string().into_string().unwrap();

    let mut pinned: Vec<_> =
        fs::read_dir(&maps).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    pinned.sort();
    let mut expected = names::map::ALL.map(str::to_owned);
    expected.sort();

    assert_eq!(pinned, expected);
    for name in names::map::ALL {
        assert_eq!(bpftool(&["map", "show", "pinned", &pin(name)])["name"], name);
    }
    let dump = bpftool(&["map", "dump", "pinned", &pin(names::map::CONFIG)]);
    let address = u32::from_ne_bytes(METADATA.ip().octets());
    let config = &dump[0]["formatted"]["value"];
    assert_eq!(config["metadata_addr_be"], address, "{dump}");
    assert_eq!(config["metadata_addr6_be"], serde_json::json!(addr6_be(METADATA6)), "{dump}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_map_of_another_layout_is_refused() {
    let lab = Lab::new();
    let maps = lab.bpf_dir.join("v2/maps");
    fs::create_dir_all(&maps).unwrap();
    let path = maps.join(names::map::CONFIG);
    let status = Command::new("bpftool")
        .args([
            "map",
            "create",
            path.to_str().unwrap(),
            "type",
            "array",
            "key",
            "4",
            "value",
            "4096",
            "entries",
            "1",
            "name",
            "other",
        ])
        .status()
        .unwrap();
    assert!(status.success());

    let error = Datapath::attach(&lab.settings()).map(drop).unwrap_err().to_string();

    assert!(error.contains("does not fit this agent"), "{error}");
    fs::remove_file(path).unwrap();
    assert!(Datapath::attach(&lab.settings()).is_ok());
}
