//! Clients as SDKs are, without an end: half of them connect for every request, half keep their connection as
//! long as the server does. Tells whatever was not answered as it should be. Depends on the HTTP client.
//! Called inside pods by the binary's `client load`.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Child,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{
    Credentials, Reply,
    http::{Family, connect, parse},
};
use crate::{Cloud, quiet::is_quiet};

/// What to do.
#[derive(Clone, Debug)]
pub struct Load {
    /// The metadata server.
    pub addr: SocketAddr,
    /// Its cloud.
    pub cloud: Cloud,
    /// The role that every answer must be of.
    pub role: String,
}

/// What happened.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Requests that were answered with this role's name or credentials.
    pub ok: usize,
    /// Answers that were another role's. Must be zero, always.
    pub wrong: usize,
    /// Answers that were refusals, by status.
    pub refusals: Vec<u16>,
    /// Connections that were refused: nobody listened.
    pub refused: usize,
    /// Connections that ended before the answer did.
    pub cut: usize,
    /// Requests on a kept connection that the server had closed meanwhile. They were sent again on a new one,
    /// as HTTP clients do (RFC 9112, 9.3.1).
    pub resent: usize,
    /// Anything else, such as no answer within five seconds.
    pub failed: usize,
    /// What the first ten of all these said.
    pub samples: Vec<String>,
    /// From the first request that was not answered to the next one that was, in microseconds, for each time
    /// that happened.
    pub outages_us: Vec<u64>,
    /// The slowest answer, in microseconds.
    pub slowest_us: u64,
    /// Of all answers, in microseconds.
    pub latencies_us: Vec<u64>,
}

/// What SDKs wait for an answer.
const SDK_PATIENCE: Duration = Duration::from_secs(1);
/// Of each of the two clients, between two requests: below `--request-rate` together.
const PAUSE: Duration = Duration::from_millis(11);

impl Load {
    /// Asks until `until` ends; then reports the result.
    ///
    /// # Errors
    /// None so far.
    pub fn run(&self, mut until: impl Read + Send) -> Result<LoadReport> {
        let ended = AtomicBool::new(false);
        let reports = thread::scope(|scope| {
            let clients = [false, true].map(|keeps| {
                scope.spawn({
                    let ended = &ended;
                    move || self.client(keeps, ended)
                })
            });
            drop(until.read_to_end(&mut Vec::new()));
            ended.store(true, Ordering::Relaxed);
            clients.into_iter().filter_map(|client| client.join().ok()).collect::<Vec<_>>()
        });
        Ok(reports.into_iter().fold(LoadReport::default(), LoadReport::plus))
    }

    fn client(&self, keeps: bool, ended: &AtomicBool) -> LoadReport {
        let (mut report, mut kept, mut down_since) = (LoadReport::default(), None, None);
        let mut turn = 0_usize;
        while !ended.load(Ordering::Relaxed) {
            turn += 1;
            let role = if turn.is_multiple_of(2) { self.role.as_str() } else { "" };
            let started = Instant::now();
            let asked = self.ask(role, keeps, &mut kept, &mut report);
            let took = |since: Instant| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
            match asked {
                Ok(reply) if reply.status == 200 => {
                    let latency_us = took(started);
                    report.slowest_us = report.slowest_us.max(latency_us);
                    report.latencies_us.push(latency_us);
                    if self.is_ours(role, &reply.body) {
                        report.ok += 1
                    } else {
                        report.wrong += 1
                    }
                    if let Some(since) = down_since.take() {
                        report.outages_us.push(took(since));
                    }
                }
                Ok(reply) => {
                    down_since.get_or_insert(started);
                    report.sample(format!("{} {}", reply.status, reply.body.trim()));
                    report.refusals.push(reply.status);
                }
                Err(error) => {
                    kept = None;
                    down_since.get_or_insert(started);
                    report.sample(format!("{error:#}"));
                    match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
                        Some(ErrorKind::ConnectionRefused) => report.refused += 1,
                        Some(kind) if is_cut(kind) => report.cut += 1,
                        _ => report.failed += 1,
                    }
                }
            }
            thread::sleep(PAUSE);
        }
        report
    }

    fn ask(
        &self,
        role: &str,
        keeps: bool,
        kept: &mut Option<TcpStream>,
        report: &mut LoadReport,
    ) -> Result<Reply> {
        let close = if keeps { "" } else { "Connection: close\r\n" };
        let (list, host) = (self.cloud.list(), self.addr.ip());
        let head = format!("GET {list}{role} HTTP/1.1\r\nHost: {host}\r\n{close}\r\n");
        if let Some(mut stream) = kept.take() {
            match exchange(&mut stream, &head) {
                Err(error) if is_cut(error.kind()) => report.resent += 1,
                answer => return self.keep(stream, answer?, keeps, kept),
            }
        }
        let mut stream = connect(self.addr, Family::of(self.addr))?;
        let answer = exchange(&mut stream, &head)?;
        self.keep(stream, answer, keeps, kept)
    }

    fn keep(
        &self,
        stream: TcpStream,
        answer: Vec<u8>,
        keeps: bool,
        kept: &mut Option<TcpStream>,
    ) -> Result<Reply> {
        let reply = parse(&answer, false)?;
        let is_last =
            reply.headers.get("connection").is_some_and(|option| option.eq_ignore_ascii_case("close"));
        *kept = (keeps && !is_last).then_some(stream);
        Ok(reply)
    }

    fn is_ours(&self, role: &str, body: &str) -> bool {
        if role.is_empty() {
            return body == self.role;
        }
        serde_json::from_str::<Credentials>(body).is_ok_and(|given| given.role() == self.role)
    }
}

impl LoadReport {
    /// Ends a `client load`, whose standard input and output are pipes, and reads its report.
    ///
    /// # Errors
    /// When it has written none.
    pub fn of(mut client: Child) -> Result<Self> {
        drop(client.stdin.take());
        let output = client.wait_with_output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("the client reported nothing, and ended with {}", output.status))
    }

    /// How long this percentage of the answers took at most; `None` without an answer.
    pub fn percentile(&self, percent: usize) -> Option<Duration> {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted.get(at).copied().map(Duration::from_micros)
    }

    /// Asserts that each request was served, and in time. With `KUBE2RAM_QUIET=1`, 99 % of the answers took
    /// less than `patience`. On other machines half of them took less than a second, which SDKs wait, and at
    /// most 1 % of the requests had no answer within five seconds.
    ///
    /// # Panics
    ///
    /// When that is not so.
    pub fn assert_served(&self, what: &str, patience: Duration) {
        let fault = self.fault(patience, is_quiet());
        assert_eq!(fault, None, "{what}: {:?}", self.samples);
    }

    /// What is not as it should be.
    fn fault(&self, patience: Duration, is_quiet: bool) -> Option<String> {
        let (percent, patience, failures_of_100) =
            if is_quiet { (99, patience, 0) } else { (50, SDK_PATIENCE, 1) };
        let Self { ok, wrong, refusals, refused, cut, failed, .. } = self;
        if *ok == 0 {
            return Some("no request was answered".to_owned());
        }
        if (*wrong, refusals.len(), *refused, *cut) != (0, 0, 0, 0) {
            return Some(format!("{wrong} wrong, {refused} refused, {cut} cut, statuses {refusals:?}"));
        }
        if failed * 100 > (ok + failed) * failures_of_100 {
            return Some(format!("{failed} of {} requests failed", ok + failed));
        }
        let took = self.percentile(percent);
        took.is_none_or(|took| took >= patience).then(|| format!("p{percent} {took:?}"))
    }

    /// Both together.
    #[must_use]
    pub fn plus(mut self, other: Self) -> Self {
        self.ok += other.ok;
        self.wrong += other.wrong;
        self.refusals.extend(other.refusals);
        self.refused += other.refused;
        self.cut += other.cut;
        self.resent += other.resent;
        self.failed += other.failed;
        self.samples.extend(other.samples);
        self.outages_us.extend(other.outages_us);
        self.slowest_us = self.slowest_us.max(other.slowest_us);
        self.latencies_us.extend(other.latencies_us);
        self
    }

    fn sample(&mut self, text: String) {
        if self.samples.len() < 10 {
            self.samples.push(text);
        }
    }
}

/// The server closed the connection, or its kernel did.
fn is_cut(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof)
}

/// Sends a request and reads an answer with `Content-Length`.
fn exchange(stream: &mut TcpStream, head: &str) -> std::io::Result<Vec<u8>> {
    stream.write_all(head.as_bytes())?;
    let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        if let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            if answer.len() >= end + 4 + length.unwrap_or(0) {
                return Ok(answer);
            }
        }
        match stream.read(&mut chunk)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1,000 answers, some of them after two seconds.
    fn report(slow: usize) -> LoadReport {
        let latencies_us = (0..1000).map(|n| if n < slow { 2_000_000 } else { 1_000 }).collect();
        LoadReport { ok: 1000, latencies_us, ..LoadReport::default() }
    }

    #[test]
    fn a_busy_machine_may_be_late_and_fail_now_and_then_and_a_quiet_one_may_not() {
        let is_served = |report: &LoadReport| {
            [false, true].map(|is_quiet| report.fault(Duration::from_millis(100), is_quiet).is_none())
        };

        assert_eq!(is_served(&report(0)), [true, true]);
        assert_eq!(is_served(&report(10)), [true, false], "the answer at the percentile is late");
        assert_eq!(is_served(&report(9)), [true, true]);
        assert_eq!(is_served(&report(499)), [true, false]);
        assert_eq!(is_served(&report(501)), [false, false]);
        assert_eq!(is_served(&LoadReport { failed: 10, ..report(0) }), [true, false]);
        assert_eq!(is_served(&LoadReport { failed: 11, ..report(0) }), [false, false]);
    }

    #[test]
    fn no_machine_may_serve_nobody_or_refuse_or_cut_a_request_or_confuse_roles() {
        for unserved in [
            LoadReport::default(),
            LoadReport { ok: 0, ..report(0) },
            LoadReport { wrong: 1, ..report(0) },
            LoadReport { refusals: vec![503], ..report(0) },
            LoadReport { refused: 1, ..report(0) },
            LoadReport { cut: 1, ..report(0) },
        ] {
            for is_quiet in [false, true] {
                assert!(unserved.fault(SDK_PATIENCE, is_quiet).is_some(), "{unserved:?}");
            }
        }
    }
}
