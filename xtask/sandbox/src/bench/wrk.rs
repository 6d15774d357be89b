//! Load from wrk (Debian package `wrk`), and what it measured. Called by `bench`.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

/// wrk's own report is for people.
const SCRIPT: &str = r#"
init = function(arguments)
  local pause = tonumber(arguments[1])
  if pause > 0 then
    delay = function() return pause end
  end
end
done = function(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("numbers %d %d %d %d %d %d\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"#;

/// What clients do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) connections: u16,
    /// Whether each request has its own connection.
    pub(super) close: bool,
    /// How long each client waits before each request. Without a wait, they are as many as the machine bears,
    /// and wait for each other.
    pub(super) pause_ms: u16,
    pub(super) seconds: u16,
}

/// What wrk saw. Latencies in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) requests: f64,
    pub(super) per_second: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
}

impl Load {
    /// Runs `command`, which is `wrk`, against a URL. One failed request is an error: then it is not known
    /// what was measured.
    pub(super) fn run(self, mut command: Command, directory: &Path, url: &str) -> Result<Seen> {
        let script = directory.join("wrk.lua");
        fs::write(&script, SCRIPT)?;
        let threads = self.connections.min(2);
        command
            .arg(format!("-t{threads}"))
            .arg(format!("-c{}", self.connections))
            .arg(format!("-d{}s", self.seconds));
        if self.close {
            command.args(["-H", "Connection: close"]);
        }
        let output = command
            .arg("-s")
            .arg(script)
            .arg(url)
            .args(["--", &self.pause_ms.to_string()])
            .output()
            .context("cannot run wrk")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk: {text}{}", String::from_utf8_lossy(&output.stderr));
        let numbers =
            text.lines().find_map(|line| line.strip_prefix("numbers ")).context("wrk said nothing")?;
        let numbers = numbers.split(' ').map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [requests, took_us, failed, p50, p99, p999] = numbers[..] else {
            anyhow::bail!("wrk said {numbers:?}")
        };
        ensure!(failed == 0.0 && requests > 0.0, "{failed} of {requests} requests to {url} failed");
        Ok(Seen {
            requests,
            per_second: requests / took_us * 1e6,
            p50: p50 / 1000.0,
            p99: p99 / 1000.0,
            p999: p999 / 1000.0,
        })
    }
}
