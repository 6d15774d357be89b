//! A trial of a language's own HTTP client: it reaches the agent by both of the metadata server's addresses,
//! in a pod of both families and in one of IPv6 alone. Depends on `sandbox`. Called by the binary's
//! `addresses`, which `cargo xtask test --sdks` runs for each client.

use std::{ffi::OsString, io::Write, path::Path, thread, time::Duration, time::Instant};

use anyhow::{Context as _, Result, ensure};

use super::{NAME, packets_from_pods};
use crate::{
    Cloud, Sandbox,
    node::{Node, PodSpec},
    show::mark,
    standin::{Accounts, Role},
};

/// The client under trial.
#[derive(Debug)]
pub struct Addresses {
    /// The program and its arguments. It is given URLs, and prints status and body of each on a line.
    pub command: Vec<OsString>,
    /// What to call it.
    pub name: String,
}

const PODS: [&str; 2] = ["dual", "six"];
/// How many seconds a client may take, the starts of a JVM on a busy machine included.
const PATIENCE: &str = "60";
/// How long pods' listeners may take to open.
const OPENING: Duration = Duration::from_secs(20);

impl Addresses {
    /// Runs the trial and prints a row of the table. Returns whether everything was as it should be.
    ///
    /// # Errors
    /// When the sandbox cannot be made or nobody listens.
    pub fn run(&self, agent: &Path, out: &mut dyn Write) -> Result<bool> {
        let mut sandbox = Sandbox::create(NAME)?;
        for pod in PODS {
            sandbox.accounts().add_role(Accounts::role_arn(&role(pod)), Role::default());
            let spec = PodSpec::new(pod).role(&role(pod));
            sandbox.add_pod(&if pod == "six" { spec.ipv6_only() } else { spec })?;
        }

        let tried = self.try_out(&mut sandbox, agent);
        let right = tried.is_ok();
        let text = match tried {
            Ok(()) => {
                "its own role by 100.100.100.200 and fd00:100::100:200, with and without IPv4".to_owned()
            }
            Err(error) => format!("{error:#}"),
        };
        writeln!(out, "{} {:<43}  {text}", mark(right), self.name)?;
        Ok(right)
    }

    fn try_out(&self, sandbox: &mut Sandbox, agent: &Path) -> Result<()> {
        let list = Cloud::Alibaba.list();
        let by_ipv6 = format!("http://[{}]{list}", Node::METADATA_IP6);
        let by_ipv4 = format!("http://{}{list}", Node::METADATA_IP);
        // Without an agent it reaches the server itself, so that what is tried is the client and not the lack
        // of a way.
        self.expect(sandbox, "dual", &[&by_ipv6, &by_ipv4], Accounts::NODE_ROLE)
            .context("without an agent")?;

        sandbox.start_agent(agent, &["--auto-discover-base-arn"])?;
        let deadline = Instant::now() + OPENING;
        while sandbox.agent()?.metric("kube2ram_pod_listeners")? < PODS.len() as f64 {
            ensure!(Instant::now() < deadline, "listeners in pods do not open");
            thread::sleep(Duration::from_millis(20));
        }
        let before = packets_from_pods(sandbox);
        for pod in PODS {
            self.expect(sandbox, pod, &[&by_ipv6, &by_ipv4], &role(pod))
                .with_context(|| format!("in {pod}"))?;
        }
        let arrived = packets_from_pods(sandbox) - before;
        ensure!(arrived == 0, "{arrived} packets reached the metadata server");
        Ok(())
    }

    /// Asserts that every URL is answered with a role's name.
    fn expect(&self, sandbox: &Sandbox, pod: &str, urls: &[&str], role: &str) -> Result<()> {
        let mut command = sandbox.pod(pod)?.pod().command("app", "timeout")?;
        command.arg(PATIENCE).args(&self.command).args(urls);
        command
            .env_clear()
            .env("HOME", sandbox.node().directory())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let output = command.output().context("cannot start the client")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the client ended with {}: {complaint}", output.status);
        let printed = String::from_utf8_lossy(&output.stdout);
        let expected = format!("200 {role}");
        let is_right = printed.lines().count() == urls.len() && printed.lines().all(|line| line == expected);
        ensure!(is_right, "it printed {printed:?} instead of {expected:?} for each of {urls:?}");
        Ok(())
    }
}

fn role(pod: &str) -> String {
    format!("{pod}-role")
}
