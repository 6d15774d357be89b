//! What a node leaves behind: nothing, however it ends, and whatever other nodes the machine has meanwhile.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::fd::AsFd as _,
    path::Path,
    process::{self, Child, Command},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::node::{CgroupDriver, Node, PodSpec, Record};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What a node of that name, which must be of this process, has on the machine.
fn things_of(name: &str) -> BTreeSet<String> {
    let names = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
    };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().map(str::to_owned).collect();
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/bpf", "/run/netns", Record::ROOT];
    let of_this_process = format!("{name}-{}", process::id());
    let all = places.into_iter().map(names).chain([mounts]).flatten();
    all.filter(|thing| thing.contains(&of_this_process)).collect()
}

/// What all nodes of the machine share, and none may touch.
fn network_of_machine() -> Vec<String> {
    let list = |arguments: &[&str]| {
        String::from_utf8(Command::new(arguments[0]).args(&arguments[1..]).output().unwrap().stdout).unwrap()
    };
    vec![
        list(&["ip", "-o", "link", "show"]),
        list(&["ip", "route", "show", "table", "all"]),
        list(&["ip", "rule"]),
        list(&["nft", "list", "tables"]),
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
        fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string(),
    ]
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn dropping_the_node_leaves_the_machine_as_it_was() {
    let before = network_of_machine();
    let outside = File::open("/proc/thread-self/ns/net").unwrap();

    let mut node = Node::create("leaves-nothing", CgroupDriver::Systemd).unwrap();
    let pod = node.add_pod(&PodSpec::new("orders")).unwrap();
    let gone = node.add_pod(&PodSpec::new("gone")).unwrap();
    let mut survivor = pod.command("app", "sleep").unwrap().arg("1000").spawn().unwrap();
    node.remove_pod(gone).unwrap();
    // A cgroup, a directory, two mounts, and the namespaces of node, metadata server and pod, each a file and
    // a mount.
    let things = things_of("leaves-nothing");
    assert_eq!(things.len(), 10, "{things:?}");
    assert_ne!(network_of_machine(), before);
    let machine = thread::spawn(move || {
        move_into_link_name_space(outside.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        network_of_machine()
    });
    assert_eq!(machine.join().unwrap(), before);
    drop(node);

    assert_eq!(things_of("leaves-nothing"), BTreeSet::new());
    assert_eq!(network_of_machine(), before);
    assert!(!survivor.wait().unwrap().success());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_failed_test_leaves_the_machine_as_it_was() {
    let outcome = thread::spawn(|| {
        let mut node = Node::create("panics", CgroupDriver::Cgroupfs).unwrap();
        let _pod = node.add_pod(&PodSpec::new("orders")).unwrap();
        assert!(!things_of("panics").is_empty());
        panic!("as a failed assertion does");
    });

    let message = outcome.join().unwrap_err();
    assert_eq!(*message.downcast::<&str>().unwrap(), "as a failed assertion does");
    assert_eq!(things_of("panics"), BTreeSet::new());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_next_node_removes_what_a_killed_process_left() {
    // A node that is made, and then made again by hand from its record: as if its process had been killed.
    let mut node = Node::create("killed", CgroupDriver::Cgroupfs).unwrap();
    let _pod = node.add_pod(&PodSpec::new("orders")).unwrap();
    let directory = Path::new(Record::ROOT).join(node.name());
    let record = fs::read(directory.join("state.json")).unwrap();
    let cgroup = node.pods_cgroup();
    drop(node);
    let mut process = leave_behind(&directory, &record, &cgroup);
    assert!(!things_of("killed").is_empty());

    drop(Node::create("next", CgroupDriver::Cgroupfs).unwrap());

    // Another process's node may have found it first, and be at it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !things_of("killed").is_empty() {
        assert!(Instant::now() < deadline, "{:?}", things_of("killed"));
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!process.wait().unwrap().success());
}

fn leave_behind(directory: &Path, record: &[u8], cgroup: &Path) -> Child {
    fs::create_dir_all(directory.join("bpf")).unwrap();
    fs::create_dir_all(cgroup).unwrap();
    let process = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(cgroup.join("cgroup.procs"), process.id().to_string()).unwrap();
    let fields: serde_json::Value = serde_json::from_slice(record).unwrap();
    let bpf = directory.join("bpf").display().to_string();
    let namespaces = fields["netns"].as_array().unwrap();
    assert_eq!(namespaces.len(), 3, "{namespaces:?}");
    let add = |netns: &serde_json::Value| {
        vec!["ip".into(), "netns".into(), "add".into(), netns.as_str().unwrap().to_owned()]
    };
    let mount = ["mount", "-t", "bpf", "bpf", &bpf].map(str::to_owned).to_vec();
    for command in namespaces.iter().map(add).chain([mount]) {
        assert!(Command::new(&command[0]).args(&command[1..]).status().unwrap().success());
    }
    fs::write(directory.join("lock"), "").unwrap();
    // Last: from here on any node may remove it.
    fs::write(directory.join("state.json"), record).unwrap();
    process
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_node_in_use_is_nobodys_to_remove() {
    let mut node = Node::create("in-use", CgroupDriver::Cgroupfs).unwrap();
    let pod = node.add_pod(&PodSpec::new("orders")).unwrap();

    thread::spawn(|| drop(Node::create("other", CgroupDriver::Cgroupfs).unwrap())).join().unwrap();

    let alive = pod.command("app", "true").unwrap().status().unwrap();
    assert!(alive.success());
    assert!(Node::create("in-use", CgroupDriver::Cgroupfs).is_err(), "a name is given once");
    assert!(things_of("in-use").len() >= 10, "{:?}", things_of("in-use"));
}
