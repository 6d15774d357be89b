//! Links: attaches a program to a cgroup and pins the link, or swaps the program under a link that is pinned
//! already; and holds each to what it should be from then on. Called by `attach` and `repair`.

use std::{
    error::Error,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, ProgramError, links::FdLink},
};

use super::{
    DatapathError, Drift, io_error,
    load::program_fd,
    pins::{ensure_pinned, remove},
    sys::{self, BPF_CGROUP_SETSOCKOPT, link_create, link_info, link_update, object_id, open_pinned, pin},
};

/// What happened to a link at a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There was none.
    Attached,
    /// The pinned link was attached to no cgroup, or to another one; a new link replaced it.
    Reattached,
    /// The program was swapped.
    Updated,
}

/// A program that is attached to a cgroup. The link is open, so that removing its pin detaches nothing.
/// Dropping it leaves the pin, so that pods are denied without an agent.
#[derive(Debug)]
pub(super) struct Link {
    name: &'static str,
    cgroup: PathBuf,
    pin: PathBuf,
    program: OwnedFd,
    program_id: u32,
    link: OwnedFd,
    /// Whether this start attached it, rather than swapped the program under it.
    is_new: bool,
    /// What it was attached to last.
    cgroup_id: u64,
    attach_type: u32,
}

impl Link {
    /// Attaches a program to a cgroup, without a moment in which an older one is already detached.
    pub(super) fn ensure(
        ebpf: &mut Ebpf,
        name: &'static str,
        cgroup: &Path,
        pin: PathBuf,
    ) -> Result<(Self, Outcome), DatapathError> {
        let (link, outcome) = match open_pinned(&pin) {
            Ok(link) if adopt(&link, cgroup, program_fd(ebpf, name)?.as_fd(), &pin)? => {
                (link, Outcome::Updated)
            }
            // The cgroup was deleted and created again, or another process detached the link: the pinned link
            // has no effect.
            Ok(_) => {
                let link = attach(ebpf, name, cgroup, &pin, remove)?;
                (link, Outcome::Reattached)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let link = attach(ebpf, name, cgroup, &pin, |_| Ok(()))?;
                (link, Outcome::Attached)
            }
            Err(error) => return Err(io_error("open", &pin)(error)),
        };
        let program = program_fd(ebpf, name)?.as_fd();
        let program = program.try_clone_to_owned().map_err(io_error("keep the program of", &pin))?;
        let program_id = object_id(&program).map_err(io_error("examine the program of", &pin))?;
        let info = link_info(&link).map_err(io_error("examine", &pin))?;
        let (cgroup_id, attach_type) = (info.cgroup, info.attach_type);
        let cgroup = cgroup.to_owned();
        let is_new = outcome != Outcome::Updated;
        Ok((Self { name, cgroup, pin, program, program_id, link, is_new, cgroup_id, attach_type }, outcome))
    }

    /// Where it was attached last.
    pub(super) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Where it is pinned.
    pub(super) fn pin(&self) -> &Path {
        &self.pin
    }

    /// Whether this start attached it, rather than swapped the program under it.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// The program's name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Compares the link with the expected state, and repairs it. `found` is called for each difference that
    /// was repaired.
    ///
    /// # Errors
    /// When it is not attached, or not pinned; the caller tries again.
    pub(super) fn repair(&mut self, mut found: impl FnMut(Drift)) -> Result<(), DatapathError> {
        let today = cgroup_id(&self.cgroup)?;
        let mut info = link_info(&self.link).map_err(io_error("examine", &self.pin))?;
        if info.cgroup != today {
            let directory = File::open(&self.cgroup).map_err(io_error("open", &self.cgroup))?;
            let link = link_create(&self.program, &directory, self.attach_type)
                .map_err(|error| attach_error(self.name, &self.cgroup, error.into()))?;
            found(if self.cgroup_id == today { Drift::Detached } else { Drift::Cgroup });
            self.link = link;
            info = link_info(&self.link).map_err(io_error("examine", &self.pin))?;
            self.cgroup_id = info.cgroup;
            // Detached as well, or of another owner.
            remove(&self.pin)?;
            return pin(&self.link, &self.pin).map_err(io_error("pin", &self.pin));
        }
        if info.program_id != self.program_id {
            link_update(&self.link, &self.program).map_err(io_error("update", &self.pin))?;
            found(Drift::Program);
        }
        let is_ours = |pinned: &OwnedFd| link_info(pinned).map(|pinned| pinned.id == info.id);
        if ensure_pinned(&self.link, &self.pin, is_ours)? {
            found(Drift::LinkPin);
        }
        Ok(())
    }
}

/// Swaps the program of a pinned link. If the link is attached to no cgroup or to another one, or is of
/// another kind, nothing is done.
fn adopt(link: &OwnedFd, cgroup: &Path, program: BorrowedFd<'_>, pin: &Path) -> Result<bool, DatapathError> {
    let info = link_info(link).map_err(io_error("examine", pin))?;
    if info.cgroup != cgroup_id(cgroup)? {
        return Ok(false);
    }
    match link_update(link, program) {
        // Of another hook, or no link of a cgroup.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        updated => updated.map(|()| true).map_err(io_error("update", pin)),
    }
}

fn cgroup_id(cgroup: &Path) -> Result<u64, DatapathError> {
    fs::metadata(cgroup).map(|metadata| metadata.ino()).map_err(io_error("examine", cgroup))
}

fn attach_error(program: &'static str, cgroup: &Path, source: Box<dyn Error + Send + Sync>) -> DatapathError {
    DatapathError::Attach { program, cgroup: cgroup.to_owned(), source }
}

/// Attaches the program, then replaces the pin: a pinned link to another cgroup stays attached until then.
fn attach(
    ebpf: &mut Ebpf,
    name: &'static str,
    cgroup: &Path,
    pin: &Path,
    make_room: impl FnOnce(&Path) -> Result<(), DatapathError>,
) -> Result<OwnedFd, DatapathError> {
    let directory = File::open(cgroup).map_err(io_error("open", cgroup))?;
    let failed = |source| attach_error(name, cgroup, source);
    if let Some(Program::CgroupSockopt(program)) = ebpf.program(name) {
        // aya 0.14 cannot pin links of this kind.
        let program = program.fd().map_err(|error| failed(error.into()))?;
        let link = link_create(program, &directory, BPF_CGROUP_SETSOCKOPT);
        let link = link.map_err(|error| failed(error.into()))?;
        make_room(pin)?;
        sys::pin(&link, pin).map_err(io_error("pin", pin))?;
        return Ok(link);
    }
    let link = create(ebpf, name, &directory).map_err(failed)?;
    make_room(pin)?;
    // The pin owns the link from here on; aya's handle only closes its descriptor when dropped.
    link.pin(pin).map(drop).map_err(|error| attach_error(name, cgroup, error.into()))?;
    open_pinned(pin).map_err(io_error("open", pin))
}

/// `Single` leaves the flags 0, which links require; links never exclude other programs. Any other mode fails
/// with EINVAL (aya#1078).
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
