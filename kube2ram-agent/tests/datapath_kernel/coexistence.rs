//! Other programs on connect(2), as a socket load balancer or an old network plugin has them: above the pods'
//! cgroup, or on it, by link or without.

use std::{
    io::{BufRead as _, BufReader},
    os::fd::AsFd as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use kube2ram_agent::datapath::{Datapath, Origins as _, attachments};

use crate::{
    connect, dial,
    lab::{Lab, METADATA},
    output, stderr,
};

/// The address of a Service: of TEST-NET-3, nobody's.
const SERVICE: &str = "203.0.113.9";

/// A program of somebody else's, which rewrites an address; detached at the end.
struct Rival(Child);

impl Rival {
    fn attach(cgroup: &Path, from: &str, to: &str, how: &str) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", include_str!("rival.py")])
            .arg(cgroup)
            .args([from, to, how])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "attached\n");
        Self(child)
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}

/// The eBPF programs with the lab's cgroup as the root of all, so that a rival can be there.
fn attach(lab: &Lab) -> Datapath {
    let mut settings = lab.settings();
    settings.cgroup_root.clone_from(&lab.cgroup);
    Datapath::attach(&settings).unwrap()
}

fn counter(datapath: &Datapath, name: &str) -> u64 {
    datapath.counters().unwrap().read().find(|(label, _)| *label == name).unwrap().1
}

fn assert_redirects(lab: &Lab, datapath: &Datapath, case: &str) {
    let client = lab.python("pods/a", &dial());
    let origin = datapath.origins().unwrap().origin_of(lab.accept().as_fd()).expect(case);
    assert_eq!(origin, lab.task("pods/a"), "{case}");
    client.wait_with_output().unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_service_that_becomes_the_metadata_address_above_the_pods_is_stopped() {
    for how in ["link", "multi"] {
        for is_first in [true, false] {
            let case = format!("by {how}, before ours: {is_first}");
            let lab = Lab::new();
            let metadata = METADATA.ip().to_string();
            let rival = || Rival::attach(&lab.cgroup, SERVICE, &metadata, how);
            let early = is_first.then(rival);
            let datapath = attach(&lab);
            let _rival = early.unwrap_or_else(rival);

            let script =
                connect("AF_INET", SERVICE, METADATA.port()).replace("settimeout(5)", "settimeout(1)");
            let through = output(&lab, "pods/a", &script);

            // The pods' own program saw the Service. The gate is in time if it comes after the rival, egress
            // always is.
            let denial = if is_first { "denied_task" } else { "denied_egress" };
            assert!(!through.status.success(), "{case}");
            assert_ne!(counter(&datapath, denial), 0, "{case}: {}", stderr(&through));
            assert_redirects(&lab, &datapath, &case);
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_rival_that_sends_the_redirected_elsewhere_gains_no_identity() {
    let lab = Lab::new();
    let datapath = attach(&lab);
    // Where nobody listens.
    let rival = Rival::attach(&lab.cgroup, &lab.agent().ip().to_string(), "127.0.0.99", "link");

    let astray = output(&lab, "pods/a", &dial());

    assert!(stderr(&astray).contains("ConnectionRefusedError"), "{}", stderr(&astray));
    assert_eq!(counter(&datapath, "handed_over"), 0);
    drop(rival);
    assert_redirects(&lab, &datapath, "once it is gone");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_exclusive_program_is_found_on_every_cgroup_above() {
    for (how, shared) in [("exclusive", false), ("override", false), ("multi", true), ("link", true)] {
        for place in ["", "pods"] {
            let lab = Lab::new();
            let cgroup = lab.cgroup.join(place);
            let rival = Rival::attach(&cgroup, SERVICE, SERVICE, how);

            let found = attachments(&cgroup).unwrap();
            let attached = Datapath::attach(&lab.settings());

            let case = format!("{how} on {place:?}");
            let [found] = found.as_slice() else { panic!("{case}: {found:?}") };
            assert_eq!((found.hook, found.shared), ("cgroup_inet4_connect", shared), "{case}");
            // Preflight refuses what does not share. So does the kernel, but for one that lets itself be
            // overridden by a descendant.
            let is_refused = !shared && (how, place) != ("override", "");
            assert_eq!(attached.is_err(), is_refused, "{case}: {attached:?}");
            drop(rival);
        }
    }
}

/// Detaches a program by number, as Cilium does (`RawDetachProgram` of cilium/ebpf), and prints what bpf(2)
/// said.
const DETACH: &str = r#"
import ctypes, errno, os, struct, sys
BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
BPF_PROG_DETACH, BPF_PROG_GET_FD_BY_ID = 9, 13
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes)
    return libc.syscall(BPF, command, buffer, len(attributes))
cgroup, hook, program = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2]), int(sys.argv[3])
descriptor = bpf(BPF_PROG_GET_FD_BY_ID, struct.pack("III", program, 0, 0))
assert descriptor >= 0, os.strerror(ctypes.get_errno())
# target_fd, attach_bpf_fd, attach_type, attach_flags, replace_bpf_fd
detached = bpf(BPF_PROG_DETACH, struct.pack("IIIII", cgroup, descriptor, hook, 0, 0))
print("detached" if detached == 0 else errno.errorcode[ctypes.get_errno()])
"#;

/// What Cilium without its socket load balancer does to every program at the cgroup root when it starts
/// (cilium/cilium#43877).
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_foreign_detach_of_the_task_gate_is_enoent_and_changes_nothing() {
    let lab = Lab::new();
    let _datapath = attach(&lab);
    // `enum bpf_attach_type`.
    let hooks =
        [(10, "k2r_task_conn4"), (11, "k2r_task_conn6"), (14, "k2r_task_send4"), (15, "k2r_task_send6")];
    let attached = |name: &str| {
        let pin = lab.bpf_dir.join("v2/links/root").join(name);
        let shown =
            Command::new("bpftool").args(["--json", "link", "show", "pinned"]).arg(pin).output().unwrap();
        let link: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
        // A link that is detached is of no cgroup.
        (link["cgroup_id"] == lab.id("").0).then(|| link["prog_id"].to_string())
    };
    for (hook, name) in hooks {
        let id = attached(name).unwrap();

        let detached = Command::new("python3")
            .args(["-c", DETACH])
            .arg(&lab.cgroup)
            .args([&hook.to_string(), &id])
            .output()
            .unwrap();

        let said = String::from_utf8_lossy(&detached.stdout);
        assert_eq!(said.trim(), "ENOENT", "{name}: {}", stderr(&detached));
        assert_eq!(attached(name), Some(id), "{name}");
    }
}
