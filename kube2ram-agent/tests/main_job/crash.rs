//! The agent's process is ended by a signal that dumps core.

use std::{fs, os::unix::process::ExitStatusExt as _, process::Command};

use kube2ram_sandbox::{agent::Signal, node::PodSpec};

use crate::support::Lab;

/// Where dumps are wanted, runs a program in the directory `$1`, for the kernel puts a dump there unless
/// `core_pattern` says otherwise.
const WITH_DUMPS: &str = r#"ulimit -c unlimited && cd "$1" && shift && exec "$@""#;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_crash_of_the_agent_leaves_no_core_dump_of_what_it_holds() {
    let directory = tempfile::tempdir().unwrap();
    let wrapper = ["sh", "-c", WITH_DUMPS, "sh", directory.path().to_str().unwrap()];
    let mut lab = Lab::new("crash", &[PodSpec::new("orders").role("orders-role")]);
    lab.prepare(&[]);
    lab.agent().unwrap().set_wrapper(&wrapper);
    lab.agent().unwrap().start().unwrap();
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    lab.agent().unwrap().signal(Signal::ABORT).unwrap();
    let ended = lab.agent().unwrap().wait().unwrap();

    assert_eq!((ended.signal(), ended.core_dumped()), (Some(6), false), "{ended}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{ended}");
    lab.assert_refused("orders");
    // The twin: this machine writes a dump of whoever does not forbid it.
    let script = r#"kill -ABRT $$"#;
    let twin = Command::new(wrapper[0]).args(&wrapper[1..]).args(["sh", "-c", script]).status().unwrap();
    assert_eq!((twin.signal(), twin.core_dumped()), (Some(6), true), "{twin}");
}
