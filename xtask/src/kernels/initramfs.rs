//! The initial RAM file system of a test machine: this machine's programs, the libraries they need, Python's
//! own, the tests, and what starts them. Called by `kernels`.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{cpio::Cpio, modules, plan::Run};
use crate::command::capture;

/// How the first process begins.
const BEGIN: &str = r#"#!/bin/sh
export PATH=/bin RUST_BACKTRACE=0
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ip route add default dev lo
echo; uname -r
run() {
  name=$1; shift
  "$@" 2>&1
  status=$?
  echo; echo "k2r-result $name $status"
}
"#;
/// How it ends: the machine turns itself off.
const END: &str = "echo o > /proc/sysrq-trigger\nsleep 60\n";

/// Loads the modules in the order of their names, without the kmod that this machine may not have
/// (init_module(2)).
const LOAD: &str = r#"
import ctypes, glob, os
FINIT_MODULE = 313
libc = ctypes.CDLL(None, use_errno=True)
for path in sorted(glob.glob("/modules/*.ko")):
    with open(path, "rb") as file:
        if libc.syscall(FINIT_MODULE, file.fileno(), b"", 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
"#;

/// What is in a machine besides the programs.
pub(super) struct Contents<'a> {
    /// What the kernel may lack, as the tests read it from the environment.
    pub(super) may_lack: &'a str,
    /// What it does, in this order.
    pub(super) runs: &'a [Run],
    /// From this machine's PATH.
    pub(super) programs: &'a [&'a str],
    /// They come to be in /tests, under the names of their sources.
    pub(super) tests: &'a [PathBuf],
    /// Modules of the kernel's, and the tests of what they bring.
    pub(super) modules: Option<Modules<'a>>,
}

/// What the tests of the bypasses need.
pub(super) struct Modules<'a> {
    /// The kernel whose modules they are.
    pub(super) kernel: &'a Path,
    /// Their names. Those that they need are found.
    pub(super) names: &'a [&'a str],
    /// Files that stay where they are, because the tests know them by path.
    pub(super) files: &'a [PathBuf],
}

/// Writes the archive.
pub(super) fn write(archive: &Path, contents: &Contents<'_>) -> Result<()> {
    let mut files = BTreeSet::new();
    let mut cpio = Cpio::create(archive)?;
    for directory in ["dev", "proc", "run", "sys", "tmp"] {
        cpio.directory(Path::new(directory))?;
    }
    let runs: String =
        contents.runs.iter().map(|Run { name, command }| format!("run {name} {command}\n")).collect();
    let may_lack = format!("export KUBE2RAM_TEST_MAY_LACK={}\n", contents.may_lack);
    cpio.file(Path::new("init"), [BEGIN, &may_lack, &runs, END].concat().as_bytes())?;
    for test in contents.tests {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        // Cargo adds a hash to the names of tests.
        let name =
            name.rsplit_once('-').filter(|(_, hash)| hash.len() == 16).map_or(&*name, |(name, _)| name);
        cpio.file(&Path::new("tests").join(name), &fs::read(test)?)?;
        files.extend(libraries(test));
    }
    for program in contents.programs {
        let path = find(program).with_context(|| format!("{program} is not installed"))?;
        cpio.file(&Path::new("bin").join(program), &fs::read(&path)?)?;
        files.extend(libraries(&path));
    }
    if let Some(modules) = &contents.modules {
        cpio.file(Path::new("modules/load.py"), LOAD.as_bytes())?;
        for (index, (name, content)) in modules::read(modules.kernel, modules.names)?.iter().enumerate() {
            cpio.file(Path::new(&format!("modules/{index:02}-{name}.ko")), content)?;
        }
        for path in modules.files {
            files.extend(libraries(path));
            files.insert(path.clone());
        }
    }
    python(&mut files)?;
    for path in &files {
        cpio.file(path, &fs::read(path).with_context(|| format!("cannot read {}", path.display()))?)?;
    }
    cpio.finish()
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    // Debian's own first: what comes before it in PATH may be a wrapper.
    let mut candidates = [PathBuf::from("/usr/bin"), "/bin".into()].into_iter().chain(directories);
    candidates.find_map(|directory| Some(directory.join(program)).filter(|path| path.is_file()))
}

/// What the dynamic linker loads for a program, and itself, where they are expected.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let list = capture(Command::new("ldd").arg(program)).unwrap_or_default();
    list.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Python's standard library, and what its compiled modules need.
fn python(files: &mut BTreeSet<PathBuf>) -> Result<()> {
    const SCRIPT: &str = "import sysconfig as s; print(s.get_path('stdlib'))";
    let python = find("python3").context("python3 is not installed")?;
    let library = capture(Command::new(python).args(["-c", SCRIPT])).context("python3 fails")?;
    let mut directories = vec![PathBuf::from(library)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                let is_bulky =
                    ["test", "__pycache__", "site-packages", "dist-packages"].contains(&name.as_ref());
                if !is_bulky && !name.starts_with("config-") {
                    directories.push(path);
                }
            } else if name.ends_with(".py") {
                files.insert(path);
            } else if name.ends_with(".so") {
                files.extend(libraries(&path));
                files.insert(path);
            }
        }
    }
    Ok(())
}
