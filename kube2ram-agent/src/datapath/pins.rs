//! Where maps and links are pinned, and the lock that keeps a second agent from writing there. Called by `attach`, `load`, `links` and `remove`.
//!
//! Pins outlive the agent: that is what fails closed. Nothing but `remove` removes one.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use kube2ram_common::abi::ABI_VERSION;
use rustix::fs::{FlockOperation, flock, statfs};

use super::{DatapathError, io_error};

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The pin directory, locked by this agent.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    _lock: File,
}

impl Pins {
    /// Makes the directories, for root's eyes only (from Linux 6.1 on, the file mode is the only guard of a pin), and takes the lock.
    pub(super) fn open(bpf_dir: &Path) -> Result<Self, DatapathError> {
        create(bpf_dir)?;
        let lock = lock(bpf_dir)?;
        let directory = bpf_dir.join(format!("v{ABI_VERSION}"));
        for kind in ["maps", "links/agent", "links/pods", "links/root"] {
            let path = directory.join(kind);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        Ok(Self { directory, _lock: lock })
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// `place` tells apart the links of one program: `pods`, `agent` or `root`.
    pub(super) fn link(&self, place: &str, program: &str) -> PathBuf {
        self.directory.join("links").join(place).join(program)
    }
}

/// Makes the directory, for root's eyes only.
pub(super) fn create(bpf_dir: &Path) -> Result<(), DatapathError> {
    check_bpffs(bpf_dir)?;
    fs::create_dir_all(bpf_dir).map_err(io_error("create", bpf_dir))?;
    fs::set_permissions(bpf_dir, Permissions::from_mode(0o700)).map_err(io_error("protect", bpf_dir))
}

/// Checks that the directory is, or would be, on a bpf file system.
///
/// # Errors
/// [`DatapathError::BpfFs`] when it is not, [`DatapathError::Io`] when nobody can tell.
pub fn check_bpffs(bpf_dir: &Path) -> Result<(), DatapathError> {
    let parent = bpf_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let magic = statfs(parent).map_err(|error| io_error("examine", parent)(error.into()))?.f_type;
    if u64::try_from(magic) == Ok(BPF_FS_MAGIC) {
        Ok(())
    } else {
        Err(DatapathError::BpfFs(bpf_dir.to_owned()))
    }
}

/// Takes the lock of a directory that exists. It is held as long as the file is open.
pub(super) fn lock(bpf_dir: &Path) -> Result<File, DatapathError> {
    check_bpffs(bpf_dir)?;
    let lock = File::open(bpf_dir).map_err(io_error("open", bpf_dir))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match io::Error::from(error) {
        error if error.kind() == io::ErrorKind::WouldBlock => DatapathError::Locked(bpf_dir.to_owned()),
        error => io_error("lock", bpf_dir)(error),
    })?;
    Ok(lock)
}
