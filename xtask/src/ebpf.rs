//! The build of the eBPF programs: the pinned stable compiler with its core sources, and bpf-linker.
//!
//! Not `aya-build`: it wants a nightly compiler, builds once more for every profile and lint, and leaves the
//! machine's paths in the object.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{capture, cargo, cargo_home, root, run, say, target_dir},
    musl, setup,
};

const PACKAGE: &str = "kube2ram-ebpf";
const TARGET: &str = "bpfel-unknown-none";
/// The object's name, and the features it is built with. The second one replaces the first when the agent
/// runs with `--debug`.
const OBJECTS: [(&str, &[&str]); 3] = [
    ("kube2ram.bpf.o", &[]),
    ("kube2ram-debug.bpf.o", &["debug-log"]),
    ("kube2ram-boot-guard.bpf.o", &["boot-guard"]),
];

/// Of the linker: 0.13.0 is built against LLVM 22, as the pinned compiler is. An older LLVM cannot read newer
/// bitcode.
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// Builds the objects and returns the directory that holds them.
pub(crate) fn build() -> Result<PathBuf> {
    let (compiler, linker) = (Compiler::find()?, setup::bpf_linker()?);
    say(format!(
        "building the eBPF programs (rustc {}, LLVM {}, bpf-linker {LINKER_VERSION})",
        compiler.release, compiler.llvm
    ));
    let directory = target_dir().join("ebpf");
    for (name, features) in OBJECTS {
        // One target directory each: cargo would otherwise rebuild at every switch of features.
        let built_in = directory.join(name.trim_end_matches(".bpf.o"));
        run(&mut compiler.command(&linker, &built_in, features))?;
        let object = stripped(&built_in.join(TARGET).join("bpf").join(PACKAGE))?;
        let destination = directory.join(name);
        // Only when it changed: the agent is built again for a newer file.
        if fs::read(&destination).ok().as_deref() != Some(&object) {
            fs::write(&destination, &object)
                .with_context(|| format!("cannot write {}", destination.display()))?;
        }
        if let Some(digest) = capture(Command::new("sha256sum").arg("--").arg(&destination)) {
            say(format!("sha256 {digest}"));
        }
    }
    Ok(directory)
}

/// A built object without DWARF, from which the linker has made BTF: four fifths of its bytes, and in memory
/// wherever the agent runs. The kernel, aya and bpftool read BTF.
fn stripped(built: &Path) -> Result<Vec<u8>> {
    let stripped = built.with_extension("stripped");
    run(musl::objcopy_command()?.arg("--strip-debug").arg(built).arg(&stripped))?;
    fs::read(&stripped).with_context(|| format!("cannot read {}", stripped.display()))
}

/// The files that `build` leaves in its directory.
pub(crate) fn objects() -> impl Iterator<Item = &'static str> {
    OBJECTS.into_iter().map(|(name, _)| name)
}

/// Passes the objects' paths to the agent's build script, which then fails without them.
pub(crate) fn embed<'a>(command: &'a mut Command, objects: &Path) -> &'a mut Command {
    command.env("KUBE2RAM_EBPF_DIR", objects).env("KUBE2RAM_REQUIRE_EBPF", "1")
}

/// A compiler with the sources of `core`.
pub(crate) struct Compiler {
    cargo: OsString,
    rustc: PathBuf,
    sysroot: PathBuf,
    release: String,
    llvm: String,
}

impl Compiler {
    /// The toolchain that runs us, or else the distribution's.
    pub(crate) fn find() -> Result<Self> {
        let ours = (
            cargo().get_program().to_owned(),
            env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from),
        );
        let mut reasons = Vec::new();
        for (cargo, rustc) in [ours, ("/usr/bin/cargo".into(), "/usr/bin/rustc".into())] {
            match Self::probe(cargo, rustc) {
                Ok(compiler) => return Ok(compiler),
                Err(reason) => reasons.push(format!("  {reason:#}")),
            }
        }
        bail!(
            "no Rust compiler with the sources of its core library:\n{}\nrun `cargo xtask setup` (rustup), or install Debian's rustc-web, \
             cargo-web and rust-web-src",
            reasons.join("\n")
        );
    }

    fn probe(cargo: OsString, rustc: PathBuf) -> Result<Self> {
        let ask = |args: &[&str]| capture(Command::new(&rustc).current_dir(root()).args(args));
        let sysroot = ask(&["--print", "sysroot"])
            .map(PathBuf::from)
            .with_context(|| format!("cannot run {}", rustc.display()))?;
        let version = ask(&["-vV"]).unwrap_or_default();
        let field = |key| version.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").to_owned();
        let sources = sysroot.join("lib/rustlib/src/rust/library/Cargo.lock");
        if !sources.exists() {
            bail!("{} {}: no {}", rustc.display(), field("release: "), sources.display());
        }
        Ok(Self { cargo, sysroot, release: field("release: "), llvm: field("LLVM version: "), rustc })
    }

    fn command(&self, linker: &Path, target_dir: &Path, features: &[&str]) -> Command {
        let mut build = Command::new(&self.cargo);
        build
            .current_dir(root())
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                PACKAGE,
                "--profile",
                "bpf",
                "--target",
                TARGET,
            ])
            .args(["-Z", "build-std=core", "--features", &features.join(","), "--target-dir"])
            .arg(target_dir)
            .env("RUSTC", &self.rustc)
            // Unstable options of the stable compiler, for this child only.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags().join(&OsString::from("\x1f")));
        for inherited in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            build.env_remove(inherited);
        }
        if self.rustc.starts_with("/usr/bin") {
            build.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTDOC");
        }
        build
    }

    /// No path of this machine gets into the object: the same sources give the same bytes anywhere. What
    /// paths are called instead leads nowhere on any machine, for LLVM adds each source line that it finds to
    /// the object (BTF's line information).
    fn flags(&self) -> Vec<OsString> {
        let cargo_home = cargo_home();
        let mut flags: Vec<OsString> = vec![
            // Whatever runs it: the architectures differ in `pt_regs` alone, of which cgroup programs know
            // nothing.
            "--cfg=bpf_target_arch=\"x86_64\"".into(),
            "-Clink-arg=--btf".into(),
        ];
        for (from, to) in [(root(), "kube2ram"), (&cargo_home, "cargo"), (&self.sysroot, "rust")] {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(from);
            flag.push("=");
            flag.push(to);
            flags.push(flag);
        }
        flags
    }
}
