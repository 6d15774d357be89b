//! Socket options that would lead a pod's packets past the programs of the wire guard.

use kube2ram_agent::datapath::{Datapath, kernel_version};

use super::{Lab, output, say, stderr};

fn denials(datapath: &Datapath, outcome: &str) -> u64 {
    datapath.counters().unwrap().read().find(|(label, _)| *label == outcome).unwrap().1
}

/// Makes a socket and sets an option of it; `$family`, `$level`, `$option` and `$value` as Python.
fn set(family: &str, level: u32, option: u32, value: &str) -> String {
    format!(
        "import socket, struct\ns = socket.socket({family}, socket.SOCK_RAW)\ns.setsockopt({level}, {option}, {value})\n"
    )
}

const BYPASS: (&str, u32, u32, &str) = ("socket.AF_PACKET", 263, 20, "1");
const TX_RING: (&str, u32, u32, &str) = ("44", 283, 3, "struct.pack('=I', 4)");

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_may_not_skip_tc_and_the_host_may() {
    let lab = Lab::new();
    let datapath = lab.attach();

    for (family, level, option, value) in [BYPASS, TX_RING] {
        let script = set(family, level, option, value);
        for pod in ["pods/a", "pods/a/nested"] {
            let denied = output(&lab, pod, &script);
            assert!(stderr(&denied).contains("PermissionError"), "{pod} {option}: {denied:?}");
        }
        let allowed = output(&lab, "host", &script);
        assert!(allowed.status.success(), "{option}: {allowed:?}");
    }
    assert_eq!(denials(&datapath, "denied_socket_option"), 4);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn other_options_of_a_pod_are_the_kernels_business() {
    let lab = Lab::new();
    let _datapath = lab.attach();
    let others = [
        // A ring to receive from, and one to send from that tc sees.
        set("socket.AF_PACKET", 263, 5, "struct.pack('=IIII', 4096, 1, 2048, 2)"),
        set("socket.AF_PACKET", 263, 13, "struct.pack('=IIII', 4096, 1, 2048, 2)"),
        set("44", 283, 2, "struct.pack('=I', 4)"),
        // Longer than what the hook copies.
        set("socket.AF_PACKET", 1, 8, "struct.pack('=I', 4096) + bytes(9000)"),
        // The same numbers of another level.
        set("socket.AF_PACKET", 1, 20, "struct.pack('=QQ', 1, 0)"),
    ];

    for script in others {
        for cgroup in ["pods/a", "host"] {
            let output = output(&lab, cgroup, &script);
            assert!(output.status.success(), "{cgroup}: {script}: {output:?}");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pods_task_may_not_set_them_on_a_socket_from_outside() {
    // Below, the hook has no helper for the calling task's cgroup.
    if kernel_version() < (6, 1) {
        return say("skipped the task's socket options: not in this kernel");
    }
    let lab = Lab::new();
    let datapath = lab.attach();
    let join = |cgroup: &str| {
        format!(
            "import os\nopen('{}/cgroup.procs', 'w').write(str(os.getpid()))\n",
            lab.cgroup.join(cgroup).display()
        )
    };
    let run = |(family, level, option, value): (&str, u32, u32, &str), cgroup: &str| {
        let made = format!("import socket, struct\ns = socket.socket({family}, socket.SOCK_RAW)\n");
        let script = format!("{made}{}s.setsockopt({level}, {option}, {value})", join(cgroup));
        output(&lab, "host", &script)
    };

    for option in [BYPASS, TX_RING] {
        let denied = run(option, "pods/b");
        assert!(stderr(&denied).contains("PermissionError"), "{option:?}: {denied:?}");
        let allowed = run(option, "host");
        assert!(allowed.status.success(), "{option:?}: {allowed:?}");
    }
    assert_eq!(denials(&datapath, "denied_task"), 2);
}
