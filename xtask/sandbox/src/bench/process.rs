//! What the kernel counts for a process: memory and processor time. Processor time shows what something
//! costs, also on a machine with other work, where requests per second only show what was scheduled. Depends
//! on procfs. Used by the other parts of `bench`.

use std::fs;

use anyhow::{Context as _, Result};

/// A process that is measured while it runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process(pub(super) u32);

impl Process {
    pub(super) fn resident_mib(self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib = line.trim().trim_end_matches(" kB").parse::<f64>()?;
        Ok(kib / 1024.0)
    }

    /// Seconds, in user and kernel mode.
    pub(super) fn cpu(self) -> Result<f64> {
        // The scheduler's own count of a thread, in nanoseconds: times(2) and `stat` have hundredths of a
        // second.
        let mut total_ns = 0.0;
        for task in fs::read_dir(format!("/proc/{}/task", self.0))? {
            // One that has ended meanwhile is not counted; the runtime's threads last as long as their
            // process.
            let Ok(schedstat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
            let running = schedstat.split_whitespace().next().context("an empty schedstat")?;
            total_ns += running.parse::<f64>()?;
        }
        Ok(total_ns / 1e9)
    }
}
