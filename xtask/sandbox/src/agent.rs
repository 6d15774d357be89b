//! The real agent as a child process, where and how its DaemonSet would run it: in its own hostNetwork pod,
//! killed, terminated and started again at will. Depends on a node and on the stand-ins' addresses. Called by
//! `sandbox`.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    net::{SocketAddrV4, TcpListener},
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::{
    Cloud,
    client::{Reply, Request},
    log_writer,
    node::{Node, Pod},
};

/// The agent, running or not.
#[derive(Debug)]
pub struct Agent {
    app_addr: SocketAddrV4,
    args: Vec<String>,
    binary: PathBuf,
    child: Option<Child>,
    environment: Vec<(String, String)>,
    log: PathBuf,
    metrics_addr: SocketAddrV4,
    pod: Pod,
    wrapper: Vec<String>,
}

/// How variables begin that would change what an agent does.
const OTHERS: [&[u8]; 2] = [b"AWS_", b"KUBE2RAM_"];

/// How long the agent may take to be ready, or to end when it is told to.
const DEADLINE: Duration = Duration::from_secs(30);

impl Agent {
    /// The name of the container it runs in.
    pub const CONTAINER: &str = "agent";

    /// Prepares an agent without starting it. `extra` arguments come last.
    pub(crate) fn new(
        node: &Node,
        pod: Pod,
        binary: &Path,
        api_url: &str,
        sts_url: &str,
        extra: &[&str],
    ) -> Result<Self> {
        let [app_port, metrics_port] = free_ports()?;
        let app_addr = SocketAddrV4::new(node.ip(), app_port);
        let metrics_addr = SocketAddrV4::new(node.ip(), metrics_port);
        let mut args = vec![
            format!("--api-server={api_url}"),
            format!("--node={}", crate::Sandbox::NODE),
            format!("--host-ip={}", node.ip()),
            format!("--app-port={}", app_addr.port()),
            format!("--metrics-port={}", metrics_addr.port()),
            format!("--sts-endpoint={sts_url}"),
            // This machine may be one of another cloud than the node that it stands for.
            format!("--metadata-addr={}", node.cloud().metadata_ip()),
            format!("--cgroup-root={}", node.cgroup_root().display()),
            format!("--pods-cgroup={}", node.pods_cgroup().display()),
            format!("--bpf-dir={}", node.bpffs().join("kube2ram").display()),
            format!("--state-dir={}", node.agent_state().display()),
        ];
        // The agent's own default is Alibaba Cloud.
        if node.cloud() != Cloud::Alibaba {
            args.push(format!("--cloud={}", node.cloud().name()));
        }
        args.extend(extra.iter().map(|arg| (*arg).to_owned()));
        let log = node.directory().join("agent.log");

        let (binary, environment, wrapper) = (binary.to_owned(), Vec::new(), Vec::new());
        Ok(Self { app_addr, args, binary, child: None, environment, log, metrics_addr, pod, wrapper })
    }

    /// Another one of the same configuration and with the same log, in its own pod: what a rolling update
    /// with a surge starts.
    #[must_use]
    pub(crate) fn beside(&self, pod: Pod) -> Self {
        Self {
            app_addr: self.app_addr,
            args: self.args.clone(),
            binary: self.binary.clone(),
            child: None,
            environment: self.environment.clone(),
            log: self.log.clone(),
            metrics_addr: self.metrics_addr,
            pod,
            wrapper: self.wrapper.clone(),
        }
    }

    /// Adds an argument, from the next start on.
    pub fn add_arg(&mut self, arg: &str) {
        self.args.push(arg.to_owned());
    }

    /// Takes a flag away, from the next start on.
    pub fn remove_flag(&mut self, flag: &str) {
        self.args.retain(|arg| arg.split('=').next() != Some(flag));
    }

    /// Starts it and waits until its container's probe succeeds: it serves, or could. `/readyz` is answered
    /// by the serving agent.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_beside(&mut self) -> Result<()> {
        self.spawn()?;
        self.await_ready()
    }

    /// Waits until its container's probe succeeds.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn await_ready(&mut self) -> Result<()> {
        self.wait_until("ready", |agent| agent.ready().is_ok())
    }

    /// The result of its container's probe: `kube2ram ready`, as the kubelet runs it.
    ///
    /// # Errors
    /// Why it is not ready.
    pub fn ready(&self) -> Result<String> {
        self.probe("ready")
    }

    /// The same for `kube2ram live`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn live(&self) -> Result<String> {
        self.probe("live")
    }

    fn probe(&self, question: &str) -> Result<String> {
        let output =
            self.pod.command(Self::CONTAINER, &self.binary)?.args([question, &self.pod_dir()]).output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Runs a subcommand in its container, as `kubectl exec` does: `status`, `explain shop/orders`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(&self, args: &[&str]) -> Result<Output> {
        let state_dir = format!("--state-dir={}", self.state_dir().display());
        let mut command = self.pod.command(Self::CONTAINER, &self.binary)?;
        Ok(command.args(args).arg(state_dir).env_remove("NO_COLOR").stdin(Stdio::null()).output()?)
    }

    /// The directory that it shares with the node's other agents.
    pub fn state_dir(&self) -> PathBuf {
        let mut given = self.args.iter().filter_map(|arg| arg.strip_prefix("--state-dir="));
        given.next_back().unwrap_or("/run/kube2ram").into()
    }

    /// The flag that names the directory of its pod, which shares this machine's files with all others.
    fn pod_dir(&self) -> String {
        format!("--pod-dir={}", self.pod_dir_path().display())
    }

    /// The directory of its pod.
    pub fn pod_dir_path(&self) -> PathBuf {
        let directory = self.log.parent().unwrap_or(Path::new("/"));
        directory.join("pods").join(&self.pod.spec().uid)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("the agent is not running")?;
        Ok(kill_process(Pid::from_child(child), signal)?)
    }

    /// Sets a variable of its environment, from the next start on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Has it started by another program, which becomes it (`setpriv …`), from the next start on.
    pub fn set_wrapper(&mut self, command: &[&str]) {
        self.wrapper = command.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Starts it and waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// When it ends at once, or is not ready within half a minute; with the end of its log.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_until("ready", |agent| agent.admin("/readyz").is_ok_and(|reply| reply.status == 200))
    }

    fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                self.child = None;
                bail!("the agent ended with {}:\n{}", status?, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("the agent is not {what} after {DEADLINE:?}:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }

        Ok(())
    }

    /// Starts it without waiting for anything.
    ///
    /// # Errors
    /// When it runs already or the binary cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        anyhow::ensure!(self.child.is_none(), "the agent is running");
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = match self.wrapper.split_first() {
            None => self.pod.command(Self::CONTAINER, &self.binary)?,
            Some((program, args)) => {
                let mut command = self.pod.command(Self::CONTAINER, program)?;
                command.args(args).arg(&self.binary);
                command
            }
        };
        fs::create_dir_all(self.pod_dir_path())?;
        // Those of the tests, and of the machine that runs them, are not the agent's.
        let is_foreign =
            |name: &OsStr| OTHERS.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix));
        for (name, _) in env::vars_os().filter(|(name, _)| is_foreign(name)) {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().cloned()).args(&self.args).arg(self.pod_dir());
        command.stdin(Stdio::null()).stderr(File::try_clone(&log)?).stdout(log);
        self.child = Some(command.spawn().context("cannot start the agent")?);

        Ok(())
    }

    /// Kills it without warning.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }

        Ok(())
    }

    /// Asks it to end, as the kubelet does, and waits for it.
    ///
    /// # Errors
    /// When it does not run, or does not end within half a minute.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Waits for it to end.
    ///
    /// # Errors
    /// When it does not run, or does not end within half a minute.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let mut child = self.child.take().context("the agent is not running")?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("the agent did not end within {DEADLINE:?}:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Terminates it and starts it again, possibly from another binary, as an upgrade does.
    ///
    /// # Errors
    /// As [`Self::terminate`] and [`Self::start`].
    pub fn restart(&mut self, binary: Option<&Path>) -> Result<()> {
        self.terminate()?;
        if let Some(binary) = binary {
            self.binary = binary.to_owned();
        }
        self.start()
    }

    /// Everything it has ever logged.
    pub fn log(&self) -> String {
        if let Some(cgroup) = self.pod.container_cgroup(Self::CONTAINER) {
            log_writer::await_written(&cgroup.join("cgroup.procs"));
        }
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks its admin listener: `/readyz`, `/metrics`, ….
    ///
    /// # Errors
    /// When it does not answer.
    pub fn admin(&self, path: &str) -> Result<Reply> {
        Request::get(format!("http://{}{path}", self.metrics_addr)).send()
    }

    /// A sample of its metrics, by name and labels as they are written; zero when there is none of them.
    ///
    /// # Errors
    /// When it does not answer, or not with a number.
    pub fn metric(&self, sample: &str) -> Result<f64> {
        let metrics = self.admin("/metrics")?.body;
        let line = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.map_or(Ok(0.0), str::parse)?)
    }

    /// Waits until a sample of its metrics has this value: what the agent does can be seen before it is
    /// counted.
    ///
    /// # Errors
    /// When it has not after the time of [`Self::start`], or the agent ended.
    pub fn await_metric(&mut self, sample: &str, value: f64) -> Result<()> {
        let has_value = |agent: &Self| agent.metric(sample).is_ok_and(|now| now.total_cmp(&value).is_eq());
        self.wait_until(&format!("at {value} by {sample}"), has_value)
    }

    /// Where redirected connections arrive in the node's namespace.
    pub fn app_addr(&self) -> SocketAddrV4 {
        self.app_addr
    }

    /// Where its admin listener is on the node's address.
    pub fn admin_addr(&self) -> SocketAddrV4 {
        self.metrics_addr
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The pod it runs in.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines = log.lines().collect::<Vec<_>>();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            crate::say(&format!("could not kill the agent: {error:#}"));
        }
    }
}

/// Two ports that were free a moment ago, both at a time: one after the other may be the same. The agent
/// takes numbers, not sockets.
fn free_ports() -> Result<[u16; 2]> {
    let listeners = [TcpListener::bind("0.0.0.0:0")?, TcpListener::bind("0.0.0.0:0")?];
    Ok([listeners[0].local_addr()?.port(), listeners[1].local_addr()?.port()])
}
