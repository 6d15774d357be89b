//! Rung 2: the agent in exactly the container that the manifest describes, as a real runtime starts it:
//! arguments, variables, capabilities, seccomp, root file system and mounts. Nothing is added for the test;
//! names and paths lead to the sandbox instead.

use std::{
    fs,
    net::{SocketAddrV4, TcpStream},
};

use kube2ram_sandbox::standin::Accounts;
use serde_json::{Value, json};

use super::{
    node::{Agent, LIST, Node, eventually},
    support::{deploy, helm, objects, single_file, strings, template},
};

fn manifest() -> Value {
    template(&objects(&single_file())).clone()
}

/// A line of the agent's /proc/<pid>/status.
fn status(node: &Node, name: &str) -> String {
    let agents = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let directory = entry.ok()?.path();
        let is_ours = fs::read_to_string(directory.join("cgroup")).ok()?.contains(node.node().name());
        let exe = fs::read_to_string(directory.join("comm")).ok()?;
        (is_ours && exe.trim() == "kube2ram").then_some(directory)
    });
    let agents: Vec<_> = agents.collect();
    assert_eq!(agents.len(), 1, "{agents:?}");
    let status = fs::read_to_string(agents[0].join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_manifests_container_does_the_main_job() {
    let mut node = Node::new("manifest-job");

    let agent = node.start(&manifest()).unwrap();

    assert_eq!((agent.ready().unwrap().as_str(), agent.live().unwrap().as_str()), ("ready", "live"));
    node.assert_served();
    assert_eq!(node.ask("plain", LIST).status, 404);
    // DAC_READ_SEARCH, NET_BIND_SERVICE, NET_ADMIN, SYS_ADMIN, SYS_PTRACE by the numbers of
    // linux/capability.h; and SYS_RESOURCE, where this machine has it to give.
    let bits: u64 = [2, 10, 12, 19, 21].iter().map(|bit| 1 << bit).sum();
    for set in ["CapBnd", "CapEff", "CapPrm"] {
        let held = u64::from_str_radix(&status(&node, set), 16).unwrap();
        assert!([bits, bits | 1 << 24].contains(&held), "{set}: {held:#x}");
    }
    assert_eq!((status(&node, "NoNewPrivs").as_str(), status(&node, "Seccomp").as_str()), ("1", "2"));
    eventually("pods have their listeners", || agent.metric("kube2ram_pod_listeners") == 3.0);
    for gauge in ["kube2ram_datapath_in_force", "kube2ram_forward_guard_in_force"] {
        eventually(gauge, || agent.metric(gauge) == 1.0);
    }
    node.assert_served();
    assert!(node.node().sniffer().packets().iter().all(|packet| node.node().owns(packet.source.ip())));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_api_servers_own_address_stands_for_a_service_network_that_is_not_there_yet() {
    let mut node = Node::new("manifest-api");
    let (host, port) = node.surroundings.api_server.clone();
    // Where no Service answers (RFC 5737, TEST-NET-1).
    node.surroundings.api_server.0 = "192.0.2.1".to_owned();
    let mut by_service = node.spawn(&manifest()).unwrap();
    eventually("it cannot ask", || by_service.container.log().contains("watch failed"));
    let waiting = by_service.ready().unwrap_err().to_string();
    assert!(waiting.contains("namespaces, pods"), "{waiting}");
    by_service.container.terminate().unwrap();

    let set = [("KUBERNETES_SERVICE_HOST", host), ("KUBERNETES_SERVICE_PORT", port.to_string())];
    let set = set.iter().enumerate().flat_map(|(index, (name, value))| {
        let of = format!("extraEnv[{index}]");
        [format!("--set-string={of}.name={name}"), format!("--set-string={of}.value={value}")]
    });
    let set: Vec<_> = set.collect();
    let charted = helm(&set.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let agent = node.start(template(&objects(&charted))).unwrap();

    assert_eq!(agent.ready().unwrap(), "ready");
    node.assert_served();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_rolling_update_hands_over_between_containers() {
    let mut node = Node::new("manifest-update");
    let mut former = node.start(&manifest()).unwrap();
    eventually("pods have their listeners", || former.metric("kube2ram_pod_listeners") == 3.0);

    let next = node.start(&manifest()).unwrap();
    node.assert_served();
    let ended = former.container.terminate().unwrap();

    assert!(ended.success(), "{ended}: {}", former.container.log());
    assert_eq!(next.ready().unwrap(), "ready");
    // Under the links of the former, not next to them.
    assert!(next.container.log().contains("outcome=Updated"), "{}", next.container.log());
    node.assert_served();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn liveness_is_the_containers_own_process_whatever_others_on_the_node_do() {
    let mut node = Node::new("manifest-live");
    let mut former = node.start(&manifest()).unwrap();
    let next = node.start(&manifest()).unwrap();
    // As many as an address may have, of the address that the kubelet has, too.
    let admin = SocketAddrV4::new(node.node().ip(), 9181);
    let held: Vec<_> = (0..16).map(|_| TcpStream::connect(admin).unwrap()).collect();
    assert!(held.iter().all(|stream| stream.local_addr().unwrap().ip() == *admin.ip()));
    let live = |agent: &Agent| agent.live().map_err(|error| format!("{error:#}"));
    let is_silent = |said: Result<String, String>| {
        said.is_err_and(|why| {
            why.contains("the agent of this container does not answer") && !why.contains('\n')
        })
    };

    for agent in [&former, &next] {
        assert_eq!(live(agent), Ok("live".to_owned()));
    }
    assert_eq!(former.admin("/healthz").status, 200, "and they keep nobody out");
    drop(held);
    // Either, while the other one is well, and what they share answers.
    for (stopped, other) in [(&next, &former), (&former, &next)] {
        stopped.container.signal("STOP").unwrap();
        assert!(is_silent(live(stopped)));
        assert_eq!(live(other), Ok("live".to_owned()));
        stopped.container.signal("CONT").unwrap();
        assert_eq!(live(stopped), Ok("live".to_owned()));
    }
    former.container.signal("KILL").unwrap();
    assert!(!former.container.wait().unwrap().success());
    assert!(live(&former).is_err());
    assert_eq!(live(&next), Ok("live".to_owned()));
}

/// Leaves a capability out of the agent's container.
fn without_capability(name: &str) -> Value {
    let mut template = manifest();
    let list = &mut template["containers"][0]["securityContext"]["capabilities"]["add"];
    let left: Vec<_> = strings(list).into_iter().filter(|capability| capability != name).collect();
    assert_eq!(left.len() + 1, strings(list).len(), "{name}");
    *list = left.into();
    template
}

/// Leaves a volume out.
fn without_volume(name: &str) -> Value {
    let mut template = manifest();
    let leave_out = |list: &mut Value| list.as_array_mut().unwrap().retain(|item| item["name"] != name);
    leave_out(&mut template["volumes"]);
    leave_out(&mut template["containers"][0]["volumeMounts"]);
    template
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_capability_it_names_the_one_to_add() {
    let mut node = Node::new("manifest-capability");
    // SYS_RESOURCE is for kernels below 5.11.
    for (capability, named) in [
        ("DAC_READ_SEARCH", "DAC_READ_SEARCH"),
        ("NET_ADMIN", "NET_ADMIN"),
        ("SYS_ADMIN", "BPF (or SYS_ADMIN)"),
    ] {
        let said = node.start(&without_capability(capability)).err().unwrap();

        assert!(said.contains(&format!("{named} missing: add to the container's")), "{capability}: {said}");
    }
    // The twin.
    node.start(&manifest()).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_ptrace_pods_share_the_host_listener_and_it_reports_why() {
    let mut node = Node::new("manifest-ptrace");

    let agent = node.start(&without_capability("SYS_PTRACE")).unwrap();

    node.assert_served();
    assert_eq!(agent.metric("kube2ram_pod_listeners"), 0.0);
    eventually("it says why", || agent.container.log().contains("SYS_PTRACE"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_mount_it_names_the_one_to_make() {
    let mut node = Node::new("manifest-mount");
    for (volume, named) in [
        ("bpf", "mount -t bpf bpf /sys/fs/bpf"),
        ("cgroup", "mount the host's at /sys/fs/cgroup"),
        ("state", "cannot write to /run/kube2ram"),
    ] {
        let said = match node.start(&without_volume(volume)) {
            Ok(agent) => panic!("without {volume} it is ready: {}", agent.container.log()),
            Err(said) => said,
        };

        assert!(said.contains(named), "{volume}: {said}");
    }
    let mut elsewhere = manifest();
    elsewhere["volumes"][0]["hostPath"]["path"] = json!("/nowhere");
    assert!(node.start(&elsewhere).err().unwrap().contains("/nowhere"));
    // The twin.
    node.start(&manifest()).unwrap();
}

/// The manifest of a version before the pod's own directory, with a later image.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_a_directory_of_the_pod_probes_still_reach_their_own_agent() {
    let mut node = Node::new("manifest-pod-dir");
    let mut former = node.start(&without_volume("pod")).unwrap();
    let another = node.start(&without_volume("pod")).unwrap();
    // Last: containers share their root file system here, and the mount point stays in it.
    let next = node.start(&manifest()).unwrap();

    for agent in [&former, &next, &another] {
        assert_eq!((agent.ready().unwrap().as_str(), agent.live().unwrap().as_str()), ("ready", "live"));
    }
    former.container.signal("KILL").unwrap();
    assert!(!former.container.wait().unwrap().success());

    assert!(former.live().is_err());
    for agent in [&next, &another] {
        assert_eq!(agent.live().unwrap(), "live");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_hosts_processes_pods_share_the_hosts_listener() {
    let mut node = Node::new("manifest-hostpid");
    let mut template = manifest();
    template["hostPID"] = json!(false);

    let agent = node.start(&template).unwrap();

    node.assert_served();
    assert_eq!(agent.metric("kube2ram_pod_listeners"), 0.0, "{}", agent.container.log());
}

/// The patch of docs/install.md: its second operation, on the pod template.
fn as_documented_for_removal(template: &Value) -> Value {
    let page = fs::read_to_string(deploy().join("../docs/install.md")).unwrap();
    let patch = page.split("patch daemonset kube2ram --type=json -p '").nth(1).unwrap();
    let patch: Value = serde_json::from_str(patch.split('\'').next().unwrap()).unwrap();
    let operation = &patch[1];
    assert_eq!(
        (&operation["op"], &operation["path"]),
        (&json!("replace"), &json!("/spec/template/spec/containers/0/args"))
    );
    let mut template = template.clone();
    template["containers"][0]["args"] = operation["value"].clone();
    template
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removal_as_documented_ends_well_and_reports_what_it_has_removed() {
    let mut node = Node::new("manifest-removal");
    let mut agent = node.start(&manifest()).unwrap();
    node.assert_served();
    assert!(agent.container.terminate().unwrap().success());
    let removal = as_documented_for_removal(&manifest());
    // The kubelet starts it again and again.
    for expected in ["pods of this node now reach the node's role", "nothing of kube2ram was active"] {
        let mut container = node.container(&removal, "kube2ram").unwrap();
        container.start().unwrap();
        let ended = container.wait().unwrap();

        assert!(ended.success(), "{ended}: {}", container.log());
        assert!(container.log().contains(expected), "{}", container.log());
    }
    assert_eq!(node.ask("orders", LIST).body, Accounts::NODE_ROLE);
}
