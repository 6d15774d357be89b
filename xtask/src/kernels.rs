//! Rung 3, `cargo xtask test --kernels`: the tests of the kernel half in virtual machines with the kernels that we promise to run on.
//!
//! A machine is QEMU without hardware help, a kernel of Debian's, and an initial RAM file system made of this machine's own programs. Called by `steps`.

mod apt;
mod cpio;
mod disk;
mod initramfs;
mod machine;
mod modules;
mod reboot;

use std::{
    cmp::Reverse,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use self::{
    apt::Apt,
    initramfs::{Contents, Modules},
    machine::Boot,
};
use crate::{
    command::{capture, cargo, root, run, say, target_dir},
    ebpf,
    musl::Arch,
    setup, steps,
};

/// The series, and the Debian release whose security suite holds its newest kernel.
const SERIES: [(&str, &str); 3] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "bookworm")];
/// The tests that need nothing but the kernel, cgroups and a loopback device.
const TESTS: [&str; 3] = ["boot_guard_kernel", "datapath_kernel", "identity_attacks"];
/// What they call, and what starts them.
const PROGRAMS: [&str; 11] =
    ["bpftool", "cat", "ip", "mkdir", "mount", "python3", "setpriv", "sh", "sleep", "uname", "unshare"];
/// The series whose machines load modules as well, for what this machine's own kernel may not have.
const MODULES_ON: [&str; 1] = ["6.1"];
/// Protocols, kube-proxy's IPVS, and what the sandbox makes a node of.
const MODULES: [&str; 9] =
    ["dccp_ipv4", "dummy", "ip_vs_rr", "nft_chain_nat", "nft_ct", "nft_masq", "sctp", "smc", "veth"];
/// The test of what they bring, and what the sandbox and its pods call.
const MODULES_TEST: &str = "bypass";
const MODULES_PROGRAMS: [&str; 3] = ["nft", "nsenter", "umount"];
/// The agent wants some certificate.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The series and the release of the node that reboots.
const REBOOTS: (&str, &str) = ("6.1", "bookworm");

/// Runs the tests on every kernel. What does not run here is said, and is an error with `no_skip`.
pub(crate) fn test(no_skip: bool) -> Result<()> {
    setup::building()?;
    setup::programs()?;
    setup::emulator()?;
    let objects = ebpf::build()?;
    say("rung 3: the kernel half on other kernels");
    let built = Built::build(&objects)?;
    let directory = target_dir().join("kernels");
    fs::create_dir_all(&directory)?;
    let mut failed = Vec::new();
    for (series, release) in SERIES {
        match kernel(&directory, series, release) {
            Ok(kernel) => {
                say(format!("booting {}", kernel.file_name().unwrap_or_default().display()));
                let log = directory.join(format!("{series}.log"));
                let archive = directory.join("initramfs.cpio");
                let runs = built.write(&archive, MODULES_ON.contains(&series).then_some(&*kernel))?;
                if let Err(error) = boot(&kernel, &archive, &log, runs) {
                    say(format!("Linux {series}: {error:#}"));
                    failed.push(series);
                }
            }
            Err(error) if no_skip => return Err(error),
            Err(error) => say(format!("SKIPPED Linux {series}: {error:#}")),
        }
    }
    ensure!(failed.is_empty(), "the kernel half fails on Linux {}", failed.join(", "));
    Ok(())
}

/// Reboots a node, to see the boot guard.
pub(crate) fn reboot() -> Result<()> {
    setup::static_building(&[Arch::HERE])?;
    setup::emulator()?;
    let objects = ebpf::build()?;
    say("rung 3: a node that reboots");
    let (series, release) = REBOOTS;
    let kernel = kernel(&target_dir().join("kernels"), series, release)?;
    reboot::prove(&kernel, release, &objects)
}

/// What the machines run.
struct Built {
    tests: Vec<PathBuf>,
    /// The test of the modules, and what it starts.
    modules_tests: [PathBuf; 2],
    agent: PathBuf,
}

impl Built {
    /// Builds the tests and finds where cargo put them.
    fn build(objects: &Path) -> Result<Self> {
        let mut build = cargo();
        build.args(["test", "--locked", "--package", "kube2ram-agent", "--no-run", "--message-format=json"]);
        for test in TESTS.iter().chain([&MODULES_TEST]) {
            build.args(["--test", test]);
        }
        let messages = capture(ebpf::embed(&mut build, objects)).context("the tests cannot be built")?;
        let executables =
            messages.lines().filter_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
        // Beside the agent's own binary.
        let (tests, binaries): (Vec<_>, Vec<_>) = executables
            .map(PathBuf::from)
            .partition(|path| path.parent().is_some_and(|p| p.ends_with("deps")));
        let (modules, tests): (Vec<_>, Vec<_>) = tests.into_iter().partition(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(MODULES_TEST))
        });
        ensure!(tests.len() == TESTS.len(), "cargo built {} tests, not {}", tests.len(), TESTS.len());
        let modules = modules.into_iter().next().context("cargo built no test of the modules")?;
        let agent = binaries.into_iter().next().context("cargo built no agent")?;
        Ok(Self { tests, modules_tests: [modules, steps::sandbox_binary(false)?], agent })
    }

    /// Writes what a machine boots from, with the modules of a kernel when it is given; tells how many results it will print.
    fn write(&self, archive: &Path, with_modules_of: Option<&Path>) -> Result<usize> {
        let Some(kernel) = with_modules_of else {
            let contents = Contents { programs: &PROGRAMS, tests: &self.tests, modules: None };
            return initramfs::write(archive, &contents);
        };
        let ways = fs::read_dir(root().join("kube2ram-agent/tests").join(MODULES_TEST))?;
        let mut files = ways.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|path| path.extension().is_some_and(|end| end == "py"));
        files.extend([self.agent.clone(), CERTIFICATES.into()]);
        let contents = Contents {
            programs: &[&PROGRAMS[..], &MODULES_PROGRAMS].concat(),
            tests: &[&self.tests[..], &self.modules_tests].concat(),
            modules: Some(Modules { kernel, names: &MODULES, files: &files }),
        };
        initramfs::write(archive, &contents)
    }
}

/// The newest kernel of a series: as downloaded before, or from Debian, into a directory of our own.
fn kernel(directory: &Path, series: &str, release: &str) -> Result<PathBuf> {
    let directory = directory.join(series);
    let image = |directory: &Path| {
        let entries = fs::read_dir(directory.join("boot")).ok()?;
        let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.find(|path| path.to_string_lossy().contains("/vmlinuz-"))
    };
    // With its modules, or it is not what the package brought.
    if let Some(image) =
        image(&directory).filter(|image| modules::directory(image).is_ok_and(|path| path.is_dir()))
    {
        return Ok(image);
    }
    let suite = format!("{release}-security");
    let apt = Apt::open(&directory.join("apt"), &[], &[&suite])?;
    let names = apt.names(&format!("linux-image-{series}."))?;
    let package = newest(&names).with_context(|| format!("{suite} has no kernel {series}"))?;
    say(format!("downloading {package}"));
    let archive = apt.download(package)?;
    // Beside, and renamed: what is half unpacked is never taken for a kernel.
    let unpacked = directory.join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&unpacked))?;
    for name in ["lib", "boot"] {
        if directory.join(name).exists() {
            fs::remove_dir_all(directory.join(name))?;
        }
        fs::rename(unpacked.join(name), directory.join(name))?;
    }
    image(&directory).context("the package holds no kernel")
}

/// The signed cloud kernel of the highest version.
fn newest(names: &str) -> Option<&str> {
    let version = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.lines().filter(|name| name.ends_with("-cloud-amd64")).min_by_key(|name| Reverse(version(name)))
}

/// Boots, waits for the machine to turn itself off, and reads the results off its console.
fn boot(kernel: &Path, archive: &Path, log: &Path, runs: usize) -> Result<()> {
    let console = machine::run(kernel, &Boot::Memory(archive), log)?;
    let lines = || console.lines().map(str::trim);
    for line in lines().filter(|line| {
        ["test ", "row "].iter().any(|word| line.starts_with(word)) || line.contains("skipped")
    }) {
        say(line);
    }
    let passed = lines().filter(|line| line.starts_with("k2r-result ") && line.ends_with(" 0")).count();
    ensure!(passed == runs, "{passed} of {runs} runs passed; see {}", log.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_signed_kernel_is_chosen_by_number() {
        let names = "linux-image-5.10.0-9-cloud-amd64\nlinux-image-5.10.0-46-cloud-amd64\nlinux-image-5.10.0-50-cloud-amd64-unsigned\n\
                     linux-image-5.10.0-51-amd64";

        assert_eq!(newest(names), Some("linux-image-5.10.0-46-cloud-amd64"));
        assert_eq!(newest("linux-image-6.1.0-50-cloud-amd64-dbg"), None);
    }
}
