//! Unmodified clients: they find the agent at the metadata server's address, and see no difference.

use kube2ram_sandbox::{client::Family, node::PodSpec};

use crate::support::{LIST, Lab, run, url};

fn lab() -> Lab {
    Lab::with_agent("clients", &[PodSpec::new("orders").role("orders-role")], &[])
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn curl_is_redirected_and_sees_the_metadata_address_as_its_peer() {
    let lab = lab();

    let (code, text) = lab.curl(
        "orders",
        &["--silent", "--write-out", " %{http_code} %{remote_ip} %{remote_port}", &url(LIST)],
    );

    assert_eq!((code, text.as_str()), (Some(0), "orders-role 200 100.100.100.200 80"));
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn urllib_of_python_is_redirected() {
    let lab = lab();
    let script = format!(
        "from urllib.request import urlopen; print(urlopen('{}', timeout=1).read().decode())",
        url(LIST)
    );

    let mut python = lab.pod("orders").unwrap().pod().command("app", "python3").unwrap();

    assert_eq!(run(python.args(["-c", &script])), (Some(0), "orders-role".into()));
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn ipv4_mapped_sockets_are_redirected() {
    let lab = lab();

    let reply = lab.pod("orders").unwrap().curl_from("app", Family::V6Mapped, &url(LIST)).unwrap();

    assert_eq!((reply.status, reply.body.as_str()), (200, "orders-role"));
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn getpeername_returns_the_address_that_the_program_connected_to() {
    let lab = lab();
    let script = "import socket\nfor family, host in ((socket.AF_INET, '100.100.100.200'), (socket.AF_INET6, '::ffff:100.100.100.200')):\n    \
                  s = socket.socket(family); s.connect((host, 80)); print(s.getpeername()[:2])";

    let mut python = lab.pod("orders").unwrap().pod().command("app", "python3").unwrap();

    let expected = "('100.100.100.200', 80)\n('::ffff:100.100.100.200', 80)";
    assert_eq!(run(python.args(["-c", script])), (Some(0), expected.into()));
}
