//! The node without kube2ram: pods really reach the metadata server and are seen doing it.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{fs, path::Path, process::Command, sync::Arc};

use kube2ram_sandbox::{
    client::{Reply, StormReport},
    clock::Clock,
    node::{CgroupDriver, Node, PodSpec},
    standin::{Accounts, Metadata},
};

const CLIENT: &str = env!("CARGO_BIN_EXE_kube2ram-sandbox");
const REGION: &str = "http://100.100.100.200/latest/meta-data/region-id";

fn json<T: serde::de::DeserializeOwned>(command: &mut Command) -> T {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn metadata(node: &Node) -> Metadata {
    Metadata::start(node.metadata_bind(), Arc::new(Accounts::new(Clock::default()))).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_reach_the_metadata_server_and_are_seen() {
    let mut node = Node::create("reach", CgroupDriver::Cgroupfs).unwrap();
    let server = metadata(&node);
    let pod = node.add_pod(&PodSpec::new("orders").containers(&["app", "sidecar"])).unwrap();
    let quiet = node.add_pod(&PodSpec::new("quiet")).unwrap();

    let reply: Reply = json(pod.command("sidecar", CLIENT).unwrap().args(["client", "get", REGION]));
    let mapped: Reply =
        json(pod.command("app", CLIENT).unwrap().args(["client", "get", "--family", "6mapped", REGION]));

    assert_eq!((reply.status, reply.body.as_str()), (200, "cn-hangzhou"));
    assert_eq!(mapped.status, 200);
    assert_eq!(server.seen()[0].peer.ip(), pod.ip());
    let packets = node.sniffer().packets_from(pod.ip());
    assert_eq!(packets.iter().filter(|packet| packet.tcp_flags == 0x02 && packet.port == 80).count(), 2);
    assert!(node.sniffer().packets_from(quiet.ip()).is_empty());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn commands_run_in_the_cgroup_and_namespace_of_their_container() {
    for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
        let mut node = Node::create("places", driver).unwrap();
        let pod = node.add_pod(&PodSpec::new("orders").containers(&["app", "sidecar"])).unwrap();
        let host_pod = node.add_pod(&PodSpec::new("daemon").host_network()).unwrap();
        let place = |command: &mut Command| {
            let script = "grep ^0: /proc/self/cgroup; readlink /proc/self/ns/net";
            let output = command.args(["-c", script]).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let (cgroup, netns) = text.trim().split_once('\n').unwrap();
            (cgroup.trim_start_matches("0::").to_owned(), netns.to_owned())
        };
        let cgroup =
            |directory: &Path| format!("/{}", directory.strip_prefix(node.cgroup_root()).unwrap().display());
        // The node's, which this thread is in.
        let here = fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string();

        let app = place(&mut pod.command("app", "sh").unwrap());
        let nested = place(&mut pod.nested_command("app", "inner/most", "sh").unwrap());
        let daemon = place(&mut host_pod.command("app", "sh").unwrap());
        let host = place(&mut node.host_command("sh"));

        assert_eq!(app.0, cgroup(pod.container_cgroup("app").unwrap()));
        assert!(app.0.starts_with(&cgroup(&node.pods_cgroup())) && app.0.contains("burstable"), "{app:?}");
        assert_ne!(app.1, here);
        assert_eq!(nested, (app.0 + "/inner/most", app.1));
        assert_eq!(daemon, (cgroup(host_pod.container_cgroup("app").unwrap()), here.clone()));
        assert_eq!(host, (cgroup(&node.cgroup().join("host")), here));
        assert!(pod.command("none", "sh").is_err());
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn storm_distinguishes_right_answers_from_wrong_ones() {
    let mut node = Node::create("storm", CgroupDriver::Cgroupfs).unwrap();
    let _server = metadata(&node);
    let pod = node.add_pod(&PodSpec::new("orders")).unwrap();
    let storm = |expect: &str| -> StormReport {
        let args = ["client", "storm", "--connects", "20", "--expect", expect, "http://100.100.100.200"];
        json(pod.command("app", CLIENT).unwrap().args(args))
    };

    let right = storm(Accounts::NODE_ROLE);
    let wrong = storm("orders-role");

    assert_eq!((right.ok, right.wrong, right.missing, right.errors), (20, 0, 0, 0));
    assert_eq!(right.latencies_us.len(), 20);
    assert_eq!((wrong.ok, wrong.wrong, wrong.missing, wrong.errors), (0, 10, 10, 0));
}
