//! Rung 3, `cargo xtask test --kernels`: the tests of the kernel half in virtual machines with the kernels that we promise to run on.
//!
//! A machine is QEMU without hardware help, a kernel of Debian's, and an initial RAM file system made of this machine's own programs. Called by `steps`.

mod initramfs;

use std::{
    cmp::Reverse,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{capture, cargo, run, say, target_dir},
    ebpf, setup,
};

/// The series, and the Debian release whose security suite holds its newest kernel.
const SERIES: [(&str, &str); 3] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "bookworm")];
/// The tests that need nothing but the kernel, cgroups and a loopback device.
const TESTS: [&str; 2] = ["datapath_kernel", "identity_attacks"];
/// What they call, and what starts them.
const PROGRAMS: [&str; 10] =
    ["bpftool", "cat", "ip", "mkdir", "mount", "python3", "setpriv", "sh", "sleep", "uname"];
/// An emulated processor takes its time.
const DEADLINE: Duration = Duration::from_secs(900);

/// Runs the tests on every kernel. What does not run here is said, and is an error with `no_skip`.
pub(crate) fn test(no_skip: bool) -> Result<()> {
    setup::building()?;
    setup::programs()?;
    setup::emulator()?;
    let objects = ebpf::build()?;
    say("rung 3: the kernel half on other kernels");
    let directory = target_dir().join("kernels");
    let tests = build_tests(&objects)?;
    let archive = directory.join("initramfs.cpio");
    fs::create_dir_all(&directory)?;
    initramfs::write(&archive, &PROGRAMS, &tests)?;
    let mut failed = Vec::new();
    for (series, release) in SERIES {
        match kernel(&directory, series, release) {
            Ok(kernel) => {
                say(format!("booting {}", kernel.file_name().unwrap_or_default().display()));
                if let Err(error) = boot(&kernel, &archive, &directory.join(format!("{series}.log"))) {
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

/// Builds the tests and finds where cargo put them.
fn build_tests(objects: &Path) -> Result<Vec<PathBuf>> {
    let mut build = cargo();
    build.args(["test", "--locked", "--package", "kube2ram-agent", "--no-run", "--message-format=json"]);
    for test in TESTS {
        build.args(["--test", test]);
    }
    let messages = capture(ebpf::embed(&mut build, objects)).context("the tests cannot be built")?;
    let executables =
        messages.lines().filter_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    // Beside the agent's own binary.
    let found: Vec<_> = executables.filter(|path| path.contains("/deps/")).map(PathBuf::from).collect();
    ensure!(found.len() == TESTS.len(), "cargo built {} tests, not {}", found.len(), TESTS.len());
    Ok(found)
}

/// The newest kernel of a series: as downloaded before, or from Debian, into a directory of our own.
fn kernel(directory: &Path, series: &str, release: &str) -> Result<PathBuf> {
    let directory = directory.join(series);
    let image = |directory: &Path| {
        let entries = fs::read_dir(directory.join("boot")).ok()?;
        let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.find(|path| path.to_string_lossy().contains("/vmlinuz-"))
    };
    if let Some(image) = image(&directory) {
        return Ok(image);
    }
    let apt = directory.join("apt");
    for below in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt.join(below))?;
    }
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let archive = security_archive().context("apt knows no Debian security archive")?;
    let source = format!("deb [arch=amd64 signed-by={keys}] {archive} {release}-security main\n");
    fs::write(apt.join("sources.list"), source)?;
    // This machine's own sources and lists stay as they are.
    let with_apt = |program: &str| {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o").arg(format!("{option}={}", apt.join(value).display()));
        }
        command
            .args(["-o", "Dir::Etc::sourceparts=/dev/null", "-o", "APT::Sandbox::User=root"])
            .current_dir(&apt);
        command
    };
    run(with_apt("apt-get").args(["update", "-qq"]))?;
    let names = capture(with_apt("apt-cache").args(["pkgnames", &format!("linux-image-{series}.")]))
        .context("apt-cache fails")?;
    let package = newest(&names).with_context(|| format!("{release}-security has no kernel {series}"))?;
    say(format!("downloading {package}"));
    run(with_apt("apt-get").args(["download", "-qq", package]))?;
    let mut downloaded = fs::read_dir(&apt)?.filter_map(|entry| Some(entry.ok()?.path()));
    let archive = downloaded.find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    run(Command::new("dpkg-deb").arg("-x").arg(archive.context("nothing was downloaded")?).arg(&directory))?;
    image(&directory).context("the package holds no kernel")
}

/// Where this machine's own apt finds Debian's security updates; other releases are beside this one.
fn security_archive() -> Option<String> {
    let uris = capture(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    uris.lines().find(|uri| uri.trim_end_matches('/').ends_with("-security")).map(str::to_owned)
}

/// The signed cloud kernel of the highest version.
fn newest(names: &str) -> Option<&str> {
    let version = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.lines().filter(|name| name.ends_with("-cloud-amd64")).min_by_key(|name| Reverse(version(name)))
}

/// Boots, waits for the machine to turn itself off, and reads the results off its console.
fn boot(kernel: &Path, archive: &Path, log: &Path) -> Result<()> {
    let mut machine = Command::new("qemu-system-x86_64")
        // cmpxchg16b is broken in QEMU 7.2's emulation: Linux 6.12 panics now and then.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", "2", "-m", "2048"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        .stdin(Stdio::null())
        .stdout(File::create(log)?)
        .stderr(Stdio::inherit())
        .spawn()
        .context("cannot start QEMU")?;
    let deadline = Instant::now() + DEADLINE;
    while machine.try_wait()?.is_none() {
        if Instant::now() > deadline {
            machine.kill()?;
            machine.wait()?;
            bail!("not done after {DEADLINE:?}; see {}", log.display());
        }
        thread::sleep(Duration::from_millis(100));
    }
    let console = fs::read(log)?;
    let console = String::from_utf8_lossy(&console);
    let lines = || console.lines().map(str::trim);
    for line in lines().filter(|line| line.starts_with("test ") || line.contains("skipped")) {
        say(line);
    }
    let passed = lines().filter(|line| line.starts_with("k2r-result ") && line.ends_with(" 0")).count();
    ensure!(passed == initramfs::RUNS, "{passed} of {} runs passed; see {}", initramfs::RUNS, log.display());
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
