//! The disk of a node with systemd: Debian's packages unpacked, a kernel's modules, and the programs of the
//! proof. Made without root: nothing is installed or run in it. Called by `reboot`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::modules;
use crate::{
    apt::Apt,
    command::{run, say},
};

const PACKAGES: [&str; 10] = [
    "ca-certificates",
    "coreutils",
    "dash",
    "iproute2",
    "kmod",
    "mount",
    "nftables",
    "systemd",
    "systemd-sysv",
    "util-linux",
];
/// As on every Debian of today.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// What the packages' own scripts would have made, and what the node is to do.
const FILES: [(&str, &str); 7] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\n"),
    ("etc/hostname", "node\n"),
    // Of no machine: without one, systemd takes each boot for the first.
    ("etc/machine-id", "00112233445566778899aabbccddeeff\n"),
    ("etc/fstab", ""),
    ("etc/nsswitch.conf", "hosts: files\n"),
    ("etc/systemd/system/kubelet.service", KUBELET),
];

/// Instead of the kubelet a program creates pods, and reports what they reach.
const KUBELET: &str = "[Unit]
Description=makes pods as a kubelet does, and tells what they reach

[Service]
ExecStart=/proof/kubelet
Environment=PATH=/usr/sbin:/usr/bin RUST_BACKTRACE=0
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/ttyS0
";

/// Makes the disk's image. `programs` come to be in /proof.
pub(super) fn write(directory: &Path, release: &str, kernel: &Path, programs: &[PathBuf]) -> Result<PathBuf> {
    let root = directory.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for name in MERGED {
        fs::create_dir_all(root.join("usr").join(name))?;
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    for package in packages(directory, release)? {
        unpack(&package, &root)?;
    }
    for name in ["dev", "host", "proc", "proof", "root", "run", "sys", "tmp", "var/tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    for (name, content) in FILES {
        fs::write(root.join(name), content)?;
    }
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink("../kubelet.service", wants.join("kubelet.service"))?;
    symlink("/usr/lib/systemd/system/multi-user.target", root.join("etc/systemd/system/default.target"))?;
    for program in programs {
        let name = program.file_name().context("a program has a name")?;
        fs::copy(program, root.join("proof").join(name))?;
    }
    certificates(&root)?;
    modules(kernel, &root)?;

    let image = directory.join("disk");
    fs::File::create(&image)?.set_len(1 << 30)?;
    let mut make = Command::new(crate::setup::find("mke2fs").context("mke2fs is not installed")?);
    make.args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"]).arg(&root).arg(&image);
    run(&mut make)?;
    Ok(image)
}

/// Downloaded once.
fn packages(directory: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let complete = directory.join("complete");
    let archives = directory.join("apt/cache/archives");
    let list = PACKAGES.join(" ");
    if fs::read_to_string(&complete).ok().as_ref() != Some(&list) {
        say(format!("downloading a node: {list}"));
        let apt = Apt::open(&directory.join("apt"), "amd64", &[release], &[&format!("{release}-security")])?;
        apt.download_all(&PACKAGES)?;
        fs::write(&complete, list)?;
    }
    let entries = fs::read_dir(&archives)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(entries.into_iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).collect())
}

/// Through the links that merge the directories, which `dpkg-deb -x` replaces.
fn unpack(package: &Path, root: &Path) -> Result<()> {
    let mut files =
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"]).arg(root);
    run(tar.stdin(files.stdout.take().context("a pipe")?))?;
    ensure!(files.wait()?.success(), "cannot unpack {}", package.display());
    Ok(())
}

/// What update-ca-certificates makes: without any certificate the agent does not speak to STS.
fn certificates(root: &Path) -> Result<()> {
    let mut bundle = Vec::new();
    for entry in fs::read_dir(root.join("usr/share/ca-certificates/mozilla"))? {
        bundle.extend(fs::read(entry?.path())?);
    }
    fs::create_dir_all(root.join("etc/ssl/certs"))?;
    Ok(fs::write(root.join("etc/ssl/certs/ca-certificates.crt"), bundle)?)
}

/// The kernel's modules, with the index that its package would have made.
fn modules(kernel: &Path, root: &Path) -> Result<()> {
    let source = modules::directory(kernel)?;
    let version = source.file_name().context("a kernel has a version")?;
    let destination = root.join("usr/lib/modules");
    fs::create_dir_all(&destination)?;
    run(Command::new("cp").arg("-r").arg(&source).arg(&destination))?;
    // The node's own, with its own libraries: this machine may have none.
    let depmod = root.with_file_name("depmod");
    if fs::symlink_metadata(&depmod).is_ok() {
        fs::remove_file(&depmod)?;
    }
    symlink(root.join("usr/bin/kmod"), &depmod)?;
    run(Command::new(&depmod)
        .env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu"))
        .arg("-b")
        .arg(root)
        .arg(version))
}
