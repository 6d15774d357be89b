//! A virtual machine: QEMU without hardware help, which boots a kernel and ends when the machine turns itself
//! off. Called by `kernels` and `reboot`.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// An emulated processor is slow: `ci` expects 25 minutes for all rows on one kernel, and reports them as
/// slow from 38 minutes on. On a busy machine they take longer, and must not be ended shortly before they are
/// done.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What a machine boots from.
pub(super) enum Boot<'a> {
    /// A disk whose file system is the root. What is written stays, and the machine may reboot.
    Disk(&'a Path),
    /// An archive with everything, in memory. A reboot ends the machine.
    Memory(&'a Path),
}

/// Runs the machine to its end and returns what its console showed, which is in `log` as well.
pub(super) fn run(kernel: &Path, boot: &Boot<'_>, log: &Path) -> Result<String> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        // cmpxchg16b is broken in QEMU 7.2's emulation: Linux 6.12 panics now and then.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", "2", "-m", "2048"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(kernel);
    let mut parameters = "console=ttyS0 quiet random.trust_cpu=on no_timer_check".to_owned();
    match boot {
        Boot::Disk(image) => {
            // The cloud kernels have NVMe and ext4 built in, so that nothing must be loaded first.
            let drive = format!("if=none,id=disk,format=raw,cache=unsafe,file={}", image.display());
            command.args(["-drive", &drive, "-device", "nvme,drive=disk,serial=1"]);
            parameters
                .push_str(" root=/dev/nvme0n1 rootfstype=ext4 rw init=/usr/lib/systemd/systemd panic=0");
        }
        Boot::Memory(archive) => {
            command.args(["-no-reboot", "-initrd"]).arg(archive);
            parameters.push_str(" panic=-1");
        }
    }
    let mut machine = command
        .args(["-append", &parameters])
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
    Ok(String::from_utf8_lossy(&fs::read(log)?).into_owned())
}
