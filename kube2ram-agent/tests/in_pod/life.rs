//! Listeners come and go with pods and with the agent.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    mem,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{kernel, node::PodSpec};

use crate::{
    LIST, pods,
    support::{Lab, NEXT_PASS, eventually, eventually_within, ip_in, output},
};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_new_pod_gets_its_listener_by_event_and_a_deleted_one_leaves_nothing() {
    let mut lab = Lab::with_agent("in-pod-new", &pods());
    let before = [lab.own_target("orders"), lab.own_target("billing")];
    // The last watches come a moment after the listeners.
    let mut watches = watched(&mut lab);
    eventually(|| {
        thread::sleep(Duration::from_millis(500));
        let before = mem::replace(&mut watches, watched(&mut lab));
        (before == watches).then_some(())
    });
    lab.add(&PodSpec::new("late").role("late-role"));
    let there = Instant::now();
    let first = lab.role("late");

    let own = lab.own_target("late");
    println!("own listener after {:?}", there.elapsed());
    let cgroup = lab.cgroup("late");

    assert_eq!(first, "late-role", "by whichever listener");
    assert!(before.iter().all(|target| target.netns != own.netns));
    assert_eq!(lab.role("late"), "late-role");
    lab.remove_pod("late").unwrap();
    eventually(|| lab.targets().iter().all(|(id, _)| *id != cgroup).then_some(()));
    eventually(|| (lab.metric("kube2ram_pod_listeners") == 2.0).then_some(()));
    // Of IPv4 and of IPv6, and what watches the devices.
    eventually(|| (listening(&mut lab) == 6).then_some(()));
    eventually(|| (watched(&mut lab) == watches).then_some(()));
}

/// Has inotify_init1(2) fail as it does when the instances of the user are used up, and becomes another
/// program.
const WITHOUT_INOTIFY: &str = r#"
import ctypes, errno, os, struct, sys
INOTIFY_INIT1 = {"x86_64": 294, "aarch64": 26}[os.uname().machine]
# Classic BPF: load the number; if it is that one, answer EMFILE, else allow.
program = [(0x20, 0, 0, 0), (0x15, 0, 1, INOTIFY_INIT1), (0x06, 0, 0, 0x00050000 | errno.EMFILE), (0x06, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
buffer = ctypes.create_string_buffer(code)
filter = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter, 0, 0) != 0:
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
"#;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_inotify_pods_are_looked_for_every_second_and_it_is_reported() {
    let mut lab = Lab::without_agent("in-pod-inotify", &pods());
    lab.add_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), &["--auto-discover-base-arn"]).unwrap();
    lab.agent().unwrap().set_wrapper(&["python3", "-c", WITHOUT_INOTIFY]);
    lab.agent().unwrap().start().unwrap();
    lab.own_target("orders");
    lab.agent().unwrap().await_metric("kube2ram_pod_cgroups_polled", 1.0).unwrap();
    assert!(lab.agent().unwrap().log().contains("raise fs.inotify.max_user_instances"));

    // Well after the looks that every new pod gets for a while.
    thread::sleep(Duration::from_secs(4));
    lab.add(&PodSpec::new("late").role("late-role"));
    let there = Instant::now();
    lab.own_target("late");
    let took = there.elapsed();
    println!("own listener after {took:?}");
    lab.remove_pod("late").unwrap();
    eventually(|| (lab.metric("kube2ram_pod_listeners") == 2.0).then_some(()));

    assert!(took < Duration::from_secs(10), "{took:?}: not only by the pass every 30 s");
    // The twin.
    lab.agent().unwrap().set_wrapper(&[]);
    lab.agent().unwrap().restart(None).unwrap();
    lab.own_target("orders");
    lab.agent().unwrap().await_metric("kube2ram_pod_cgroups_polled", 0.0).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn where_no_listener_can_be_opened_the_hosts_serves() {
    let mut lab = Lab::without_agent("in-pod-host", &pods());
    ip_in(&lab, "orders", &["link", "set", "lo", "down"]);

    lab.start();
    lab.own_target("billing");
    eventually(|| {
        (lab.metric(r#"kube2ram_pod_listener_failures_total{step="listen"}"#) >= 2.0).then_some(())
    });

    assert_eq!(lab.role("orders"), "orders-role");
    assert_eq!(lab.target("orders"), None);
    assert_eq!(lab.agent().unwrap().log().matches("the host listener serves a pod").count(), 1);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_with_devices_past_the_nodes_network_are_counted_and_logged_once() {
    let mut lab = Lab::without_agent("in-pod-beside", &pods());
    let orders = lab.pod("orders").unwrap().pod().netns().unwrap();
    let orders = orders.file_name().unwrap().to_str().unwrap();
    ip_in(
        &lab,
        "billing",
        &["link", "add", "link", "eth0", "name", "net1", "netns", orders, "type", "macvlan"],
    );

    lab.start();

    let pods = |device: &str| format!(r#"kube2ram_pods_beside_host_network{{device="{device}"}}"#);
    // A pass asks for 100 ms at most and leaves the rest to the next one, which an emulated machine needs.
    eventually_within(NEXT_PASS, || (lab.metric(&pods("macvlan")) == 1.0).then_some(()));
    assert_eq!(lab.metric(&pods("ebpf")) + lab.metric(&pods("ipvlan")) + lab.metric(&pods("nic")), 0.0);
    assert_eq!(lab.agent().unwrap().log().matches("do not pass the node's network stack").count(), 1);
    assert_eq!(lab.role("orders"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_whose_packets_a_program_on_the_node_may_route_are_counted() {
    let mut lab = Lab::without_agent("in-pod-routed", &pods());
    let routed = r#"kube2ram_pods_beside_host_network{device="ebpf"}"#;
    let (name, _) = node_end(&lab, "orders");
    assert_eq!(output(Command::new("tc").args(["qdisc", "add", "dev", &name, "clsact"])), "");
    let (_, index) = node_end(&lab, "billing");
    let mut by_link = Command::new("python3");
    by_link.args(["-c", ATTACH_TCX, &index]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut by_link = by_link.spawn().unwrap();
    let mut attached = String::new();
    BufReader::new(by_link.stdout.take().unwrap()).read_line(&mut attached).unwrap();
    let has_tcx = attached.trim() != "-1";
    if !has_tcx {
        kernel::skip("tcx", "tcx");
    }

    lab.start();

    eventually_within(NEXT_PASS, || (lab.metric(routed) == if has_tcx { 2.0 } else { 1.0 }).then_some(()));
    assert_eq!(lab.agent().unwrap().log().matches("device=\"ebpf\"").count(), 1);
    assert_eq!(lab.role("orders"), "orders-role");
    by_link.kill().unwrap();
    by_link.wait().unwrap();
}

/// Attaches a program that does nothing where a device's packets arrive (`BPF_PROG_LOAD`, `BPF_LINK_CREATE`),
/// until it is killed.
const ATTACH_TCX: &str = r#"
import ctypes, platform, struct, sys
libc, number = ctypes.CDLL(None), {"x86_64": 321, "aarch64": 280}[platform.machine()]
bpf = lambda command, attributes: libc.syscall(number, command, ctypes.create_string_buffer(attributes, 64), 64)
code = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xb7, 0, 0, -1, 0x95, 0, 0, 0))
licence = ctypes.create_string_buffer(b"GPL")
program = bpf(5, struct.pack("<IIQQ", 3, 2, ctypes.addressof(code), ctypes.addressof(licence)))
print(bpf(28, struct.pack("<IIII", program, int(sys.argv[1]), 46, 0)), flush=True)
sys.stdin.read()
"#;

/// Name and index of the other end of a pod's eth0.
fn node_end(lab: &Lab, pod: &str) -> (String, String) {
    let netns = lab.pod(pod).unwrap().pod().netns().unwrap();
    let inside = output(
        Command::new("ip").arg("-n").arg(netns.file_name().unwrap()).args(["-o", "link", "show", "eth0"]),
    );
    let index = inside.split("@if").nth(1).and_then(|rest| rest.split(':').next()).unwrap().to_owned();
    let all = output(Command::new("ip").args(["-o", "link"]));
    let line = all.lines().find(|line| line.starts_with(&format!("{index}: "))).unwrap();
    (line.split([' ', '@']).nth(1).unwrap().to_owned(), index)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_is_back_opens_them_again_and_forgets_the_former_ones() {
    let mut lab = Lab::with_agent("in-pod-back", &pods());
    let before = lab.own_target("orders");
    ip_in(&lab, "orders", &["link", "set", "eth0", "down"]);

    lab.agent().unwrap().kill().unwrap();
    let gone = lab.cgroup("billing");
    lab.remove_pod("billing").unwrap();

    assert!(lab.role("orders").contains("refused"), "{}", lab.role("orders"));
    assert!(lab.targets().iter().any(|(id, _)| *id == gone), "nobody was there to forget it");
    lab.agent().unwrap().start().unwrap();
    eventually(|| (lab.metric("kube2ram_pod_listeners") == 1.0).then_some(()));
    assert_eq!(lab.target("orders"), Some(before));
    assert_eq!(lab.role("orders"), "orders-role");
    assert!(lab.targets().iter().all(|(id, _)| *id != gone));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_sandbox_made_again_gets_a_listener_in_its_new_namespace() {
    let mut lab = Lab::with_agent("in-pod-anew", &pods());
    let before = lab.own_target("billing");
    let pod = lab.pod("billing").unwrap().pod();
    let pause = output(Command::new("cat").arg(pod.container_cgroup("pause").unwrap().join("cgroup.procs")));
    output(Command::new("kill").arg(pause.trim()));
    let script = "ip link set lo up; echo up; exec sleep 60";
    let mut sandbox = pod.command("app", "unshare").unwrap();
    let mut sandbox = sandbox.args(["--net", "sh", "-c", script]).stdout(Stdio::null()).spawn().unwrap();

    let after = eventually(|| lab.target("billing").filter(|target| *target != before));
    let netns = format!("--net=/proc/{}/ns/net", sandbox.id());
    let url = format!("http://100.100.100.200{LIST}");
    let role = || {
        let mut curl = lab.pod("billing").unwrap().pod().command("app", "nsenter").unwrap();
        output(curl.args([&netns, "curl", "--silent", "--max-time", "3", &url]))
    };

    assert_ne!(after.netns, before.netns);
    // It has no way to the host, so this is the in-pod listener.
    eventually(|| (role() == "billing-role").then_some(()));
    eventually(|| (listening(&mut lab) == 6).then_some(()));
    sandbox.kill().unwrap();
    sandbox.wait().unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_without_the_hosts_pid_namespace_logs_it_once_and_serves_on_the_host() {
    let mut lab = Lab::without_agent("in-pod-hidden", &pods());
    let wrapper = lab.node().directory().join("agent.sh");
    let agent = env!("CARGO_BIN_EXE_kube2ram");
    let unshare = "unshare --pid --fork --kill-child --mount-proc";
    fs::write(&wrapper, format!("#!/bin/sh\nexec {unshare} {agent} \"$@\"\n")).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();

    lab.start_agent(&wrapper, &["--auto-discover-base-arn"]).unwrap();
    eventually(|| (lab.metric(r#"kube2ram_pod_listener_failures_total{step="find"}"#) >= 2.0).then_some(()));

    assert_eq!(lab.role("orders"), "orders-role");
    assert_eq!(lab.targets(), []);
    assert_eq!(lab.agent().unwrap().log().matches("hostPID: true").count(), 1);
}

/// How many files the agent watches.
fn watched(lab: &mut Lab) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fdinfo", pid(lab))).unwrap();
    let texts = files.filter_map(|file| fs::read_to_string(file.ok()?.path()).ok());
    texts.map(|text| text.lines().filter(|line| line.starts_with("inotify wd:")).count()).sum()
}

fn pid(lab: &mut Lab) -> String {
    let procs = lab.agent().unwrap().pod().container_cgroup("agent").unwrap().join("cgroup.procs");
    fs::read_to_string(procs).unwrap().trim().to_owned()
}

/// How many sockets the agent has that listen in pods: those that the node's namespace, in which this thread
/// is, does not know.
fn listening(lab: &mut Lab) -> usize {
    let links = fs::read_dir(format!("/proc/{}/fd", pid(lab))).unwrap();
    let inodes = links.filter_map(|link| {
        let link = fs::read_link(link.ok()?.path()).ok()?;
        Some(link.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned())
    });
    let tables = ["netlink", "tcp", "tcp6", "unix"];
    let hosts =
        tables.map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap()).join("\n");
    inodes.filter(|inode| !hosts.split_ascii_whitespace().any(|field| field == inode)).count()
}
