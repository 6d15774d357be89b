//! Rung 3, `cargo xtask test --kernels`: the tests of the eBPF programs in virtual machines with the kernels
//! that we promise to run on.
//!
//! A machine is QEMU without hardware help, a kernel of Debian's, and an initial RAM file system made of this
//! machine's own programs. Called by `steps`.

mod cpio;
mod disk;
mod initramfs;
mod machine;
mod modules;
mod plan;
mod reboot;

use std::{
    cmp::Reverse,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use self::{machine::Boot, plan::Plan};
use crate::{
    apt::Apt,
    build,
    command::{run, say, target_dir},
    counts::Counts,
    ebpf,
    musl::Arch,
    setup,
};

/// The series, and the Debian release whose security suite holds its newest kernel.
const RELEASES: [(&str, &str); 3] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "bookworm")];
/// The series, as the command line names them.
pub(crate) const SERIES: [&str; 3] = [RELEASES[0].0, RELEASES[1].0, RELEASES[2].0];
/// The series and the release of the node that reboots.
const REBOOTS: (&str, &str) = ("6.1", "bookworm");

/// How much of what can run on a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// All tests.
    All,
    /// What differs between kernels: that the programs load, with few capabilities too, attach, redirect,
    /// deny and distinguish pods.
    Essential,
}

/// Runs the tests on the kernels of the named series, or on every one when none is named. A kernel that
/// cannot be had is reported, and is an error with `no_skip`.
pub(crate) fn test(rows: Rows, named: &[String], no_skip: bool) -> Result<Counts> {
    setup::building()?;
    setup::programs()?;
    setup::emulator()?;
    let objects = ebpf::build()?;
    say("rung 3: the eBPF programs on other kernels");
    let programs = build::programs()?;
    let directory = target_dir().join("kernels");
    fs::create_dir_all(&directory)?;
    let mut machines = Vec::new();
    let mut counts = Counts::default();
    let is_named = |series: &str| named.is_empty() || named.iter().any(|name| name == series);
    for (series, release) in RELEASES.into_iter().filter(|(series, _)| is_named(series)) {
        match kernel(&directory, series, release) {
            Ok(kernel) => {
                let plan = Plan::new(series, rows, &objects)?;
                let archive = directory.join(format!("{series}.cpio"));
                plan.write(&archive, &kernel, &programs)?;
                machines.push(Machine {
                    series,
                    kernel,
                    archive,
                    log: directory.join(format!("{series}.log")),
                    plan,
                });
            }
            Err(error) if no_skip => return Err(error),
            Err(error) => {
                say(format!("SKIPPED Linux {series}: {error:#}"));
                counts.skipped += 1;
            }
        }
    }
    let at_a_time = match rows {
        // The tests with the whole agent have deadlines, which pass too soon on a processor that emulates
        // more than one machine. They run one after the other, so a machine keeps one busy.
        Rows::All => thread::available_parallelism()?.get(),
        // Side by side: each machine waits much of the time.
        Rows::Essential => machines.len(),
    };
    let outcomes = machines.chunks(at_a_time.max(1)).flat_map(|machines| {
        thread::scope(|scope| {
            let started: Vec<_> = machines.iter().map(|machine| scope.spawn(|| machine.run())).collect();
            started.into_iter().map(|started| started.join()).collect::<Vec<_>>()
        })
    });
    let mut failed = Vec::new();
    for (machine, outcome) in machines.iter().zip(outcomes) {
        match outcome {
            Ok(Ok(passed)) => counts.passed += passed,
            Ok(Err(error)) => failed.push(format!("{}: {error:#}", machine.series)),
            Err(_) => failed.push(format!("{}: panicked", machine.series)),
        }
    }
    ensure!(failed.is_empty(), "the eBPF programs fail on Linux {}", failed.join("; "));
    Ok(counts)
}

/// Reboots a node, to see the boot guard.
pub(crate) fn reboot() -> Result<Counts> {
    setup::static_building(&[Arch::HERE])?;
    setup::emulator()?;
    let objects = ebpf::build()?;
    say("rung 3: a node that reboots");
    let (series, release) = REBOOTS;
    let kernel = kernel(&target_dir().join("kernels"), series, release)?;
    reboot::prove(&kernel, release, &objects)
}

/// A virtual machine, and what it is to do.
struct Machine {
    series: &'static str,
    kernel: PathBuf,
    archive: PathBuf,
    log: PathBuf,
    plan: Plan,
}

impl Machine {
    /// Boots, waits for the machine to turn itself off, reads the results off its console, and returns how
    /// many tests passed.
    fn run(&self) -> Result<usize> {
        let begun = Instant::now();
        let console = machine::run(&self.kernel, &Boot::Memory(&self.archive), &self.log)?;
        let lines = || console.lines().map(str::trim);
        let mut told = format!("{}, in {} s:", self.kernel.display(), begun.elapsed().as_secs());
        for line in lines().filter(|line| {
            ["test ", "row "].iter().any(|word| line.starts_with(word)) || line.contains("skipped")
        }) {
            told.push_str(&format!("\n  {line}"));
        }
        say(told);
        let passed = lines().filter(|line| line.starts_with("k2r-result ") && line.ends_with(" 0")).count();
        let runs = self.plan.runs.len();
        ensure!(passed == runs, "{passed} of {runs} runs passed; see {}", self.log.display());
        Ok(passed_tests(&console))
    }
}

/// How many tests a console shows to have passed, by the summaries of the test harness.
fn passed_tests(console: &str) -> usize {
    let summaries = console.lines().filter_map(|line| line.trim().strip_prefix("test result: ok. "));
    summaries.filter_map(|summary| summary.split_once(" passed")?.0.parse::<usize>().ok()).sum()
}

/// The newest kernel of a series: as downloaded before, or from Debian, into a directory of our own.
fn kernel(directory: &Path, series: &str, release: &str) -> Result<PathBuf> {
    let directory = directory.join(series);
    let image = |directory: &Path| {
        let entries = fs::read_dir(directory.join("boot")).ok()?;
        let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.find(|path| path.to_string_lossy().contains("/vmlinuz-"))
    };
    // With its modules, or it is not what the package brought.
    if let Some(image) =
        image(&directory).filter(|image| modules::directory(image).is_ok_and(|path| path.is_dir()))
    {
        return Ok(image);
    }
    let suite = format!("{release}-security");
    let apt = Apt::open(&directory.join("apt"), "amd64", &[], &[&suite])?;
    let names = apt.names(&format!("linux-image-{series}."))?;
    let package = newest(&names).with_context(|| format!("{suite} has no kernel {series}"))?;
    say(format!("downloading {package}"));
    let archive = apt.download(package)?;
    // Unpacked next to it, and renamed: a half unpacked file is never used as a kernel.
    let unpacked = directory.join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&unpacked))?;
    for name in ["lib", "boot"] {
        if directory.join(name).exists() {
            fs::remove_dir_all(directory.join(name))?;
        }
        fs::rename(unpacked.join(name), directory.join(name))?;
    }
    image(&directory).context("the package holds no kernel")
}

/// The signed cloud kernel of the highest version.
fn newest(names: &str) -> Option<&str> {
    let version = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.lines().filter(|name| name.ends_with("-cloud-amd64")).min_by_key(|name| Reverse(version(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_by_the_harness_summaries() {
        let console = "test a ... ok\r\ntest result: ok. 13 passed; 0 failed; 2 ignored\r\n\
                       test b ...\r\nrow c\r\nok\r\ntest result: ok. 1 passed; 0 failed\r\ntest result: FAILED. 7 passed; 1 failed";

        assert_eq!(passed_tests(console), 14);
    }

    #[test]
    fn the_newest_signed_kernel_is_chosen_by_number() {
        let names = "linux-image-5.10.0-9-cloud-amd64\nlinux-image-5.10.0-46-cloud-amd64\nlinux-image-5.10.0-50-cloud-amd64-unsigned\n\
                     linux-image-5.10.0-51-amd64";

        assert_eq!(newest(names), Some("linux-image-5.10.0-46-cloud-amd64"));
        assert_eq!(newest("linux-image-6.1.0-50-cloud-amd64-dbg"), None);
    }
}
