//! Below Linux 5.15 a write to cgroup v1 `net_cls` sends every new socket to the root cgroup, past the
//! programs of the pods' one, until the next boot. That is done only where nothing else has the hierarchy,
//! and after all other tests: the tests run in the order of their names.

use std::{fs, path::Path, process::Command};

use kube2ram_agent::datapath::{Mode, kernel_version};

use crate::field::Field;

/// What pods and the host see when the programs are at the root.
fn check_redirection_at_the_root(field: &Field) {
    for pod in ["pods/a", "pods/b", "pods/a/nested"] {
        assert_eq!(field.dial(pod, 0).unwrap(), field.lab.id(pod));
    }
    field.client("pods/a", DENIED_DATAGRAMS).finish();
    // Made outside, connected as a pod's: its task is what counts.
    let moved = field.client("host", "s = tcp()\nmove('b')\ns.connect(METADATA)\ns.recv(1)");
    let (accepted, origin) = field.next();
    drop(accepted);
    moved.finish();
    assert_eq!(origin.unwrap(), field.lab.id("pods/b"));
    // A process of the host goes where it wants: in this namespace, nowhere.
    let host = "s = tcp()\ntry: s.connect(METADATA)\nexcept OSError as e: assert e.errno == 101, e\nelse: raise AssertionError";
    field.client("host", host).finish();
    for (cgroup, is_vouched) in [("pods/a", true), ("host", false)] {
        let direct = field.client(cgroup, "s = tcp()\ns.connect(AGENT)\ns.recv(1)");
        let (accepted, origin) = field.next();
        drop(accepted);
        direct.finish();
        assert_eq!(origin.is_ok(), is_vouched, "{cgroup}: {origin:?}");
    }
    assert_eq!(field.pending(), 0);
    // The gate for socket options is there from Linux 6.1 on.
    let expected = 7 + usize::from(kernel_version() >= (6, 1));
    let links = |place: &str| fs::read_dir(field.lab.bpf_dir.join("v2/links").join(place)).unwrap().count();
    assert_eq!((links("agent"), links("pods"), links("root")), (0, 4, expected));
}

const DENIED_DATAGRAMS: &str = "u = socket(AF_INET, SOCK_DGRAM)\nfor attempt in (lambda: u.connect(METADATA), lambda: u.sendto(b'x', METADATA)):\n  \
    try: attempt()\n  except PermissionError: pass\n  else: raise AssertionError";

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_is_redirected_there_and_the_next_agent_knows() {
    let mut field = Field::new("root");
    assert_eq!(field.datapath.mode(), Mode::Pods);

    field.datapath.fall_back().unwrap();

    check_redirection_at_the_root(&field);
    let Field { lab, datapath, origins, netns } = field;
    drop(datapath);
    let datapath = lab.attach();
    assert_eq!(datapath.mode(), Mode::Root);
    check_redirection_at_the_root(&Field { lab, datapath, origins, netns });
}

/// Does what Docker and some network policies do, unless this machine has a use for it.
fn use_net_cls() -> bool {
    const HIERARCHY: &str = "/tmp/kube2ram-net_cls";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').filter_map(|part| part.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) >= (Some(5), Some(15)) {
        skip(&format!("on Linux {release} sockets stay with their cgroup (8520e224f547, 5.15)"));
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

#[expect(clippy::print_stderr, reason = "says what does not run here")]
fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agent_finds_out_and_follows() {
    let before = Field::new("fall-before");
    assert_eq!(before.datapath.mode(), Mode::Pods);
    if !use_net_cls() {
        return;
    }
    let try_it = "try: tcp().connect(METADATA)\nexcept PermissionError: print('denied', flush=True)\nelse: print('redirected', flush=True)";
    let mut client = before.client("pods/a", try_it);
    let outcome = client.line();
    client.finish();
    // Nothing leaks either way: the gate at the root sees whom the others no longer see.
    before.client("pods/a", DENIED_DATAGRAMS).finish();
    drop(before);

    let field = Field::new("fall");

    if outcome == "redirected" {
        skip("this kernel is below 5.15, but sockets stay with their cgroup (8520e224f547 is back-ported)");
        assert_eq!(field.datapath.mode(), Mode::Pods);
        assert_eq!(field.dial("pods/a", 0).unwrap(), field.lab.id("pods/a"));
    } else {
        assert_eq!(field.datapath.mode(), Mode::Root);
        check_redirection_at_the_root(&field);
    }
}
