//! What a node leaves behind: nothing, however it ends. One test at a time, since they look at the whole machine.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Child, Command},
    sync::{Mutex, PoisonError},
};

use kube2ram_sandbox::node::{CgroupDriver, Node, PodSpec, Record};

static ALONE: Mutex<()> = Mutex::new(());

/// What a node could leave on the machine.
fn machine() -> BTreeSet<String> {
    let names = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
        let paths = entries.filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_file()));
        paths.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
    };
    let routes = Command::new("ip").args(["route", "show", "table", "all"]).output().unwrap().stdout;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    ["/sys/class/net", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/bpf", "/run/kube2ram-sandbox"]
        .into_iter()
        .flat_map(names)
        .chain(
            fs::read_dir("/run/netns")
                .into_iter()
                .flatten()
                .map(|entry| format!("{:?}", entry.unwrap().path())),
        )
        .chain(String::from_utf8(routes).unwrap().lines().map(str::to_owned))
        .chain(mounts.lines().filter(|mount| !mount.contains("/run/netns")).map(str::to_owned))
        .chain([fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap()])
        .collect()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn dropping_the_node_leaves_the_machine_as_it_was() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(Node::create("first", CgroupDriver::Cgroupfs).unwrap());
    let before = machine();

    let mut node = Node::create("leaves-nothing", CgroupDriver::Systemd).unwrap();
    let pod = node.add_pod(&PodSpec::new("orders")).unwrap();
    let gone = node.add_pod(&PodSpec::new("gone")).unwrap();
    let mut survivor = pod.command("app", "sleep").unwrap().arg("1000").spawn().unwrap();
    node.remove_pod(gone).unwrap();
    assert_ne!(machine(), before);
    drop(node);

    assert_eq!(machine(), before);
    assert!(!survivor.wait().unwrap().success());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_failed_test_leaves_the_machine_as_it_was() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(Node::create("first", CgroupDriver::Cgroupfs).unwrap());
    let before = machine();

    let outcome = std::thread::spawn(|| {
        let mut node = Node::create("panics", CgroupDriver::Cgroupfs).unwrap();
        let _pod = node.add_pod(&PodSpec::new("orders")).unwrap();
        panic!("as a failed assertion does");
    });

    assert!(outcome.join().is_err());
    assert_eq!(machine(), before);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_next_run_removes_what_a_killed_one_left() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(Node::create("first", CgroupDriver::Cgroupfs).unwrap());
    let before = machine();
    // A node that is made, and then made again by hand from its record: as if its process had been killed.
    let mut node = Node::create("killed", CgroupDriver::Cgroupfs).unwrap();
    let _pod = node.add_pod(&PodSpec::new("orders")).unwrap();
    let directory = Path::new(Record::ROOT).join("killed");
    let record = fs::read(directory.join("state.json")).unwrap();
    let cgroup = node.pods_cgroup();
    drop(node);
    let mut process = leave_behind(&directory, &record, &cgroup);

    drop(Node::create("next", CgroupDriver::Cgroupfs).unwrap());

    assert_eq!(machine(), before);
    assert!(!process.wait().unwrap().success());
}

fn leave_behind(directory: &Path, record: &[u8], cgroup: &Path) -> Child {
    fs::create_dir_all(directory.join("bpf")).unwrap();
    fs::write(directory.join("state.json"), record).unwrap();
    fs::create_dir_all(cgroup).unwrap();
    let process = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(cgroup.join("cgroup.procs"), process.id().to_string()).unwrap();
    let record: serde_json::Value = serde_json::from_slice(record).unwrap();
    let link = record["links"][1].as_str().unwrap();
    let netns = record["netns"][1].as_str().unwrap();
    let bpf = directory.join("bpf").display().to_string();
    for command in [
        vec!["mount", "-t", "bpf", "bpf", &bpf],
        vec!["ip", "netns", "add", netns],
        vec!["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", netns],
    ] {
        assert!(Command::new(command[0]).args(&command[1..]).status().unwrap().success());
    }
    process
}
