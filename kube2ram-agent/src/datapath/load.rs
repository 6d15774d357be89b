//! Loads the embedded object on the pinned maps. Called by `attach`.

use std::{fs, io};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapInfo, MapType},
    programs::{Program, ProgramFd},
};
use kube2ram_common::{
    abi::{Config, ConnectRecord, Counter, Handshake, MAX_HANDSHAKES, MAX_LEASES, MAX_TARGETS, Target},
    names::{boot, map, program},
};

use super::{DatapathError, io_error, pins::Pins};

/// 8-byte aligned: the ELF parser casts in place.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kube2ram.bpf.o"));
/// The same programs, logging every verdict.
static DEBUG_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kube2ram-debug.bpf.o"));

/// The layout of a map as the kernel reports it: type, key size, value size, entries.
type Layout = (MapType, usize, usize, usize);

/// aya 0.14 takes whatever is pinned under the name, and typed reads would then go by our sizes, not the
/// kernel's.
const LAYOUTS: [(&str, Layout); 10] = [
    (map::CONFIG, (MapType::Array, 4, size_of::<Config>(), 1)),
    (map::TARGETS, (MapType::Hash, 8, size_of::<Target>(), MAX_TARGETS)),
    (map::NAMESPACES, (MapType::Hash, 8, 8, MAX_TARGETS)),
    (map::HANDSHAKES, (MapType::Hash, size_of::<Handshake>(), size_of::<ConnectRecord>(), MAX_HANDSHAKES)),
    (map::SHARES, (MapType::Hash, 8, 8, MAX_LEASES)),
    (map::CLIENTS, (MapType::Hash, 8, size_of::<ConnectRecord>(), MAX_HANDSHAKES)),
    (map::ACCEPTED, (MapType::SkStorage, 4, size_of::<ConnectRecord>(), 0)),
    (map::NETNS, (MapType::SkStorage, 4, 8, 0)),
    (map::PASS, (MapType::SkStorage, 4, 4, 0)),
    (map::COUNTERS, (MapType::PerCpuArray, 4, 8, Counter::ALL.len())),
];

/// Returns whether a running agent has pinned every map.
pub(super) fn check_all_pinned(pins: &Pins) -> Result<(), DatapathError> {
    LAYOUTS.iter().try_for_each(|(name, _)| {
        let pin = pins.map(name);
        fs::metadata(&pin).map(drop).map_err(io_error("examine", &pin))
    })
}

/// Loads the object and all of its programs; the maps are pinned, or found pinned.
pub(super) fn load(pins: &Pins, debug: bool) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for (name, layout) in LAYOUTS {
        check_pinned(pins, name, layout)?;
        loader.map_pin_path(name, pins.map(name));
    }
    load_object(&mut loader, if debug { DEBUG_OBJECT } else { OBJECT })
}

/// Loads an object and all of its programs.
pub(super) fn load_object(loader: &mut EbpfLoader<'_>, object: &'static [u8]) -> Result<Ebpf, DatapathError> {
    if object.is_empty() {
        return Err(DatapathError::NoObject);
    }
    raise_memlock_limit();
    let mut ebpf = loader.load(object).map_err(|error| load_error("the object", error))?;
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| is_for_this_kernel(name)) {
        match program {
            Program::CgroupSkb(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSockopt(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            Program::SockOps(program) => program.load(),
            _ => Err(aya::programs::ProgramError::UnexpectedProgramType),
        }
        .map_err(|error| load_error(name, error))?;
    }
    Ok(ebpf)
}

/// Whether the kernel can run a program. Those that judge the calling task at the setsockopt hook need
/// `bpf_get_current_ancestor_cgroup_id` there, which 6.1 has and 5.10 has not ("unknown func").
pub(super) fn is_for_this_kernel(name: &str) -> bool {
    const FROM_6_1: [&str; 2] = [program::TASK_SOCKET_OPTION, boot::SOCKET_OPTION];
    !FROM_6_1.contains(&name) || kernel_version() >= (6, 1)
}

/// The descriptor of a loaded program.
pub(super) fn program_fd<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, DatapathError> {
    match ebpf.program(name) {
        Some(Program::CgroupSkb(program)) => program.fd(),
        Some(Program::CgroupSockAddr(program)) => program.fd(),
        Some(Program::CgroupSockopt(program)) => program.fd(),
        Some(Program::SchedClassifier(program)) => program.fd(),
        Some(Program::SockOps(program)) => program.fd(),
        _ => Err(aya::programs::ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| load_error(name, error))
}

fn load_error(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DatapathError {
    DatapathError::Load { what: what.to_owned(), source: source.into() }
}

fn check_pinned(pins: &Pins, name: &'static str, expected: Layout) -> Result<(), DatapathError> {
    let path = pins.map(name);
    match super::sys::open_pinned(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(DatapathError::Io { what: "open", path, source }),
        Ok(_) => {}
    }
    let map_error = |source| DatapathError::Map { what: "examine", name, source };
    let info = MapInfo::from_pin(&path).map_err(map_error)?;
    let found = (
        info.map_type().map_err(map_error)?,
        info.key_size() as usize,
        info.value_size() as usize,
        info.max_entries() as usize,
    );
    if found == expected { Ok(()) } else { Err(DatapathError::ForeignMap(path)) }
}

/// Below Linux 5.11 maps count against RLIMIT_MEMLOCK, whose default of 64 KiB is too small. If the limit
/// cannot be raised, the load fails.
fn raise_memlock_limit() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        tracing::debug!(%error, "cannot raise RLIMIT_MEMLOCK");
    }
}

/// The running kernel's major and minor version, parsed from its release name.
pub fn kernel_version() -> (u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
