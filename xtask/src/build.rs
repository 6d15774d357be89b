//! Where things are, how commands are run, and the build of the agent.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::ebpf;

/// The workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Cargo's target directory.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Says what is being done.
#[expect(clippy::print_stderr, reason = "progress for the person at the terminal")]
pub(crate) fn say(what: impl AsRef<str>) {
    eprintln!("\x1b[1m==>\x1b[0m {}", what.as_ref());
}

/// Runs a command to its end; its failure is ours.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(status.success(), "{} failed ({status})", line(command));
    Ok(())
}

/// The command's trimmed standard output, if it succeeds.
pub(crate) fn capture(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn line(command: &Command) -> String {
    let words: Vec<_> =
        [command.get_program()].into_iter().chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

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
