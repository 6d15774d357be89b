//! The metadata server's IPv6 address: a connect(2) to it is redirected to the same listener as one to the
//! IPv4 address, and everything else is denied.

use std::{fs, os::fd::AsFd as _, process::Command};

use kube2ram_agent::datapath::{Datapath, Origins as _};
use kube2ram_cloud::MetadataAddr;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{
    connect,
    lab::{Lab, METADATA, METADATA6},
    output, stderr,
};

/// Moves this thread, and so the lab's listener and clients, to its own network namespace, which ends with
/// them.
#[expect(unsafe_code, reason = "the call is unsafe for flags that unshare memory or files")]
pub(crate) fn enter_namespace() {
    // SAFETY: a network namespace is no memory and no file.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    ip(&["link", "set", "lo", "up"]);
}

pub(crate) fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().expect("iproute2").success(), "ip {arguments:?}");
}

fn dial6() -> String {
    connect("AF_INET6", &METADATA6.to_string(), METADATA.port())
}

fn counter(datapath: &Datapath, name: &str) -> u64 {
    datapath.counters().unwrap().read().find(|(label, _)| *label == name).unwrap().1
}

/// A script with `s`, an IPv6 socket, and `M`, the metadata server. Prints the error's name, if there is one.
fn script(kind: &str, attempt: &str) -> String {
    format!(
        "import errno, socket\nM = ('{METADATA6}', {})\ns = socket.socket(socket.AF_INET6, socket.SOCK_{kind})\ns.settimeout(5)\n\
         try:\n  {attempt}\nexcept OSError as error: print(errno.errorcode[error.errno])",
        METADATA.port()
    )
}

fn error_of(lab: &Lab, cgroup: &str, kind: &str, attempt: &str) -> String {
    let output = output(lab, cgroup, &script(kind, attempt));
    assert!(output.status.success(), "{attempt}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn assert_vouches_for_the_caller(lab: &Lab, datapath: &Datapath) {
    let origins = datapath.origins().unwrap();
    for cgroup in ["pods/a", "pods/b", "pods/a/nested"] {
        let client = lab.python(cgroup, &dial6());

        let accepted = lab.accept();
        let origin = origins.origin_of(accepted.as_fd()).expect("vouched for");
        assert!(accepted.peer_addr().unwrap().is_ipv4());
        drop(accepted);
        let output = client.wait_with_output().unwrap();

        assert_eq!(origin, lab.task(cgroup));
        let (peer, agent) = (String::from_utf8(output.stdout).unwrap(), lab.agent());
        let mapped = format!("('::ffff:{}', {})", agent.ip(), agent.port());
        assert_eq!(peer.trim(), mapped, "of the host listener nothing is kept");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn returns_the_cgroup_that_connected_to_the_ipv6_address() {
    let lab = Lab::new();
    let datapath = lab.attach();

    assert_vouches_for_the_caller(&lab, &datapath);

    assert_eq!(counter(&datapath, "redirected"), 3);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn redirects_where_the_network_has_no_ipv6_at_all() {
    enter_namespace();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    let lab = Lab::new();
    let datapath = lab.attach();
    assert_eq!(error_of(&lab, "host", "STREAM", "s.connect(('::1', 9))"), "EADDRNOTAVAIL", "no IPv6 here");

    assert_vouches_for_the_caller(&lab, &datapath);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn returns_the_cgroup_however_it_connects() {
    let lab = Lab::new();
    let origins = lab.attach().origins().unwrap();
    for attempt in [
        "s.setblocking(False); assert s.connect_ex(M) == errno.EINPROGRESS; s.settimeout(5); s.recv(1)",
        "s.settimeout(None); s.sendto(b'x', socket.MSG_FASTOPEN, M); s.recv(1)",
        "s.setsockopt(socket.IPPROTO_TCP, 30, 1); s.connect(M); s.sendall(b'x'); s.recv(1)",
        "s.bind(('::', 0)); s.connect(M); s.recv(1)",
    ] {
        let client = lab.python("pods/a", &script("STREAM", attempt));

        let accepted = lab.accept();
        let origin = origins.origin_of(accepted.as_fd());
        drop(accepted);
        let output = client.wait_with_output().unwrap();

        assert_eq!(origin.ok(), Some(lab.task("pods/a")), "{attempt}");
        // What the client sent was never read, so that closing resets the connection.
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.is_empty() || said == "ECONNRESET\n", "{attempt}: {said}{:?}", output.stderr);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_socket_of_ipv6_alone_is_refused() {
    let lab = Lab::new();
    let _datapath = lab.attach();

    let only = error_of(
        &lab,
        "pods/a",
        "STREAM",
        "s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); s.connect(M)",
    );
    let bound = error_of(&lab, "pods/a", "STREAM", "s.bind(('::1', 0)); s.connect(M)");

    assert_eq!((only.as_str(), bound.as_str()), ("ENETUNREACH", "ENETUNREACH"));
    lab.listener.set_nonblocking(true).unwrap();
    assert!(lab.listener.accept().is_err(), "nobody connected");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn denies_other_ports_and_protocols_of_the_ipv6_address() {
    let lab = Lab::new();
    let datapath = lab.attach();

    for (kind, attempt, counted) in [
        ("STREAM", "s.connect((M[0], 443))", "denied_port"),
        ("DGRAM", "s.connect(M)", "denied_protocol"),
        ("DGRAM", "s.sendto(b'x', M)", "denied_message"),
        ("DGRAM", "s.sendto(b'x', (M[0], 53))", "denied_message"),
        ("DGRAM", "s.sendmsg([b'x'], [], 0, M)", "denied_message"),
    ] {
        let before = counter(&datapath, counted);
        assert_eq!(error_of(&lab, "pods/a", kind, attempt), "EPERM", "{attempt}");
        assert_eq!(counter(&datapath, counted), before + 1, "{attempt}");
        assert_ne!(error_of(&lab, "host", kind, attempt), "EPERM", "{attempt} of the host");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn leaves_neighbours_of_the_ipv6_address_alone() {
    enter_namespace();
    let lab = Lab::new();
    let _datapath = lab.attach();
    ip(&["-6", "route", "add", "local", "2001:db8::/32", "dev", "lo"]);

    for word in 0..8 {
        let mut segments = METADATA6.segments();
        // Of the last bit of each word, but within the prefix.
        segments[word] ^= if word == 0 { 0x1000 } else { 1 };
        let neighbour = std::net::Ipv6Addr::from(segments);
        for (kind, attempt) in
            [("STREAM", "s.connect"), ("DGRAM", "s.connect"), ("DGRAM", "lambda a: s.sendto(b'x', a)")]
        {
            let attempt = format!("({attempt})(('{neighbour}', 80))");
            let refused = error_of(&lab, "pods/a", kind, &attempt);
            assert_ne!(refused, "EPERM", "{attempt}");
            assert!(!refused.is_empty() || kind == "DGRAM", "{attempt} reached somebody");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_an_ipv6_address_none_is_redirected() {
    let lab = Lab::new();
    let mut settings = lab.settings();
    settings.metadata = MetadataAddr::v4_only(METADATA);
    let datapath = Datapath::attach(&settings).unwrap();

    for address in [METADATA6.to_string(), "::".into(), "::1".into()] {
        for (kind, attempt) in
            [("STREAM", "s.connect"), ("DGRAM", "s.connect"), ("DGRAM", "lambda a: s.sendto(b'x', a)")]
        {
            let attempt = format!("({attempt})(('{address}', 80))");
            assert_ne!(error_of(&lab, "pods/a", kind, &attempt), "EPERM", "{attempt}");
        }
    }

    assert_eq!(counter(&datapath, "redirected"), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_socket_from_outside_does_not_serve_a_pod_over_ipv6() {
    let lab = Lab::new();
    let datapath = lab.attach();
    let procs = lab.cgroup.join("pods/a/cgroup.procs");

    for (kind, attempt) in
        [("STREAM", "s.connect(M)"), ("DGRAM", "s.connect(M)"), ("DGRAM", "s.sendto(b'x', M)")]
    {
        let moved = format!("open({procs:?}, 'w').write('0'); {attempt}");
        assert_eq!(error_of(&lab, "host", kind, &moved), "EPERM", "{attempt}");
    }

    assert_eq!(counter(&datapath, "denied_task"), 3);
}
