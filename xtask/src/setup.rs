//! `cargo xtask setup`: installs what building and testing need, and reports it. Nothing is installed that is
//! there already.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::{
    command::{capture, cargo, root, run, say},
    ebpf::{Compiler, LINKER_VERSION},
    manifests,
    musl::{self, Arch, CLANG},
    tools::Tool,
};

/// Where Debian's llvm-22 packages put LLVM.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
/// What bpf-linker is built from. A file that tells, and the packages.
const LLVM_PACKAGES: (&str, &[&str]) = (
    "/usr/lib/llvm-22/bin/llvm-config",
    &["llvm-22-dev", "libpolly-22-dev", "libclang-22-dev", "zlib1g-dev", "libzstd-dev", "libxml2-dev"],
);
/// What the sandbox and the tests call: a program that tells, and its package.
const PROGRAMS: [(&str, &str); 9] = [
    ("bpftool", "bpftool"),
    ("crun", "crun"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("python3", "python3-minimal"),
    ("strace", "strace"),
];

/// What else: a file that tells, and its package. The seccomp profile of runtimes.
const FILES: [(&str, &str); 1] = [("/usr/share/containers/seccomp.json", "golang-github-containers-common")];

/// Everything, for `cargo xtask setup`.
pub(crate) fn everything() -> Result<()> {
    static_building(&Arch::ALL)?;
    programs()?;
    nextest()?;
    dependency_checkers()?;
    manifests::tools()?;
    prometheus()?;
    say("everything is there");
    Ok(())
}

/// What a build needs.
pub(crate) fn building() -> Result<()> {
    // jemalloc's.
    missing(&[("make", "make")])?;
    rust_sources()?;
    bpf_linker().map(drop)
}

/// What static programs for the node need besides.
pub(crate) fn static_building(arches: &[Arch]) -> Result<()> {
    building()?;
    if !Path::new(CLANG).exists() {
        install(&["clang-22", "llvm-22"])?;
    }
    for arch in arches.iter().filter(|arch| !arch.is_installed()) {
        say(format!("adding the Rust standard library for {}", arch.target()));
        run(Command::new("rustup").current_dir(root()).args(["target", "add", arch.target()]))?;
    }
    musl::headers().map(drop)
}

/// What reads an image, and runs the programs of another architecture.
pub(crate) fn image(arches: &[Arch]) -> Result<()> {
    let emulator = if Arch::HERE == Arch::Arm64 { "qemu-x86_64-static" } else { "qemu-aarch64-static" };
    let programs = [("skopeo", "skopeo"), (emulator, "qemu-user-static")];
    missing(if arches == [Arch::HERE] { &programs[..1] } else { &programs })
}

/// What the sandbox and the tests need besides.
pub(crate) fn programs() -> Result<()> {
    let files = FILES.iter().filter(|(file, _)| !Path::new(file).exists());
    install(&files.map(|(_, package)| *package).collect::<Vec<_>>())?;
    missing(&PROGRAMS)
}

/// Prometheus and promtool, for the tests of alerts and the dashboard. Unpacked, not installed: the package
/// would start a server on every developer's machine.
pub(crate) fn prometheus() -> Result<()> {
    if in_path("promtool") && in_path("prometheus") {
        return Ok(());
    }
    if !in_path("apt-get") {
        say(
            "no Debian: the tests of alerts and the dashboard are skipped unless prometheus and promtool are installed",
        );
        return Ok(());
    }
    let make = |directory: &Path| {
        say("unpacking Debian's prometheus");
        let mut download = Command::new("apt-get");
        download.args(["download", "-qq", "-o", "APT::Sandbox::User=root", "prometheus"]);
        download.current_dir(directory);
        if run(&mut download).is_err() {
            run(privileged("apt-get").args(["update", "-qq"]))?;
            run(&mut download)?;
        }
        let files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let package = files.iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
        let Some(package) = package else { bail!("apt-get download prometheus brought no package") };
        run(Command::new("dpkg-deb").arg("-x").arg(package).arg(directory))?;
        Ok(fs::remove_file(package)?)
    };
    Tool { name: "prometheus", version: "of-debian" }.directory(make).map(drop)
}

/// What a bench compares with, and what it loads servers with.
pub(crate) fn bench() -> Result<()> {
    missing(&[("wrk", "wrk")])
}

fn rust_sources() -> Result<()> {
    if Compiler::find().is_ok() {
        return Ok(());
    }
    say("adding the sources of the Rust core library: rustup component add rust-src");
    if run(Command::new("rustup").current_dir(root()).args(["component", "add", "rust-src"])).is_err() {
        // Debian ships the same pair; it is found in /usr/bin.
        install(&["rustc-web", "cargo-web", "rust-web-src"])?;
    }
    Compiler::find().map(drop)
}

/// What links eBPF objects.
pub(crate) fn bpf_linker() -> Result<PathBuf> {
    let name = "bpf-linker";
    crate_program(name, LINKER_VERSION, name, |build| {
        if !Path::new(LLVM_PACKAGES.0).exists() {
            install(LLVM_PACKAGES.1)?;
        }
        build.args(["--no-default-features", "--features", "llvm-22"]);
        // Without it the build picks the compiler's own LLVM directory, and fails to link.
        build.env("LLVM_PREFIX", LLVM_PREFIX);
        Ok(())
    })
}

/// What runs the tests.
pub(crate) fn nextest() -> Result<PathBuf> {
    unoptimised_crate_program(
        "cargo-nextest",
        "0.9.151",
        &["--no-default-features", "--features", "default-no-update"],
    )
}

/// What checks the dependencies: licences, bans and sources; and that all of them are used.
pub(crate) fn dependency_checkers() -> Result<[PathBuf; 2]> {
    Ok([
        unoptimised_crate_program("cargo-deny", "0.20.2", &[])?,
        unoptimised_crate_program("cargo-machete", "0.9.2", &[])?,
    ])
}

/// A program that is built sooner than it is fast: where the build takes minutes, and its own work seconds.
fn unoptimised_crate_program(name: &str, version: &str, arguments: &[&str]) -> Result<PathBuf> {
    crate_program(name, version, name, |build| {
        build.args(["--profile", "dev", "--config", "profile.dev.debug=false"]).args(arguments);
        Ok(())
    })
}

/// A program from crates.io, built when this machine does not have it yet.
pub(crate) fn crate_program(
    name: &str,
    version: &str,
    program: &str,
    prepare: impl FnOnce(&mut Command) -> Result<()>,
) -> Result<PathBuf> {
    Tool { name, version }.program(program, |directory| {
        let mut build = cargo();
        build.args(["install", name, "--version", version, "--locked", "--root"]).arg(directory);
        prepare(&mut build)?;
        say(format!("building {name} {version} (once on this machine)"));
        run(&mut build)
    })
}

/// Installs the packages of those programs that are not there.
fn missing(programs: &[(&str, &str)]) -> Result<()> {
    let missing = programs.iter().filter(|(program, _)| !in_path(program)).map(|(_, package)| *package);
    install(&missing.collect::<Vec<_>>())
}

/// Installs Debian packages, as root or through sudo.
fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !in_path("apt-get") {
        bail!("this is no Debian; install what gives you: {list}");
    }
    say(format!("installing Debian packages: {list}"));
    run(privileged("apt-get").args(["update", "-qq"]))?;
    run(privileged("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(packages)
        .stdin(Stdio::null()))
}

/// What runs other kernels.
pub(crate) fn emulator() -> Result<()> {
    if in_path("qemu-system-x86_64") { Ok(()) } else { install(&["qemu-system-x86"]) }
}

/// Mounts the bpf file system where systemd would have; tests pin there.
pub(crate) fn bpf_file_system() -> Result<()> {
    const PLACE: &str = "/sys/fs/bpf";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq([PLACE, "bpf"])) {
        return Ok(());
    }
    say(format!("mounting the bpf file system at {PLACE}"));
    run(privileged("mount").args(["-t", "bpf", "bpf", PLACE]))
}

/// A command that runs as root: as it is, or through sudo.
pub(crate) fn privileged(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        return command;
    }
    let mut command = Command::new("sudo");
    command.args(["--preserve-env=CI,RUST_BACKTRACE", "DEBIAN_FRONTEND=noninteractive"]).arg(program);
    command
}

/// Returns whether we are root.
pub(crate) fn is_root() -> bool {
    capture(Command::new("id").arg("-u")).is_some_and(|id| id == "0")
}

/// Returns whether PATH, or the directories of administration programs, hold `program`.
pub(crate) fn in_path(program: &str) -> bool {
    find(program).is_some()
}

/// Where PATH, or the directories of administration programs, hold `program`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}
