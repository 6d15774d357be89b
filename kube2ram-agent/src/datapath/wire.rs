//! The wire guard's programs on network devices: attaches each before all others on a device's egress, and
//! swaps the programs that an earlier agent attached. Called by `wire_guard`, in the network namespace of the
//! device.
//!
//! From Linux 6.6 on the program is attached by a tcx link. Only bpf(2) can remove it, and it stays on a
//! device that is moved to another namespace. On older kernels it is a filter of the clsact queueing
//! discipline.

mod clsact;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use aya::Ebpf;
use kube2ram_common::names::program;
use rustix::io::Errno;

use super::{
    DatapathError, io_error,
    load::{kernel_version, program_fd},
    pins::{Pins, children, ensure_pinned, remove},
    sys::{link_detach, link_update, object_id, open_pinned, tcx_create, tcx_egress_programs, tcx_info},
};

/// What the packets of a device begin with, as its egress sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkHeader {
    /// An Ethernet header.
    Ethernet,
    /// The IP header: a tunnel's.
    None,
}

/// A network device of the calling thread's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WireDevice {
    /// Its index.
    pub index: u32,
    /// What its packets begin with.
    pub header: LinkHeader,
}

/// How programs are attached to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireHook {
    /// As a filter of clsact.
    Clsact,
    /// By a tcx link.
    Tcx,
}

impl WireHook {
    /// The better one that this kernel has.
    pub fn of_kernel() -> Self {
        if kernel_version() >= (6, 6) { Self::Tcx } else { Self::Clsact }
    }
}

/// What had to be done for a device to be covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covering {
    /// It had no program of ours.
    Attached,
    /// The device was removed.
    Gone,
    /// It had one behind another program, or an older one.
    Moved,
    /// Nothing.
    Unchanged,
}

/// One of the two programs, loaded.
#[derive(Debug)]
struct Program {
    name: &'static str,
    fd: OwnedFd,
    id: u32,
    /// Where its links are pinned, each under its number.
    pins: PathBuf,
}

/// Both programs, before any of them is attached.
#[derive(Debug)]
pub(super) struct WirePrograms([Program; 2]);

impl WirePrograms {
    pub(super) fn of(ebpf: &Ebpf, pins: &Pins) -> Result<Self, DatapathError> {
        let of = |name| {
            let directory = pins.attachment_point(name);
            let fd = program_fd(ebpf, name)?.as_fd().try_clone_to_owned();
            let fd = fd.map_err(io_error("keep the program of", &directory))?;
            let id = object_id(&fd).map_err(io_error("examine the program of", &directory))?;
            Ok(Program { name, fd, id, pins: directory })
        };
        Ok(Self([of(program::WIRE)?, of(program::WIRE_IP)?]))
    }

    fn try_clone(&self) -> Result<Self, DatapathError> {
        let clone = |program: &Program| {
            let fd = program.fd.try_clone().map_err(io_error("keep the program of", &program.pins))?;
            Ok(Program { fd, pins: program.pins.clone(), ..*program })
        };
        let [ethernet, none] = &self.0;
        Ok(Self([clone(ethernet)?, clone(none)?]))
    }
}

/// The wire guard's attached programs. Dropping it detaches nothing.
#[derive(Debug)]
pub struct Wire {
    programs: WirePrograms,
    hook: WireHook,
    /// By their number, which the kernel never gives twice.
    links: BTreeMap<u32, Link>,
}

#[derive(Debug)]
struct Link {
    link: OwnedFd,
    pin: PathBuf,
    header: LinkHeader,
}

impl Wire {
    /// Takes over what an earlier agent has attached by links, with today's programs.
    pub(super) fn adopt(programs: &WirePrograms, hook: WireHook) -> Result<Self, DatapathError> {
        let mut wire = Self { programs: programs.try_clone()?, hook, links: BTreeMap::new() };
        for header in [LinkHeader::Ethernet, LinkHeader::None] {
            let program = &wire.programs.0[header as usize];
            for pin in children(&program.pins)? {
                let link = open_pinned(&pin).map_err(io_error("open", &pin))?;
                let info = tcx_info(&link).map_err(io_error("examine", &pin))?;
                wire.links.insert(info.id, Link { link, pin, header });
            }
        }
        wire.repair_links()?;
        Ok(wire)
    }

    /// Makes sure that each link runs this agent's program and is pinned. Links of removed devices are
    /// deleted. Returns how many were repaired.
    ///
    /// # Errors
    /// When a link is not what it should be; to be tried again.
    pub fn repair_links(&mut self) -> Result<usize, DatapathError> {
        let (mut repaired, mut gone) = (0, Vec::new());
        for (id, Link { link, pin, header }) in &self.links {
            let info = tcx_info(link).map_err(io_error("examine", pin))?;
            if info.device == 0 {
                gone.push(*id);
                continue;
            }
            let program = &self.programs.0[*header as usize];
            if info.program_id != program.id {
                match link_update(link, &program.fd) {
                    // The device was removed just now.
                    Err(error) if is_severed(&error) => continue,
                    updated => updated.map_err(io_error("update", pin))?,
                }
            }
            let is_ours = |pinned: &OwnedFd| tcx_info(pinned).map(|pinned| pinned.id == *id);
            repaired += usize::from(ensure_pinned(link, pin, is_ours)?);
        }
        for id in gone {
            self.forget(id)?;
        }
        Ok(repaired)
    }

    /// Makes sure that a device's egress runs the program before any other.
    ///
    /// # Errors
    /// When it does not.
    pub fn cover(&mut self, device: WireDevice) -> Result<Covering, DatapathError> {
        let covered = match self.hook {
            WireHook::Clsact => {
                let Program { name, fd, id, .. } = &self.programs.0[device.header as usize];
                clsact::cover(device.index, &clsact::Program { name, fd: fd.as_fd(), id: *id })
            }
            WireHook::Tcx => return self.cover_by_link(device),
        };
        or_gone(covered).map_err(|source| wire_error(device, source))
    }

    fn cover_by_link(&mut self, device: WireDevice) -> Result<Covering, DatapathError> {
        let failed = |source| wire_error(device, source);
        let program = &self.programs.0[device.header as usize];
        let attached = match tcx_egress_programs(device.index) {
            Err(error) if is_gone(&error) => return Ok(Covering::Gone),
            attached => attached.map_err(failed)?,
        };
        let position = attached.iter().position(|(program_id, _)| *program_id == program.id);
        if position == Some(0) {
            return Ok(Covering::Unchanged);
        }
        // A program is attached to a device only once, and a link does not change its position.
        if let Some((_, link)) = position.and_then(|at| attached.get(at)) {
            self.forget(*link)?;
        }
        let program = &self.programs.0[device.header as usize];
        let link = match tcx_create(&program.fd, device.index) {
            Err(error) if is_gone(&error) => return Ok(Covering::Gone),
            link => link.map_err(failed)?,
        };
        let id = tcx_info(&link).map_err(failed)?.id;
        let path = program.pins.join(id.to_string());
        let is_other = |_: &OwnedFd| Ok(false);
        ensure_pinned(&link, &path, is_other)?;
        self.links.insert(id, Link { link, pin: path, header: device.header });
        Ok(if position.is_some() { Covering::Moved } else { Covering::Attached })
    }

    /// Detaches all programs that were attached by links, and returns their number.
    ///
    /// # Errors
    /// Those of the kernel and the bpf file system; the other devices keep the program.
    pub fn detach_links(&mut self) -> Result<usize, DatapathError> {
        let ids: Vec<_> = self.links.keys().copied().collect();
        ids.iter().try_for_each(|id| self.forget(*id))?;
        Ok(ids.len())
    }

    fn forget(&mut self, id: u32) -> Result<(), DatapathError> {
        let Some(Link { link, pin, .. }) = self.links.get(&id) else { return Ok(()) };
        match link_detach(link) {
            // Detached already, with its device.
            Err(error) if is_severed(&error) => {}
            detached => detached.map_err(io_error("detach", pin))?,
        }
        remove(pin)?;
        self.links.remove(&id);
        Ok(())
    }
}

/// Removes the program from a device of the calling thread's network namespace where it is a filter, and
/// returns whether it was.
///
/// # Errors
/// Netlink's.
pub fn uncover(index: u32) -> io::Result<bool> {
    match clsact::uncover(index) {
        Err(error) if is_gone(&error) => Ok(false),
        outcome => outcome,
    }
}

fn or_gone(covered: io::Result<Covering>) -> io::Result<Covering> {
    match covered {
        Err(error) if is_gone(&error) => Ok(Covering::Gone),
        covered => covered,
    }
}

/// Whether the device does not exist.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

/// Whether a link was detached already, with its device or by another process.
pub(super) fn is_severed(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOLINK.raw_os_error())
}

fn wire_error(device: WireDevice, source: io::Error) -> DatapathError {
    DatapathError::Wire { index: device.index, source }
}
