//! The directory that the agents of one node share: root's alone, on a tmpfs, so that what it holds ends with
//! the boot. Depends on nothing of ours; opened by `app`, which hands out what is in it.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        Access, AtFlags, CWD, FlockOperation, Mode, OFlags, accessat, flock, fstatfs, linkat, open, openat,
        unlinkat,
    },
    io::Errno,
    process::geteuid,
    rand::{GetRandomFlags, getrandom},
};
use secrecy::{ExposeSecret as _, ExposeSecretMut as _, SecretBox};

/// A secret of this boot.
pub type Secret = SecretBox<[u8; SECRET_BYTES]>;

const SECRET_BYTES: usize = 32;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC`, include/uapi/linux/magic.h.
const VOLATILE_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// The mode bits that the directory, and a secret in it, must not have.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const OPEN_TO_OTHERS: u32 = 0o077;

/// Why the directory is not used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// An agent uses it, or `kube2ram uninstall` does.
    #[error("{} is in use by another kube2ram process", .0.display())]
    InUse(PathBuf),
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another user could have written there.
    #[error("{} is not a directory that only root can write: remove it, or set --state-dir", .0.display())]
    NotOurs(PathBuf),
}

/// The directory, checked and held open.
#[derive(Debug)]
pub struct StateDir {
    directory: OwnedFd,
    path: PathBuf,
    is_volatile: bool,
}

impl StateDir {
    /// Opens the directory, if it is there.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn existing(path: &Path) -> Result<Option<Self>, StateDirError> {
        match Self::open_made(path) {
            Err(StateDirError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// Opens the directory, and makes it, for this user alone, when it is missing.
    ///
    /// # Errors
    /// [`StateDirError::NotOurs`] when it is a symlink or no directory, another user's, or writable by
    /// others; then its content cannot be trusted. [`StateDirError::Io`] otherwise.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let failed = |what| move |source| StateDirError::Io { what, path: path.to_owned(), source };
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create")(error)),
            _ => Self::open_made(path),
        }
    }

    fn open_made(path: &Path) -> Result<Self, StateDirError> {
        let failed = |what| move |source| StateDirError::Io { what, path: path.to_owned(), source };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match open(path, flags, Mode::empty()).map_err(io::Error::from) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {
                return Err(StateDirError::NotOurs(path.to_owned()));
            }
            opened => opened.map_err(failed("open"))?,
        };
        let metadata = File::from(directory.try_clone().map_err(failed("open"))?)
            .metadata()
            .map_err(failed("examine"))?;
        if !is_ours(&metadata, WRITABLE_BY_OTHERS) {
            return Err(StateDirError::NotOurs(path.to_owned()));
        }
        let kind = fstatfs(&directory).map_err(|error| failed("examine")(error.into()))?.f_type;
        let is_volatile = u64::try_from(kind).is_ok_and(|kind| VOLATILE_FILE_SYSTEMS.contains(&kind));
        Ok(Self { directory, path: path.to_owned(), is_volatile })
    }

    /// Fails where nothing can be written, such as on a read-only file system.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn require_writable(&self) -> Result<(), StateDirError> {
        let writable = accessat(&self.directory, ".", Access::WRITE_OK, AtFlags::empty());
        writable.map_err(|error| StateDirError::Io {
            what: "write to",
            path: self.path.clone(),
            source: error.into(),
        })
    }

    /// Marks the directory as used by an agent, for as long as it is open, so that [`Self::claim`] fails.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] while `kube2ram uninstall` runs; [`StateDirError::Io`].
    pub fn hold(&self) -> Result<(), StateDirError> {
        self.lock(FlockOperation::NonBlockingLockShared)
    }

    /// Keeps agents away, for as long as it is open.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] when an agent runs, serving or standing by; [`StateDirError::Io`].
    pub fn claim(&self) -> Result<(), StateDirError> {
        self.lock(FlockOperation::NonBlockingLockExclusive)
    }

    fn lock(&self, operation: FlockOperation) -> Result<(), StateDirError> {
        flock(&self.directory, operation).map_err(|error| match error {
            Errno::WOULDBLOCK => StateDirError::InUse(self.path.clone()),
            error => StateDirError::Io { what: "lock", path: self.path.clone(), source: error.into() },
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path by which a socket in it can be bound and dialled: short enough for a socket's address however
    /// deep the directory is, and it leads into the directory that was checked.
    pub fn socket(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Whether what it holds is in memory only, and ends with the boot.
    pub fn is_volatile(&self) -> bool {
        self.is_volatile
    }

    /// The secret of this name: the one of the node's previous agent, or a new one. If the directory is not
    /// [volatile](Self::is_volatile), it is always a new one and never stored. To change it, remove its file
    /// and restart the agent.
    ///
    /// # Errors
    /// [`StateDirError::Io`].
    pub fn secret(&self, name: &str) -> Result<Secret, StateDirError> {
        let failed = |what| move |source| StateDirError::Io { what, path: self.path.join(name), source };
        let fresh = random().map_err(failed("make random bytes for"))?;
        if !self.is_volatile {
            return Ok(fresh);
        }
        if let Some(kept) = self.read(name).map_err(failed("read"))? {
            return Ok(kept);
        }
        self.write(name, &fresh).map_err(failed("write"))?;
        // Two agents may start at once: the first writer's secret counts.
        Ok(self.read(name).map_err(failed("read"))?.unwrap_or(fresh))
    }

    /// `None` when there is no trustworthy one; an untrustworthy file is removed.
    fn read(&self, name: &str) -> io::Result<Option<Secret>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = match openat(&self.directory, name, flags, Mode::empty()).map_err(io::Error::from) {
            Ok(file) => File::from(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return self.remove(name),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        let length = u64::try_from(SECRET_BYTES).unwrap_or(u64::MAX);
        if !metadata.is_file() || !is_ours(&metadata, OPEN_TO_OTHERS) || metadata.len() != length {
            return self.remove(name);
        }
        let mut secret = Secret::new(Box::new([0; SECRET_BYTES]));
        file.read_exact(secret.expose_secret_mut())?;
        Ok(Some(secret))
    }

    fn remove(&self, name: &str) -> io::Result<Option<Secret>> {
        unlinkat(&self.directory, name, AtFlags::empty())?;
        Ok(None)
    }

    /// Writes a whole file or none, and none over another: the file has no name until it is complete.
    fn write(&self, name: &str, secret: &Secret) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mut file = File::from(openat(&self.directory, ".", flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(secret.expose_secret())?;
        let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(CWD, nameless, &self.directory, name, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_ours(metadata: &Metadata, forbidden: u32) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & forbidden == 0
}

fn random() -> io::Result<Secret> {
    let mut secret = Secret::new(Box::new([0; SECRET_BYTES]));
    // The kernel fills up to 256 bytes at once, or none.
    getrandom(secret.expose_secret_mut().as_mut_slice(), GetRandomFlags::empty())?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// On a tmpfs, as the agent's own.
    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn key(path: &Path) -> [u8; SECRET_BYTES] {
        *StateDir::open(path).unwrap().secret("key").unwrap().expose_secret()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn makes_a_directory_for_its_user_alone_and_takes_one_that_only_it_can_write() {
        let scratch = scratch();
        let path = scratch.path().join("state");

        assert_eq!(StateDir::open(&path).unwrap().path(), path);
        assert_eq!(mode(&path), 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(StateDir::open(&path).unwrap().is_volatile());
    }

    #[test]
    fn refuses_what_others_could_have_written() {
        let scratch = scratch();
        let path = scratch.path().join("state");
        let refused = |path: &Path| matches!(StateDir::open(path), Err(StateDirError::NotOurs(_)));
        fs::create_dir(&path).unwrap();
        symlink(&path, scratch.path().join("link")).unwrap();
        fs::write(scratch.path().join("file"), "").unwrap();

        assert!(!refused(&path), "the allowed twin");
        assert!(refused(&scratch.path().join("link")));
        assert!(refused(&scratch.path().join("file")));
        for mode in [0o770, 0o707, 0o1777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(refused(&path), "{mode:o}");
        }
        assert!(matches!(
            StateDir::open(&scratch.path().join("a/b")),
            Err(StateDirError::Io { what: "create", .. })
        ));
    }

    #[test]
    fn agents_share_it_and_keep_an_uninstallation_away() {
        let scratch = scratch();
        let path = scratch.path().join("state");
        let open = || StateDir::open(&path).unwrap();
        let in_use = |outcome| matches!(outcome, Err(StateDirError::InUse(_)));

        let (one, other) = (open(), open());
        one.hold().unwrap();
        other.hold().unwrap();
        assert!(in_use(open().claim()));
        drop(one);
        assert!(in_use(open().claim()));
        drop(other);

        let uninstallation = open();
        uninstallation.claim().unwrap();
        assert!(in_use(open().hold()));
        drop(uninstallation);
        open().hold().unwrap();
    }

    #[test]
    fn keeps_a_secret_for_the_next_agent_and_makes_another_for_another_name() {
        let scratch = scratch();
        let path = scratch.path().join("state");

        let first = key(&path);

        assert_eq!(key(&path), first);
        assert_eq!(mode(&path.join("key")), 0o600);
        assert_ne!(*StateDir::open(&path).unwrap().secret("other").unwrap().expose_secret(), first);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 2, "no drafts");
        fs::remove_file(path.join("key")).unwrap();
        assert_ne!(key(&path), first, "rotated");
    }

    #[test]
    fn replaces_a_secret_that_cannot_be_believed() {
        let scratch = scratch();
        let path = scratch.path().join("state");
        let first = key(&path);
        let file = path.join("key");

        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let second = key(&path);
        fs::write(&file, "short").unwrap();
        let third = key(&path);
        fs::rename(&file, path.join("elsewhere")).unwrap();
        symlink(path.join("elsewhere"), &file).unwrap();
        let fourth = key(&path);

        assert!(first != second && second != third && third != fourth);
        assert_eq!(key(&path), fourth);
    }

    #[test]
    fn agents_that_start_at_once_have_one_secret() {
        let scratch = scratch();
        let path = &scratch.path().join("state");

        let keys: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(move || key(path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });

        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn writes_no_secret_to_a_disk() {
        let scratch = scratch();
        let state = StateDir { is_volatile: false, ..StateDir::open(&scratch.path().join("state")).unwrap() };

        let first = *state.secret("key").unwrap().expose_secret();

        assert_ne!(*state.secret("key").unwrap().expose_secret(), first);
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
