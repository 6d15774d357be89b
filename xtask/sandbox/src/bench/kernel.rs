//! What each program costs by the kernel's own count (`kernel.bpf_stats_enabled`), which includes the
//! counting. Depends on bpftool. Called by `bench`.

use std::{collections::BTreeMap, fs, io::Write, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Counts while it lives; the machine's setting comes back afterwards.
pub(super) struct Counting {
    before: String,
    begin: BTreeMap<u32, Program>,
}

/// One program, as bpftool shows it.
#[derive(Clone, Debug, Deserialize)]
struct Program {
    id: u32,
    #[serde(default)]
    name: String,
    #[serde(default)]
    run_cnt: u64,
    #[serde(default)]
    run_time_ns: u64,
}

impl Counting {
    pub(super) fn start() -> Result<Self> {
        let before = fs::read_to_string(SWITCH)?;
        fs::write(SWITCH, "1")?;
        Ok(Self { before, begin: programs()? })
    }

    /// Prints what each of our programs took, for each of `connects` that were made meanwhile.
    pub(super) fn report(&self, connects: usize, out: &mut dyn Write) -> Result<()> {
        for (id, end) in programs()? {
            let begin = self.begin.get(&id);
            let runs = end.run_cnt - begin.map_or(0, |begin| begin.run_cnt);
            let took = end.run_time_ns - begin.map_or(0, |begin| begin.run_time_ns);
            if runs > 0 {
                let each = took as f64 / runs as f64;
                let often = runs as f64 / connects as f64;
                writeln!(out, "  {:<58} {each:>9.0} ns × {often:.1} a connect", end.name)?;
            }
        }
        Ok(())
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        drop(fs::write(SWITCH, &self.before));
    }
}

/// Ours, by id.
fn programs() -> Result<BTreeMap<u32, Program>> {
    let output =
        Command::new("bpftool").args(["--json", "prog", "show"]).output().context("cannot run bpftool")?;
    ensure!(output.status.success(), "bpftool: {}", String::from_utf8_lossy(&output.stderr).trim());
    let all = serde_json::from_slice::<Vec<Program>>(&output.stdout)?;
    Ok(all
        .into_iter()
        .filter(|program| program.name.starts_with("k2r_"))
        .map(|program| (program.id, program))
        .collect())
}
