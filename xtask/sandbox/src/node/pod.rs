//! A pod: cgroups, possibly a network namespace, a pause process, and the way in.
//! Depends on util-linux's nsenter. Made by `node`, used by `sandbox`, `show` and tests.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use uuid::Uuid;

use super::{PodRecord, Qos, netns};
use crate::Cloud;

/// What network a pod has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodNetwork {
    /// Its own namespace with only a loopback device.
    Alone,
    /// The node's.
    Host,
    /// Its own namespace, on a veth to the node, with addresses of both families.
    #[default]
    Veth,
    /// The same without an IPv4 address, as in an IPv6-only cluster; its loopback device has both.
    VethIpv6,
}

/// What a pod should be like.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Names of its containers.
    pub containers: Vec<String>,
    /// The UID of its mirror in the API server, when it is a static pod.
    pub mirror_uid: Option<String>,
    /// Its name, which is unique on the node here.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its network.
    pub network: PodNetwork,
    /// Its quality of service class.
    pub qos: Qos,
    /// The role that [`Self::role`] has named in its annotations.
    pub role: Option<String>,
    /// Its service account.
    pub service_account: String,
    /// Its UID, by which its cgroup is called.
    pub uid: String,
}

impl PodSpec {
    /// A burstable pod with one container `app` in the namespace `default`, without annotations.
    pub fn new(name: &str) -> Self {
        Self {
            annotations: BTreeMap::new(),
            containers: vec!["app".into()],
            mirror_uid: None,
            name: name.into(),
            namespace: "default".into(),
            network: PodNetwork::default(),
            qos: Qos::Burstable,
            role: None,
            service_account: "default".into(),
            uid: Uuid::new_v4().to_string(),
        }
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// Adds the annotation that names the role, by Alibaba Cloud's key. A sandbox of another cloud replaces
    /// that by its own key.
    #[must_use]
    pub fn role(mut self, role: &str) -> Self {
        self.role = Some(role.into());
        self.annotation(&Cloud::Alibaba.annotation(ROLE), role)
    }

    /// With the annotation that [`Self::role`] has added by a cloud's key.
    #[must_use]
    pub(crate) fn of(mut self, cloud: Cloud) -> Self {
        let Some(role) = self.role.clone() else { return self };
        self.annotations.remove(&Cloud::Alibaba.annotation(ROLE));
        self.annotation(&cloud.annotation(ROLE), &role)
    }

    /// Sets the containers.
    #[must_use]
    pub fn containers(mut self, names: &[&str]) -> Self {
        self.containers = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// Shares the node's network namespace.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.network = PodNetwork::Host;
        self
    }

    /// Gives it a network namespace without a way out, which is cheap enough for a crowd.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.network = PodNetwork::Alone;
        self
    }

    /// Gives it no IPv4 address but the loopback device's.
    #[must_use]
    pub fn ipv6_only(mut self) -> Self {
        self.network = PodNetwork::VethIpv6;
        self
    }

    /// Makes it a static pod: its UID is the hash of a file, and the API server knows a mirror of it.
    #[must_use]
    pub fn static_pod(mut self) -> Self {
        self.uid = Uuid::new_v4().simple().to_string();
        self.mirror_uid = Some(Uuid::new_v4().to_string());
        let hash = self.uid.clone();
        self.annotation("kubernetes.io/config.hash", &hash).annotation("kubernetes.io/config.mirror", &hash)
    }

    /// Sets the namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Sets the service account.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    /// Sets the quality of service class.
    #[must_use]
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }
}

/// A pod that exists.
#[derive(Debug)]
pub struct Pod {
    ip: Ipv4Addr,
    ip6: Ipv6Addr,
    pause: Child,
    record: PodRecord,
    spec: PodSpec,
}

/// The name of the role's annotation.
const ROLE: &str = "role";

/// The container that holds the namespaces.
pub(super) const PAUSE: &str = "pause";

/// How long the pause process may take to be where it belongs.
const START_DEADLINE: Duration = Duration::from_secs(60);

impl Pod {
    pub(super) fn start(spec: PodSpec, record: PodRecord, (ip, ip6): (Ipv4Addr, Ipv6Addr)) -> Result<Self> {
        let mut command = record.command(Some(PAUSE), "sleep")?;
        let pause = command.arg("infinity").stdin(Stdio::null()).spawn().context("cannot start sleep")?;
        let pod = Self { ip, ip6, pause, record, spec };

        // The shell that joins the cgroup becomes nsenter becomes sleep; a namespace found through it must be
        // the pod's.
        let deadline = Instant::now() + START_DEADLINE;
        let comm = format!("/proc/{}/comm", pod.pause.id());
        while fs::read_to_string(&comm).is_ok_and(|comm| comm.trim() != "sleep") {
            ensure!(Instant::now() < deadline, "the pause process of {} does not start", pod.spec.name);
            thread::sleep(Duration::from_millis(1));
        }
        ensure!(Path::new(&comm).exists(), "the pause process of {} ended at once", pod.spec.name);
        Ok(pod)
    }

    /// What was asked for.
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// Its IPv4 address: the node's when it shares the node's network, the loopback device's when it has no
    /// other.
    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// Its IPv6 address, likewise.
    pub fn ip6(&self) -> Ipv6Addr {
        self.ip6
    }

    /// The directory of its cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.record.cgroup
    }

    /// The directory of a container's cgroup.
    pub fn container_cgroup(&self, container: &str) -> Option<&Path> {
        self.record.containers.get(container).map(PathBuf::as_path)
    }

    /// Its network namespace as a file; `None` when that is the node's.
    pub fn netns(&self) -> Option<PathBuf> {
        self.record.netns.as_deref().map(netns::path)
    }

    /// A command that will run in a container: it joins the cgroup, then the network namespace, then becomes
    /// the program.
    ///
    /// # Errors
    /// When the pod has no such container.
    pub fn command(&self, container: &str, program: impl AsRef<OsStr>) -> Result<Command> {
        self.record.command(Some(container), program)
    }

    /// The same in a cgroup of the container's own making, as Docker in Docker or systemd in a container has.
    ///
    /// # Errors
    /// When the pod has no such container or the cgroup cannot be made.
    pub fn nested_command(
        &self,
        container: &str,
        nested: &str,
        program: impl AsRef<OsStr>,
    ) -> Result<Command> {
        let cgroup = self.container_cgroup(container).context("no such container")?.join(nested);
        fs::create_dir_all(&cgroup)?;
        Ok(self.record.join(&cgroup, program.as_ref()))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Its own child, so the id cannot have been reused.
        drop(self.pause.kill());
        drop(self.pause.wait());
    }
}

/// A command that joins a cgroup and a network namespace, in this order, before it becomes the program.
pub(super) fn join(cgroup: &Path, netns: Option<&str>, program: &OsStr) -> Command {
    let mut command = Command::new("sh");
    let procs = cgroup.join("cgroup.procs");
    match netns {
        Some(netns) => command
            .args(["-c", r#"echo $$ > "$1" && shift && exec nsenter "$@""#, "sh"])
            .arg(procs)
            .arg(format!("--net={}", netns::path(netns).display()))
            .arg("--"),
        None => command.args(["-c", r#"echo $$ > "$1" && shift && exec "$@""#, "sh"]).arg(procs),
    };
    command.arg(program);
    command
}
