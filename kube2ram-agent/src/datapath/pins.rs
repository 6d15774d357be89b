//! Where maps and links are pinned, and the lock that keeps a second agent from writing there. Called by `attach`, `load`, `links` and `remove`.
//!
//! Pins outlive the agent: that is what fails closed. Nothing but `remove` removes one.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use kube2ram_common::abi::ABI_VERSION;
use rustix::fs::{FlockOperation, flock, statfs};

use super::{DatapathError, io_error};

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The right to write to the pins: an exclusive lock of their directory. It holds as long as any copy of it is open, in whatever process, so
/// that it can be handed to another one without being free in between.
#[derive(Debug)]
pub struct Lock {
    directory: File,
    bpf_dir: PathBuf,
}

impl Lock {
    /// Makes the directory, for root's eyes only (from Linux 6.1 on, the file mode is the only guard of a pin), and takes the lock.
    ///
    /// # Errors
    /// [`DatapathError::Locked`] when an agent has it.
    pub fn take(bpf_dir: &Path) -> Result<Self, DatapathError> {
        check_bpffs(bpf_dir)?;
        fs::create_dir_all(bpf_dir).map_err(io_error("create", bpf_dir))?;
        fs::set_permissions(bpf_dir, Permissions::from_mode(0o700)).map_err(io_error("protect", bpf_dir))?;
        Self::of_existing(bpf_dir)
    }

    /// Takes the lock of a directory that exists.
    pub(super) fn of_existing(bpf_dir: &Path) -> Result<Self, DatapathError> {
        check_bpffs(bpf_dir)?;
        let directory = File::open(bpf_dir).map_err(io_error("open", bpf_dir))?;
        let lock = Self { directory, bpf_dir: bpf_dir.to_owned() };
        lock.hold()?;
        Ok(lock)
    }

    /// Takes over the lock that another agent holds and passed on.
    ///
    /// # Errors
    /// When it is not this directory's, or a third process has it.
    pub fn adopt(bpf_dir: &Path, passed: OwnedFd) -> Result<Self, DatapathError> {
        let passed = File::from(passed);
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let expected = fs::metadata(bpf_dir).map(identity).map_err(io_error("examine", bpf_dir))?;
        if passed.metadata().map(identity).map_err(io_error("examine", bpf_dir))? != expected {
            return Err(DatapathError::ForeignLock(bpf_dir.to_owned()));
        }
        let lock = Self { directory: passed, bpf_dir: bpf_dir.to_owned() };
        lock.hold()?; // a matter of form where the former agent has it: the lock is the open file's, and so is ours
        Ok(lock)
    }

    /// The same lock once more.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn try_clone(&self) -> Result<Self, DatapathError> {
        let directory = self.directory.try_clone().map_err(io_error("open", &self.bpf_dir))?;
        Ok(Self { directory, bpf_dir: self.bpf_dir.clone() })
    }

    fn hold(&self) -> Result<(), DatapathError> {
        flock(&self.directory, FlockOperation::NonBlockingLockExclusive).map_err(
            |error| match io::Error::from(error) {
                error if error.kind() == io::ErrorKind::WouldBlock => {
                    DatapathError::Locked(self.bpf_dir.clone())
                }
                error => io_error("lock", &self.bpf_dir)(error),
            },
        )
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The pin directory, locked by this agent unless it only looks.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    _lock: Option<Lock>,
}

impl Pins {
    /// Makes the directories.
    pub(super) fn open(lock: Lock) -> Result<Self, DatapathError> {
        let pins = Self { directory: layout(&lock.bpf_dir), _lock: Some(lock) };
        for kind in ["maps", "links/agent", "links/pods", "links/root"] {
            let path = pins.directory.join(kind);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        Ok(pins)
    }

    /// Those of an agent that runs: to look at, not to be changed.
    pub(super) fn of_running(bpf_dir: &Path) -> Self {
        Self { directory: layout(bpf_dir), _lock: None }
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// `place` tells apart the links of one program: `pods`, `agent` or `root`.
    pub(super) fn link(&self, place: &str, program: &str) -> PathBuf {
        self.directory.join("links").join(place).join(program)
    }
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

fn layout(bpf_dir: &Path) -> PathBuf {
    bpf_dir.join(format!("v{ABI_VERSION}"))
}
