//! The boot guard's programs: attached to the cgroup root from boot until the agent's programs are. Called by
//! `boot_guard`, `attach` and `remove`.
//!
//! An agent detaches them in two steps: those at the cgroup root when its own programs are attached, those on
//! network devices when the wire guard is on the devices. Between the two, a device runs both programs, the
//! wire guard's first, and a packet passes if it passes both.
//!
//! Pins: `<bpf-dir>/boot/{links,maps}`, next to the layouts, because the guard on the host may be older than
//! the agent. The directory stays when the programs are detached, and records until the next boot that they
//! were attached.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray},
};
use kube2ram_common::{
    abi::BootConfig,
    connection::{addr_be, addr6_be},
    names::boot,
};

use super::{
    DatapathError, LinkHeader, WireDevice, WireHook, io_error,
    links::Link,
    load,
    pins::{Lock, children, layouts},
    sys::{self, link_detach, link_info, open_pinned, tcx_create, tcx_info},
    wire::{is_gone, is_severed},
};
use crate::identity::cgroup_id;
use kube2ram_cloud::MetadataAddr;

/// 8-byte aligned: the ELF parser casts in place.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kube2ram-boot-guard.bpf.o"));

/// What the boot guard needs.
#[derive(Clone, Debug)]
pub struct BootSettings {
    /// Directory of the pins, on a bpf file system; the agent's.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount: the root of all cgroups.
    pub cgroup_root: PathBuf,
    /// The host's own cgroups, relative to the root: what is not in them is denied.
    pub host_cgroups: Vec<PathBuf>,
    /// What is denied.
    pub metadata: MetadataAddr,
    /// Devices of the calling thread's network namespace by which packets leave the node. Those with an
    /// Ethernet header get a program where the kernel has tcx (Linux 6.6).
    pub wire: Vec<WireDevice>,
}

/// The result of activating the boot guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootOutcome {
    /// An agent's programs are attached, or about to be: the guard would only block them.
    AgentActive,
    /// The guard is active.
    Active {
        /// Cgroups of the host that do not exist yet: tasks in them are denied.
        missing: Vec<PathBuf>,
    },
}

/// What is known of the boot guard, since this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootGuard {
    /// It was never active at this boot.
    Absent,
    /// It is active.
    Active {
        /// What it denied: connects, datagrams, packets.
        denied: u64,
    },
    /// An agent took over.
    TakenOver,
}

/// Activates the boot guard, unless an agent's programs are attached.
///
/// # Errors
/// As named; programs that were attached before stay attached.
pub fn apply_boot_guard(settings: &BootSettings) -> Result<BootOutcome, DatapathError> {
    let _lock = match Lock::take(&settings.bpf_dir) {
        Ok(lock) => lock,
        Err(DatapathError::Locked(_)) => return Ok(BootOutcome::AgentActive),
        Err(error) => return Err(error),
    };
    if is_agent_active(&settings.bpf_dir)? {
        return Ok(BootOutcome::AgentActive);
    }
    let guard = Pins::of(&settings.bpf_dir);
    for directory in [&guard.links, &guard.maps] {
        fs::create_dir_all(directory).map_err(io_error("create", directory))?;
    }
    // Nothing of theirs is worth keeping, and an older guard's may be of another layout.
    guard.remove_maps()?;
    let mut loader = EbpfLoader::new();
    for name in boot::MAPS {
        loader.map_pin_path(name, guard.maps.join(name));
    }
    let mut ebpf = load::load_object(&mut loader, OBJECT)?;
    let missing = configure(&guard, settings)?;
    for program in boot::PROGRAMS.into_iter().filter(|program| load::is_for_this_kernel(program)) {
        Link::ensure(&mut ebpf, program, &settings.cgroup_root, guard.links.join(program))?;
    }
    cover(&ebpf, &guard, &settings.wire)?;
    Ok(BootOutcome::Active { missing })
}

/// Attaches the program to devices, then removes what an earlier run has attached.
fn cover(ebpf: &Ebpf, guard: &Pins, devices: &[WireDevice]) -> Result<(), DatapathError> {
    let old = guard.wires()?;
    if WireHook::of_kernel() == WireHook::Tcx {
        let program = load::program_fd(ebpf, boot::WIRE)?;
        for WireDevice { index, .. } in devices.iter().filter(|device| device.header == LinkHeader::Ethernet)
        {
            let failed = |source| DatapathError::Wire { index: *index, source };
            let link = match tcx_create(program, *index) {
                Err(error) if is_gone(&error) => continue,
                link => link.map_err(failed)?,
            };
            let pin = guard.links.join(format!("{}_{}", boot::WIRE, tcx_info(&link).map_err(failed)?.id));
            sys::pin(&link, &pin).map_err(io_error("pin", &pin))?;
        }
    }
    old.iter().try_for_each(|pin| detach(pin))
}

fn is_wire(pin: &Path) -> bool {
    pin.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(boot::WIRE))
}

/// The link is detached first: unpinning alone lets the program run for a moment longer. The link of a
/// removed device is already detached.
fn detach(pin: &Path) -> Result<(), DatapathError> {
    let link = open_pinned(pin).map_err(io_error("open", pin))?;
    match link_detach(link) {
        Err(error) if is_severed(&error) => {}
        detached => detached.map_err(io_error("detach", pin))?,
    }
    fs::remove_file(pin).map_err(io_error("remove", pin))
}

/// Returns the boot guard's state.
///
/// # Errors
/// [`DatapathError::Io`] or [`DatapathError::Map`] when it cannot be determined.
pub fn boot_guard(bpf_dir: &Path) -> Result<BootGuard, DatapathError> {
    let guard = Pins::of(bpf_dir);
    if !guard.links.exists() {
        return Ok(BootGuard::Absent);
    }
    if children(&guard.links)?.is_empty() {
        return Ok(BootGuard::TakenOver);
    }
    let failed = |source| DatapathError::Map { what: "read", name: boot::DENIED, source };
    let denied: PerCpuArray<_, u64> = guard.open(boot::DENIED)?;
    let denied = denied.get(&0, 0).map_err(failed)?.iter().sum();
    Ok(BootGuard::Active { denied })
}

/// Detaches the guard from the cgroup root, and returns the number of these programs. The caller holds the
/// lock. Programs on network devices stay, until [`retire_wires`].
pub(super) fn retire(bpf_dir: &Path) -> Result<usize, DatapathError> {
    let guard = Pins::of(bpf_dir);
    let mut links = children(&guard.links)?;
    links.retain(|pin| !is_wire(pin));
    links.iter().try_for_each(|link| detach(link))?;
    if guard.wires()?.is_empty() {
        guard.remove_maps()?;
    }
    Ok(links.len())
}

/// Whether programs of the guard are on network devices.
pub(super) fn has_wires(bpf_dir: &Path) -> Result<bool, DatapathError> {
    Ok(!Pins::of(bpf_dir).wires()?.is_empty())
}

/// Detaches the guard from network devices, and returns their number. The caller holds the lock, and has
/// detached the other programs.
pub(super) fn retire_wires(bpf_dir: &Path) -> Result<usize, DatapathError> {
    let guard = Pins::of(bpf_dir);
    let wires = guard.wires()?;
    wires.iter().try_for_each(|pin| detach(pin))?;
    guard.remove_maps()?;
    Ok(wires.len())
}

/// Detaches all of it, and removes the directory that records the guard.
pub(super) fn forget(bpf_dir: &Path) -> Result<usize, DatapathError> {
    let programs = retire(bpf_dir)? + retire_wires(bpf_dir)?;
    let directory = bpf_dir.join(DIRECTORY);
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &directory)(error)),
        _ => Ok(programs),
    }
}

const DIRECTORY: &str = "boot";

struct Pins {
    links: PathBuf,
    maps: PathBuf,
}

impl Pins {
    fn of(bpf_dir: &Path) -> Self {
        let directory = bpf_dir.join(DIRECTORY);
        Self { links: directory.join("links"), maps: directory.join("maps") }
    }

    /// The pinned links to network devices.
    fn wires(&self) -> Result<Vec<PathBuf>, DatapathError> {
        let mut wires = children(&self.links)?;
        wires.retain(|pin| is_wire(pin));
        Ok(wires)
    }

    /// The programs keep the maps that they use.
    fn remove_maps(&self) -> Result<(), DatapathError> {
        children(&self.maps)?.iter().try_for_each(|map| fs::remove_file(map).map_err(io_error("remove", map)))
    }

    fn open<T>(&self, name: &'static str) -> Result<T, DatapathError>
    where
        T: TryFrom<aya::maps::Map, Error = MapError>,
    {
        let opened = MapData::from_pin(self.maps.join(name)).and_then(aya::maps::Map::from_map_data);
        opened.and_then(T::try_from).map_err(|source| DatapathError::Map { what: "open", name, source })
    }
}

/// Before anything is attached. Returns the cgroups that do not exist.
fn configure(guard: &Pins, settings: &BootSettings) -> Result<Vec<PathBuf>, DatapathError> {
    let failed = |name| move |source| DatapathError::Map { what: "write", name, source };
    let mut hosts: HashMap<_, u64, u32> = guard.open(boot::HOSTS)?;
    let mut missing = Vec::new();
    for name in &settings.host_cgroups {
        let cgroup = settings.cgroup_root.join(name);
        match cgroup_id(&cgroup) {
            Ok(id) => hosts.insert(id.0, 1, 0).map_err(failed(boot::HOSTS))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(name.clone()),
            Err(error) => return Err(io_error("examine", &cgroup)(error)),
        }
    }
    let mut config: Array<_, BootConfig> = guard.open(boot::CONFIG)?;
    let MetadataAddr { v4, v6 } = settings.metadata;
    let wanted =
        BootConfig { metadata_addr6_be: v6.map_or([0; 4], addr6_be), metadata_addr_be: addr_be(*v4.ip()) };
    config.set(0, wanted, 0).map_err(failed(boot::CONFIG))?;
    Ok(missing)
}

/// Whether the pods' cgroup has an agent's programs. A pinned link to a removed cgroup does not count.
fn is_agent_active(bpf_dir: &Path) -> Result<bool, DatapathError> {
    for layout in layouts(bpf_dir)? {
        for pin in children(&layout.join("links/pods"))? {
            let link = open_pinned(&pin).map_err(io_error("open", &pin))?;
            if link_info(&link).map_err(io_error("examine", &pin))?.cgroup != 0 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
