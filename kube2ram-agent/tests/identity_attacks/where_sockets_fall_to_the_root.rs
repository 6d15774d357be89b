//! Below Linux 5.15 a write to cgroup v1 `net_cls` sends every new socket to the root cgroup, past the programs of the pods' one, until the next boot.
//! Only where the kernel does so, and then after all other tests: the tests run in the order of their names.

use std::{fs, path::Path, process::Command};

use kube2ram_agent::datapath::{Mode, OriginError};

use crate::{field::Field, lab::METADATA};

const HIERARCHY: &str = "/tmp/kube2ram-net_cls";

/// Does what Docker and some network policies do; tells whether this kernel minds.
#[expect(clippy::print_stderr, reason = "says what does not run here")]
fn use_net_cls() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').filter_map(|part| part.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(5), Some(15)) {
        eprintln!("skipped: on Linux {release} sockets stay with their cgroup (8520e224f547, 5.15)");
        return false;
    }
    fs::create_dir_all(HIERARCHY).unwrap();
    let mount = Command::new("mount").args(["-t", "cgroup", "-o", "net_cls", "net_cls", HIERARCHY]).status();
    assert!(mount.unwrap().success());
    let group = Path::new(HIERARCHY).join("group");
    fs::create_dir_all(&group).unwrap();
    fs::write(group.join("net_cls.classid"), "0x100001").unwrap();
    true
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_are_redirected_there_and_the_host_is_not() {
    let before = Field::new("fall-before");
    assert_eq!(before.datapath.mode(), Mode::Pods);
    if !use_net_cls() {
        return;
    }
    // What was in force before sees nothing any more, and the gate at the root denies.
    let denied = format!(
        "try: tcp().connect(METADATA)\nexcept PermissionError: pass\nelse: raise AssertionError\n{}",
        DENIED_DATAGRAMS
    );
    before.client("pods/a", &denied).finish();
    drop(before);

    let field = Field::new("fall");

    assert_eq!(field.datapath.mode(), Mode::Root);
    for pod in ["pods/a", "pods/b", "pods/a/nested"] {
        assert_eq!(field.dial(pod, 0).unwrap(), field.lab.id(pod));
    }
    field.client("pods/a", DENIED_DATAGRAMS).finish();
    // A process of the host goes where it wants: in this namespace, nowhere.
    let host = "s = tcp()\ntry: s.connect(METADATA)\nexcept OSError as e: assert e.errno == 101, e\nelse: raise AssertionError";
    field.client("host", host).finish();
    let direct = field.client("pods/a", "s = tcp()\ns.connect(AGENT)\ns.recv(1)");
    let (accepted, origin) = field.next();
    drop(accepted);
    direct.finish();
    assert!(matches!(origin, Err(OriginError::Unvouched)), "{origin:?}");
    assert_eq!(field.pending(), 0);
    assert!(field.counter("redirected") >= 3 && METADATA.port() == 80);

    // The next agent knows, and swaps what is in force.
    let Field { lab, datapath, .. } = &field;
    assert_eq!(datapath.mode(), Mode::Root);
    let links = |place: &str| fs::read_dir(lab.bpf_dir.join("v1/links").join(place)).unwrap().count();
    assert_eq!((links("agent"), links("pods"), links("root")), (0, 3, 6));
}

const DENIED_DATAGRAMS: &str = "u = socket(AF_INET, SOCK_DGRAM)\nfor attempt in (lambda: u.connect(METADATA), lambda: u.sendto(b'x', METADATA)):\n  \
    try: attempt()\n  except PermissionError: pass\n  else: raise AssertionError";
