//! A cluster whose users log in by the authenticator: the API server with the files of `init`, the webhook as
//! a process with the rights of its manifests, the stand-in of STS, and kubectl. Used by all tests here.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    clock::Clock,
    control_plane::ControlPlane,
    standin::{AccessKey, Accounts, Authority, Bind, Role, Sts},
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const CLUSTER: &str = "c0123456789abcdef0123456789abcdef";
/// What kubectl shows for 401.
pub(crate) const UNAUTHORIZED: &str = "You must be logged in to the server";
const PROGRAM: &str = env!("CARGO_BIN_EXE_kube2ram-authenticator");
const DEADLINE: Duration = Duration::from_secs(120);
/// The account of deploy/authenticator/examples.
const ACCOUNT_OF_EXAMPLES: &str = "123456789012";

pub(crate) struct Cluster {
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) sts: Sts,
    server: Option<Server>,
    plane: ControlPlane,
    metrics_port: u16,
    directory: TempDir,
}

/// The webhook; killed when it is dropped.
struct Server(Child);

impl Cluster {
    /// Starts all of it. `flags` are the API server's, besides the one that names the webhook. Mapped are
    ///
    /// * by the configuration file: the user alice, a developer
    /// * by the ConfigMap: the user carol, an auditor
    /// * by a RAMIdentityMapping: the roles dev-*, developers, under the session's name
    pub(crate) fn start(flags: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let accounts = Arc::new(Accounts::new(Clock::default()));
        let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts)).unwrap();
        accounts.add_role(Accounts::role_arn("dev-orders"), Role::default());
        accounts.add_role(Accounts::role_arn("billing"), Role::default());
        let [port, metrics_port] = free_ports();
        let at = |name: &str| directory.path().join(name);
        let config = json!({
            "clusterID": CLUSTER,
            "server": {
                "port": port, "stateDir": at("state"), "generateKubeconfig": at("webhook.yaml"),
                "kubeconfigPregenerated": true, "backendMode": ["MountedFile", "CRD", "ACKConfigMap"],
                "mapUsers": [{ "userARN": user_arn("alice"), "username": "alice", "groups": ["developers"] }],
            },
        });
        fs::write(at("config.yaml"), config.to_string()).unwrap();
        let init = Command::new(PROGRAM).arg("init").arg("--config").arg(at("config.yaml")).output().unwrap();
        assert!(init.status.success(), "{init:?}");

        let policy =
            json!({ "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{ "level": "Metadata" }] });
        fs::write(at("audit-policy.yaml"), policy.to_string()).unwrap();
        let mut all = vec![
            format!("--authentication-token-webhook-config-file={}", at("webhook.yaml").display()),
            format!("--audit-policy-file={}", at("audit-policy.yaml").display()),
            format!("--audit-log-path={}", at("audit.log").display()),
        ];
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let authority = Authority::new().unwrap();
        let programs = tools().join("kube-apiserver/bin");
        let plane = ControlPlane::start(&programs, directory.path(), &authority, &all).unwrap();
        let mut cluster = Self { accounts, sts, server: None, plane, metrics_port, directory };
        cluster.await_api_server();
        cluster.install();
        cluster.start_server();
        cluster
    }

    fn await_api_server(&self) {
        let deadline = Instant::now() + DEADLINE;
        // A namespace that the API server makes itself, late in its start.
        while self.admin(&["get", "--raw", "/readyz"]).is_err()
            || self.admin(&["get", "namespace", "kube-system"]).is_err()
        {
            let log = self.plane.log();
            let end: Vec<_> = log.lines().rev().take(20).collect();
            assert!(Instant::now() < deadline, "the API server is not ready: {end:#?}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Applies the manifests and the mappings, and gives the webhook its service account's token.
    fn install(&self) {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/authenticator");
        let apply = |path: &Path| {
            let path = path.to_str().unwrap();
            self.admin(&["apply", "--server-side", "--validate=strict", "-f", path]).unwrap();
        };
        apply(&deploy.join("kustomize/crd.yaml"));
        apply(&deploy.join("kustomize/authenticator.yaml"));
        let crd = "crd/ramidentitymappings.ramauthenticator.k8s.alibabacloud";
        self.admin(&["wait", "--for=condition=Established", "--timeout=60s", crd]).unwrap();
        let example = fs::read_to_string(deploy.join("examples/mapping.yaml")).unwrap();
        assert!(example.contains(ACCOUNT_OF_EXAMPLES));
        let mapping = self.directory.path().join("mapping.yaml");
        fs::write(&mapping, example.replace(ACCOUNT_OF_EXAMPLES, Accounts::UID)).unwrap();
        apply(&mapping);
        let users = json!([{ "userarn": user_arn("carol"), "username": "carol", "groups": ["auditors"] }]);
        let config_map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "alibabacloud-auth", "namespace": "kube-system" },
            "data": { "mapUsers": users.to_string() },
        });
        let path = self.directory.path().join("config-map.yaml");
        fs::write(&path, config_map.to_string()).unwrap();
        apply(&path);
        let create = ["create", "token", "kube2ram-authenticator", "--namespace=kube-system"];
        let token = self.admin(&create).unwrap();
        self.write_kubeconfig("server.kubeconfig", &json!({ "token": token.trim() }));
    }

    /// Starts the webhook, and waits until it is ready.
    pub(crate) fn start_server(&mut self) {
        let at = |name: &str| self.directory.path().join(name);
        let log = File::options().create(true).append(true).open(at("server.log")).unwrap();
        let mut server = Command::new(PROGRAM);
        server.arg("server").arg("--config").arg(at("config.yaml"));
        server.arg("--kubeconfig").arg(at("server.kubeconfig"));
        server.args(["--sts-endpoint", &self.sts.url(), "--metrics-port", &self.metrics_port.to_string()]);
        server.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.server = Some(Server(server.spawn().unwrap()));
        let log = || fs::read_to_string(at("server.log")).unwrap();
        let deadline = Instant::now() + DEADLINE;
        while self.metrics_server("/readyz").is_none() {
            assert!(Instant::now() < deadline, "the webhook is not ready: {}", log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends the webhook as the kubelet does.
    pub(crate) fn stop_server(&mut self) {
        let mut server = self.server.take().unwrap();
        let killed = Command::new("kill").arg(server.0.id().to_string()).status().unwrap();
        assert!(killed.success());
        assert!(server.0.wait().unwrap().success(), "{}", self.server_log());
    }

    pub(crate) fn server_log(&self) -> String {
        fs::read_to_string(self.directory.path().join("server.log")).unwrap()
    }

    pub(crate) fn api_server_log(&self) -> String {
        self.plane.log()
    }

    /// The lines of the audit log.
    pub(crate) fn audit_log(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.directory.path().join("audit.log")).unwrap();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// How many logins had this result.
    pub(crate) fn logins(&self, result: &str) -> u64 {
        let metrics = self.metrics_server("/metrics").unwrap();
        let start = format!("kube2ram_authenticator_logins_total{{result=\"{result}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&start));
        count.unwrap_or_else(|| panic!("no {start}: {metrics}")).parse().unwrap()
    }

    fn metrics_server(&self, path: &str) -> Option<String> {
        let url = format!("http://127.0.0.1:{}{path}", self.metrics_port);
        let output = Command::new("curl").args(["--silent", "--fail", "--max-time", "5", &url]).output();
        output.ok().filter(|output| output.status.success()).map(|output| text(output.stdout))
    }

    /// kubectl as the cluster's administrator: standard output, or standard error.
    pub(crate) fn admin(&self, arguments: &[&str]) -> Result<String, String> {
        let user = json!({ "token": ControlPlane::ADMIN });
        let kubeconfig = self.write_kubeconfig("admin.kubeconfig", &user);
        printed(self.kubectl(&kubeconfig, arguments).output().unwrap())
    }

    pub(crate) fn kubectl(&self, kubeconfig: &Path, arguments: &[&str]) -> Command {
        let mut kubectl = Command::new(tools().join("kubectl/bin/kubectl"));
        kubectl.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        kubectl.env_clear().env("HOME", self.directory.path()).env("KUBECONFIG", kubeconfig);
        kubectl
    }

    /// A kubeconfig whose user is this.
    pub(crate) fn write_kubeconfig(&self, name: &str, user: &Value) -> PathBuf {
        let server = format!("https://127.0.0.1:{}", self.plane.port());
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{
                "name": "it", "cluster": { "server": server, "certificate-authority": self.plane.ca() },
            }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
            "users": [{ "name": "it", "user": user }],
        });
        let path = self.directory.path().join(name);
        fs::write(&path, kubeconfig.to_string()).unwrap();
        path
    }

    /// A kubeconfig with our plugin, these keys in its environment, and these flags.
    pub(crate) fn plugin(&self, key: &AccessKey, version: &str, flags: &[&str]) -> PathBuf {
        let mut arguments = vec!["token", "--cluster-id", CLUSTER];
        arguments.extend(flags);
        let name = format!("{}.kubeconfig", key.id);
        let exec = json!({
            "apiVersion": format!("client.authentication.k8s.io/{version}"), "command": PROGRAM,
            "args": arguments, "interactiveMode": "Never",
            "env": [
                { "name": "ALIBABA_CLOUD_ACCESS_KEY_ID", "value": key.id },
                { "name": "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "value": key.secret },
            ],
        });
        self.write_kubeconfig(&name, &json!({ "exec": exec }))
    }

    /// Who the API server takes a user of our plugin for, or kubectl's error.
    pub(crate) fn login(&self, key: &AccessKey, flags: &[&str]) -> Result<Value, String> {
        user_info(self.whoami(&self.plugin(key, "v1", flags)).output().unwrap())
    }

    /// The same for a token that is at hand.
    pub(crate) fn login_with(&self, token: &str) -> Result<Value, String> {
        let kubeconfig = self.write_kubeconfig("token.kubeconfig", &json!({ "token": token }));
        user_info(self.whoami(&kubeconfig).output().unwrap())
    }

    pub(crate) fn whoami(&self, kubeconfig: &Path) -> Command {
        self.kubectl(kubeconfig, &["auth", "whoami", "--output=json"])
    }

    /// The flags by which the plugin assumes a role.
    pub(crate) fn assume(&self, role: &str, session: &str) -> [String; 6] {
        let arn = Accounts::role_arn(role);
        ["--role-arn", &arn, "--session-name", session, "--sts-endpoint", &self.sts.url()].map(str::to_owned)
    }

    /// The token that our plugin prints.
    pub(crate) fn token(&self, key: &AccessKey, flags: &[&str]) -> String {
        let mut plugin = Command::new(PROGRAM);
        plugin.args(["token", "--cluster-id", CLUSTER, "--token-only"]).args(flags);
        plugin.env_clear().env("HOME", self.directory.path());
        plugin.env("ALIBABA_CLOUD_ACCESS_KEY_ID", &key.id);
        plugin.env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", &key.secret);
        printed(plugin.output().unwrap()).unwrap().trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

pub(crate) fn user_arn(name: &str) -> String {
    format!("acs:ram::{}:user/{name}", Accounts::UID)
}

/// The `userInfo` of a SelfSubjectReview.
pub(crate) fn user_info(output: Output) -> Result<Value, String> {
    let review: Value = serde_json::from_str(&printed(output)?).unwrap();
    assert_eq!(review["kind"], "SelfSubjectReview", "{review}");
    Ok(review["status"]["userInfo"].clone())
}

pub(crate) fn printed(output: Output) -> Result<String, String> {
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// How long it takes until this holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "it does not come: {what}");
        thread::sleep(Duration::from_millis(200));
    }
    start.elapsed()
}

/// `cargo xtask test --api-server` links to the programs next to the directory of the profile.
fn tools() -> PathBuf {
    Path::new(PROGRAM).ancestors().nth(2).unwrap().join("tools")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// Both are open at the same time, so that they differ.
fn free_ports() -> [u16; 2] {
    let listeners = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
