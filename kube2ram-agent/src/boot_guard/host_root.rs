//! The host's file system, mounted somewhere: every path is resolved as the host would (openat2(2),
//! `RESOLVE_IN_ROOT`), so that no link of its leads out of it into ours. Called by `boot_guard`.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// Why a file of the host could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub struct HostRootError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A directory and a name in it, relative to the root.
type HostFile<'a> = (&'a str, &'a str);

/// The root directory of the host.
#[derive(Debug)]
pub(super) struct HostRoot(OwnedFd);

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl HostRoot {
    pub(super) fn open(path: &Path) -> Result<Self, HostRootError> {
        fs::open(path, DIRECTORY, Mode::empty()).map(Self).map_err(failed("open", path))
    }

    /// Whether there is such a directory.
    pub(super) fn exists(&self, directory: &str) -> bool {
        self.resolve(directory).is_ok()
    }

    /// Writes a file atomically: readers see the previous file or the new one, whatever fails. Returns
    /// whether it was changed.
    pub(super) fn write(
        &self,
        host_file: HostFile<'_>,
        content: &[u8],
        mode: u32,
    ) -> Result<bool, HostRootError> {
        let directory = self.make(host_file.0)?;
        let mode = Mode::from_raw_mode(mode);
        if holds(&directory, host_file.1, content, mode) {
            return Ok(false);
        }
        self.replace(host_file, &directory, |aside| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(fs::openat(&directory, aside, flags, mode)?);
            file.write_all(content)?;
            fs::fchmod(&file, mode)?; // past the umask
            file.sync_all()
        })?;
        Ok(true)
    }

    /// Creates a symbolic link, and replaces any file with its name. Returns whether it was changed.
    pub(super) fn link(&self, host_file: HostFile<'_>, target: &str) -> Result<bool, HostRootError> {
        let directory = self.make(host_file.0)?;
        if fs::readlinkat(&directory, host_file.1, Vec::new())
            .is_ok_and(|found| found.as_bytes() == target.as_bytes())
        {
            return Ok(false);
        }
        self.replace(host_file, &directory, |aside| Ok(fs::symlinkat(target, &directory, aside)?))?;
        Ok(true)
    }

    /// Removes a file or a link. Returns whether it was there.
    pub(super) fn remove(&self, host_file: HostFile<'_>) -> Result<bool, HostRootError> {
        let directory = match self.resolve(host_file.0) {
            Err(Errno::NOENT) => return Ok(false),
            directory => directory.map_err(failed("open", host_file.0))?,
        };
        match fs::unlinkat(&directory, host_file.1, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(false),
            removed => {
                removed.and_then(|()| fs::fsync(&directory)).map_err(failed("remove", path(host_file)))?;
                Ok(true)
            }
        }
    }

    /// Removes a directory, unless something is in it or it is not there.
    pub(super) fn remove_empty(&self, directory: &str) -> Result<(), HostRootError> {
        let (parent, name) = directory.rsplit_once('/').unwrap_or((".", directory));
        let removed = self.resolve(parent).and_then(|parent| fs::unlinkat(&parent, name, AtFlags::REMOVEDIR));
        match removed {
            Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) | Ok(()) => Ok(()),
            Err(error) => Err(failed("remove", directory)(error)),
        }
    }

    /// Opens a directory as the host would find it.
    fn resolve(&self, directory: &str) -> rustix::io::Result<OwnedFd> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        fs::openat2(&self.0, directory, DIRECTORY, Mode::empty(), inside)
    }

    /// The same, made where it is missing.
    fn make(&self, directory: &str) -> Result<OwnedFd, HostRootError> {
        let mut parent = self.resolve(".").map_err(failed("open", directory))?;
        let ends = directory.match_indices('/').map(|(end, _)| end).chain([directory.len()]);
        for end in ends {
            let name = directory[..end].rsplit('/').next().unwrap_or_default();
            let opened = match self.resolve(&directory[..end]) {
                Err(Errno::NOENT) => {
                    let made = fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755));
                    made.and_then(|()| fs::fsync(&parent)).map_err(failed("create", &directory[..end]))?;
                    self.resolve(&directory[..end])
                }
                opened => opened,
            };
            parent = opened.map_err(failed("open", &directory[..end]))?;
        }
        Ok(parent)
    }

    /// Makes something under another name, and renames it.
    fn replace(
        &self,
        host_file: HostFile<'_>,
        directory: &OwnedFd,
        make: impl FnOnce(&str) -> io::Result<()>,
    ) -> Result<(), HostRootError> {
        let aside = format!(".{}.new", host_file.1);
        let remove_aside = || match fs::unlinkat(directory, &aside, AtFlags::empty()) {
            Err(error) if error != Errno::NOENT => Err(error),
            _ => Ok(()),
        };
        // Of a run that was killed.
        remove_aside().map_err(failed("remove", Path::new(host_file.0).join(&aside)))?;
        let rename =
            || fs::renameat(directory, &aside, directory, host_file.1).and_then(|()| fs::fsync(directory));
        make(&aside).and_then(|()| Ok(rename()?)).map_err(|source| {
            // What failed is worth more telling than what is left.
            let _left = remove_aside();
            HostRootError { what: "write", path: path(host_file), source }
        })
    }
}

/// Whether a regular file is exactly this.
fn holds(directory: &OwnedFd, name: &str, content: &[u8], mode: Mode) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = fs::openat(directory, name, flags, Mode::empty()) else { return false };
    let mut file = File::from(file);
    let same_size =
        file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == content.len() as u64);
    let same_mode = fs::fstat(&file).is_ok_and(|stat| Mode::from_raw_mode(stat.st_mode) == mode);
    let mut found = Vec::new();
    same_size && same_mode && file.read_to_end(&mut found).is_ok() && found == content
}

fn path((directory, name): HostFile<'_>) -> PathBuf {
    Path::new(directory).join(name)
}

fn failed<E: Into<io::Error>>(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(E) -> HostRootError {
    let path = path.into();
    move |source| HostRootError { what, path, source: source.into() }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{create_dir, create_dir_all, metadata, read, read_dir, read_link},
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    const FILE: HostFile<'_> = ("etc/deep/er", "file");

    fn root() -> (tempfile::TempDir, HostRoot) {
        let directory = tempfile::tempdir().unwrap();
        let root = HostRoot::open(directory.path()).unwrap();
        (directory, root)
    }

    fn names(directory: &Path) -> Vec<String> {
        read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn writes_whole_files_and_only_when_they_change() {
        let (directory, root) = root();

        assert!(root.write(FILE, b"one", 0o755).unwrap());
        assert!(!root.write(FILE, b"one", 0o755).unwrap());
        assert!(root.write(FILE, b"one", 0o644).unwrap());
        assert!(root.write(FILE, b"two", 0o644).unwrap());

        let path = directory.path().join("etc/deep/er/file");
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(names(path.parent().unwrap()), ["file"]);
    }

    #[test]
    fn goes_on_after_a_run_that_was_killed() {
        let (directory, root) = root();
        create_dir_all(directory.path().join(FILE.0)).unwrap();
        std::fs::write(directory.path().join("etc/deep/er/.file.new"), "half").unwrap();

        assert!(root.write(FILE, b"whole", 0o644).unwrap());

        assert_eq!(names(&directory.path().join(FILE.0)), ["file"]);
    }

    #[test]
    fn links_lead_nowhere_but_into_the_host() {
        let (outside, _) = root();
        let (directory, root) = root();
        create_dir(directory.path().join("real")).unwrap();
        symlink("/real", directory.path().join("etc")).unwrap();
        symlink(outside.path(), directory.path().join("opt")).unwrap();
        symlink("../../../../../..", directory.path().join("up")).unwrap();

        root.write(("etc", "file"), b"x", 0o644).unwrap();
        root.write(("up", "file"), b"x", 0o644).unwrap();
        let refused = root.write(("opt/sub", "file"), b"x", 0o644).unwrap_err();

        assert!(directory.path().join("real/file").exists() && directory.path().join("file").exists());
        assert!(names(outside.path()).is_empty());
        assert_eq!(refused.to_string(), "cannot create opt", "a link that dangles in the host");
    }

    #[test]
    fn a_link_instead_of_the_file_is_replaced_not_followed() {
        let (directory, root) = root();
        let precious = directory.path().join("precious");
        std::fs::write(&precious, "x").unwrap();
        symlink("precious", directory.path().join("file")).unwrap();

        assert!(root.write((".", "file"), b"x", 0o644).unwrap());

        assert!(metadata(directory.path().join("file")).unwrap().is_file());
        assert!(read_link(directory.path().join("file")).is_err());
        assert_eq!(read(precious).unwrap(), b"x");
    }

    #[test]
    fn removes_what_it_made_and_nothing_else() {
        let (directory, root) = root();
        root.write(FILE, b"x", 0o644).unwrap();
        assert!(root.link(("etc/deep", "link"), "er/file").unwrap());
        assert!(!root.link(("etc/deep", "link"), "er/file").unwrap());

        assert!(root.remove(FILE).unwrap() && !root.remove(FILE).unwrap());
        assert!(!root.remove(("no/where", "file")).unwrap());
        for empty in ["etc/deep/er", "etc/deep", "no/where"] {
            root.remove_empty(empty).unwrap();
        }

        assert_eq!(names(&directory.path().join("etc/deep")), ["link"]);
    }
}
