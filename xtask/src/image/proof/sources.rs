//! A second copy of the sources, and the comparison of what comes of the two. Called by `proof`.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::command::{capture, root};

/// Copies all files that git knows or would take, as they are now, in place of an earlier copy; keeps what
/// was built of that.
pub(super) fn copy(destination: &Path) -> Result<()> {
    let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let files = capture(Command::new("git").current_dir(root()).args(list))
        .context("the sources are no git checkout")?;
    clear(destination)?;
    for path in files.split_terminator('\0') {
        let (from, to) = (root().join(path), destination.join(path));
        // Deleted, but not yet for git.
        if !from.exists() {
            continue;
        }
        fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        // Cargo builds again what seems new.
        File::options().write(true).open(&to)?.set_modified(from.metadata()?.modified()?)?;
    }
    Ok(())
}

/// Removes all but what was built.
fn clear(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_file() {
            fs::remove_file(&path)?;
        } else if !path.ends_with("target") {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// Compares two layouts byte by byte.
pub(super) fn ensure_same(one: &Path, other: &Path) -> Result<()> {
    let (files, others) = (files(one)?, files(other)?);
    let differing = files.symmetric_difference(&others).cloned().chain(
        files.intersection(&others).filter(|path| !is_same(&one.join(path), &other.join(path))).cloned(),
    );
    let differing: Vec<String> = differing.map(|path| path.display().to_string()).collect();
    ensure!(
        differing.is_empty(),
        "{} and {} differ: {}",
        one.display(),
        other.display(),
        differing.join(", ")
    );
    Ok(())
}

/// The digest of a layout's image.
pub(super) fn digest(layout: &Path) -> Result<String> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    Ok(index["manifests"][0]["digest"].as_str().context("an index has a digest")?.to_owned())
}

/// Whether both are there, with the same bytes.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    fs::read(one).ok().zip(fs::read(other).ok()).is_some_and(|(one, other)| one == other)
}

/// All files below, by their paths from there.
fn files(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let (mut found, mut open) = (BTreeSet::new(), vec![directory.to_owned()]);
    while let Some(current) = open.pop() {
        for entry in fs::read_dir(&current).with_context(|| format!("cannot read {}", current.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.insert(path.strip_prefix(directory)?.to_owned());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(name: &str, program: &[u8]) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("kube2ram-xtask-{}-{name}", std::process::id()));
        fs::create_dir_all(directory.join("blobs")).unwrap();
        fs::write(directory.join("index.json"), r#"{"manifests":[{"digest":"sha256:0"}]}"#).unwrap();
        fs::write(directory.join("blobs/program"), program).unwrap();
        directory
    }

    #[test]
    fn one_other_byte_is_found_and_named() {
        let (one, same, other) = (layout("one", b"x"), layout("same", b"x"), layout("other", b"y"));

        let (equal, unequal) = (ensure_same(&one, &same), ensure_same(&one, &other));
        let digest = digest(&one);
        for directory in [one, same, other] {
            fs::remove_dir_all(directory).unwrap();
        }

        equal.unwrap();
        assert_eq!(digest.unwrap(), "sha256:0");
        assert!(unequal.unwrap_err().to_string().ends_with("differ: blobs/program"));
    }
}
