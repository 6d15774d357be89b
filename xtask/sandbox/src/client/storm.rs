//! Many short connections that each check whose credentials they were given: the test for identities mixed
//! up. Depends on the HTTP client. Called inside pods by the binary's `client storm`.

use std::{
    io::{self, ErrorKind},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use serde::{Deserialize, Serialize};

use super::{Credentials, Request};
use crate::Cloud;

/// What to do.
#[derive(Clone, Debug)]
pub struct Storm {
    /// `http://100.100.100.200` and the like, taken in turns.
    pub base_urls: Vec<String>,
    /// Their cloud.
    pub cloud: Cloud,
    /// Connections in all, half of them for the role's name and half for its credentials.
    pub connects: usize,
    /// Connections at a time.
    pub concurrency: usize,
    /// The role that every answer must be of.
    pub role: String,
}

/// What happened.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StormReport {
    /// Answers that were this role's.
    pub ok: usize,
    /// Answers that were another role's. Must be zero, always.
    pub wrong: usize,
    /// Refusals: the agent did not know who asked, or had nothing for it.
    pub missing: usize,
    /// Requests that were told to ask again, or were not answered in time: the machine is slow.
    pub late: usize,
    /// Connections that failed in another way, and why the first ones did.
    pub errors: usize,
    /// At most ten.
    pub error_samples: Vec<String>,
    /// Of all answers, sorted, in microseconds.
    pub latencies_us: Vec<u64>,
}

impl Storm {
    /// Connects and compares.
    pub fn run(&self) -> StormReport {
        let next = AtomicUsize::new(0);
        let reports = thread::scope(|scope| {
            let workers = (0..self.concurrency.max(1)).map(|_| scope.spawn(|| self.work(&next)));
            let workers = workers.collect::<Vec<_>>();
            workers.into_iter().filter_map(|worker| worker.join().ok()).collect::<Vec<_>>()
        });
        let mut total = StormReport::default();
        for report in reports {
            total.ok += report.ok;
            total.wrong += report.wrong;
            total.missing += report.missing;
            total.late += report.late;
            total.errors += report.errors;
            total.error_samples.extend(report.error_samples);
            total.latencies_us.extend(report.latencies_us);
        }
        total.error_samples.truncate(10);
        total.latencies_us.sort_unstable();
        total
    }

    fn work(&self, next: &AtomicUsize) -> StormReport {
        let mut report = StormReport::default();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= self.connects {
                return report;
            }
            let list = index.is_multiple_of(2);
            let role = if list { "" } else { self.role.as_str() };
            let base_url = &self.base_urls[index / 2 % self.base_urls.len()];
            let url = format!("{base_url}{}{role}", self.cloud.list());
            match Request::get(url).send() {
                Ok(reply) => {
                    report.latencies_us.push(reply.latency_us);
                    match reply.status {
                        200 if self.is_ours(list, &reply.body) => report.ok += 1,
                        200 => report.wrong += 1,
                        503 => report.late += 1,
                        _ => report.missing += 1,
                    }
                }
                Err(error) if is_late(&error) => report.late += 1,
                Err(error) => {
                    report.errors += 1;
                    if report.error_samples.len() < 10 {
                        report.error_samples.push(format!("{error:#}"));
                    }
                }
            }
        }
    }

    fn is_ours(&self, list: bool, body: &str) -> bool {
        if list {
            return body == self.role;
        }
        serde_json::from_str::<Credentials>(body).is_ok_and(|given| given.role() == self.role)
    }
}

/// A socket whose time is up reports that nothing has arrived yet.
fn is_late(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::WouldBlock)
}
