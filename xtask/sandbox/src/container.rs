//! A container as a node would run it: the pod template of a manifest, its image, and a real runtime (crun)
//! with the configuration that kubelet and containerd make of them. Depends on `node` and crun. Called by
//! tests of the manifests.

mod config;
mod seccomp;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{agent::Agent, log_writer, node::Pod};

/// An image: a root file system and what is run in it.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its files.
    pub root: PathBuf,
    /// Its entry point.
    pub entrypoint: String,
}

/// What a node knows that a manifest does not contain.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Where directories of the host are on this machine. A hostPath that is not among them does not exist.
    pub host_paths: BTreeMap<PathBuf, PathBuf>,
    /// The node's host name, which containers on its network have, too; empty for this machine's.
    pub host_name: String,
    /// Lines of the node's /etc/hosts.
    pub hosts: String,
    /// Lines of the node's /etc/resolv.conf, without options: what a pod of `dnsPolicy: Default` is given.
    pub resolv_conf: String,
    /// `spec.nodeName` and the like, for the downward API.
    pub fields: BTreeMap<String, String>,
    /// The API server, as in `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`.
    pub api_server: (String, u16),
    /// `token`, `ca.crt` and `namespace` of the service account.
    pub service_account: BTreeMap<String, String>,
    /// Tokens of projected volumes, by their audience.
    pub tokens: BTreeMap<String, String>,
    /// The data of ConfigMaps in the pod's namespace, by their name.
    pub config_maps: BTreeMap<String, BTreeMap<String, String>>,
}

/// A container that has been made, running or not. Dropping it ends it.
#[derive(Debug)]
pub struct Container {
    bundle: PathBuf,
    child: Option<Child>,
    host_name: String,
    id: String,
    /// Whom its processes run as, in the words of crun.
    user: String,
    /// The cgroup to start it in, in the words of `sh`.
    procs: PathBuf,
}

const DEADLINE: Duration = Duration::from_secs(30);

impl Image {
    /// An image that holds one binary, the libraries that it needs, and certificates of authorities.
    ///
    /// # Errors
    /// When the machine refuses.
    pub fn of_binary(binary: &Path, entrypoint: &str, certificates: &str, root: PathBuf) -> Result<Self> {
        let put = |from: &Path, to: &str| -> Result<()> {
            let to = root.join(to.trim_start_matches('/'));
            create_directories(&root, to.parent().context("a file has a directory")?)?;
            fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
            Ok(())
        };
        put(binary, entrypoint)?;
        let libraries = Command::new("ldd").arg(binary).output()?;
        // A static binary has none, which ldd counts as a failure.
        for word in
            String::from_utf8(libraries.stdout)?.split_whitespace().filter(|word| word.starts_with('/'))
        {
            put(Path::new(word), word)?;
        }
        let bundle = root.join("etc/ssl/certs/ca-certificates.crt");
        create_directories(&root, bundle.parent().context("a file has a directory")?)?;
        write(&bundle, certificates)?;
        Ok(Self { root, entrypoint: entrypoint.to_owned() })
    }
}

/// Makes the directories from `root` to `directory`. Like those of an image, they are open to each user of
/// a container, whatever umask this process has.
fn create_directories(root: &Path, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    directory
        .ancestors()
        .take_while(|path| path.starts_with(root))
        .try_for_each(|path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
}

/// Writes a file that each user of a container may read, whatever umask this process has.
fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::write(file, text)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o644))
}

impl Container {
    /// Makes the container `name` of a pod template (the `spec` of a Pod) in a pod's container
    /// [`Agent::CONTAINER`], in its own directory.
    ///
    /// # Errors
    /// When the template has no such container, or asks for what a node does not have, with the kubelet's
    /// message.
    pub fn create(
        pod: &Pod,
        template: &Value,
        name: &str,
        image: &Image,
        surroundings: &Surroundings,
        directory: &Path,
    ) -> Result<Self> {
        let of_kind = |kind| template[kind].as_array().into_iter().flatten();
        let container = of_kind("containers")
            .chain(of_kind("initContainers"))
            .find(|container| container["name"] == name)
            .with_context(|| format!("the template has no container {name:?}"))?;
        let bundle = directory.to_owned();
        fs::create_dir_all(&bundle)?;
        let config = config::of(template, container, image, surroundings, &bundle)?;
        fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        let cgroup = pod.container_cgroup(Agent::CONTAINER).context("the pod has no container")?;
        let id = format!("kube2ram-{}", pod.spec().uid);
        let host_name = surroundings.host_name.clone();
        let ids = &config["process"]["user"];
        let user = format!("{}:{}", ids["uid"], ids["gid"]);
        Ok(Self { bundle, child: None, host_name, id, user, procs: cgroup.join("cgroup.procs") })
    }

    /// Starts it. What it writes goes to [`Self::log`].
    ///
    /// # Errors
    /// When it runs already, or crun cannot be started.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "the container runs already");
        let log = OpenOptions::new().create(true).append(true).open(self.bundle.join("log"))?;
        let mut crun = self.crun(&["run", "--bundle"]);
        crun.arg(&self.bundle).arg(&self.id);
        crun.stdin(Stdio::null()).stderr(File::try_clone(&log)?).stdout(log);
        self.child = Some(crun.spawn().context("cannot start crun")?);
        Ok(())
    }

    /// Runs a command in it, as `kubectl exec` and exec probes do: what it wrote, or why it failed.
    ///
    /// # Errors
    /// What it wrote to its standard error.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        let output = self.output(command)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// The same, for a command whose exit status is a part of the answer.
    ///
    /// # Errors
    /// When crun cannot be started.
    pub fn output(&self, command: &[&str]) -> Result<Output> {
        // The kubelet's runtimes take the container's user; crun by itself takes root.
        Ok(self
            .crun(&["exec", "--user", &self.user, &self.id])
            .args(command)
            .stdin(Stdio::null())
            .output()?)
    }

    /// Asks it to end, as the kubelet does, and waits for it.
    ///
    /// # Errors
    /// When it does not run, or does not end within half a minute.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait()
    }

    /// Sends its first process a signal, by its name without `SIG`.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, name: &str) -> Result<()> {
        let killed = self.crun(&["kill", &self.id, name]).output()?;
        ensure!(killed.status.success(), "{}", String::from_utf8_lossy(&killed.stderr).trim());
        Ok(())
    }

    /// Waits for it to end.
    ///
    /// # Errors
    /// As [`Self::terminate`].
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let child = self.child.as_mut().context("the container does not run")?;
            if let Some(status) = child.try_wait()? {
                self.child = None;
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("the container did not end within {DEADLINE:?}:\n{}", self.log());
    }

    /// Returns whether it has ended by itself.
    ///
    /// # Errors
    /// When it was not started.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.as_mut().context("the container does not run")?.try_wait()?.is_some())
    }

    /// What it has written.
    pub fn log(&self) -> String {
        log_writer::await_written(&self.procs);
        fs::read_to_string(self.bundle.join("log")).unwrap_or_default()
    }

    /// The runtime's configuration of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn config(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.bundle.join("config.json"))?)?)
    }

    /// crun leaves cgroups alone here: what it starts stays in the one that it is started in, which is the
    /// container's. It knows no hybrid hierarchies, so that it is shown one that is not. The host name is
    /// that of its UTS namespace, which containers on the host's network stay in. The umask is that of
    /// container runtimes: crun makes directories for the mounts.
    fn crun(&self, args: &[&str]) -> Command {
        const START: &str = r#"umask 022
            echo $$ > "$1" || exit
            if [ -n "$2" ]; then echo "$2" > /proc/sys/kernel/hostname; fi
            shift 2
            if [ -e /sys/fs/cgroup/unified/cgroup.procs ]; then mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup; fi
            exec crun "$@""#;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--uts", "--", "sh", "-c", START, "sh"])
            .arg(&self.procs)
            .arg(&self.host_name);
        command.arg("--cgroup-manager=disabled").arg("--root").arg(self.bundle.join("state")).args(args);
        command
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(self.crun(&["delete", "--force", &self.id]).output());
        drop(child.kill());
        drop(child.wait());
    }
}
