//! The initial RAM file system of a test machine: this machine's programs, the libraries they need, Python's own, the tests, and what starts them.
//! Written in the "newc" format of Linux (Documentation/driver-api/early-userspace/buffer-format.rst). Called by `kernels`.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::command::capture;

/// How many results [`INIT`] prints.
pub(super) const RUNS: usize = 5;

/// The first process. The first runs have the capabilities of an agent without CAP_SYS_ADMIN and CAP_PERFMON, for which the verifier is stricter (and
/// CAP_DAC_OVERRIDE, because the tests make cgroups below the root; CAP_NET_RAW, because one tries a raw socket).
const INIT: &str = r#"#!/bin/sh
export PATH=/bin PYTHONDONTWRITEBYTECODE=1 RUST_BACKTRACE=0
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ip route add default dev lo
echo; uname -r
run() {
  name=$1; shift
  "$@" --ignored --nocapture --test-threads=1 2>&1
  status=$?
  echo; echo "k2r-result $name $status"
}
unprivileged() {
  run "unprivileged-$1" setpriv --bounding-set -all,+bpf,+dac_override,+net_admin,+net_raw --inh-caps -all "/tests/$1" "$2"
}
(
  ulimit -l unlimited
  unprivileged datapath_kernel tells_the_cgroup_that_connected
  unprivileged boot_guard_kernel denies_all_but_the_hosts_own
)
run boot_guard /tests/boot_guard_kernel
run datapath /tests/datapath_kernel
run attacks /tests/identity_attacks
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// Writes the archive.
pub(super) fn write(archive: &Path, programs: &[&str], tests: &[PathBuf]) -> Result<()> {
    let mut files = BTreeSet::new();
    let mut cpio = Cpio::create(archive)?;
    for directory in ["dev", "proc", "run", "sys", "tmp"] {
        cpio.directory(Path::new(directory))?;
    }
    cpio.file(Path::new("init"), INIT.as_bytes())?;
    for test in tests {
        let name = test.file_name().unwrap_or_default().to_string_lossy();
        let (name, _hash) = name.rsplit_once('-').context("cargo names a test and a hash")?;
        cpio.file(&Path::new("tests").join(name), &fs::read(test)?)?;
        files.extend(libraries(test));
    }
    for program in programs {
        let path = find(program).with_context(|| format!("{program} is not installed"))?;
        cpio.file(&Path::new("bin").join(program), &fs::read(&path)?)?;
        files.extend(libraries(&path));
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

/// An archive being written.
struct Cpio {
    directories: BTreeSet<PathBuf>,
    entries: u32,
    out: io::BufWriter<fs::File>,
}

impl Cpio {
    fn create(path: &Path) -> Result<Self> {
        let file = fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { directories: BTreeSet::new(), entries: 0, out: io::BufWriter::new(file) })
    }

    /// A directory, after those above it.
    fn directory(&mut self, path: &Path) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() || !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, 0o040_755, &[])
    }

    /// An executable file, in directories that are made for it.
    fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, 0o100_755, content)
    }

    fn finish(mut self) -> Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        Ok(self.out.flush()?)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let name = path.as_os_str().as_encoded_bytes();
        let (name_size, size) = (u32::try_from(name.len() + 1)?, u32::try_from(content.len())?);
        // inode, mode, uid, gid, links, mtime, size, device ×2, special device ×2, length of the name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let header: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        self.out.write_all(format!("070701{header}").as_bytes())?;
        self.out.write_all(name)?;
        // Name and content each end at a multiple of four, the name with at least one zero.
        self.out.write_all(&[0; 4][..4 - (110 + name.len()) % 4])?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; 4][..content.len().next_multiple_of(4) - content.len()])?;
        Ok(())
    }
}
