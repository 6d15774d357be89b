//! Rung 2: `init` and the server in exactly the containers that the manifests describe, as a real runtime
//! starts them: arguments, users, capabilities, seccomp, root file system and mounts. Only the configuration
//! file is edited, as an operator would.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use kube2ram_sandbox::{
    Sandbox,
    agent::Agent,
    container::{Container, Image, Surroundings},
    login::{token_of, user_arn},
    node::Pod,
    standin::{AccessKey, Authority, TlsFront},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{PROGRAM, of_kind, pods};

const CLUSTER: &str = "c-of-this-test";
/// As the image has it.
const ENTRYPOINT: &str = "/usr/local/bin/kube2ram-authenticator";
/// The endpoint of no region.
const STS: &str = "sts.aliyuncs.com";
const STATE: &str = "/var/lib/kube2ram-authenticator";
const KUBECONFIG: &str = "/etc/kubernetes/kube2ram-authenticator";
const USER: u32 = 64532;
const DEADLINE: Duration = Duration::from_secs(60);

/// A control-plane node before its first pod, with STS by its name.
struct Node {
    image: Image,
    surroundings: Surroundings,
    /// One for each container.
    pods: Vec<Pod>,
    alice: AccessKey,
    _sts: TlsFront,
    sandbox: Sandbox,
    directory: TempDir,
}

impl Node {
    fn new(name: &str) -> Self {
        let sandbox = Sandbox::create(name).unwrap();
        let alice = sandbox.accounts().add_user("alice");
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let at = |path: &str| directory.path().join(path.trim_start_matches('/'));
        let authority = Authority::new().unwrap();
        let image = Image::of_binary(PROGRAM.as_ref(), ENTRYPOINT, authority.pem(), at("image")).unwrap();
        let ip = sandbox.node().ip();
        let upstream = sandbox.sts().url().trim_start_matches("http://").parse().unwrap();
        let sts = authority.front(TcpListener::bind((ip, 443)).unwrap(), upstream, &[STS]).unwrap();
        let config = BTreeMap::from([("config.yaml".to_owned(), configuration())]);
        let surroundings = Surroundings {
            host_paths: BTreeMap::from([STATE, KUBECONFIG].map(|path| (PathBuf::from(path), at(path)))),
            hosts: format!("127.0.0.1 localhost\n{ip} {STS}\n"),
            config_maps: BTreeMap::from([("kube2ram-authenticator".to_owned(), config)]),
            ..Surroundings::default()
        };
        Self { image, surroundings, pods: Vec::new(), alice, _sts: sts, sandbox, directory }
    }

    /// Where a path of the node is on this machine.
    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    /// Makes a pod, and this container of its template in it.
    fn container(&mut self, template: &Value, name: &str) -> Container {
        let number = self.pods.len();
        let pod = self.sandbox.add_agent_pod(&format!("authenticator-{number}")).unwrap();
        let directory = self.at(&format!("container-{number}"));
        let made = Container::create(&pod, template, name, &self.image, &self.surroundings, &directory);
        self.pods.push(pod);
        made.unwrap()
    }

    /// Runs the init container to its end: what it wrote, if it has failed as the error.
    fn init(&mut self, template: &Value) -> Result<String, String> {
        let mut container = self.container(template, "init");
        container.start().unwrap();
        let ended = container.wait().unwrap();
        if ended.success() { Ok(container.log()) } else { Err(container.log()) }
    }

    /// Starts the server's container, and waits until its readiness probe succeeds.
    fn start(&mut self, template: &Value) -> Container {
        let mut server = self.container(template, "server");
        server.start().unwrap();
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = probe(&server, template, "readinessProbe") {
            let is_waited_for = !server.has_ended().unwrap() && Instant::now() < deadline;
            assert!(is_waited_for, "it is not ready: {error:#}\n{}", server.log());
            thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// What the webhook decides about a token, asked by the API server's kubeconfig.
    fn login(&self, key: &AccessKey) -> Value {
        let kubeconfig = fs::read_to_string(self.at(KUBECONFIG).join("kubeconfig.yaml")).unwrap();
        let kubeconfig: Value = serde_saphyr::from_str(&kubeconfig).unwrap();
        let webhook = &kubeconfig["clusters"][0]["cluster"];
        let ca = STANDARD.decode(webhook["certificate-authority-data"].as_str().unwrap()).unwrap();
        fs::write(self.at("ca.pem"), ca).unwrap();
        let review = json!({
            "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1",
            "spec": { "token": token_of(CLUSTER, key, Timestamp::now()) },
        });
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "30", "--noproxy", "*", "--cacert"]);
        curl.arg(self.at("ca.pem")).args(["--resolve", "localhost:21362:127.0.0.1"]);
        curl.args(["--header", "Content-Type: application/json", "--data", &review.to_string()]);
        let output = curl.arg(webhook["server"].as_str().unwrap()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["status"].take()
    }

    /// Asserts that alice is let in, and nobody who only knows her key's id.
    fn assert_serves(&self) {
        let guessed = AccessKey { secret: "guessed".into(), ..self.alice.clone() };

        assert_eq!(self.login(&self.alice)["user"]["username"], "alice");
        assert_eq!(self.login(&guessed), json!({ "authenticated": false }));
    }

    /// Asserts what the process of the newest container may do: nothing, and write into its probe's directory
    /// alone.
    fn assert_confined(&self, config: &str) {
        let cgroup = self.pods.last().unwrap().container_cgroup(Agent::CONTAINER).unwrap();
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        // The others are the runtime's. The kernel cuts names off at 15 bytes.
        let is_server = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "kube2ram-authen\n")
        };
        let servers: Vec<&str> = processes.lines().filter(is_server).collect();
        let [server] = *servers else { panic!("{servers:?}") };

        let status = fs::read_to_string(format!("/proc/{server}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        for name in ["Uid", "Gid"] {
            assert_eq!(field(name), [USER.to_string().as_str(); 4].join(" "), "{name}");
        }
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&field(name), 16), Ok(0), "{name}");
        }
        assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));

        let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).unwrap();
        let is_writable = |path: &str| {
            let mut mounted = mounts.lines().map(|line| line.split(' ').skip(4).collect::<Vec<_>>());
            // The last one covers the others.
            let mount = mounted.rfind(|fields| fields[0] == path);
            let options = mount.unwrap_or_else(|| panic!("no {path} in {mounts}"))[1];
            options.split(',').any(|option| option == "rw")
        };
        for (path, expected) in
            [("/", false), (STATE, false), (config, false), ("/run/kube2ram-authenticator", true)]
        {
            assert_eq!(is_writable(path), expected, "{path} in {mounts}");
        }
    }

    /// The user who has a file of the node, and its mode.
    fn owner(&self, path: &str) -> (u32, u32) {
        let metadata = fs::metadata(self.at(path)).unwrap();
        (metadata.uid(), metadata.mode() & 0o777)
    }
}

/// The ConfigMap's, for a cluster and with a user. Without an API server it has no backends of the cluster.
fn configuration() -> String {
    let mut text = of_kind("ConfigMap")["data"]["config.yaml"].as_str().unwrap().to_owned();
    for (from, to) in [
        ("clusterID: \"\"\n", format!("clusterID: {CLUSTER}\n")),
        ("[MountedFile, CRD, ACKConfigMap]", "[MountedFile]".to_owned()),
    ] {
        assert!(text.contains(from), "{from} in {text}");
        text = text.replace(from, &to);
    }
    format!("{text}  mapUsers: [{{ userARN: '{}', username: alice }}]\n", user_arn("alice"))
}

/// What a probe of the manifest says, as the kubelet asks it.
fn probe(server: &Container, template: &Value, name: &str) -> anyhow::Result<String> {
    let words = template["containers"][0][name]["exec"]["command"].as_array().unwrap().iter();
    let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
    server.exec(&words)
}

/// Ends the server as the kubelet does.
fn assert_ends(mut server: Container) {
    let ended = server.terminate().unwrap();

    assert!(ended.success(), "{ended}: {}", server.log());
    assert!(server.log().contains("drained"), "{}", server.log());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_daemon_sets_containers_let_a_user_log_in_and_end_with_sigterm() {
    let mut node = Node::new("auth-daemon-set");
    let [template, _] = pods();

    let said = node.init(&template).unwrap();
    let server = node.start(&template);

    assert!(said.contains("a new CA was made"), "{said}");
    assert_eq!(node.owner(&format!("{STATE}/key.pem")), (USER, 0o600));
    assert_eq!(probe(&server, &template, "livenessProbe").unwrap(), "live");
    node.assert_serves();
    node.assert_confined("/etc/kube2ram-authenticator");
    assert_ends(server);
    // The next pod on the node: the API server knows the CA by then.
    let said = node.init(&template).unwrap();
    assert!(said.contains("nothing was changed"), "{said}");
    let server = node.start(&template);
    node.assert_serves();
    assert_ends(server);
}

/// `init` runs on the node itself, as the manifest asks.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_static_pods_container_lets_a_user_log_in_and_ends_with_sigterm() {
    let mut node = Node::new("auth-static-pod");
    let [_, template] = pods();
    let [state, etc] = [STATE, KUBECONFIG].map(|path| node.at(path));
    fs::create_dir_all(&etc).unwrap();
    fs::write(etc.join("config.yaml"), configuration()).unwrap();
    let mut init = Command::new(PROGRAM);
    init.arg("init").arg("--config").arg(etc.join("config.yaml")).args(["--owner", &USER.to_string()]);
    // On this machine the paths are others.
    init.arg("--state-dir").arg(&state).arg("--generate-kubeconfig").arg(etc.join("kubeconfig.yaml"));
    let output = init.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let server = node.start(&template);

    assert_eq!(node.owner(STATE), (USER, 0o700));
    assert_eq!(probe(&server, &template, "livenessProbe").unwrap(), "live");
    node.assert_serves();
    node.assert_confined(KUBECONFIG);
    assert_ends(server);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn init_needs_each_of_its_capabilities() {
    let mut node = Node::new("auth-init");
    let [template, _] = pods();
    let without = |name: &str| {
        let mut template = template.clone();
        let added = &mut template["initContainers"][0]["securityContext"]["capabilities"]["add"];
        let added = added.as_array_mut().unwrap();
        let count = added.len();
        added.retain(|capability| capability != name);
        assert_eq!(added.len() + 1, count, "{name}");
        template
    };

    let said = node.init(&without("CHOWN")).unwrap_err();
    assert!(said.contains(&format!("cannot change the owner of {STATE}")), "{said}");
    node.init(&template).unwrap();
    // Of what is the server's by now.
    let said = node.init(&without("DAC_OVERRIDE")).unwrap_err();
    assert!(said.contains(&format!("cannot read {STATE}/key.pem")), "{said}");
    node.init(&template).unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_server_that_was_not_given_the_key_names_it() {
    let mut node = Node::new("auth-owner");
    let [mut template, _] = pods();
    let arguments = template["initContainers"][0]["args"].as_array_mut().unwrap();
    arguments.retain(|argument| argument != "--owner=64532");
    node.init(&template).unwrap();
    assert_eq!(node.owner(&format!("{STATE}/key.pem")), (0, 0o600));

    let mut server = node.container(&template, "server");
    server.start().unwrap();
    let ended = server.wait().unwrap();

    assert!(!ended.success(), "{}", server.log());
    assert!(server.log().contains(&format!("cannot read {STATE}/key.pem")), "{}", server.log());
}
