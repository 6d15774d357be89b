//! A cluster whose users log in by the authenticator: a real API server with the files of `init`, the
//! authenticator with the rights of its manifests, the stand-in of STS, and kubectl. Depends on the control
//! plane and on STS. Called by the authenticator's tests, and by the binary's `logins`.

mod client;
mod reviewer;
pub mod show;
mod token;

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

pub use self::{
    client::{Login, UNAUTHORIZED},
    reviewer::{Connection, Reviewer, is_complete, review},
    token::{tampered, token_of},
};
use crate::{
    clock::Clock,
    control_plane::ControlPlane,
    standin::{Accounts, Authority, Bind, Role, Sts},
};

/// The programs and where they work.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `kube2ram-authenticator`, as an absolute path.
    pub authenticator: PathBuf,
    /// The directory of the tools that `cargo xtask test --api-server` builds.
    pub tools: PathBuf,
    /// `deploy/authenticator`.
    pub deploy: PathBuf,
}

/// All of it, until it is dropped.
#[derive(Debug)]
pub struct Cluster {
    accounts: Arc<Accounts>,
    sts: Sts,
    server: Option<Server>,
    plane: ControlPlane,
    port: u16,
    metrics_port: u16,
    programs: Programs,
    directory: PathBuf,
}

/// The authenticator's server; killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Server(pub(crate) Child);

impl Cluster {
    /// The cluster's id, which tokens must be for.
    pub const ID: &str = "c0123456789abcdef0123456789abcdef";

    /// Starts all of it, with its files in `directory`. `flags` are the API server's, besides those that name
    /// the webhook and the audit log. Mapped are
    ///
    /// * by the configuration file: the user alice, in the group developers
    /// * by the ConfigMap: the user carol, in the group auditors
    /// * by a RAMIdentityMapping: the roles dev-*, in the group developers, under the session's name
    ///
    /// The roles dev-orders and billing exist.
    ///
    /// # Errors
    /// When a program does not start, or is not ready in time.
    pub fn start(programs: Programs, directory: &Path, flags: &[&str]) -> Result<Self> {
        let accounts = Arc::new(Accounts::new(Clock::default()));
        let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts))?;
        for role in ["dev-orders", "billing"] {
            accounts.add_role(Accounts::role_arn(role), Role::default());
        }
        let [port, metrics_port] = free_ports()?;
        let at = |name: &str| directory.join(name);
        let config = json!({
            "clusterID": Self::ID,
            "server": {
                "port": port, "stateDir": at("state"), "generateKubeconfig": at("webhook.yaml"),
                "kubeconfigPregenerated": true, "backendMode": ["MountedFile", "CRD", "ACKConfigMap"],
                "mapUsers": [{ "userARN": user_arn("alice"), "username": "alice", "groups": ["developers"] }],
            },
        });
        fs::write(at("config.yaml"), config.to_string())?;
        let mut init = Command::new(&programs.authenticator);
        let init = init.arg("init").arg("--config").arg(at("config.yaml")).output()?;
        ensure!(init.status.success(), "init failed: {}", String::from_utf8_lossy(&init.stderr));

        let policy =
            json!({ "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{ "level": "Metadata" }] });
        fs::write(at("audit-policy.yaml"), policy.to_string())?;
        let mut all = vec![
            format!("--authentication-token-webhook-config-file={}", at("webhook.yaml").display()),
            format!("--audit-policy-file={}", at("audit-policy.yaml").display()),
            format!("--audit-log-path={}", at("audit.log").display()),
        ];
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let of_plane = programs.tools.join("kube-apiserver/bin");
        let plane = ControlPlane::start(&of_plane, directory, &Authority::new()?, &all)?;
        let directory = directory.to_owned();
        let mut cluster =
            Self { accounts, sts, server: None, plane, port, metrics_port, programs, directory };
        cluster.await_api_server()?;
        cluster.install()?;
        cluster.start_server()?;
        Ok(cluster)
    }

    fn await_api_server(&self) -> Result<()> {
        // A namespace that the API server makes itself, late in its start.
        let is_ready = || {
            self.admin(&["get", "--raw", "/readyz"]).is_ok()
                && self.admin(&["get", "namespace", "kube-system"]).is_ok()
        };
        wait_for(is_ready).with_context(|| format!("the API server is not ready: {}", self.api_server_log()))
    }

    /// Applies the manifests and the mappings, and gives the server its service account's token.
    fn install(&self) -> Result<()> {
        let apply = |path: &Path| {
            let path = path.display().to_string();
            self.admin(&["apply", "--server-side", "--validate=strict", "-f", &path])
                .with_context(|| format!("cannot apply {path}"))
        };
        apply(&self.programs.deploy.join("kustomize/crd.yaml"))?;
        apply(&self.programs.deploy.join("kustomize/authenticator.yaml"))?;
        let crd = "crd/ramidentitymappings.ramauthenticator.k8s.alibabacloud";
        self.admin(&["wait", "--for=condition=Established", "--timeout=60s", crd])?;
        let example = fs::read_to_string(self.programs.deploy.join("examples/mapping.yaml"))?;
        ensure!(example.contains(ACCOUNT_OF_EXAMPLES), "the example is of another account");
        let mapping = self.directory.join("mapping.yaml");
        fs::write(&mapping, example.replace(ACCOUNT_OF_EXAMPLES, Accounts::UID))?;
        apply(&mapping)?;
        let users = json!([{ "userarn": user_arn("carol"), "username": "carol", "groups": ["auditors"] }]);
        let config_map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "alibabacloud-auth", "namespace": "kube-system" },
            "data": { "mapUsers": users.to_string() },
        });
        let path = self.directory.join("config-map.yaml");
        fs::write(&path, config_map.to_string())?;
        apply(&path)?;
        let create = ["create", "token", "kube2ram-authenticator", "--namespace=kube-system"];
        let token = self.admin(&create)?;
        self.write_kubeconfig("server.kubeconfig", &json!({ "token": token.trim() }))?;
        Ok(())
    }

    /// Starts the server, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not start, or is not ready in time.
    pub fn start_server(&mut self) -> Result<()> {
        let config = self.directory.join("config.yaml");
        self.start_server_with(&[format!("--config={}", config.display())])
    }

    /// The same with other flags than the one that names the cluster's configuration file. Flags for the
    /// kubeconfig, STS and the metrics port are added. The API server knows the CA in `state`, and
    /// [`Self::port`].
    ///
    /// # Errors
    /// As [`Self::start_server`].
    pub fn start_server_with(&mut self, flags: &[String]) -> Result<()> {
        let at = |name: &str| self.directory.join(name);
        let log = File::options().create(true).append(true).open(at(SERVER_LOG))?;
        let mut server = Command::new(&self.programs.authenticator);
        server.arg("server").args(flags);
        server.arg("--kubeconfig").arg(at("server.kubeconfig"));
        server.args(["--sts-endpoint", &self.sts.url(), "--metrics-port", &self.metrics_port.to_string()]);
        server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.server = Some(Server(server.spawn().context("cannot start the authenticator")?));
        wait_for(|| self.admin_port("/readyz").is_ok())
            .with_context(|| format!("the authenticator is not ready: {}", self.server_log()))
    }

    /// Ends the server as the kubelet does.
    ///
    /// # Errors
    /// When it does not run, or ends in another way.
    pub fn stop_server(&mut self) -> Result<()> {
        let mut server = self.server.take().context("it does not run")?;
        let killed = Command::new("kill").arg(server.0.id().to_string()).status()?;
        ensure!(killed.success(), "cannot signal the authenticator");
        ensure!(server.0.wait()?.success(), "the authenticator failed: {}", self.server_log());
        Ok(())
    }

    /// Where its files are; the CA and its key are in `state`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The port by which the API server reaches the server.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The account whose users and roles log in.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// The stand-in of STS.
    pub fn sts(&self) -> &Sts {
        &self.sts
    }

    /// What the server has logged; empty if that cannot be read.
    pub fn server_log(&self) -> String {
        fs::read_to_string(self.directory.join(SERVER_LOG)).unwrap_or_default()
    }

    /// What the API server has logged; empty if that cannot be read.
    pub fn api_server_log(&self) -> String {
        self.plane.log()
    }

    /// The events of the API server's audit log.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn audit_log(&self) -> Result<Vec<Value>> {
        let log = fs::read_to_string(self.directory.join("audit.log"))?;
        // The last line may be half written.
        Ok(log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// How many questions to the server had this result, by its own metrics.
    ///
    /// # Errors
    /// When there is no such result, or the server does not run.
    pub fn logins(&self, result: &str) -> Result<u64> {
        let metrics = self.admin_port("/metrics")?;
        let start = format!("kube2ram_authenticator_logins_total{{result=\"{result}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&start));
        Ok(count.with_context(|| format!("no {start}in {metrics}"))?.parse()?)
    }

    fn admin_port(&self, path: &str) -> Result<String> {
        let url = format!("http://127.0.0.1:{}{path}", self.metrics_port);
        client::printed(Command::new("curl").args(["--silent", "--fail", "--max-time", "5", &url]))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The ARN of a user.
pub fn user_arn(name: &str) -> String {
    format!("acs:ram::{}:user/{name}", Accounts::UID)
}

pub(crate) fn wait_for(is_ready: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !is_ready() {
        ensure!(Instant::now() < deadline, "it took more than {DEADLINE:?}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Both are open at the same time, so that they differ.
pub(crate) fn free_ports() -> Result<[u16; 2]> {
    let listeners = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    let [one, other] = &listeners;
    Ok([one.local_addr()?.port(), other.local_addr()?.port()])
}

const SERVER_LOG: &str = "server.log";
/// Of both, the API server takes longer.
const DEADLINE: Duration = Duration::from_secs(120);
/// The account of deploy/authenticator/examples.
const ACCOUNT_OF_EXAMPLES: &str = "123456789012";
