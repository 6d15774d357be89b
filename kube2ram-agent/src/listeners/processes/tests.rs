//! Which of a pod's processes decides, by files in the kernel's layout.

use std::path::PathBuf;

use super::*;

/// A pod's cgroup and a procfs. Two processes are in one namespace when their `ns/net` is one file.
struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        let node = Self(tempfile::tempdir().unwrap());
        for netns in ["host", "pod", "nested"] {
            fs::write(node.0.path().join(netns), "").unwrap();
        }
        fs::create_dir(node.pod()).unwrap();
        fs::write(node.pod().join("cgroup.procs"), "").unwrap();
        node
    }

    fn pod(&self) -> PathBuf {
        self.0.path().join("pod-cgroup")
    }

    /// Adds a process: where, its number, when it started, its namespace.
    fn with(self, cgroup: &str, pid: u32, started: u64, netns: &str) -> Self {
        let process = self.0.path().join("proc").join(pid.to_string());
        fs::create_dir_all(process.join("ns")).unwrap();
        fs::hard_link(self.0.path().join(netns), process.join("ns/net")).unwrap();
        let stat = format!("{pid} (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {started} 20\n");
        fs::write(process.join("stat"), stat).unwrap();
        self.listed(cgroup, pid)
    }

    /// Lists a number in a cgroup.
    fn listed(self, cgroup: &str, pid: u32) -> Self {
        let cgroup = self.pod().join(cgroup);
        fs::create_dir_all(&cgroup).unwrap();
        let procs = cgroup.join("cgroup.procs");
        let before = fs::read_to_string(&procs).unwrap_or_default();
        fs::write(procs, format!("{before}{pid}\n")).unwrap();
        self
    }

    fn id(&self, netns: &str) -> NetnsId {
        Netns::open(&self.0.path().join(netns)).unwrap().id
    }

    fn found(&self) -> io::Result<Found> {
        of_pod_in(&self.0.path().join("proc"), &self.pod(), self.id("host"))
    }

    /// What is found, as a word.
    fn tells(&self) -> &'static str {
        match self.found().unwrap() {
            Found::Denied => "denied",
            Found::Hidden => "hidden",
            Found::Hosts => "host",
            Found::Monitors => "monitors",
            Found::Nobody => "nobody",
            Found::Own(netns, _) if netns.id == self.id("pod") => "pod",
            Found::Own(netns, _) if netns.id == self.id("nested") => "nested",
            Found::Own(..) => "another",
        }
    }
}

#[test]
fn of_processes_of_one_time_one_in_the_hosts_namespace_decides() {
    for [first, second] in [["host", "pod"], ["pod", "host"]] {
        let node = Node::new().with("a", 10, 100, first).with("b", 11, 100, second);
        assert_eq!(node.with("c", 12, 100, "nested").tells(), "host", "{first}");
    }
    assert_eq!(
        Node::new().with("a", 10, 100, "pod").with("b", 11, 99, "nested").tells(),
        "nested",
        "the older"
    );
}

const MONITOR: &str = "crio-conmon-0f1e.scope";

#[test]
fn the_oldest_process_decides_whatever_namespaces_others_are_in() {
    let pause = |netns| Node::new().with("pause", 10, 100, netns);

    assert_eq!(pause("host").tells(), "host");
    assert_eq!(pause("pod").tells(), "pod");
    for nested in ["app", "app/container", "app/init.scope/service"] {
        assert_eq!(pause("host").with(nested, 11, 200, "nested").tells(), "host", "{nested}");
        assert_eq!(pause("pod").with(nested, 11, 200, "nested").tells(), "pod", "{nested}");
        // A container with hostPID and SYS_ADMIN may enter the host's.
        assert_eq!(pause("pod").with(nested, 11, 200, "host").tells(), "pod", "{nested}");
    }
    // Numbers are used again: the start counts.
    assert_eq!(
        Node::new().with("app", 10, 200, "nested").with("pause", 4_000_000, 100, "host").tells(),
        "host"
    );
    // Where the runtime keeps no pause process, a container's first one starts what is nested.
    let child = Node::new().with("app", 10, 100, "host").with("app", 11, 100, "nested");
    assert_eq!(child.tells(), "host", "started within one tick");
}

#[test]
fn monitors_of_the_runtime_do_not_count() {
    let monitor = || Node::new().with(MONITOR, 9, 50, "host");

    assert_eq!(monitor().tells(), "monitors");
    assert_eq!(monitor().with("app", 10, 100, "pod").tells(), "pod");
    assert_eq!(monitor().with("app", 10, 100, "host").with("app", 11, 200, "nested").tells(), "host");
    assert_eq!(
        Node::new().with("crio-conmon-0f1e", 9, 50, "host").with("app", 10, 100, "pod").tells(),
        "pod"
    );
    // A container cannot choose which process counts.
    let own = Node::new().with("app/crio-conmon-0f1e", 10, 100, "host").with("app", 11, 200, "nested");
    assert_eq!(own.tells(), "host");
}

#[test]
fn a_process_that_has_ended_or_is_hidden_does_not_decide() {
    assert_eq!(Node::new().tells(), "nobody");
    let gone = Node::new().listed("pause", 10);
    assert_eq!(gone.tells(), "nobody");
    assert_eq!(gone.with("app", 11, 200, "pod").tells(), "pod");
    assert_eq!(Node::new().listed("app", 0).tells(), "hidden");
    assert_eq!(Node::new().listed("app", 0).with("app", 11, 200, "pod").tells(), "pod");
    assert_eq!(Node::new().with("app", 11, 200, "pod").listed("app", 0).tells(), "pod");
}

#[test]
fn nothing_is_reported_when_a_process_cannot_be_read() {
    let node = Node::new().with("app", 11, 200, "nested").with("pause", 10, 100, "host");
    assert_eq!(node.tells(), "host");
    let netns = node.0.path().join("proc/10/ns/net");
    fs::remove_file(&netns).unwrap();
    std::os::unix::fs::symlink(&netns, &netns).unwrap();

    let error = node.found().unwrap_err();

    // Not as if the younger one were the oldest.
    assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
}

#[test]
fn reads_the_start_time_behind_any_command() {
    let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";

    for command in ["(sleep)", "(a b) S 9)", "(\u{fffd})", "()"] {
        assert_eq!(start_time(format!("12 {command} {rest}").as_bytes()), Some(777), "{command}");
    }
    for cut in ["", "12 (sleep", "12 (sleep) S 1 2"] {
        assert_eq!(start_time(cut.as_bytes()), None, "{cut}");
    }
}

#[test]
fn a_process_knows_when_it_started() {
    let started = |pid: u32| start_time(&fs::read(format!("/proc/{pid}/stat")).unwrap()).unwrap();

    assert!(started(1) <= started(std::process::id()));
}

#[test]
fn a_process_is_in_its_namespace_and_in_no_other() {
    let here = NetnsId::own().unwrap();
    let elsewhere = NetnsId::at(Path::new("/proc/self/ns/mnt")).unwrap();
    let this = Pid(std::process::id());

    assert!(this.is_in(here));
    assert!(!this.is_in(elsewhere));
    assert!(!Pid(u32::MAX).is_in(here), "there is no such process");
}
