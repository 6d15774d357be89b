//! The build of the agent around the kernel half. Depends on `ebpf`; called by `main` and `steps`.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    command::{cargo, run, say, target_dir},
    ebpf,
};

/// Builds the kernel half and the agent around it, and tells where the binary is.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    let objects = ebpf::build()?;
    say("building the agent");
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "kube2ram-agent", "--bin", "kube2ram"]);
    if release {
        build.arg("--release");
    }
    run(ebpf::embed(&mut build, &objects))?;
    let binary = target_dir().join(if release { "release" } else { "debug" }).join("kube2ram");
    say(format!("built {}", binary.display()));
    Ok(binary)
}
