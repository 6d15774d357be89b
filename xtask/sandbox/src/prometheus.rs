//! A real Prometheus next to the sandbox, in a hurry: it scrapes the agent and judges it by the shipped alert
//! rules, with all times shortened alike. Depends on Debian's package, unpacked by `cargo xtask`. Called by
//! tests.

use std::{
    env,
    fs::{self, File},
    net::{SocketAddrV4, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use url::form_urlencoded::Serializer;

use crate::{client::Request, clock::Clock};

/// A Prometheus that runs until it is dropped.
#[derive(Debug)]
pub struct Prometheus {
    addr: SocketAddrV4,
    child: Child,
    log: PathBuf,
}

/// One series of an answer: its labels, and its values in the order of time.
#[derive(Clone, Debug)]
pub struct Series {
    /// The labels.
    pub labels: serde_json::Map<String, Value>,
    /// The values; one of a moment, some of a range.
    pub values: Vec<f64>,
}

/// How long Prometheus may take to start.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How often Prometheus scrapes and judges in production: the manifests' interval.
const INTERVAL: Duration = Duration::from_secs(30);
/// Every duration of rules and panels is whole in it, hastened.
const _: () = assert!(60_000 % Prometheus::HASTE == 0);

impl Prometheus {
    /// How much faster time goes: a scrape and a judgement each quarter of a second instead of each half
    /// minute.
    pub const HASTE: u32 = 120;

    /// A program of Debian's package: where `cargo xtask` unpacks it, or in PATH.
    pub fn program(name: &str) -> Option<PathBuf> {
        let this = env::current_exe().unwrap_or_default();
        let unpacked = this.ancestors().map(|above| above.join("tools/prometheus/usr/bin").join(name));
        let path = env::var_os("PATH").unwrap_or_default();
        let installed = env::split_paths(&path).map(|directory| directory.join(name)).collect::<Vec<_>>();
        unpacked.chain(installed).find(|file| file.is_file())
    }

    /// Starts one in `directory`, which scrapes the agent there and knows these rules.
    ///
    /// # Errors
    /// When there is no Prometheus, or it does not start.
    pub fn start(directory: &Path, agent: SocketAddrV4, node: &str, rules: &str) -> Result<Self> {
        let program = Self::program("prometheus").context("Prometheus is missing: cargo xtask setup")?;
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string().parse::<SocketAddrV4>()?;
        let (config, log) = (directory.join("prometheus.yaml"), directory.join("prometheus.log"));
        fs::write(directory.join("rules.yaml"), hastened(rules))?;
        let interval = format!("{}ms", (INTERVAL / Self::HASTE).as_millis());
        fs::write(
            &config,
            format!(
                "global: {{ scrape_interval: {interval}, scrape_timeout: {interval}, evaluation_interval: {interval} }}\n\
                 rule_files: [rules.yaml]\n\
                 scrape_configs:\n  - job_name: kube2ram\n    static_configs:\n      \
                 - {{ targets: ['{agent}'], labels: {{ node: {node} }} }}\n"
            ),
        )?;
        let out = File::create(&log)?;
        let child = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("prometheus").display()))
            .arg(format!("--web.listen-address={addr}"))
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(File::try_clone(&out)?)
            .stderr(out)
            .spawn()?;
        let mut prometheus = Self { addr, child, log };
        prometheus.await_ready()?;
        Ok(prometheus)
    }

    fn await_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        let url = format!("http://{}/-/ready", self.addr);
        while !Request::get(&url).send().is_ok_and(|reply| reply.status == 200) {
            let log = || fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(status) = self.child.try_wait()? {
                bail!("Prometheus ended with {status}:\n{}", log());
            }
            ensure!(Instant::now() < deadline, "Prometheus is not ready:\n{}", log());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What an expression gives now.
    ///
    /// # Errors
    /// When Prometheus does not take it.
    pub fn query(&self, expression: &str) -> Result<Vec<Series>> {
        self.ask("query", &[("query", expression)])
    }

    /// What it gave in the last while, at each scrape. Samples that are no number, as a quotient of nothing,
    /// are left out, and so are series without others.
    ///
    /// # Errors
    /// As [`Self::query`].
    pub fn query_range(&self, expression: &str, last: Duration) -> Result<Vec<Series>> {
        let end = Clock::default().now().as_duration().as_secs_f64();
        let [start, end] = [end - last.as_secs_f64(), end].map(|time| time.to_string());
        let step = (INTERVAL / Self::HASTE).as_secs_f64().to_string();
        self.ask("query_range", &[("query", expression), ("start", &start), ("end", &end), ("step", &step)])
    }

    /// The names of the alerts that fire.
    ///
    /// # Errors
    /// When Prometheus does not answer.
    pub fn firing(&self) -> Result<Vec<String>> {
        let firing = self.query(r#"count by (alertname) (ALERTS{alertstate="firing"})"#)?;
        Ok(firing.iter().filter_map(|series| series.label("alertname").map(str::to_owned)).collect())
    }

    fn ask(&self, what: &str, parameters: &[(&str, &str)]) -> Result<Vec<Series>> {
        let query = Serializer::new(String::new()).extend_pairs(parameters).finish();
        let reply = Request::get(format!("http://{}/api/v1/{what}?{query}", self.addr)).send()?;
        let answer = serde_json::from_str::<Value>(&reply.body)?;
        ensure!(answer["status"] == "success", "{parameters:?}: {}", reply.body);
        let result = answer["data"]["result"].as_array().context("no result")?;
        let series = result.iter().map(|series| {
            let samples =
                series["values"].as_array().cloned().unwrap_or_else(|| vec![series["value"].clone()]);
            let number =
                |sample: &Value| sample[1].as_str()?.parse::<f64>().ok().filter(|value| value.is_finite());
            let labels = series["metric"].as_object().cloned().unwrap_or_default();
            Series { labels, values: samples.iter().filter_map(number).collect() }
        });
        Ok(series.filter(|series| !series.values.is_empty()).collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Series {
    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name)?.as_str()
    }
}

/// Divides every duration in rules or in an expression by [`Prometheus::HASTE`]: those in brackets, and those
/// of `for:`. What is compared with a number of seconds stays: credentials live as long as ever.
pub fn hastened(text: &str) -> String {
    let mut hastened = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if let Some((before, duration)) = line.split_once("for: ")
            && before.trim().is_empty()
        {
            hastened += &format!("{before}for: {}\n", divided(duration.trim()).unwrap_or_default());
            continue;
        }
        let mut rest = line;
        while let Some((before, after)) = rest.split_once('[') {
            let Some((inside, behind)) = after.split_once(']') else { break };
            let inside = divided(inside).unwrap_or_else(|| inside.to_owned());
            hastened += &format!("{before}[{inside}]");
            rest = behind;
        }
        hastened += rest;
    }
    hastened
}

/// A duration of Prometheus's, of one unit.
fn divided(duration: &str) -> Option<String> {
    let (number, unit) = duration.split_at(duration.find(|c: char| !c.is_ascii_digit())?);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        _ => return None,
    };
    let milliseconds = number.parse::<u32>().ok()? * seconds * 1_000 / Prometheus::HASTE;
    Some(format!("{milliseconds}ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_shortened_alike_and_nothing_else_is() {
        let rules =
            "- alert: A\n  expr: rate(x{a=~\"[b-c]\"}[10m]) > 300 and y[30s]\n  for: 5m\n  # for: 5m\n";

        let expected = "- alert: A\n  expr: rate(x{a=~\"[b-c]\"}[5000ms]) > 300 and y[250ms]\n  for: 2500ms\n  # for: 5m\n";
        assert_eq!(hastened(rules), expected);
    }
}
