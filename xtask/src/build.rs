//! The build of the agent around the kernel half. Depends on `ebpf`; called by `main`, `steps` and `kernels`.

use std::{env, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    command::{cargo, run, say, target_dir},
    ebpf,
};

/// The target of static binaries. The same as the compiler's own: named, so that only what is for the node is static, not what runs during the
/// build.
pub(crate) const STATIC_TARGET: &str = match env::consts::ARCH.as_bytes() {
    b"aarch64" => "aarch64-unknown-linux-gnu",
    _ => "x86_64-unknown-linux-gnu",
};

/// Has cargo build what runs on any machine, in an empty image and on a host alike. glibc rather than musl: it needs no other target or C compiler,
/// its allocator is made for threads, and since 2.34 it resolves names by files and DNS without loading anything.
pub(crate) fn make_static(build: &mut Command) -> &mut Command {
    build
        .args(["--target", STATIC_TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
}

/// Builds the kernel half and the agent around it, and tells where the binary is. A release is one static file.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    let objects = ebpf::build()?;
    say("building the agent");
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "kube2ram-agent", "--bin", "kube2ram"]);
    let mut directory = target_dir();
    if release {
        make_static(build.arg("--release"));
        directory.push(STATIC_TARGET);
    }
    run(ebpf::embed(&mut build, &objects))?;
    let binary = directory.join(if release { "release" } else { "debug" }).join("kube2ram");
    say(format!("built {}", binary.display()));
    Ok(binary)
}
