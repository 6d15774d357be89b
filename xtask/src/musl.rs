//! Static programs for the node: which targets, and how cargo builds them so that the same sources give the
//! same bytes in any directory of any machine. Compiler, linker and C library are the pinned toolchain's own;
//! only the C of ring and jemalloc is compiled by clang. Called by `build`, `image` and `kernels`.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    apt::Apt,
    command::{capture, cargo_home, root, run, say, target_dir},
    tools::Tool,
};

/// An architecture that kube2ram is released for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    pub(crate) const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// The one of this machine.
    pub(crate) const HERE: Self = match env::consts::ARCH.as_bytes() {
        b"aarch64" => Self::Arm64,
        _ => Self::Amd64,
    };

    /// As container images, Kubernetes and Go call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As the Rust compiler calls it, with the C library.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-musl",
            Self::Arm64 => "aarch64-unknown-linux-musl",
        }
    }

    /// As GNU calls it, with the C library.
    fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-musl",
            Self::Arm64 => "aarch64-linux-musl",
        }
    }

    /// The binary logarithm of the largest page that a kernel may have. jemalloc ends a process whose pages
    /// are larger.
    fn log_of_page(self) -> &'static str {
        match self {
            Self::Amd64 => "12",
            Self::Arm64 => "16",
        }
    }

    /// Whether the toolchain has its standard library, which brings its C library too.
    pub(crate) fn is_installed(self) -> bool {
        let mut ask = rustc();
        ask.args(["--print", "target-libdir", "--target", self.target()]);
        capture(&mut ask)
            .is_some_and(|directory| Path::new(&directory).join("self-contained/libc.a").is_file())
    }
}

pub(crate) const CLANG: &str = "/usr/lib/llvm-22/bin/clang";

/// A program of LLVM's, as Debian has it in the compiler's own major version.
pub(crate) fn llvm(program: &str) -> PathBuf {
    Path::new(CLANG).with_file_name(program)
}

/// The headers of musl, of all architectures. Its library is the toolchain's own.
pub(crate) fn headers() -> Result<PathBuf> {
    const VERSION: &str = "1.2.3-1";
    let make = |directory: &Path| {
        for arch in Arch::ALL {
            say(format!("unpacking Debian's headers of musl for {}", arch.name()));
            let apt = directory.join("apt");
            let package =
                Apt::open(&apt, arch.name(), &["bookworm"], &[])?.download(&format!("musl-dev={VERSION}"))?;
            run(Command::new("dpkg-deb").arg("-x").arg(package).arg(directory))?;
            fs::remove_dir_all(apt)?;
        }
        Ok(())
    };
    Ok(Tool { name: "musl-headers", version: VERSION }.directory(make)?.join("usr/include"))
}

/// Has cargo build for that architecture.
pub(crate) fn make_static(build: &mut Command, arch: Arch) -> Result<&mut Command> {
    for (name, _) in env::vars_os().filter(|(name, _)| changes_a_build(&name.to_string_lossy())) {
        build.env_remove(name);
    }
    let of_target = |variable: &str| format!("{variable}_{}", arch.target().replace('-', "_"));
    let headers = headers()?;
    for path in names_of_paths().into_iter().map(|(path, _)| path).chain([headers.clone(), toolchain()?.0]) {
        let has_blank = path.to_string_lossy().contains(char::is_whitespace);
        ensure!(
            !has_blank,
            "jemalloc cannot be built where a directory's name has a blank: {}",
            path.display()
        );
    }
    Ok(build
        .args(["--target", arch.target()])
        .env("CARGO_ENCODED_RUSTFLAGS", rust_flags()?.join(&OsString::from("\x1f")))
        .env("CARGO_INCREMENTAL", "0")
        .env(of_target("CC"), CLANG)
        .env(of_target("CFLAGS"), c_flags(arch, &headers))
        .env(of_target("AR"), llvm("llvm-ar"))
        // What jemalloc's `configure` would otherwise find on the machine, or find out about it.
        .env("AR", llvm("llvm-ar"))
        .env("NM", llvm("llvm-nm"))
        .env("RANLIB", llvm("llvm-ranlib"))
        .env(format!("{}_LDFLAGS", arch.target().replace('-', "_").to_uppercase()), link_flags(arch)?)
        .env("JEMALLOC_SYS_WITH_LG_PAGE", arch.log_of_page())
        .env("JEMALLOC_SYS_WITH_LG_HUGEPAGE", "21")
        .env("JEMALLOC_SYS_WITH_LG_VADDR", "48"))
}

/// Moves what only a debugger reads out of a program, into its own file. The two find each other by the build
/// id, or when they are in one directory.
pub(crate) fn split(built: &Path, program: &Path, debug: &Path) -> Result<()> {
    let objcopy = |args: &[&str], from: &Path, to: &Path| {
        run(objcopy_command()?.current_dir(debug.parent().unwrap_or(root())).args(args).arg(from).arg(to))
    };
    objcopy(&["--only-keep-debug", "--compress-debug-sections=zlib"], built, debug)?;
    let link = format!("--add-gnu-debuglink={}", debug.file_name().context("a file has a name")?.display());
    objcopy(&["--strip-all", &link], built, program)
}

/// Variables by which a machine's owner changes what compilers do.
fn changes_a_build(variable: &str) -> bool {
    const PREFIXES: [&str; 10] = [
        "AARCH64_UNKNOWN_",
        "CARGO_BUILD_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_AARCH64_",
        "CARGO_TARGET_X86_64_",
        "JEMALLOC_",
        "MAKE",
        "RING_",
        "RUSTC_W",
        "X86_64_UNKNOWN_",
    ];
    const NAMES: [&str; 11] = [
        "CONFIG_SITE",
        "CPPFLAGS",
        "EXTRA_CFLAGS",
        "LDFLAGS",
        "LIBS",
        "RUSTFLAGS",
        "RUSTC_BOOTSTRAP",
        "CFLAGS",
        "TARGET_CFLAGS",
        "CRATE_CC_NO_DEFAULTS",
        "KUBE2RAM_REVISION",
    ];
    // How much at once, which changes nothing.
    variable != "CARGO_BUILD_JOBS"
        && (NAMES.contains(&variable) || PREFIXES.iter().any(|prefix| variable.starts_with(prefix)))
}

/// What paths of this machine are called in the program: a later one goes before an earlier one.
fn names_of_paths() -> [(PathBuf, &'static str); 3] {
    [(root().to_owned(), "/src"), (target_dir(), "/target"), (cargo_home(), "/cargo")]
}

fn rust_flags() -> Result<Vec<OsString>> {
    let mut flags: Vec<OsString> = [
        "-Ctarget-feature=+crt-static",
        // The compiler's own, where a cc would bring the machine's linker and libraries.
        "-Clinker=rust-lld",
        "-Clink-self-contained=yes",
        "-Clink-arg=--build-id=sha1",
        // Half a megabyte of relocations in a few kilobytes. musl's start-up code knows them since 1.2.4.
        "-Clink-arg=--pack-dyn-relocs=relr",
    ]
    .map(Into::into)
    .into();
    let (sysroot, commit) = toolchain()?;
    // Where they are installed, the compiler writes the path of the standard library's sources.
    let sources = (sysroot.join("lib/rustlib/src/rust"), format!("/rustc/{commit}"));
    let paths = names_of_paths().map(|(path, name)| (path, name.to_owned()));
    for (path, name) in paths.into_iter().chain([sources]) {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(path);
        flag.push("=");
        flag.push(name);
        flags.push(flag);
    }
    Ok(flags)
}

/// With musl's headers, and never the machine's.
fn c_flags(arch: Arch, headers: &Path) -> OsString {
    let mut flags = OsString::from("-nostdlibinc -isystem ");
    flags.push(headers.join(arch.triple()));
    for (path, name) in names_of_paths().into_iter().chain([(headers.to_owned(), "/musl")]) {
        flags.push(" -ffile-prefix-map=");
        flags.push(path);
        flags.push("=");
        flags.push(name);
    }
    flags
}

/// How `configure` links the programs by which it finds out what musl has: as the compiler links, with the
/// toolchain's own linker and libraries. No such program panics. The system root, which is none, keeps clang
/// from the machine's libraries.
fn link_flags(arch: Arch) -> Result<OsString> {
    let (sysroot, _) = toolchain()?;
    let linker = sysroot.join("lib/rustlib").join(host()?).join("bin/gcc-ld/ld.lld");
    let libraries = sysroot.join("lib/rustlib").join(arch.target()).join("lib");
    let builtins = fs::read_dir(&libraries)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libcompiler_builtins-") && name.ends_with(".rlib")
        })
        .context("the toolchain has no compiler_builtins")?;
    let mut flags = OsString::from(
        "-static -nostdlib --sysroot=/nonexistent -Wl,--defsym=rust_eh_personality=0 --ld-path=",
    );
    flags.push(linker);
    let own =
        ["crt1.o", "crti.o", "crtn.o", "libc.a"].map(|name| libraries.join("self-contained").join(name));
    for path in own.into_iter().chain([builtins]) {
        flags.push(" ");
        flags.push(path);
    }
    Ok(flags)
}

/// Where the toolchain is, and the commit that it was built from.
fn toolchain() -> Result<(PathBuf, String)> {
    let sysroot = capture(rustc().args(["--print", "sysroot"])).context("cannot run rustc")?;
    let version = capture(rustc().arg("-vV")).unwrap_or_default();
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
    Ok((sysroot.into(), commit.context("rustc does not tell its commit")?.to_owned()))
}

/// The toolchain's own objcopy, LLVM's; beside a distribution's toolchain, which has none, that of the LLVM
/// that bpf-linker is built with.
pub(crate) fn objcopy_command() -> Result<Command> {
    let (sysroot, _) = toolchain()?;
    let own = sysroot.join("lib/rustlib").join(host()?).join("bin/rust-objcopy");
    let program = if own.is_file() { own } else { llvm("llvm-objcopy") };
    ensure!(program.is_file(), "there is no {}: use rustup's toolchain", program.display());
    let mut command = Command::new(program);
    // The toolchain's is made to be started by the compiler, which finds its libraries.
    command.env("LD_LIBRARY_PATH", sysroot.join("lib"));
    Ok(command)
}

/// The target of this machine's own programs.
fn host() -> Result<String> {
    let version = capture(rustc().arg("-vV")).unwrap_or_default();
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not tell its host")?.to_owned())
}

fn rustc() -> Command {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(root());
    rustc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_takes_nothing_from_the_environment_but_how_much_at_once() {
        for variable in [
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "CFLAGS",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO_BUILD_RUSTFLAGS",
            "JEMALLOC_SYS_WITH_MALLOC_CONF",
            "KUBE2RAM_REVISION",
            "LDFLAGS",
            "MAKEFLAGS",
            "X86_64_UNKNOWN_LINUX_MUSL_LDFLAGS",
        ] {
            assert!(changes_a_build(variable), "{variable}");
        }
        for variable in ["CARGO_BUILD_JOBS", "CARGO_HOME", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN", "PATH"] {
            assert!(!changes_a_build(variable), "{variable}");
        }
    }

    #[test]
    fn paths_of_this_machine_are_renamed_for_both_compilers() {
        let rust = rust_flags().unwrap();
        let c = c_flags(Arch::HERE, Path::new("/headers"));

        for (path, name) in names_of_paths() {
            let pair = format!("{}={name}", path.display());
            assert!(rust.iter().any(|flag| flag.to_string_lossy().ends_with(&pair)), "{pair}");
            assert!(c.to_string_lossy().contains(&pair), "{pair}");
        }
        assert!(c.to_string_lossy().contains("-ffile-prefix-map=/headers=/musl"), "{}", c.display());
    }
}
