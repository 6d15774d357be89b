//! The first agent of this map layout on a node of layout 1: from the pins of an agent that is dead, and of
//! one that runs until it is told to end. What that agent left is the former layout's directory, its maps
//! with their sizes, and its programs, attached to their hooks.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Shutdown, SocketAddrV4, TcpListener, TcpStream},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kube2ram_agent::{
    datapath::{AcceptedOrigins, AgentAddr, Datapath, Layout, Origin, Origins as _, Settings},
    identity::CgroupId,
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_sandbox::{client::LoadReport, node::Node};

use crate::support::{LIST, Lab, POD_LISTENERS, PODS, eventually, role};

/// How often each of the two changes happens.
const ROUNDS: usize = 5;
/// Clients in pods are refused from the end of the former agent to the first answer of this one, which loads
/// its programs and gets to know pods, account and region meanwhile: about as long as after a crash.
const LONGEST_OUTAGE: Duration = Duration::from_secs(6);

/// An agent of layout 1, of which only the layout is another one's: this build's programs on their own maps.
struct Former {
    addr: SocketAddrV4,
    datapath: Datapath,
    serving: JoinHandle<()>,
    shared: Arc<Shared>,
}

struct Shared {
    has_ended: AtomicBool,
    /// Those that are open, by number.
    connections: Mutex<HashMap<usize, TcpStream>>,
    origins: AcceptedOrigins,
    /// By the cgroup of a pod's container.
    roles: HashMap<CgroupId, String>,
}

impl Former {
    fn start(lab: &mut Lab) -> Self {
        let addr = lab.agent().unwrap().app_addr();
        let listener = TcpListener::bind(addr).unwrap();
        let node = lab.node();
        let settings = Settings {
            bpf_dir: bpf_dir(lab),
            cgroup_root: node.cgroup_root().to_owned(),
            pods_cgroup: node.pods_cgroup(),
            other_pods_cgroups: Vec::new(),
            own_cgroup: own_cgroup(node.cgroup_root()),
            metadata: MetadataAddr {
                v4: SocketAddrV4::new(Node::METADATA_IP, 80),
                v6: Some(Node::METADATA_IP6),
            },
            agent: AgentAddr(addr),
            keeps_open: false,
            guards_wire: false,
            debug: false,
        };
        let datapath = Datapath::attach_layout(&settings, Layout(1)).unwrap();
        let cgroup = |pod: &str| {
            let pod = lab.pod(pod).unwrap().pod();
            CgroupId(fs::metadata(pod.container_cgroup("app").unwrap()).unwrap().ino())
        };
        let shared = Arc::new(Shared {
            has_ended: AtomicBool::new(false),
            connections: Mutex::default(),
            origins: datapath.origins().unwrap(),
            roles: PODS.map(|pod| (cgroup(pod), role(pod))).into(),
        });
        make_pins_of_layout_1(&settings.bpf_dir.join("v1"));
        let serving = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve(&listener)
        });
        Self { addr, datapath, serving, shared }
    }

    /// As its process's end does: it listens no more, its connections are cut, and the lock is free. What it
    /// has in the kernel stays.
    fn end(self) {
        self.shared.has_ended.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.addr)); // wakes it
        self.serving.join().unwrap();
        for (_, connection) in self.shared.connections.lock().unwrap().drain() {
            let _has_gone = connection.shutdown(Shutdown::Both);
        }
        drop(self.datapath);
    }
}

impl Shared {
    fn serve(self: Arc<Self>, listener: &TcpListener) {
        for (number, connection) in listener.incoming().enumerate() {
            if self.has_ended.load(Ordering::Relaxed) {
                return;
            }
            let Ok(connection) = connection else { continue };
            let Ok(Origin::Task(cgroup)) = self.origins.origin_of(connection.as_fd()) else { continue };
            let Some(role) = self.roles.get(&cgroup).cloned() else { continue };
            self.connections.lock().unwrap().insert(number, connection.try_clone().unwrap());
            let shared = Arc::clone(&self);
            thread::spawn(move || {
                answer(&connection, &role);
                shared.connections.lock().unwrap().remove(&number);
            });
        }
    }
}

/// Answers until the client has enough.
fn answer(connection: &TcpStream, role: &str) -> Option<()> {
    let mut lines = BufReader::new(connection).lines();
    loop {
        let request = lines.next()?.ok()?;
        let mut is_last = false;
        loop {
            let header = lines.next()?.ok()?;
            if header.is_empty() {
                break;
            }
            is_last |= header.eq_ignore_ascii_case("connection: close");
        }
        let asked = request.split(' ').nth(1)?.strip_prefix(LIST)?;
        let body = if asked.is_empty() {
            role.to_owned()
        } else {
            format!(
                r#"{{"AccessKeyId":"STS.{role}.1","AccessKeySecret":"none","SecurityToken":"none","Code":"Success"}}"#
            )
        };
        write!(&mut &*connection, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
        if is_last {
            return None;
        }
    }
}

/// Makes a layout's directory what the last agent of layout 1 left: these pins and no others. Programs keep
/// the maps that they were loaded with.
fn make_pins_of_layout_1(layout: &Path) {
    let (maps, links) = (layout.join("maps"), layout.join("links"));
    for unknown in [
        "k2r_namespaces",
        "k2r_netns",
        "k2r_handshakes",
        "k2r_shares",
        "k2r_config",
        "k2r_counters",
        "k2r_clients",
    ] {
        fs::remove_file(maps.join(unknown)).unwrap();
    }
    for (name, kind, key, value, entries) in [
        ("k2r_config", "array", 4, 24, 1),
        ("k2r_handshakes", "hash", 16, 72, 16_384),
        ("k2r_shares", "hash", 8, 8, 16_384),
        ("k2r_counters", "percpu_array", 4, 8, 18),
    ] {
        let pin = maps.join(name).display().to_string();
        let sizes = [key, value, entries].map(|size: u32| size.to_string());
        let [key, value, entries] = &sizes;
        let of = [
            "map", "create", &pin, "type", kind, "key", key, "value", value, "entries", entries, "name", name,
        ];
        bpftool(&[&of[..], if kind == "hash" { &["flags", "1"] } else { &[] }].concat());
    }
    // Socket storage needs type information, which bpftool does not give: another one under its name.
    let [from, to] = ["k2r_accepted", "k2r_clients"].map(|name| maps.join(name).display().to_string());
    bpftool(&["map", "pin", "pinned", &from, &to]);
    for unknown in ["pods/k2r_option", "root/k2r_task_option", "root/k2r_task_send6"] {
        // Without a pin it is no longer attached. Below Linux 6.1 this build has one program less.
        let _may_be_missing = fs::remove_file(links.join(unknown));
    }
    for place in ["k2r_wire", "k2r_wire_ip"] {
        fs::remove_dir(links.join(place)).unwrap();
    }
}

fn bpftool(arguments: &[&str]) {
    let output = Command::new("bpftool").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn bpf_dir(lab: &Lab) -> PathBuf {
    lab.node().bpffs().join("kube2ram")
}

/// The cgroup of this process, which makes the former agent's listener.
fn own_cgroup(root: &Path) -> PathBuf {
    let path = fs::read_to_string("/proc/self/cgroup").unwrap();
    root.join(path.lines().find_map(|line| line.strip_prefix("0::/")).unwrap())
}

/// The layouts that have pins.
fn layouts(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(bpf_dir(lab)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// This agent serves all pods, by its own programs and pins alone.
fn assert_taken_over(lab: &mut Lab) {
    eventually("pods are served", || lab.is_served());
    eventually("pods have their listeners", || lab.metric("kube2ram_pod_listeners") == POD_LISTENERS);
    lab.assert_served();
    assert_eq!(layouts(lab), ["v2"]);
    let redirected = lab.metric(r#"kube2ram_kernel_outcomes_total{outcome="redirected"}"#);
    assert!(redirected >= PODS.len() as f64, "{redirected}");
}

/// No client got a wrong answer, or none at all. Other requests were refused, or asked to try again, and not
/// for long. Returns the summary.
fn assert_bounded(lab: &Lab, mut report: LoadReport, what: &str) -> String {
    report.outages_us.sort_unstable();
    let longest = Duration::from_micros(report.outages_us.last().copied().unwrap_or_default());
    let middle = report.outages_us.get(report.outages_us.len() / 2).copied().unwrap_or_default();
    let with = |status: u16| report.refusals.iter().filter(|refusal| **refusal == status).count();
    let told = format!(
        "{ROUNDS} times from {what} under the load of {} pods: {} requests answered, {} refused, {} cut, {} resent, {} with 503, {} with 403; \
         outage of a client {middle} µs (median), {longest:?} (longest)",
        PODS.len(),
        report.ok,
        report.refused,
        report.cut,
        report.resent,
        with(503),
        with(403)
    );
    assert_eq!((report.wrong, report.failed), (0, 0), "{:?}", report.samples);
    // Who was redirected by the former programs to the listener, before the programs that hand over were
    // there, is nobody that the agent knows.
    assert_eq!(with(503) + with(403), report.refusals.len(), "{:?}", report.samples);
    assert!(report.ok > 500 && report.refused > 0, "{report:?}");
    assert!(longest < LONGEST_OUTAGE, "{longest:?}");
    assert_eq!(lab.leaks(), []);
    told
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_pins_of_a_dead_agent_of_layout_1_are_taken_over_under_load() {
    let mut lab = Lab::without_agent("dead-v1");
    let mut load = None;
    for _ in 0..ROUNDS {
        let former = Former::start(&mut lab);
        lab.assert_served();
        let _running = load.get_or_insert_with(|| lab.load());
        former.end();
        lab.assert_not_served();
        assert_eq!(layouts(&lab), ["v1"]);

        lab.agent().unwrap().start().unwrap();

        assert_taken_over(&mut lab);
        // A node that goes back: the former layout's agent removes this one's programs.
        lab.agent().unwrap().kill().unwrap();
    }
    let report = load.unwrap().end();

    println!("{}", assert_bounded(&lab, report, "a dead agent's pins of layout 1"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_running_agent_of_layout_1_is_followed_under_load() {
    let mut lab = Lab::without_agent("from-v1");
    let mut load = None;
    let mut waits = Vec::new();
    for _ in 0..ROUNDS {
        let former = Former::start(&mut lab);
        lab.assert_served();
        let _running = load.get_or_insert_with(|| lab.load());

        // It counts as ready, or Kubernetes would never end the other one.
        lab.agent().unwrap().start_beside().unwrap();
        lab.assert_served();
        assert_eq!(layouts(&lab), ["v1"], "while it stands by nothing is changed");
        let ended = Instant::now();
        former.end();

        assert_taken_over(&mut lab);
        waits.push(ended.elapsed());
        assert_eq!(lab.agent().unwrap().terminate().unwrap().code(), Some(0));
    }
    let report = load.unwrap().end();

    println!("from the former agent's end until all pods had listeners of their own: {waits:?}");
    println!("{}", assert_bounded(&lab, report, "a running agent of layout 1"));
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("removed the programs of another map layout").count(), ROUNDS, "{log}");
}
