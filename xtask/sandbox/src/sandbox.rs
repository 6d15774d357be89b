//! A node, the stand-ins it talks to, pods that exist in both, and the agent between them: what a kernel test
//! starts from. Depends on everything else here. Called by `show` and by tests.

mod in_pod;

use std::{
    collections::BTreeMap,
    env,
    net::{Ipv4Addr, TcpListener},
    path::{self, Path, PathBuf},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, ensure};

pub use self::in_pod::InPod;
use self::in_pod::{reply, url};
use crate::{
    Cloud,
    agent::Agent,
    client::Reply,
    clock::Clock,
    node::{CgroupDriver, Node, Pod, PodNetwork, PodSpec},
    secrets,
    standin::{
        Accounts, ApiServer, Bind, Metadata, OidcIssuer, OidcTrust, PodManifest, Predecessor, Role, Sts,
    },
};

/// A node that looks like one of a cluster to whoever runs on it. Dropping it removes everything. The calling
/// thread is inside the node's network namespace until then, see [`Node::create`].
///
/// ```no_run
/// # use kube2ram_sandbox::{Sandbox, node::PodSpec};
/// # fn main() -> anyhow::Result<()> {
/// let mut sandbox = Sandbox::create("my-test")?;
/// sandbox.accounts().add_role("acs:ram::1234567890123456:role/orders-role", Default::default());
/// sandbox.add_pod(&PodSpec::new("orders").role("orders-role"))?;
/// sandbox.start_agent("target/debug/kube2ram".as_ref(), &["--auto-discover-base-arn"])?;
/// let reply = sandbox.pod("orders")?.curl("/latest/meta-data/ram/security-credentials/")?;
/// assert_eq!(reply.body, "orders-role");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sandbox {
    // In this order: the node, dropped last, kills what is left of the others.
    agent: Option<Agent>,
    pods: BTreeMap<String, Pod>,
    api: ApiServer,
    metadata: Metadata,
    sts: Sts,
    accounts: Arc<Accounts>,
    client: PathBuf,
    surges: usize,
    node: Node,
}

impl Sandbox {
    /// The name of the Node object.
    pub const NODE: &str = "sandbox-node";

    /// Makes a node of Alibaba Cloud with cgroupfs naming and starts the stand-ins.
    ///
    /// # Errors
    /// As [`Node::create`]; when the client binary has not been built.
    pub fn create(name: &str) -> Result<Self> {
        Self::create_in(name, Cloud::Alibaba)
    }

    /// The same of any cloud: its addresses, its stand-ins, its annotation for [`PodSpec::role`].
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_in(name: &str, cloud: Cloud) -> Result<Self> {
        Self::on(Node::create_in(name, CgroupDriver::Cgroupfs, cloud)?)
    }

    /// The same of Alibaba Cloud, with a choice of naming.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_with(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::on(Node::create(name, driver)?)
    }

    /// The same with the machine's own network, for a virtual machine that is a node as a whole.
    ///
    /// # Errors
    /// As [`Node::create_of_machine`]; when the client binary has not been built.
    pub fn create_of_machine(name: &str, driver: CgroupDriver) -> Result<Self> {
        Self::on(Node::create_of_machine(name, driver)?)
    }

    fn on(node: Node) -> Result<Self> {
        let client = client_path()?;
        let accounts = Arc::new(Accounts::of(node.cloud(), Clock::default()));
        let metadata = Metadata::start(node.metadata_bind(), Arc::clone(&accounts))?;
        let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts))?;
        let cloud = node.cloud();
        let api = ApiServer::with_issuer(Bind::loopback(), OidcIssuer::new(cloud.issuer())?)?;
        api.bind_agent(Some(Self::NODE));
        accounts.add_provider(cloud.cluster_provider(), api.issuer().provider_in(cloud));
        api.apply(serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": Self::NODE, "uid": "node-sandbox" },
            "status": { "addresses": [{ "type": "InternalIP", "address": node.ip() }] },
        }))?;
        for namespace in ["default", "kube-system"] {
            api.apply_namespace(namespace, &[])?;
        }

        Ok(Self { agent: None, pods: BTreeMap::new(), api, metadata, sts, accounts, client, surges: 0, node })
    }

    /// The cloud that it stands for.
    pub fn cloud(&self) -> Cloud {
        self.node.cloud()
    }

    /// Makes a pod on the node, and notifies the API server. Its ServiceAccount is made, too, if there is
    /// none of that name.
    ///
    /// # Errors
    /// As [`Node::add_pod`].
    pub fn add_pod(&mut self, spec: &PodSpec) -> Result<()> {
        let spec = spec.clone().of(self.cloud());
        self.api.ensure_service_account(&spec.namespace, &spec.service_account)?;
        let pod = self.node.add_pod(&spec)?;
        self.pods.insert(spec.name.clone(), pod);
        self.api.apply(manifest(&spec).to_json())
    }

    /// Deletes a pod from the API server and from the node.
    ///
    /// # Errors
    /// When there is no such pod; as [`Node::remove_pod`].
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.remove(name).with_context(|| format!("no pod {name:?}"))?;
        self.api.delete_pod(&pod.spec().namespace, name);
        self.node.remove_pod(pod)
    }

    /// Changes an annotation of a pod that exists, and notifies the API server.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn annotate(&self, name: &str, key: &str, value: &str) -> Result<()> {
        let spec = self.pod(name)?.pod().spec().clone().annotation(key, value);
        self.api.apply(manifest(&spec).to_json())
    }

    /// Runs the agent in its own pod and waits until it is ready.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_agent(&mut self, binary: &Path, extra: &[&str]) -> Result<&mut Agent> {
        self.add_agent(binary, extra)?;
        let agent = self.agent()?;
        agent.start()?;
        Ok(agent)
    }

    /// Makes the agent's pod, and starts nothing in it yet. The agent is called as `binary` is, also when
    /// that is a link.
    ///
    /// # Errors
    /// When there is an agent, or no such binary.
    pub fn add_agent(&mut self, binary: &Path, extra: &[&str]) -> Result<&mut Agent> {
        ensure!(self.agent.is_none(), "the sandbox has an agent already");
        ensure!(binary.is_file(), "cannot find the agent at {}", binary.display());
        let binary = path::absolute(binary)?;
        let pod = self.add_agent_pod("kube2ram")?;
        let agent = Agent::new(&self.node, pod, &binary, &self.api.url(), &self.sts.url(), extra)?;
        Ok(self.agent.insert(agent))
    }

    /// Makes another agent of the same configuration, in its own pod, as a rolling update with a surge does.
    /// It is the caller's until [`Self::replace_agent`].
    ///
    /// # Errors
    /// When there is no agent, or the machine refuses.
    pub fn surge(&mut self) -> Result<Agent> {
        self.surges += 1;
        let pod = self.add_agent_pod(&format!("kube2ram-{}", self.surges))?;
        Ok(self.agent()?.beside(pod))
    }

    /// Makes an agent the sandbox's, and gives back the former one.
    ///
    /// # Errors
    /// When there was none.
    pub fn replace_agent(&mut self, agent: Agent) -> Result<Agent> {
        self.agent.replace(agent).context("the sandbox has no agent")
    }

    /// Deletes an agent's pod from the API server and from the node, with its cgroups and what still runs
    /// there.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn remove_agent(&mut self, agent: Agent) -> Result<()> {
        let (namespace, name) = (agent.pod().spec().namespace.clone(), agent.pod().spec().name.clone());
        drop(agent);
        self.api.delete_pod(&namespace, &name);
        self.node.remove(&name)
    }

    /// Makes a hostNetwork pod in kube-system for an agent that is not [`Self::agent`]'s to start.
    ///
    /// # Errors
    /// As [`Node::add_pod`].
    pub fn add_agent_pod(&mut self, name: &str) -> Result<Pod> {
        let spec = PodSpec::new(name).namespace("kube-system").host_network().containers(&[Agent::CONTAINER]);
        self.api.ensure_service_account(&spec.namespace, &spec.service_account)?;
        let pod = self.node.add_pod(&spec)?;
        self.api.apply(manifest(&spec).to_json())?;
        Ok(pod)
    }

    /// The agent.
    ///
    /// # Errors
    /// When it was never started.
    pub fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("the sandbox has no agent")
    }

    /// The pods, by name.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// The agent, if there is one.
    pub fn agent_if_any(&self) -> Option<&Agent> {
        self.agent.as_ref()
    }

    /// The account that STS and the metadata server serve.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Adds a role to the account that trusts a ServiceAccount of the cluster, and nobody else.
    pub fn add_role_of_account(&self, role: &str, namespace: &str, name: &str) {
        let cloud = self.cloud();
        let subject = format!("system:serviceaccount:{namespace}:{name}");
        let trust = OidcTrust::equals(cloud.cluster_provider(), subject);
        self.accounts.add_role(cloud.role_arn(role), Role::trusting(trust));
    }

    /// A predecessor's agent on the node, on a port of all its addresses, which knows the pods that exist by
    /// now and their annotations.
    ///
    /// # Errors
    /// When no port is free.
    pub fn predecessor(&self) -> Result<Predecessor> {
        let key = self.cloud().annotation("role");
        let role = |pod: &Pod| Some((pod.ip().into(), pod.spec().annotations.get(&key)?.clone()));
        let roles = self.pods.values().filter_map(role).collect();
        let bind = Bind::new((Ipv4Addr::UNSPECIFIED, 0).into(), TcpListener::bind);
        Predecessor::start(bind, Arc::clone(&self.accounts), roles)
    }

    /// The API server.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// The metadata server.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The node, to make something on it that no cluster knows.
    pub fn node_mut(&mut self) -> &mut Node {
        &mut self.node
    }

    /// A pod on the network of this node that the API server alone has, with the node's address, as
    /// kube-proxy is.
    ///
    /// # Errors
    /// When the API server does not take it.
    pub fn apply_host_pod(&self) -> Result<()> {
        let manifest = PodManifest {
            host_network: true,
            name: "kube-proxy".to_owned(),
            namespace: "kube-system".to_owned(),
            node: Self::NODE.to_owned(),
            service_account: "kube-proxy".to_owned(),
            uid: "0a1b2c3d-0000-4000-8000-0000000000aa".to_owned(),
            ..PodManifest::default()
        };
        let mut pod = manifest.to_json();
        pod["status"]["podIP"] = self.node.ip().to_string().into();
        self.api.apply(pod)
    }

    /// STS.
    pub fn sts(&self) -> &Sts {
        &self.sts
    }

    /// The same STS once more, where pods reach it: at the node's address. It has its own record.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn sts_for_pods(&self) -> Result<Sts> {
        Sts::start(Bind::new((self.node.ip(), 0).into(), TcpListener::bind), Arc::clone(&self.accounts))
    }

    /// A pod to run something in.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn pod(&self, name: &str) -> Result<InPod<'_>> {
        let pod = self.pods.get(name).with_context(|| format!("no pod {name:?}"))?;
        Ok(InPod { client: &self.client, cloud: self.cloud(), pod })
    }

    /// Sends a GET to the metadata address from a host daemon.
    ///
    /// # Errors
    /// When it gets no answer.
    pub fn host_curl(&self, target: &str) -> Result<Reply> {
        self.host_curl_url(&url(self.cloud(), target))
    }

    /// Sends a GET to any URL from a host daemon.
    ///
    /// # Errors
    /// When it gets no answer.
    pub fn host_curl_url(&self, url: &str) -> Result<Reply> {
        reply(self.node.host_command(&self.client).args(["client", "get", url]))
    }
}

impl Drop for Sandbox {
    /// Whatever was tried here: no secret may be in anything that the agent has told.
    #[expect(clippy::print_stderr, reason = "for whoever reads why a test failed")]
    fn drop(&mut self) {
        if thread::panicking() {
            // The log is about to go. What requests were answered is long, and tells little.
            let log = self.agent().map(|agent| agent.log()).unwrap_or_default();
            let lines = log.lines().filter(|line| !line.contains("request answered"));
            eprintln!("the agent's log:\n{}", lines.collect::<Vec<_>>().join("\n"));
            return;
        }
        let told = secrets::told(self);
        assert!(told.is_empty(), "the agent has told a secret:\n{}", told.join("\n"));
    }
}

fn manifest(spec: &PodSpec) -> PodManifest {
    PodManifest {
        annotations: spec.annotations.clone(),
        host_network: spec.network == PodNetwork::Host,
        name: spec.name.clone(),
        namespace: spec.namespace.clone(),
        node: Sandbox::NODE.to_owned(),
        service_account: spec.service_account.clone(),
        uid: spec.mirror_uid.as_ref().unwrap_or(&spec.uid).clone(),
    }
}

/// `kube2ram-sandbox` itself, or where cargo puts it next to the running test.
fn client_path() -> Result<PathBuf> {
    const NAME: &str = "kube2ram-sandbox";
    let this = env::current_exe()?;
    let beside = this.ancestors().skip(1).take(2).map(|directory| directory.join(NAME));
    let found = beside.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("{NAME} is not built: cargo build --package {NAME}"))
}
