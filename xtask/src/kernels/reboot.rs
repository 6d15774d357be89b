//! The boot guard on a node that really reboots: systemd, a kubelet's stand-in, pods that start before any
//! agent, the guard installed in the first boot, and in the second one the agent that takes over from it.
//! Called by `kernels`.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::{
    disk,
    machine::{self, Boot},
};
use crate::{
    command::{cargo, run, say, target_dir},
    counts::Counts,
    ebpf,
    musl::{self, Arch},
};

/// The boots, each of which must report that all was as expected.
const RESULTS: [&str; 2] = ["k2r-result unguarded 0", "k2r-result guarded 0"];

/// Runs the proof on one kernel, with the userland of a Debian release.
pub(super) fn prove(kernel: &Path, release: &str, objects: &Path) -> Result<Counts> {
    let directory = target_dir().join("kernels/node");
    let image = disk::write(&directory, release, kernel, &programs(objects)?)?;
    say(format!("booting a node with {}, twice", kernel.file_name().unwrap_or_default().display()));
    let log = directory.join("console.log");
    let console = machine::run(kernel, &Boot::Disk(&image), &log)?;
    for line in console.lines().map(str::trim).filter(|line| line.starts_with("k2r-")) {
        say(line);
    }
    for result in RESULTS {
        let said = console.lines().any(|line| line.trim() == result);
        ensure!(said, "the console does not show {result:?}; see {}", log.display());
    }
    Ok(Counts::passed(RESULTS.len()))
}

/// The agent, the kubelet's stand-in and the client of its pods, none of which needs a library of the node's.
fn programs(objects: &Path) -> Result<Vec<PathBuf>> {
    say("building static programs for the node");
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "kube2ram-agent", "--bin", "kube2ram"]);
    build.args(["--package", "kube2ram-sandbox", "--bin", "kube2ram-sandbox", "--example", "kubelet"]);
    run(ebpf::embed(musl::make_static(&mut build, Arch::HERE)?, objects))?;
    let built = target_dir().join(Arch::HERE.target()).join("debug");
    Ok(["kube2ram", "kube2ram-sandbox", "examples/kubelet"].map(|name| built.join(name)).into())
}
