//! Files that others read while they change: each is there as a whole or not at all. Depends on nothing;
//! called by `tls` and `client`.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use secrecy::zeroize::Zeroizing;
use uuid::Uuid;

/// Modes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// For everybody to read.
    Public,
    /// For this user alone.
    Secret,
}

impl Mode {
    fn bits(self) -> u32 {
        match self {
            Self::Public => 0o644,
            Self::Secret => 0o600,
        }
    }
}

/// Writes a whole file, over another one if there is one. A reader sees the old or the new content.
pub(crate) fn replace(path: &Path, content: &[u8], mode: Mode) -> io::Result<()> {
    let draft = draft_of(path);
    let written = write(&draft, content, mode).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // It may not have come into being.
        drop(fs::remove_file(&draft));
    }
    written
}

fn write(draft: &Path, content: &[u8], mode: Mode) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode.bits()).open(draft)?;
    // Whatever the umask takes away or a default access list of the directory adds.
    file.set_permissions(Permissions::from_mode(mode.bits()))?;
    file.write_all(content)?;
    file.sync_all()
}

/// In the same directory, as a rename must not leave its file system.
fn draft_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", Uuid::new_v4().as_simple()));
    path.with_file_name(name)
}

/// Reads a regular file of at most `limit_bytes`, into memory that is zeroised. `None` when there is none.
pub(crate) fn read(path: &Path, limit_bytes: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    // A FIFO would have the caller wait for a writer.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    // All of it at once: a vector that grows leaves copies behind.
    let mut content = Zeroizing::new(Vec::with_capacity(limit_bytes + 1));
    let limit = u64::try_from(limit_bytes + 1).unwrap_or(u64::MAX);
    file.take(limit).read_to_end(&mut content)?;
    if content.len() > limit_bytes {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than any such file"));
    }
    Ok(Some(content))
}

/// Makes a directory, for this user alone, and those above it, unless they are there.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Keeps other processes that ask for the same lock waiting, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "its descriptor holds the lock")] File);

impl Lock {
    /// Locks a directory.
    pub(crate) fn take(directory: &Path) -> io::Result<Self> {
        let file = File::open(directory)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Duration,
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn replaces_a_file_and_leaves_no_draft() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");

        replace(&path, b"one", Mode::Public).unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (b"one".as_slice(), 0o644));
        replace(&path, b"two", Mode::Secret).unwrap();

        assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (b"two".as_slice(), 0o600));
        assert!(replace(&directory.path().join("none/file"), b"", Mode::Public).is_err());
        fs::create_dir(directory.path().join("directory")).unwrap();
        assert!(replace(&directory.path().join("directory"), b"", Mode::Public).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn reads_regular_files_within_their_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "12345").unwrap();

        assert_eq!(read(&path, 5).unwrap().unwrap().as_slice(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert!(read(&directory.path().join("none"), 5).unwrap().is_none());
        assert!(read(directory.path(), 5).is_err());
    }

    #[test]
    fn a_lock_is_held_until_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let is_free = AtomicBool::new(false);
        let lock = Lock::take(directory.path()).unwrap();

        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let _lock = Lock::take(directory.path()).unwrap();
                assert!(is_free.load(Ordering::SeqCst));
            });
            thread::sleep(Duration::from_millis(50));
            is_free.store(true, Ordering::SeqCst);
            drop(lock);
            waiting.join().unwrap();
        });
    }
}
