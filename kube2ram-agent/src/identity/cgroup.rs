//! Cgroup id → path → pod, by opening the id as a file handle: one system call in each direction, without a
//! walk or a cache. Depends on `cgroup_path`; called by `server` once per connection of the host listener.
//! The module's only unsafe code.

use std::{
    io, mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

use super::{
    CgroupId, CgroupPods, IdentityError, MountError, PodUid,
    cgroup_path::{QOS_CLASSES, is_qos_cgroup},
    pod_of_path,
};

/// The host's cgroup2 tree, as seen through one mount.
#[derive(Debug)]
pub struct CgroupTree {
    mount: OwnedFd,
    root: PathBuf,
    /// Relative to `root`.
    pods: Vec<PathBuf>,
}

impl CgroupTree {
    /// Opens the tree mounted at `root`, whose pods live below each of `pods` (absolute paths, below `root`,
    /// which need not exist).
    ///
    /// # Errors
    /// [`MountError::Outside`] when one of `pods` is not below `root`, [`MountError::Read`] when `root` does
    /// not open.
    pub fn open(root: &Path, pods: &[PathBuf]) -> Result<Self, MountError> {
        let below = |pods: &PathBuf| {
            let below = pods.strip_prefix(root).ok().filter(|below| below.file_name().is_some());
            let outside = || MountError::Outside { path: pods.clone(), root: root.into() };
            below.map(Path::to_owned).ok_or_else(outside)
        };
        let pods = pods.iter().map(below).collect::<Result<_, _>>()?;
        let mount = rustix::fs::open(root, OPEN_FLAGS, Mode::empty())
            .map_err(|source| MountError::Read { path: root.into(), source: source.into() })?;
        Ok(Self { mount, root: root.into(), pods })
    }

    /// The path of a cgroup, relative to the mount.
    fn path_of(&self, id: CgroupId) -> Result<PathBuf, IdentityError> {
        let open_error = |source: io::Error| match source.raw_os_error() {
            Some(libc::ESTALE) => IdentityError::Gone(id),
            _ => IdentityError::Open { id, source },
        };
        let cgroup = open_by_id(&self.mount, id).map_err(open_error)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", cgroup.as_raw_fd())).map_err(open_error)?;
        // Removed between the two calls: the kernel appends this to the path (d_path, fs/d_path.c).
        if path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)") {
            return Err(IdentityError::Gone(id));
        }
        match path.strip_prefix(&self.root) {
            Ok(below) => Ok(below.into()),
            // The cgroup is not reachable through this mount, so its pod is unknown.
            Err(_) => Err(IdentityError::NoPod { path }),
        }
    }
}

impl CgroupPods for CgroupTree {
    fn pod_of(&self, cgroup: CgroupId) -> Result<PodUid, IdentityError> {
        let path = self.path_of(cgroup)?;
        let pod = self.pods.iter().find_map(|pods| pod_of_path(&path, pods));
        pod.ok_or(IdentityError::NoPod { path })
    }
}

/// The id of the cgroup whose directory is `path`: its inode number, as on every kernel from 5.5 (kernfs,
/// 40430452fd5d).
///
/// # Errors
/// stat(2)'s.
pub fn cgroup_id(path: &Path) -> io::Result<CgroupId> {
    Ok(CgroupId(std::fs::metadata(path)?.ino()))
}

/// The ids of the cgroups directly below the pods' that hold the pods of one quality of service, as far as
/// they are there.
///
/// # Errors
/// When the pods' cgroup cannot be read.
pub fn qos_cgroups(pods: &Path) -> io::Result<[Option<CgroupId>; QOS_CLASSES.len()]> {
    let mut ids = [None; QOS_CLASSES.len()];
    let mut free = ids.iter_mut();
    for entry in std::fs::read_dir(pods)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| is_qos_cgroup(name, pods))
            && let Some(id) = free.next()
        {
            *id = Some(CgroupId(std::os::unix::fs::DirEntryExt::ino(&entry)));
        }
    }
    // In whatever order the directory is read.
    ids.sort_unstable();
    Ok(ids)
}

const OPEN_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// `struct file_handle` with the 8 bytes that kernfs puts in it (`FILEID_KERNFS`, include/linux/exportfs.h).
#[repr(C)]
struct KernfsHandle {
    header: libc::file_handle,
    id: u64,
}

const HANDLE_BYTES: u32 = 8;
const FILEID_KERNFS: i32 = 0xfe;
const _: () = assert!(
    size_of::<KernfsHandle>() == 16 && mem::offset_of!(KernfsHandle, id) == 8,
    "the id directly follows the two 32-bit fields"
);

fn open_by_id(mount: &OwnedFd, id: CgroupId) -> io::Result<OwnedFd> {
    let header = libc::file_handle { handle_bytes: HANDLE_BYTES, handle_type: FILEID_KERNFS, f_handle: [] };
    let mut handle = KernfsHandle { header, id: id.0 };
    #[expect(unsafe_code, reason = "rustix has no open_by_handle_at")]
    // SAFETY: the pointer is to a whole `KernfsHandle`, so the `handle_bytes` behind the header are readable;
    // the kernel reads it only during the call, and `mount` is open for as long.
    let fd = unsafe {
        libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), OPEN_FLAGS.bits().cast_signed())
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    #[expect(unsafe_code, reason = "a new descriptor has to be given an owner")]
    // SAFETY: the call above returned this descriptor as new, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd)
}
