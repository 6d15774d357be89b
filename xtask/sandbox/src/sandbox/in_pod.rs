//! What is done in one pod of a sandbox: requests of its clients. Made by the parent; called by tests.

use std::{
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Cloud,
    client::{Family, Reply},
    node::Pod,
};

/// A pod and what runs in it.
#[derive(Clone, Copy, Debug)]
pub struct InPod<'a> {
    pub(super) client: &'a Path,
    pub(super) cloud: Cloud,
    pub(super) pod: &'a Pod,
}

impl<'a> InPod<'a> {
    /// The pod itself.
    pub fn pod(&self) -> &'a Pod {
        self.pod
    }

    /// Sends a GET to the metadata address from the first container, on an IPv4 socket.
    ///
    /// # Errors
    /// When it gets no answer: refused, reset, or silence for five seconds.
    pub fn curl(&self, target: &str) -> Result<Reply> {
        let first = self.pod.spec().containers.first().context("the pod has no container")?;
        self.curl_from(first, Family::V4, &url(self.cloud, target))
    }

    /// As [`Self::curl`], until the status is another one than 503, "not yet", or the time is over: as SDKs
    /// do.
    ///
    /// # Errors
    /// As [`Self::curl`].
    pub fn curl_until_ready(&self, target: &str, patience: Duration) -> Result<Reply> {
        let deadline = Instant::now() + patience;
        loop {
            let reply = self.curl(target)?;
            if reply.status != 503 || Instant::now() > deadline {
                return Ok(reply);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a GET to the metadata server's IPv6 address from the first container.
    ///
    /// # Errors
    /// As [`Self::curl`].
    pub fn curl6(&self, target: &str) -> Result<Reply> {
        let first = self.pod.spec().containers.first().context("the pod has no container")?;
        let url = format!("http://[{}]{target}", self.cloud.metadata_ip6());
        self.curl_from(first, Family::V6, &url)
    }

    /// Sends a GET to any URL from any container, on any kind of socket.
    ///
    /// # Errors
    /// As [`Self::curl`].
    pub fn curl_from(&self, container: &str, family: Family, url: &str) -> Result<Reply> {
        let family = match family {
            Family::V4 => "4",
            Family::V6 => "6",
            Family::V6Mapped => "6mapped",
        };
        reply(self.pod.command(container, self.client)?.args(["client", "get", "--family", family, url]))
    }

    /// Sends a GET to the metadata address from a cgroup inside the container's.
    ///
    /// # Errors
    /// As [`Self::curl`].
    pub fn curl_nested(&self, container: &str, target: &str) -> Result<Reply> {
        reply(self.nested_client(container, "nested/deeper")?.args(["get", &url(self.cloud, target)]))
    }

    /// A `kube2ram-sandbox client …` command in a container, for what is not a GET.
    ///
    /// # Errors
    /// When the pod has no such container.
    pub fn client(&self, container: &str) -> Result<Command> {
        let mut command = self.pod.command(container, self.client)?;
        command.arg("client");
        Ok(command)
    }

    /// The same in a cgroup inside the container's.
    ///
    /// # Errors
    /// As [`Self::client`]; when the cgroup cannot be made.
    pub fn nested_client(&self, container: &str, nested: &str) -> Result<Command> {
        let mut command = self.pod.nested_command(container, nested, self.client)?;
        command.arg("client");
        Ok(command)
    }
}

pub(super) fn url(cloud: Cloud, target: &str) -> String {
    format!("http://{}{target}", cloud.metadata_ip())
}

pub(super) fn reply(command: &mut Command) -> Result<Reply> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(serde_json::from_slice(&output.stdout)?)
}
