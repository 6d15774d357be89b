//! kubectl, as the cluster's administrator and as its users. Depends on nothing but the parent.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::Cluster;
use crate::{
    control_plane::ControlPlane,
    standin::{AccessKey, Accounts},
};

/// What kubectl shows for 401.
pub const UNAUTHORIZED: &str = "You must be logged in to the server";

/// A kubectl that asks the API server who its user is.
#[derive(Debug)]
pub struct Login(Child);

impl Login {
    /// Whether it has an answer.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// The `userInfo` of the API server's SelfSubjectReview.
    ///
    /// # Errors
    /// kubectl's own, such as [`UNAUTHORIZED`].
    pub fn user(self) -> Result<Value> {
        let output = self.0.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        let mut review: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(review["kind"] == "SelfSubjectReview", "kubectl printed {review}");
        Ok(review["status"]["userInfo"].take())
    }
}

impl Cluster {
    /// kubectl as the cluster's administrator: what it prints.
    ///
    /// # Errors
    /// kubectl's own.
    pub fn admin(&self, arguments: &[&str]) -> Result<String> {
        let kubeconfig =
            self.write_kubeconfig("admin.kubeconfig", &json!({ "token": ControlPlane::ADMIN }))?;
        self.kubectl(&kubeconfig, arguments)
    }

    /// kubectl with a kubeconfig: what it prints.
    ///
    /// # Errors
    /// kubectl's own.
    pub fn kubectl(&self, kubeconfig: &Path, arguments: &[&str]) -> Result<String> {
        printed(self.command(kubeconfig).args(arguments))
    }

    fn command(&self, kubeconfig: &Path) -> Command {
        let mut kubectl = Command::new(self.programs.tools.join("kubectl/bin/kubectl"));
        kubectl.env_clear().env("HOME", &self.directory).env("KUBECONFIG", kubeconfig);
        kubectl
    }

    /// Starts to log in.
    ///
    /// # Errors
    /// When kubectl does not start.
    pub fn begin_login(&self, kubeconfig: &Path) -> Result<Login> {
        let mut kubectl = self.command(kubeconfig);
        kubectl.args(["auth", "whoami", "--output=json"]);
        kubectl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        kubectl.spawn().map(Login).context("cannot start kubectl")
    }

    /// Logs in by the authenticator's plugin with a user's keys: who the API server takes the user for.
    ///
    /// # Errors
    /// kubectl's own, such as [`UNAUTHORIZED`].
    pub fn login(&self, key: &AccessKey, flags: &[&str]) -> Result<Value> {
        self.begin_login(&self.plugin(key, "v1", flags)?)?.user()
    }

    /// Logs in with a token that is at hand.
    ///
    /// # Errors
    /// kubectl's own, such as [`UNAUTHORIZED`].
    pub fn login_with(&self, token: &str) -> Result<Value> {
        self.begin_login(&self.write_kubeconfig("token.kubeconfig", &json!({ "token": token }))?)?.user()
    }

    /// A kubeconfig with the authenticator's plugin: its API's version, a user's keys, and more flags.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn plugin(&self, key: &AccessKey, version: &str, flags: &[&str]) -> Result<PathBuf> {
        let mut arguments = vec!["token", "--cluster-id", Self::ID];
        arguments.extend(flags);
        let exec = json!({
            "apiVersion": format!("client.authentication.k8s.io/{version}"),
            "command": self.programs.authenticator, "args": arguments, "interactiveMode": "Never",
            "env": [
                { "name": ID_VARIABLE, "value": key.id },
                { "name": SECRET_VARIABLE, "value": key.secret },
            ],
        });
        self.write_kubeconfig(&format!("{}.kubeconfig", key.id), &json!({ "exec": exec }))
    }

    /// The flags by which the plugin assumes a role.
    pub fn assume(&self, role: &str, session: &str) -> [String; 6] {
        let arn = Accounts::role_arn(role);
        ["--role-arn", &arn, "--session-name", session, "--sts-endpoint", &self.sts.url()].map(str::to_owned)
    }

    /// The token that the plugin prints.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn token(&self, key: &AccessKey, flags: &[&str]) -> Result<String> {
        let mut plugin = Command::new(&self.programs.authenticator);
        plugin.args(["token", "--cluster-id", Self::ID, "--token-only"]).args(flags);
        plugin.env_clear().env("HOME", &self.directory);
        plugin.env(ID_VARIABLE, &key.id).env(SECRET_VARIABLE, &key.secret);
        Ok(printed(&mut plugin)?.trim().to_owned())
    }

    pub(super) fn write_kubeconfig(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let server = format!("https://127.0.0.1:{}", self.plane.port());
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{
                "name": "it", "cluster": { "server": server, "certificate-authority": self.plane.ca() },
            }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
            "users": [{ "name": "it", "user": user }],
        });
        let path = self.directory.join(name);
        fs::write(&path, kubeconfig.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// Standard output, or standard error as the error.
pub(super) fn printed(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

const ID_VARIABLE: &str = "ALIBABA_CLOUD_ACCESS_KEY_ID";
const SECRET_VARIABLE: &str = "ALIBABA_CLOUD_ACCESS_KEY_SECRET";
