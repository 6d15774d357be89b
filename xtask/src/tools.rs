//! Tools of pinned versions, each made once on a machine and used by all checkouts:
//! `~/.cache/kube2ram/<name>-<version>`, with a link to it in `target/tools`, where the tests look. Called by
//! whatever needs one.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};

use crate::command::target_dir;

/// A directory of one tool's own.
pub(crate) struct Tool<'a> {
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
}

impl Tool<'_> {
    /// Where the tool is; it is made there by `make`, if it is not yet. What `make` leaves half done is never
    /// taken for the tool.
    pub(crate) fn directory(&self, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let directory = cache().join(format!("{}-{}", self.name, self.version));
        if !directory.exists() {
            let unfinished = directory.with_extension(format!("new-{}", process::id()));
            fs::create_dir_all(&unfinished)
                .with_context(|| format!("cannot make {}", unfinished.display()))?;
            if let Err(error) = make(&unfinished) {
                drop(fs::remove_dir_all(&unfinished));
                return Err(error);
            }
            // Another checkout may have been faster; one is as good as the other.
            if fs::rename(&unfinished, &directory).is_err() {
                fs::remove_dir_all(&unfinished)?;
            }
        }
        self.link(&directory)?;
        Ok(directory)
    }

    /// A program of the tool, in its `bin`.
    pub(crate) fn program(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        Ok(self.directory(make)?.join("bin").join(name))
    }

    fn link(&self, directory: &Path) -> Result<()> {
        let link = target_dir().join("tools").join(self.name);
        if fs::read_link(&link).is_ok_and(|target| target == directory) {
            return Ok(());
        }
        fs::create_dir_all(target_dir().join("tools"))?;
        // Renamed into place: a test that runs meanwhile finds the old one or the new one.
        let new = link.with_extension(format!("new-{}", process::id()));
        symlink(directory, &new)?;
        if link.is_dir() && !link.is_symlink() {
            fs::remove_dir_all(&link)?;
        }
        fs::rename(&new, &link).with_context(|| format!("cannot make {}", link.display()))
    }
}

/// Where the tools of all checkouts are: `KUBE2RAM_CACHE`, or below the user's cache directory.
fn cache() -> PathBuf {
    let of_variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of_variable("KUBE2RAM_CACHE").unwrap_or_else(|| {
        let cache = of_variable("XDG_CACHE_HOME");
        let home = || of_variable("HOME").unwrap_or_else(|| "/root".into()).join(".cache");
        cache.unwrap_or_else(home).join("kube2ram")
    })
}
