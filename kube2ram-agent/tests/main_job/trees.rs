//! Two trees of pods' cgroups, as a change of the kubelet's cgroup driver leaves them: both are covered.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Stdio},
};

use kube2ram_sandbox::{
    node::PodSpec,
    standin::{Accounts, PodManifest, Role},
};

use crate::support::{LIST, Lab, ROLE, command_in, eventually, owner_of, run, url};

const HOST: &str = "left";
const OWN: &str = "apart";
const UIDS: [(&str, &str); 2] =
    [(HOST, "3f1c2a5e-1f6d-4f0e-9d1c-3a1d5f1f0001"), (OWN, "3f1c2a5e-1f6d-4f0e-9d1c-3a1d5f1f0002")];

/// A pod in the tree of the other driver, which the sandbox's node does not know.
struct Leftover {
    cgroup: PathBuf,
    netns: Option<String>,
    process: Child,
}

impl Leftover {
    fn start(lab: &Lab, name: &str) -> Self {
        let uid = UIDS.iter().find(|(known, _)| *known == name).unwrap().1;
        let role = format!("{name}-role");
        lab.accounts().add_role(Accounts::role_arn(&role), Role::default());
        let manifest = PodManifest {
            annotations: [(ROLE.to_owned(), role)].into(),
            host_network: name == HOST,
            name: name.to_owned(),
            namespace: "default".to_owned(),
            node: "sandbox-node".to_owned(),
            uid: uid.to_owned(),
            service_account: "default".to_owned(),
        };
        lab.api().apply(manifest.to_json()).unwrap();
        let cgroup = tree(lab)
            .join("kubepods-burstable.slice")
            .join(format!("kubepods-burstable-pod{}.slice/cri-containerd-1.scope", uid.replace('-', "_")));
        fs::create_dir_all(&cgroup).unwrap();
        let mut command = command_in(&cgroup, if name == HOST { "sh" } else { "unshare" });
        if name != HOST {
            command.args(["--net", "sh"]);
        }
        command.args(["-c", "ip link set lo up; echo up; exec sleep 600"]);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        let netns = (name != HOST).then(|| format!("--net=/proc/{}/ns/net", process.id()));
        Self { cgroup, netns, process }
    }

    /// What a process of the pod prints.
    fn runs(&self, program: &str, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = match &self.netns {
            Some(netns) => {
                let mut command = command_in(&self.cgroup, "nsenter");
                command.args([netns, program]);
                command
            }
            None => command_in(&self.cgroup, program),
        };
        run(command.args(arguments))
    }

    /// What it is told its role is.
    fn role(&self) -> String {
        self.runs("curl", &["--silent", "--max-time", "5", &url(LIST)]).1
    }

    /// Whose credentials it gets if it asks for a role's.
    fn credentials(&self, role: &str) -> String {
        owner_of(&self.runs("curl", &["--silent", "--max-time", "5", &url(&format!("{LIST}{role}"))]).1)
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        for cgroup in [Some(&*self.cgroup), self.cgroup.parent()].into_iter().flatten() {
            drop(fs::remove_dir(cgroup));
        }
    }
}

/// The other driver's.
fn tree(lab: &Lab) -> PathBuf {
    lab.node().cgroup().join("kubepods.slice")
}

/// An agent that finds the pods' cgroups by itself, on a node whose cgroup is the root.
fn prepare(lab: &mut Lab) {
    let root = format!("--cgroup-root={}", lab.node().cgroup().display());
    lab.prepare(&[&root]);
    lab.agent().unwrap().remove_flag("--pods-cgroup");
}

/// The pins of the other tree's links.
fn pins(lab: &Lab) -> PathBuf {
    lab.node().bpffs().join("kube2ram/v2/links/kubepods_slice")
}

fn assert_denied(pod: &Leftover) {
    let datagram = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                    try: s.sendto(b'x', ('100.100.100.200', 53))\nexcept PermissionError: print('denied')";
    assert_eq!(pod.runs("python3", &["-c", datagram]), (Some(0), "denied".to_owned()));
    let node_role = format!("{LIST}{}", Accounts::NODE_ROLE);
    let asked =
        pod.runs("curl", &["--silent", "--max-time", "5", "--write-out", "%{http_code}", &url(&node_role)]);
    assert!(asked.1.ends_with("403"), "{asked:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_of_the_former_cgroup_driver_get_their_own_role() {
    let mut lab = Lab::new("two-trees", &[PodSpec::new("orders").role("orders-role")]);
    let (host, own) = (Leftover::start(&lab, HOST), Leftover::start(&lab, OWN));
    assert_eq!(host.role(), Accounts::NODE_ROLE, "without an agent");
    prepare(&mut lab);

    lab.agent().unwrap().start().unwrap();

    // One for `orders`, in the tree in which the agent is.
    eventually(2.0, || lab.metric("kube2ram_pod_listeners"));
    assert_eq!((host.role(), own.role()), ("left-role".to_owned(), "apart-role".to_owned()));
    assert_eq!(host.credentials("left-role"), "left-role");
    assert_eq!(own.credentials("apart-role"), "apart-role");
    assert_denied(&host);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    for pod in [HOST, OWN] {
        let (code, why) = lab.document(&["explain", &format!("default/{pod}")]);
        assert_eq!(code, Some(0), "{why:#}");
    }
    let status = lab.document(&["status"]).1;
    assert!(status["datapath"]["pods_cgroup"].as_str().unwrap().ends_with("/kubepods"), "{status:#}");
    let programs = status["datapath"]["programs"].as_array().unwrap();
    let of_tree = programs.iter().filter(|program| program["cgroup"] == tree(&lab).to_str().unwrap()).count();
    let of_pods =
        programs.iter().filter(|program| program["cgroup"] == status["datapath"]["pods_cgroup"]).count();
    assert!(of_tree == of_pods && of_tree > 5, "{programs:#?}");
    assert_eq!(lab.leaks(), []);

    // Without an agent they are refused, as all others.
    lab.agent().unwrap().kill().unwrap();
    assert_eq!(host.runs("curl", &["--silent", "--max-time", "5", &url(LIST)]).0, Some(7));
    lab.agent().unwrap().start().unwrap();
    assert_eq!(host.role(), "left-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_tree_that_comes_and_goes_while_the_agent_runs_is_covered_and_forgotten() {
    let mut lab = Lab::new("new-tree", &[PodSpec::new("orders").role("orders-role")]);
    prepare(&mut lab);
    lab.agent().unwrap().start().unwrap();
    assert!(!pins(&lab).exists());

    // The kubelet makes the tree first, and a pod's cgroup in it later.
    fs::create_dir_all(tree(&lab).join("kubepods-burstable.slice")).unwrap();
    eventually(true, || pins(&lab).join("k2r_peer_name6").exists());
    let host = Leftover::start(&lab, HOST);
    assert_eq!(host.credentials("left-role"), "left-role");
    assert_denied(&host);

    drop(host);
    for cgroup in [tree(&lab).join("kubepods-burstable.slice"), tree(&lab)] {
        eventually(true, || fs::remove_dir(&cgroup).is_ok() || !cgroup.exists());
    }
    eventually(false, || pins(&lab).exists());
    eventually(1.0, || lab.metric("kube2ram_datapath_in_force"));
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.leaks(), []);
}
