//! Rung 2: the eBPF programs are held to what it should be, and agents of different map layouts follow each
//! other. Below the rest of the agent.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod drift;
#[path = "../lab/mod.rs"]
mod lab;
mod layouts;
mod others;

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use kube2ram_agent::datapath::{AcceptedOrigins, Origins as _};
use serde_json::Value;

use self::lab::{Lab, METADATA};

/// Connects as a pod's process and waits for the end.
fn dial() -> String {
    format!(
        "import socket\ns = socket.socket()\ns.settimeout(5)\ns.connect(('{}', {}))\ns.recv(1)",
        METADATA.ip(),
        METADATA.port()
    )
}

/// A pod reaches the agent, which is told who it is.
fn assert_works(lab: &Lab, origins: &AcceptedOrigins) {
    let client = lab.python("pods/a", &dial());
    let accepted = lab.accept();
    let origin = origins.origin_of(accepted.as_fd()).expect("vouched for");
    drop(accepted);
    assert!(client.wait_with_output().unwrap().status.success());
    assert_eq!(origin, lab.task("pods/a"));
}

fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").args(["-j"]).args(arguments).output().expect("bpftool");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The pinned links, sorted.
fn pinned_links(bpf_dir: &Path) -> Vec<PathBuf> {
    let pins = Command::new("find").arg(bpf_dir).args(["-path", "*/links/*/*"]).output().unwrap();
    let mut pins: Vec<_> = String::from_utf8(pins.stdout).unwrap().lines().map(PathBuf::from).collect();
    pins.sort();
    pins
}

fn link(pin: &Path, key: &str) -> u64 {
    bpftool(&["link", "show", "pinned", pin.to_str().unwrap()])[key].as_u64().unwrap()
}
