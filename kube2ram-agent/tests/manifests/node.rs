//! A node with pods, and before it what a cluster and the cloud look like from a container: the API server by
//! its Service variables and the service account's token, STS by its name, both over TLS. Used by the tests
//! that start the manifests' containers.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, TcpListener},
    ops::{Deref, DerefMut},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Cloud, Sandbox,
    client::{Credentials, Reply, Request, caller_identity},
    container::{Container, Image, Surroundings},
    node::{Pod, PodSpec},
    standin::{Authority, Role, TlsFront},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::{agent, strings};

pub(crate) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
const DEADLINE: Duration = Duration::from_secs(60);
/// As the image has it.
const ENTRYPOINT: &str = "/usr/local/bin/kube2ram";
/// The entry point of the image for kube2iam's manifests.
const AS_KUBE2IAM: &str = "/kube2iam";
pub(crate) const STS: [&str; 2] = ["sts-vpc.cn-hangzhou.aliyuncs.com", "sts.cn-hangzhou.aliyuncs.com"];
const STS_ON_AWS: [&str; 2] = ["sts.eu-west-1.amazonaws.com", "sts.amazonaws.com"];
/// Each with its own role; one shares the host's network.
pub(crate) const PODS: [&str; 3] = ["orders", "billing", "daemon"];

pub(crate) struct Node {
    containers: usize,
    image: Image,
    pub(crate) surroundings: Surroundings,
    _fronts: Vec<TlsFront>,
    /// Of the containers.
    pods: Vec<Pod>,
    sandbox: Sandbox,
    directory: TempDir,
}

impl Node {
    /// With the stand-in for the API server.
    pub(crate) fn new(name: &str) -> Self {
        Self::new_in(name, Cloud::Alibaba)
    }

    /// The same of any cloud.
    pub(crate) fn new_in(name: &str, cloud: Cloud) -> Self {
        let authority = Authority::new().unwrap();
        let mut node = Self::without_cluster_in(name, &authority, cloud);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let upstream = node.sandbox.api().url().strip_prefix("http://").unwrap().parse().unwrap();
        let front = authority.front(listener, upstream, &["127.0.0.1"]).unwrap();
        let token = "SandboxToken-of-the-service-account";
        node.sandbox.api().require_token(token);
        node.join(("127.0.0.1".to_owned(), front.addr().port()), token, authority.pem());
        node._fronts.push(front);
        node.sandbox
            .api()
            .apply_namespace("default", &[(&*cloud.annotation("allowed-roles"), r#"["*-role"]"#)])
            .unwrap();
        for pod in PODS {
            node.add(pod, PodSpec::new(pod));
        }
        node.sandbox.add_pod(&PodSpec::new("plain")).unwrap();
        node
    }

    /// Knows no API server, and has no pods.
    pub(crate) fn without_cluster(name: &str, authority: &Authority) -> Self {
        Self::without_cluster_in(name, authority, Cloud::Alibaba)
    }

    /// The same of any cloud.
    pub(crate) fn without_cluster_in(name: &str, authority: &Authority, cloud: Cloud) -> Self {
        let names = match cloud {
            Cloud::Alibaba => STS,
            Cloud::Aws => STS_ON_AWS,
        };
        let sandbox = Sandbox::create_in(name, cloud).unwrap();
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image =
            Image::of_binary(&agent(), ENTRYPOINT, authority.pem(), directory.path().join("image")).unwrap();
        let ip = sandbox.node().ip();
        let upstream = sandbox.sts().url();
        let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
        let sts = authority.front(TcpListener::bind((ip, 443)).unwrap(), upstream, &names).unwrap();
        let host_root = directory.path().join("host");
        fs::create_dir_all(&host_root).unwrap();
        let cgroup = sandbox.node().pods_cgroup().parent().unwrap().to_owned();
        let host_paths: [(&str, PathBuf); 4] = [
            ("/", host_root),
            ("/sys/fs/cgroup", cgroup),
            ("/sys/fs/bpf", sandbox.node().bpffs()),
            ("/run/kube2ram", sandbox.node().agent_state()),
        ];
        let surroundings = Surroundings {
            host_paths: host_paths.into_iter().map(|(path, place)| (path.into(), place)).collect(),
            hosts: format!("127.0.0.1 localhost\n{ip} {}\n", names.join(" ")),
            fields: [("spec.nodeName", Sandbox::NODE.to_owned()), ("status.podIP", ip.to_string())]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            ..Surroundings::default()
        };
        Self { containers: 0, image, surroundings, _fronts: vec![sts], pods: Vec::new(), sandbox, directory }
    }

    /// Gives containers the API server's address, and their identity there.
    pub(crate) fn join(&mut self, api_server: (String, u16), token: &str, authority: &str) {
        self.surroundings.api_server = api_server;
        let files = [("token", token), ("ca.crt", authority), ("namespace", "kube-system")];
        self.surroundings.service_account = BTreeMap::from(files.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    /// Adds a pod with its own role.
    pub(crate) fn add(&mut self, name: &str, spec: PodSpec) {
        let role = format!("{name}-role");
        self.sandbox.accounts().add_role(self.sandbox.cloud().role_arn(&role), Role::default());
        let spec = spec.role(&role);
        self.sandbox.add_pod(&if name == "daemon" { spec.host_network() } else { spec }).unwrap();
    }

    /// From now on containers have the image for kube2iam's manifests.
    pub(crate) fn take_image_for_kube2iam(&mut self) {
        let link = self.image.root.join(AS_KUBE2IAM.trim_start_matches('/'));
        symlink(ENTRYPOINT.trim_start_matches('/'), link).unwrap();
        self.image.entrypoint = AS_KUBE2IAM.to_owned();
    }

    /// The host's root directory, as the agent's pod sees it.
    pub(crate) fn host_root(&self) -> &Path {
        &self.surroundings.host_paths[Path::new("/")]
    }

    /// Makes a pod and a container of its template in it.
    pub(crate) fn container(&mut self, template: &Value, name: &str) -> anyhow::Result<Container> {
        self.containers += 1;
        let pod = self.sandbox.add_agent_pod(&format!("kube2ram-{}", self.containers))?;
        let directory = self.directory.path().join(format!("container-{}", self.containers));
        let mut template = template.clone();
        // This machine may be one of another cloud than the node that it stands for.
        let addr = json!({ "name": "KUBE2RAM_METADATA_ADDR", "value": self.sandbox.cloud().metadata_ip() });
        for kind in ["containers", "initContainers"] {
            for container in template[kind].as_array_mut().into_iter().flatten() {
                container["env"].as_array_mut().unwrap().push(addr.clone());
            }
        }
        let container = Container::create(&pod, &template, name, &self.image, &self.surroundings, &directory);
        self.pods.push(pod);
        container
    }

    /// Starts the agent's container and waits until its readiness probe succeeds, or it has ended; then
    /// returns what it wrote.
    pub(crate) fn start(&mut self, template: &Value) -> Result<Agent, String> {
        let mut agent = self.spawn(template)?;
        agent.await_ready()?;
        Ok(agent)
    }

    /// Starts the agent's container, or returns why the kubelet would not.
    pub(crate) fn spawn(&mut self, template: &Value) -> Result<Agent, String> {
        let name = template["containers"][0]["name"].as_str().unwrap();
        let container = self.container(template, name).map_err(|error| format!("{error:#}"))?;
        let ip = self.sandbox.node().ip();
        let mut agent = Agent { container, template: template.clone(), admin: String::new(), ip };
        let args = strings(&agent.spec()["args"]);
        let port_of = |flag: &str| args.iter().find_map(|arg| arg.strip_prefix(flag)?.strip_prefix('='));
        // For kube2iam, which has all on one port: never the app port.
        let port = port_of("--metrics-port").filter(|port| port_of("--app-port") != Some(*port));
        agent.admin = format!("http://{ip}:{}", port.unwrap_or("9181"));
        agent.container.start().unwrap();
        Ok(agent)
    }

    /// Whether each pod gets its own role, and none other.
    pub(crate) fn assert_served(&self) {
        let list = self.sandbox.cloud().list();
        for pod in PODS {
            let role = format!("{pod}-role");
            let reply = self.ask(pod, list);
            assert_eq!((reply.status, reply.body.as_str()), (200, role.as_str()), "{pod}");
            let reply = self.ask_until_ready(pod, &format!("{list}{role}"));
            let credentials = serde_json::from_str::<Credentials>(&reply.body)
                .unwrap_or_else(|error| panic!("{pod}: {error}: {reply:?}"));
            let caller = caller_identity(&self.sandbox.sts().url(), &credentials).unwrap();
            assert!(caller.contains(&format!("assumed-role/{role}")), "{caller}");
        }
        assert_eq!(self.ask("orders", &format!("{list}billing-role")).status, 403);
        assert_eq!(self.ask("orders", "/latest/meta-data/instance-id").status, 200);
    }

    pub(crate) fn ask(&self, pod: &str, target: &str) -> Reply {
        self.sandbox.pod(pod).unwrap().curl(target).unwrap()
    }

    /// The same until the answer is another one than "not yet", as SDKs do.
    pub(crate) fn ask_until_ready(&self, pod: &str, target: &str) -> Reply {
        self.sandbox.pod(pod).unwrap().curl_until_ready(target, DEADLINE).unwrap()
    }
}

impl Deref for Node {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

impl DerefMut for Node {
    fn deref_mut(&mut self) -> &mut Sandbox {
        &mut self.sandbox
    }
}

/// A container of the agent's, running.
pub(crate) struct Agent {
    pub(crate) container: Container,
    template: Value,
    admin: String,
    ip: Ipv4Addr,
}

impl Agent {
    /// The manifest's settings of the container.
    pub(crate) fn spec(&self) -> &Value {
        &self.template["containers"][0]
    }

    /// The readiness probe, as the kubelet makes it.
    pub(crate) fn ready(&self) -> anyhow::Result<String> {
        self.probe("readinessProbe")
    }

    /// The liveness probe, likewise.
    pub(crate) fn live(&self) -> anyhow::Result<String> {
        self.probe("livenessProbe")
    }

    /// What takes longer than the manifest allows has failed.
    fn probe(&self, name: &str) -> anyhow::Result<String> {
        let probe = &self.spec()[name];
        // The API server's default.
        let timeout = Duration::from_secs(probe["timeoutSeconds"].as_u64().unwrap_or(1));
        let begun = Instant::now();
        let said = match &probe["httpGet"] {
            Value::Null => {
                let command = strings(&probe["exec"]["command"]);
                self.container.exec(&command.iter().map(String::as_str).collect::<Vec<_>>())
            }
            http => self.ask_by_http(http),
        };
        anyhow::ensure!(begun.elapsed() < timeout, "{name} took {:?}: {said:?}", begun.elapsed());
        said
    }

    /// As the kubelet, whose connections have the node's address.
    fn ask_by_http(&self, http: &Value) -> anyhow::Result<String> {
        let (port, path) = (http["port"].as_u64().unwrap(), http["path"].as_str().unwrap());
        let reply = Request::get(format!("http://{}:{port}{path}", self.ip)).send()?;
        anyhow::ensure!((200..400).contains(&reply.status), "{reply:?}");
        Ok(reply.body)
    }

    /// What `kube2ram status` prints in it, with problems or without.
    pub(crate) fn status(&self) -> Value {
        let output = self.container.output(&[ENTRYPOINT, "status", "-o", "json"]).unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    pub(crate) fn explain(&self, pod: &str) -> Value {
        let output = self.container.output(&[ENTRYPOINT, "explain", pod, "-o", "json"]).unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    pub(crate) fn admin(&self, path: &str) -> Reply {
        Request::get(format!("{}{path}", self.admin)).send().unwrap()
    }

    /// A sample of its metrics; zero when there is none of that name.
    pub(crate) fn metric(&self, sample: &str) -> f64 {
        let metrics = self.admin("/metrics").body;
        let line = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }

    pub(crate) fn await_ready(&mut self) -> Result<(), String> {
        self.await_probe(Self::ready)
    }

    /// The same by `kube2ram ready`, whatever probe the manifest has.
    pub(crate) fn await_serving(&mut self) -> Result<(), String> {
        self.await_probe(|agent| agent.container.exec(&[ENTRYPOINT, "ready"]))
    }

    fn await_probe(&mut self, probe: impl Fn(&Self) -> anyhow::Result<String>) -> Result<(), String> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let probed = probe(self);
            let ended = self.container.has_ended().unwrap();
            match probed {
                Ok(_) => return Ok(()),
                Err(_) if ended => return Err(self.container.log()),
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("not ready: {error:#}\n{}", self.container.log()));
                }
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
