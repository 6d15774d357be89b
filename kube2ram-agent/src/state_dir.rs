//! The directory that agents of this node share: made for root alone, and refused when anybody else could have a hand in it.
//! Depends on nothing of ours; opened by `app`.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

/// A directory of root's, or of the agent's own user.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It could not be made.
    #[error("cannot make the state directory {path}")]
    Make {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not be looked at.
    #[error("cannot look at the state directory {path}")]
    Look {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is a symbolic link or a file, is somebody else's, or others may write to it.
    #[error("the state directory {0} is no directory of root's that only root may write to")]
    Unsafe(PathBuf),
}

impl StateDir {
    /// Opens a directory, which is made for its owner alone when it is not there. Its parent must be.
    ///
    /// # Errors
    /// See [`StateDirError`].
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(source) if source.kind() != ErrorKind::AlreadyExists => {
                return Err(StateDirError::Make { path: path.into(), source });
            }
            _ => {}
        }
        let found =
            fs::symlink_metadata(path).map_err(|source| StateDirError::Look { path: path.into(), source })?;
        let is_ours = found.uid() == 0 || found.uid() == rustix::process::geteuid().as_raw();
        if found.is_dir() && is_ours && found.mode() & 0o022 == 0 {
            Ok(Self(path.into()))
        } else {
            Err(StateDirError::Unsafe(path.into()))
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn makes_a_directory_for_its_owner_alone_and_opens_it_again() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");

        StateDir::open(&path).unwrap();
        let again = StateDir::open(&path).unwrap();

        assert_eq!(again.path(), path);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn refuses_what_others_could_have_a_hand_in() {
        let parent = tempfile::tempdir().unwrap();
        let [good, open, file, link] = ["good", "open", "file", "link"].map(|name| parent.path().join(name));
        for path in [&good, &open] {
            fs::create_dir(path).unwrap();
        }
        fs::set_permissions(&open, fs::Permissions::from_mode(0o775)).unwrap();
        fs::write(&file, "").unwrap();
        symlink(&good, &link).unwrap();

        assert!(StateDir::open(&good).is_ok());
        for path in [&open, &file, &link] {
            assert!(matches!(StateDir::open(path), Err(StateDirError::Unsafe(_))), "{path:?}");
        }
        assert!(matches!(StateDir::open(&parent.path().join("a/b")), Err(StateDirError::Make { .. })));
    }
}
