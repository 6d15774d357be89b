//! Links: attaches a program to a cgroup and pins the link, or swaps the program under a link that is pinned already. Called by `attach`.

use std::{
    error::Error,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError, links::FdLink},
};

use super::{
    DatapathError, io_error,
    load::program_fd,
    sys::{link_info, link_update, open_pinned},
};

/// What happened to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There was none.
    Attached,
    /// There was one on a cgroup that is gone; a new one took its place.
    Reattached,
    /// The program was swapped.
    Updated,
}

/// Puts `program` in force on the cgroup, with no moment in which an older one is detached before.
pub(super) fn ensure(
    ebpf: &mut Ebpf,
    program: &'static str,
    cgroup: &Path,
    pin: &Path,
) -> Result<Outcome, DatapathError> {
    let directory = File::open(cgroup).map_err(io_error("open", cgroup))?;
    let id = directory.metadata().map_err(io_error("examine", cgroup))?.ino();
    match open_pinned(pin) {
        Ok(link) => {
            if link_info(&link).map_err(io_error("examine", pin))?.cgroup == id {
                link_update(&link, program_fd(ebpf, program)?.as_fd()).map_err(io_error("update", pin))?;
                return Ok(Outcome::Updated);
            }
            // The cgroup was deleted and made anew: the pinned link is dead. Pinned aside and renamed over it.
            let mut aside = pin.as_os_str().to_owned();
            aside.push("_new"); // a bpf file system allows no dot
            let aside = PathBuf::from(aside);
            remove(&aside)?; // of an agent that was killed between the pin and the rename
            attach(ebpf, program, cgroup, &directory, &aside)?;
            fs::rename(&aside, pin).map_err(io_error("replace", pin))?;
            Ok(Outcome::Reattached)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            attach(ebpf, program, cgroup, &directory, pin)?;
            Ok(Outcome::Attached)
        }
        Err(error) => Err(io_error("open", pin)(error)),
    }
}

/// Removes a pin, and so the link, if it is there.
pub(super) fn remove(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", pin)(error)),
        _ => Ok(()),
    }
}

fn attach(
    ebpf: &mut Ebpf,
    name: &'static str,
    path: &Path,
    cgroup: &File,
    pin: &Path,
) -> Result<(), DatapathError> {
    let failed = |source| DatapathError::Attach { program: name, cgroup: PathBuf::from(path), source };
    let link = create(ebpf, name, cgroup).map_err(failed)?;
    // The pin owns the link from here on; ours only closes its descriptor when dropped.
    link.pin(pin).map(drop).map_err(|error| failed(error.into()))
}

/// `Single` is no mode: it leaves the flags 0, as links must have them, and a link is always one of many. Any other mode is EINVAL (aya#1078).
fn create(ebpf: &mut Ebpf, name: &str, cgroup: &File) -> Result<FdLink, Box<dyn Error + Send + Sync>> {
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let cgroup: OwnedFd = cgroup.as_fd().try_clone_to_owned()?;
    Ok(match ebpf.program_mut(name) {
        Some(Program::CgroupSkb(program)) => {
            let id = program.attach(cgroup, CgroupSkbAttachType::Egress, MODE)?;
            program.take_link(id)?.try_into()?
        }
        Some(Program::CgroupSockAddr(program)) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()?
        }
        Some(Program::SockOps(program)) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()?
        }
        _ => return Err(ProgramError::UnexpectedProgramType.into()),
    })
}
