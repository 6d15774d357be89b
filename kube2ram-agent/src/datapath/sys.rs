//! The few bpf(2) commands that aya 0.14 does not offer. Called by the other modules of `datapath`.

#![expect(unsafe_code, reason = "raw system calls")]

mod entries;

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

pub(super) use self::entries::count_entries;

// Command numbers: include/uapi/linux/bpf.h, enum bpf_cmd.
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Calls bpf(2).
///
/// # Safety
/// `A` must be a prefix of the kernel's `union bpf_attr` for `command`, `repr(C)`, without padding, and every
/// pointer in it valid for the call. (The kernel takes the size as an argument and reads the rest as zeros.)
unsafe fn bpf<A>(command: libc::c_int, attributes: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: the caller's.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Takes the descriptor that a command returned.
///
/// # Safety
/// The command must make a descriptor and return it.
unsafe fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The `OBJ_*` member of `union bpf_attr`.
#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Opens a pinned object.
///
/// # Errors
/// bpf(2)'s; [`io::ErrorKind::NotFound`] when nothing is pinned there.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let pathname = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Object { pathname: pathname.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the path outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attributes) }?;
    // SAFETY: this command makes a descriptor.
    unsafe { descriptor(fd) }
}

/// Pins an object where nothing is.
///
/// # Errors
/// bpf(2)'s; [`io::ErrorKind::AlreadyExists`] when something is there.
pub(super) fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let pathname = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes =
        Object { pathname: pathname.as_ptr() as u64, bpf_fd: number(object.as_fd()), file_flags: 0 };
    // SAFETY: the path outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attributes) }.map(drop)
}

/// `struct bpf_link_info`, as far as cgroup links fill it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CgroupLinkInfo {
    link_type: u32,
    /// Never given twice before a reboot.
    pub(super) id: u32,
    /// The program that it runs.
    pub(super) program_id: u32,
    reserved: u32,
    /// The cgroup that the link is attached to; 0 once the cgroup is removed or the link is detached.
    pub(super) cgroup: u64,
    /// The hook.
    pub(super) attach_type: u32,
    reserved2: u32,
}

/// What `struct bpf_prog_info` and `struct bpf_map_info` begin with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ObjectInfo {
    kind: u32,
    id: u32,
}

/// Asks what an object is. The kernel fills as much as there is room for.
///
/// # Safety
/// `I` must be `repr(C)`, integers only.
unsafe fn info<I: Default>(object: BorrowedFd<'_>) -> io::Result<I> {
    #[repr(C)]
    struct GetInfo {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = I::default();
    let mut attributes = GetInfo {
        bpf_fd: number(object),
        info_len: u32::try_from(size_of::<I>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` points to `info_len` writable bytes.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

/// Returns what a link is attached to.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn link_info(link: impl AsFd) -> io::Result<CgroupLinkInfo> {
    // SAFETY: integers only.
    unsafe { info(link.as_fd()) }
}

/// The number of a program or a map, never given twice before a reboot.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn object_id(object: impl AsFd) -> io::Result<u32> {
    // SAFETY: integers only.
    unsafe { info::<ObjectInfo>(object.as_fd()) }.map(|info| info.id)
}

/// Of include/uapi/linux/bpf.h, enum bpf_attach_type.
pub(super) const BPF_CGROUP_SETSOCKOPT: u32 = 22;

/// Attaches a program to a cgroup, as one of many, for as long as the link is open or pinned.
///
/// # Errors
/// bpf(2)'s; `EPERM` below a program that was attached as exclusive.
pub(super) fn link_create(program: impl AsFd, cgroup: impl AsFd, attach_type: u32) -> io::Result<OwnedFd> {
    create_link(program.as_fd(), number(cgroup.as_fd()), attach_type, 0)
}

/// `target` is a descriptor, or the index of a device.
fn create_link(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct LinkCreate {
        prog_fd: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attributes = LinkCreate { prog_fd: number(program), target, attach_type, flags };
    // SAFETY: no pointers.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attributes) }?;
    // SAFETY: this command makes a descriptor.
    unsafe { descriptor(fd) }
}

/// `struct bpf_link_info`, as far as tcx links fill it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TcxInfo {
    link_type: u32,
    /// Never given twice before a reboot.
    pub(super) id: u32,
    /// The program that it runs.
    pub(super) program_id: u32,
    reserved: u32,
    /// The index of the device in its network namespace; 0 once the device is removed or the link is
    /// detached.
    pub(super) device: u32,
    attach_type: u32,
}

/// Returns what a tcx link is attached to.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn tcx_info(link: impl AsFd) -> io::Result<TcxInfo> {
    // SAFETY: integers only.
    unsafe { info(link.as_fd()) }
}

/// `BPF_TCX_EGRESS` of include/uapi/linux/bpf.h, enum bpf_attach_type. Linux 6.6.
const BPF_TCX_EGRESS: u32 = 47;

/// Attaches a program to egress of a device of the calling thread's network namespace, before all others. It
/// stays while the link is open or pinned, and the device exists.
///
/// # Errors
/// bpf(2)'s; `ENODEV` when the device does not exist.
pub(super) fn tcx_create(program: impl AsFd, device: u32) -> io::Result<OwnedFd> {
    /// Without another program's id: before the first one.
    const BPF_F_BEFORE: u32 = 1 << 3;
    create_link(program.as_fd(), device, BPF_TCX_EGRESS, BPF_F_BEFORE)
}

/// The programs on egress of a device of the calling thread's network namespace, in their order, each with
/// the number of its link (0 without one).
///
/// # Errors
/// bpf(2)'s; `ENODEV` when the device does not exist.
pub(super) fn tcx_egress_programs(device: u32) -> io::Result<Vec<(u32, u32)>> {
    /// `BPF_MPROG_MAX`: the kernel attaches no more.
    const MAX: u32 = 64;
    #[repr(C)]
    struct ProgQuery {
        device: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        reserved: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let (mut programs, mut links) = ([0_u32; MAX as usize], [0_u32; MAX as usize]);
    let mut attributes = ProgQuery {
        device,
        attach_type: BPF_TCX_EGRESS,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr() as u64,
        prog_cnt: MAX,
        reserved: 0,
        prog_attach_flags: 0,
        link_ids: links.as_mut_ptr() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: both arrays have room for `prog_cnt` numbers, and outlive the call.
    match unsafe { bpf(BPF_PROG_QUERY, &mut attributes) } {
        // Nothing was ever attached there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        queried => queried?,
    };
    let count = attributes.prog_cnt.min(MAX) as usize;
    Ok(programs.into_iter().zip(links).take(count).collect())
}

/// Replaces the program of a link, atomically: no connect(2) runs without one.
///
/// Without `BPF_F_REPLACE`: opening the old program by its id takes CAP_SYS_ADMIN, and the lock on the pin
/// directory already keeps a second writer away.
///
/// # Errors
/// bpf(2)'s; `ENOLINK` when the cgroup was removed.
pub(super) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct LinkUpdate {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attributes = LinkUpdate {
        link_fd: number(link.as_fd()),
        new_prog_fd: number(program.as_fd()),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Detaches a link's program at once. The link object stays, without a program (Linux 5.9).
///
/// # Errors
/// bpf(2)'s.
pub(super) fn link_detach(link: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct LinkDetach {
        link_fd: u32,
    }
    let mut attributes = LinkDetach { link_fd: number(link.as_fd()) };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

/// The `query` member of `union bpf_attr`.
#[repr(C)]
struct ProgQuery {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    reserved: u32,
}

/// Asks what is attached at a hook of this very cgroup. Numbers of programs go to `ids`; an empty slice asks
/// for the count and the flags alone.
fn query(cgroup: BorrowedFd<'_>, hook: u32, ids: &mut [u32]) -> io::Result<ProgQuery> {
    let mut attributes = ProgQuery {
        target_fd: number(cgroup),
        attach_type: hook,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: if ids.is_empty() { 0 } else { ids.as_mut_ptr() as u64 },
        prog_cnt: u32::try_from(ids.len()).map_err(io::Error::other)?,
        reserved: 0,
    };
    // SAFETY: `prog_ids` points to `prog_cnt` writable numbers, or is null.
    unsafe { bpf(BPF_PROG_QUERY, &mut attributes) }?;
    Ok(attributes)
}

/// The flags with which programs are attached at a hook of this cgroup itself; `None` when there is no
/// program.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn attach_flags(cgroup: impl AsFd, hook: u32) -> io::Result<Option<u32>> {
    let found = query(cgroup.as_fd(), hook, &mut [])?;
    Ok((found.prog_cnt > 0).then_some(found.attach_flags))
}

/// The numbers of the programs at a hook of this very cgroup.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn program_ids(cgroup: impl AsFd, hook: u32) -> io::Result<Vec<u32>> {
    /// `BPF_CGROUP_MAX_PROGS`, include/linux/bpf-cgroup.h.
    const MAX: usize = 64;
    let mut ids = [0; MAX];
    let found = query(cgroup.as_fd(), hook, &mut ids)?.prog_cnt;
    Ok(ids.into_iter().take(usize::try_from(found).unwrap_or(MAX)).collect())
}

/// The name of a program, which the kernel cuts to 15 bytes. Takes CAP_SYS_ADMIN.
///
/// # Errors
/// bpf(2)'s; [`io::ErrorKind::NotFound`] when the program no longer exists.
pub(super) fn program_name(id: u32) -> io::Result<String> {
    #[repr(C)]
    struct GetId {
        prog_id: u32,
        next_id: u32,
        open_flags: u32,
    }
    /// `struct bpf_prog_info`, up to the name.
    #[repr(C)]
    #[derive(Default)]
    struct ProgInfo {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        jited_prog_len: u32,
        xlated_prog_len: u32,
        jited_prog_insns: u64,
        xlated_prog_insns: u64,
        load_time: u64,
        created_by_uid: u32,
        nr_map_ids: u32,
        map_ids: u64,
        name: [u8; 16],
    }
    let mut attributes = GetId { prog_id: id, next_id: 0, open_flags: 0 };
    // SAFETY: no pointers.
    let fd = unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes) }?;
    // SAFETY: this command makes a descriptor.
    let program = unsafe { descriptor(fd) }?;
    // SAFETY: integers only.
    let info: ProgInfo = unsafe { info(program.as_fd()) }?;
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h), Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of the network namespace in which a socket was made.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub(super) fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let (mut cookie, mut length): (u64, libc::socklen_t) = (0, u64::BITS / 8);
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, and the written length to `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
