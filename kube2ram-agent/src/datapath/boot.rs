//! The boot guard's programs: in force at the cgroup root from boot until the agent's own are. Called by `boot_guard`, `attach` and `remove`.
//!
//! Pins: `<bpf-dir>/boot/{links,maps}`, beside the layouts: the guard on the host may be older than the agent. The directory stays when the
//! programs go, and tells until the next boot that they were there.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray},
};
use kube2ram_common::{
    abi::BootConfig,
    connection::{addr_be, addr6_be},
    names::boot,
};

use super::{
    DatapathError, MetadataAddr, io_error,
    links::Link,
    load,
    pins::{Lock, children, layouts},
    sys::{link_detach, link_info, open_pinned},
};
use crate::identity::cgroup_id;

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
}

/// What became of the boot guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootOutcome {
    /// An agent's programs are in force, or about to be: the guard would only be in their way.
    AgentInForce,
    /// The guard is in force.
    InForce {
        /// Cgroups of the host that do not exist: what comes to be in them is denied.
        missing: Vec<PathBuf>,
    },
}

/// What is known of the boot guard, since this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootGuard {
    /// It never was in force.
    Absent,
    /// It is in force.
    InForce {
        /// What it denied: connects, datagrams, packets.
        denied: u64,
    },
    /// An agent took over.
    TakenOver,
}

/// Puts the boot guard in force, unless an agent is.
///
/// # Errors
/// As named; what was in force before stays.
pub fn apply_boot_guard(settings: &BootSettings) -> Result<BootOutcome, DatapathError> {
    let _lock = match Lock::take(&settings.bpf_dir) {
        Ok(lock) => lock,
        Err(DatapathError::Locked(_)) => return Ok(BootOutcome::AgentInForce),
        Err(error) => return Err(error),
    };
    if is_agent_in_force(&settings.bpf_dir)? {
        return Ok(BootOutcome::AgentInForce);
    }
    let guard = Pins::of(&settings.bpf_dir);
    for directory in [&guard.links, &guard.maps] {
        fs::create_dir_all(directory).map_err(io_error("create", directory))?;
    }
    // Nothing of theirs is worth keeping, and an older guard's may be of another layout.
    for map in children(&guard.maps)? {
        fs::remove_file(&map).map_err(io_error("remove", &map))?;
    }
    let mut loader = EbpfLoader::new();
    for name in boot::MAPS {
        loader.map_pin_path(name, guard.maps.join(name));
    }
    let mut ebpf = load::load_object(&mut loader, OBJECT)?;
    let missing = configure(&guard, settings)?;
    for program in boot::PROGRAMS {
        Link::ensure(&mut ebpf, program, &settings.cgroup_root, guard.links.join(program))?;
    }
    Ok(BootOutcome::InForce { missing })
}

/// Tells what became of the boot guard.
///
/// # Errors
/// [`DatapathError::Io`] or [`DatapathError::Map`] when nobody can tell.
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
    Ok(BootGuard::InForce { denied })
}

/// Takes the guard out of force, and tells how many programs it had there. The caller holds the lock.
pub(super) fn retire(bpf_dir: &Path) -> Result<usize, DatapathError> {
    let guard = Pins::of(bpf_dir);
    let links = children(&guard.links)?;
    for link in &links {
        // Unpinning alone lets the program run for a moment longer.
        let opened = open_pinned(link).map_err(io_error("open", link))?;
        link_detach(opened).map_err(io_error("detach", link))?;
        fs::remove_file(link).map_err(io_error("remove", link))?;
    }
    for map in children(&guard.maps)? {
        fs::remove_file(&map).map_err(io_error("remove", &map))?;
    }
    Ok(links.len())
}

/// The same, and nothing tells that it ever was.
pub(super) fn forget(bpf_dir: &Path) -> Result<usize, DatapathError> {
    let programs = retire(bpf_dir)?;
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

/// Whether the pods' cgroup has an agent's programs. A pinned link to a cgroup that is gone is none.
fn is_agent_in_force(bpf_dir: &Path) -> Result<bool, DatapathError> {
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
