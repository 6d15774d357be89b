//! Where maps and links are pinned, and the lock that keeps a second agent from writing there. Called by `attach`, `load`, `links`, `maps`, `repair` and
//! `remove`.
//!
//! Pins outlive the agent: that is what fails closed. Nothing but `remove` takes one away for good.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock, statfs};

use super::{DatapathError, Layout, io_error, sys};

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The pin directory of one map layout, locked by this agent together with those of all other layouts.
#[derive(Debug)]
pub(super) struct Pins {
    bpf_dir: PathBuf,
    layout: Layout,
    lock: File,
}

/// How often a directory that others remove is made.
const ATTEMPTS: u8 = 8;

impl Pins {
    /// Makes the directories, for root's eyes only (from Linux 6.1 on, the file mode is the only guard of a pin), and takes the lock.
    pub(super) fn open(bpf_dir: &Path, layout: Layout) -> Result<Self, DatapathError> {
        check_bpffs(bpf_dir)?;
        let lock = lock_made(bpf_dir)?;
        let pins = Self { bpf_dir: bpf_dir.to_owned(), layout, lock };
        for path in pins.directories() {
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        Ok(pins)
    }

    /// Makes the directories again, and takes the lock again, if somebody removed the directory that is locked.
    ///
    /// # Errors
    /// [`DatapathError::Locked`] when another agent was faster.
    pub(super) fn restore(&mut self) -> Result<(), DatapathError> {
        if !is_at(&self.lock, &self.bpf_dir)? {
            *self = Self::open(&self.bpf_dir, self.layout)?;
        }
        Ok(())
    }

    pub(super) fn bpf_dir(&self) -> &Path {
        &self.bpf_dir
    }

    /// Where this layout's pins are.
    pub(super) fn directory(&self) -> PathBuf {
        self.bpf_dir.join(format!("v{}", self.layout.0))
    }

    /// The directories that hold them.
    pub(super) fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let directory = self.directory();
        ["maps", "links/agent", "links/pods", "links/root"].into_iter().map(move |kind| directory.join(kind))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory().join("maps").join(name)
    }

    /// `place` tells apart the links of one program: `pods`, `agent` or `root`.
    pub(super) fn link(&self, place: &str, program: &str) -> PathBuf {
        self.directory().join("links").join(place).join(program)
    }
}

/// Pins an object unless it is pinned there already, and tells whether something was done. What else is pinned there gives way.
pub(super) fn ensure_pinned(
    object: impl AsFd,
    path: &Path,
    is_ours: impl FnOnce(&OwnedFd) -> io::Result<bool>,
) -> Result<bool, DatapathError> {
    match sys::open_pinned(path) {
        Ok(pinned) => {
            if is_ours(&pinned).map_err(io_error("examine", path))? {
                return Ok(false);
            }
            remove(path)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            check_bpffs(path)?;
            let parent = path.parent().unwrap_or(path);
            fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        }
        Err(error) => return Err(io_error("open", path)(error)),
    }
    sys::pin(object, path).map_err(io_error("pin", path))?;
    Ok(true)
}

/// Removes a pin if it is there. The kernel frees what nobody else holds.
pub(super) fn remove(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", pin)(error)),
        _ => Ok(()),
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

/// Takes the lock of a directory; `None` when there is none. It is held as long as the file is open.
///
/// An uninstall may remove the directory between the opening and the locking: such a lock would keep nobody away.
pub(super) fn lock(bpf_dir: &Path) -> Result<Option<File>, DatapathError> {
    for _ in 0..ATTEMPTS {
        let lock = match File::open(bpf_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            lock => lock.map_err(io_error("open", bpf_dir))?,
        };
        check_bpffs(bpf_dir)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match io::Error::from(error) {
                error if error.kind() == io::ErrorKind::WouldBlock => {
                    DatapathError::Locked(bpf_dir.to_owned())
                }
                error => io_error("lock", bpf_dir)(error),
            }
        })?;
        if is_at(&lock, bpf_dir)? {
            return Ok(Some(lock));
        }
    }
    Err(DatapathError::Locked(bpf_dir.to_owned()))
}

/// Takes the lock of a directory, which is made where there is none.
pub(super) fn lock_made(bpf_dir: &Path) -> Result<File, DatapathError> {
    for _ in 0..ATTEMPTS {
        fs::create_dir_all(bpf_dir).map_err(io_error("create", bpf_dir))?;
        if let Some(lock) = lock(bpf_dir)? {
            fs::set_permissions(bpf_dir, Permissions::from_mode(0o700))
                .map_err(io_error("protect", bpf_dir))?;
            return Ok(lock);
        }
    }
    Err(DatapathError::Locked(bpf_dir.to_owned()))
}

/// Whether an open directory is what stands at a path now.
fn is_at(directory: &File, path: &Path) -> Result<bool, DatapathError> {
    let ours = directory.metadata().map_err(io_error("examine", path))?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("examine", path)(error)),
    }
}
