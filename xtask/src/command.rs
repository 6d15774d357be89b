//! Where things are, and how commands are run and announced. Called by all other modules.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result, ensure};

/// The workspace: the one that cargo runs us for, so that a copy of the sources can be built without another
/// xtask.
pub(crate) fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let xtask =
            env::var_os("CARGO_MANIFEST_DIR").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        xtask.parent().unwrap_or(Path::new(".")).to_owned()
    })
}

/// Cargo's target directory.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where cargo keeps the sources of crates.
pub(crate) fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME")
        .map_or_else(|| PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"), PathBuf::from)
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    cargo_like(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A program that runs cargo, in our root. What the cargo that runs us says of our own package is kept from
/// it: build scripts that read such variables would run again, and so much be built again, whenever
/// somebody's own cargo ran in between.
pub(crate) fn cargo_like(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let is_ours = |prefix: &str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
        if is_ours("CARGO_PKG_") || is_ours("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Prints what is being done.
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
