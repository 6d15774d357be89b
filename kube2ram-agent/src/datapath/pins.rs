//! Where maps and links are pinned, and the lock that keeps a second agent from writing there. Called by
//! `attach`, `load`, `links`, `maps`, `repair` and `remove`.
//!
//! Pins outlive the agent, so that pods are denied without one. Only `remove` deletes a pin permanently.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kube2ram_common::names::program;
use rustix::{
    fs::{FlockOperation, flock, statfs},
    io::Errno,
};

use super::{DatapathError, Layout, io_error, sys};

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The right to write to the pins: an exclusive lock of their directory, whatever the layout. It holds as
/// long as any copy of it is open, in whatever process, so that it can be handed to another one without being
/// free in between.
#[derive(Clone, Debug)]
pub struct Lock {
    bpf_dir: PathBuf,
    /// Shared by all clones: if the directory is removed, all of them use the new one.
    directory: Arc<Mutex<File>>,
}

/// How often a directory that another process removes is created again.
const ATTEMPTS: u8 = 8;

impl Lock {
    /// Makes the directory, for root's eyes only (from Linux 6.1 on, the file mode is the only guard of a
    /// pin), and takes the lock.
    ///
    /// # Errors
    /// [`DatapathError::Locked`] when an agent has it.
    pub fn take(bpf_dir: &Path) -> Result<Self, DatapathError> {
        take(bpf_dir).map(|directory| Self::of(bpf_dir, directory))
    }

    /// Takes the lock of a directory; `None` when the directory does not exist.
    pub(super) fn of_existing(bpf_dir: &Path) -> Result<Option<Self>, DatapathError> {
        Ok(take_existing(bpf_dir)?.map(|directory| Self::of(bpf_dir, directory)))
    }

    /// Takes over the lock that another agent holds and passed on.
    ///
    /// # Errors
    /// When it is not this directory's, or a third process has it.
    pub fn adopt(bpf_dir: &Path, passed: OwnedFd) -> Result<Self, DatapathError> {
        let passed = File::from(passed);
        if !is_at(&passed, bpf_dir)? {
            return Err(DatapathError::ForeignLock(bpf_dir.to_owned()));
        }
        hold(&passed, bpf_dir)?; // the outgoing agent has the same lock: it belongs to the open file, which this agent received
        Ok(Self::of(bpf_dir, passed))
    }

    /// What another agent can adopt.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn copy(&self) -> Result<OwnedFd, DatapathError> {
        let directory = self.directory().as_fd().try_clone_to_owned();
        directory.map_err(io_error("open", &self.bpf_dir))
    }

    /// Takes the lock again if the locked directory was removed, and returns whether it did so.
    ///
    /// # Errors
    /// [`DatapathError::Locked`] when another agent was faster.
    fn restore(&self) -> Result<bool, DatapathError> {
        let mut directory = self.directory();
        if is_at(&directory, &self.bpf_dir)? {
            return Ok(false);
        }
        *directory = take(&self.bpf_dir)?;
        Ok(true)
    }

    fn of(bpf_dir: &Path, directory: File) -> Self {
        Self { bpf_dir: bpf_dir.to_owned(), directory: Arc::new(Mutex::new(directory)) }
    }

    fn directory(&self) -> MutexGuard<'_, File> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pin directory of one map layout. This agent has locked it together with those of all other layouts,
/// unless it only reads.
#[derive(Debug)]
pub(super) struct Pins {
    bpf_dir: PathBuf,
    layout: Layout,
    lock: Option<Lock>,
}

impl Pins {
    /// Makes the directories.
    pub(super) fn open(lock: Lock, layout: Layout) -> Result<Self, DatapathError> {
        let pins = Self { bpf_dir: lock.bpf_dir.clone(), layout, lock: Some(lock) };
        pins.make_directories()?;
        Ok(pins)
    }

    /// The pins of a running agent: they may be read but not changed.
    pub(super) fn of_running(bpf_dir: &Path) -> Self {
        Self { bpf_dir: bpf_dir.to_owned(), layout: Layout::OURS, lock: None }
    }

    /// Creates the directories again, and takes the lock again, if the locked directory was removed.
    ///
    /// # Errors
    /// [`DatapathError::Locked`] when another agent was faster.
    pub(super) fn restore(&mut self) -> Result<(), DatapathError> {
        match &self.lock {
            Some(lock) if lock.restore()? => self.make_directories(),
            _ => Ok(()),
        }
    }

    fn make_directories(&self) -> Result<(), DatapathError> {
        self.directories().try_for_each(|path| fs::create_dir_all(&path).map_err(io_error("create", &path)))
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
        let wires = program::WIRES.map(|name| self.attachment_point(name));
        let others = ["maps", "links/agent", "links/pods", "links/root"];
        others.into_iter().map(move |kind| directory.join(kind)).chain(wires)
    }

    /// The directory of one attachment point's links: a cgroup, or the devices that have a program.
    pub(super) fn attachment_point(&self, attachment_point: &str) -> PathBuf {
        self.directory().join("links").join(attachment_point)
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory().join("maps").join(name)
    }

    /// `attachment_point` distinguishes the links of one program: `pods`, `agent` or `root`.
    pub(super) fn link(&self, attachment_point: &str, program: &str) -> PathBuf {
        self.attachment_point(attachment_point).join(program)
    }
}

/// Pins an object unless it is pinned there already, and returns whether it did so. Another object that is
/// pinned there is unpinned.
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

/// Removes a pin if it exists. The kernel then frees an object without other references.
pub(super) fn remove(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", pin)(error)),
        _ => Ok(()),
    }
}

/// Checks that the directory is, or would be, on a bpf file system.
///
/// # Errors
/// [`DatapathError::BpfFs`] when it is not, [`DatapathError::Io`] when it cannot be determined.
pub fn check_bpffs(bpf_dir: &Path) -> Result<(), DatapathError> {
    for path in bpf_dir.ancestors() {
        match statfs(path) {
            Ok(found) if u64::try_from(found.f_type) == Ok(BPF_FS_MAGIC) => return Ok(()),
            Ok(_) => break,
            // Another process may remove it at any time, even now.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(io_error("examine", path)(error.into())),
        }
    }
    Err(DatapathError::BpfFs(bpf_dir.to_owned()))
}

/// Takes the lock of a directory; `None` when the directory does not exist. It is held as long as the file is
/// open.
///
/// An uninstall may remove the directory between opening and locking it: such a lock would exclude no other
/// agent.
fn take_existing(bpf_dir: &Path) -> Result<Option<File>, DatapathError> {
    for _ in 0..ATTEMPTS {
        let directory = match File::open(bpf_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            directory => directory.map_err(io_error("open", bpf_dir))?,
        };
        check_bpffs(bpf_dir)?;
        hold(&directory, bpf_dir)?;
        if is_at(&directory, bpf_dir)? {
            return Ok(Some(directory));
        }
    }
    Err(DatapathError::Locked(bpf_dir.to_owned()))
}

/// Takes the lock of a directory, which is created if it does not exist.
fn take(bpf_dir: &Path) -> Result<File, DatapathError> {
    check_bpffs(bpf_dir)?;
    for _ in 0..ATTEMPTS {
        match fs::create_dir_all(bpf_dir) {
            // The directory existed, and was removed again.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created.map_err(io_error("create", bpf_dir))?,
        }
        if let Some(directory) = take_existing(bpf_dir)? {
            let protected = directory.set_permissions(Permissions::from_mode(0o700));
            return protected.map(|()| directory).map_err(io_error("protect", bpf_dir));
        }
    }
    Err(DatapathError::Locked(bpf_dir.to_owned()))
}

fn hold(directory: &File, bpf_dir: &Path) -> Result<(), DatapathError> {
    flock(directory, FlockOperation::NonBlockingLockExclusive).map_err(|error| match io::Error::from(error) {
        error if error.kind() == io::ErrorKind::WouldBlock => DatapathError::Locked(bpf_dir.to_owned()),
        error => io_error("lock", bpf_dir)(error),
    })
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

/// The directories of all layouts.
pub(super) fn layouts(bpf_dir: &Path) -> Result<Vec<PathBuf>, DatapathError> {
    let mut layouts = children(bpf_dir)?;
    layouts.retain(|path| is_layout(path));
    Ok(layouts)
}

/// `v` and a number: the directory of one map layout.
fn is_layout(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('v'));
    name.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The entries of a directory; none when it does not exist.
pub(super) fn children(directory: &Path) -> Result<Vec<PathBuf>, DatapathError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("read", directory))?,
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(io_error("read", directory))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_layouts_are_ours() {
        for (name, ours) in [("v1", true), ("v12", true), ("v", false), ("v1x", false), ("other", false)] {
            assert_eq!(is_layout(&Path::new("/b").join(name)), ours, "{name}");
        }
    }
}
