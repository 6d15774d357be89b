//! The few bpf(2) commands that aya 0.14 does not offer for cgroup links. Called by `links`, `remove` and `attachment`.
//! And a child that connects from another cgroup, for `probe`.

#![expect(unsafe_code, reason = "raw system calls")]

use std::{
    ffi::CString,
    io,
    net::SocketAddrV4,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    net::{
        AddressFamily, SocketType,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{WaitOptions, waitpid},
};

// Command numbers: include/uapi/linux/bpf.h, enum bpf_cmd.
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Calls bpf(2).
///
/// # Safety
/// `A` must be a prefix of the kernel's `union bpf_attr` for `command`, `repr(C)`, without padding, and every pointer in it valid for the call. (The kernel
/// takes the size as an argument and reads the rest as zeros.)
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
    /// The cgroup that the link is attached to; 0 once that is gone, or somebody detached the link.
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

/// Tells what a link is attached to.
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
    /// The index of the device, in whatever namespace that is; 0 once it is gone, or somebody detached the link.
    pub(super) device: u32,
    attach_type: u32,
}

/// Tells what a tcx link is attached to.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn tcx_info(link: impl AsFd) -> io::Result<TcxInfo> {
    // SAFETY: integers only.
    unsafe { info(link.as_fd()) }
}

/// `BPF_TCX_EGRESS` of include/uapi/linux/bpf.h, enum bpf_attach_type. Linux 6.6.
const BPF_TCX_EGRESS: u32 = 47;

/// Attaches a program to egress of a device of the calling thread's network namespace, before all others, for as
/// long as the link is open or pinned, or the device there.
///
/// # Errors
/// bpf(2)'s; `ENODEV` when there is no such device.
pub(super) fn tcx_create(program: impl AsFd, device: u32) -> io::Result<OwnedFd> {
    /// Before the first one, where no other is named.
    const BPF_F_BEFORE: u32 = 1 << 3;
    create_link(program.as_fd(), device, BPF_TCX_EGRESS, BPF_F_BEFORE)
}

/// The programs on egress of a device of the calling thread's network namespace, in their order, each with the
/// number of its link (0 without one).
///
/// # Errors
/// bpf(2)'s; `ENODEV` when there is no such device.
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
/// Without `BPF_F_REPLACE`: opening the old program by its id takes CAP_SYS_ADMIN, and the lock on the pin directory already
/// keeps a second writer away.
///
/// # Errors
/// bpf(2)'s; `ENOLINK` when the cgroup is gone.
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

/// Takes a link's program out of force at once, while the link lives on without one (Linux 5.9).
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

/// The flags with which programs are attached at a hook of this very cgroup; `None` when there is no program.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn attach_flags(cgroup: impl AsFd, hook: u32) -> io::Result<Option<u32>> {
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
    let mut attributes = ProgQuery {
        target_fd: number(cgroup.as_fd()),
        attach_type: hook,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: 0, // the count and the flags will do
        prog_cnt: 0,
        reserved: 0,
    };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_PROG_QUERY, &mut attributes) }?;
    Ok((attributes.prog_cnt > 0).then_some(attributes.attach_flags))
}

/// What a child makes of its socket.
#[derive(Clone, Copy, Debug)]
pub(super) enum Attempt {
    /// No packet comes of it.
    Datagram,
    /// Waits for the handshake, within whole seconds.
    Stream(std::time::Duration),
}

/// Connects a socket in a child process, which joins the cgroup of `procs` before: what connect(2) said there.
///
/// # Errors
/// When there was no child, or it could not join or make a socket.
pub(super) fn connect_in_child(
    procs: Option<BorrowedFd<'_>>,
    to: SocketAddrV4,
    attempt: Attempt,
) -> io::Result<io::Result<()>> {
    // SAFETY: the child of a process with threads may only do what is safe in a signal handler: system calls, and nothing that allocates.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = join_and_connect(procs, to, attempt);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(status) };
    }
    let Some(child) = rustix::process::Pid::from_raw(child).filter(|_| child > 0) else {
        return Err(io::Error::last_os_error());
    };
    let waited = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))?;
    match waited.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(Ok(())),
        Some(errno) if errno != UNABLE => Ok(Err(io::Error::from_raw_os_error(errno))),
        _ => Err(io::Error::other("the child could not try")),
    }
}

/// An exit status that is no error number; those are what the child ends with, or 0.
const UNABLE: i32 = 255;

/// What the child does.
fn join_and_connect(procs: Option<BorrowedFd<'_>>, to: SocketAddrV4, attempt: Attempt) -> i32 {
    if procs.is_some_and(|procs| rustix::io::write(procs, b"0").is_err()) {
        return UNABLE;
    }
    let kind = match attempt {
        Attempt::Datagram => SocketType::DGRAM,
        Attempt::Stream(_) => SocketType::STREAM,
    };
    let Ok(socket) = rustix::net::socket(AddressFamily::INET, kind, None) else { return UNABLE };
    // Also bounds connect(2), socket(7).
    if let Attempt::Stream(patience) = attempt
        && set_socket_timeout(&socket, Timeout::Send, Some(patience)).is_err()
    {
        return UNABLE;
    }
    rustix::net::connect(&socket, &to).map_or_else(rustix::io::Errno::raw_os_error, |()| 0)
}
