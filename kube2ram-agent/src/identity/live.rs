//! The pods that have a cgroup now, and where. Depends on `cgroup_path` for their names; called by
//! `kubernetes`, through `app`.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{PodUid, pod_of_path};

/// The UIDs after which the cgroups directly below each of `pods` and below its classes are named; all are
/// absolute paths, `pods` below `root`.
///
/// # Errors
/// When a directory cannot be read; a removed one counts as empty.
pub fn live_pods(root: &Path, pods: &[PathBuf]) -> io::Result<HashSet<PodUid>> {
    Ok(pod_cgroups(root, pods)?.into_keys().collect())
}

/// The same, with the cgroup of each: in the first of `pods`, if it has one in several.
///
/// # Errors
/// As [`live_pods`].
pub fn pod_cgroups(root: &Path, pods: &[PathBuf]) -> io::Result<HashMap<PodUid, PathBuf>> {
    let mut found = HashMap::new();
    for pods in pods.iter().rev() {
        collect(root, pods, &mut found)?;
    }
    Ok(found)
}

fn collect(root: &Path, pods: &Path, found: &mut HashMap<PodUid, PathBuf>) -> io::Result<()> {
    let below = |path: &Path| path.strip_prefix(root).map(Path::to_owned).unwrap_or_default();
    let pods_below = below(pods);
    for path in directories(pods)? {
        match pod_of_path(&below(&path), &pods_below) {
            Some(uid) => drop(found.insert(uid, path)),
            None => {
                let inner = directories(&path)?.into_iter();
                found.extend(inner.filter_map(|path| Some((pod_of_path(&below(&path), &pods_below)?, path))));
            }
        }
    }
    Ok(())
}

fn directories(parent: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The children of a cgroup; none when it was removed. Most cgroups belong to a container and have no
/// children. The kernel reports this without a listing of about sixty files: it counts a directory's children
/// in its links (`kernfs_refresh_inode`, fs/kernfs/inode.c).
pub(crate) fn child_cgroups(cgroup: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let may_have_any = fs::metadata(cgroup).is_ok_and(|metadata| metadata.nlink() != LINKS_OF_CHILDLESS);
    let entries = may_have_any.then(|| fs::read_dir(cgroup)).and_then(Result::ok);
    let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.into_iter().flatten().filter_map(Result::ok).filter(is_directory).map(|entry| entry.path())
}

/// Its name and its own `.`; file systems that count nothing have 1.
const LINKS_OF_CHILDLESS: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_pods_of_every_class_under_either_driver() {
        const UID: &str = "0b8c2a5e-1f6d-4f0e-9d1c-3a1d5f1f000";
        let root = tempfile::tempdir().unwrap();
        let systemd = UID.replace('-', "_");
        for path in [
            format!("kubepods/pod{UID}1"),
            format!("kubepods/burstable/pod{UID}2/app/pod{UID}9"),
            format!("kubepods.slice/kubepods-pod{systemd}3.slice"),
            format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}4.slice"),
        ] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let live = |pods: &[&str]| {
            let pods: Vec<_> = pods.iter().map(|pods| root.path().join(pods)).collect();
            let mut found: Vec<_> = live_pods(root.path(), &pods).unwrap().into_iter().collect();
            found.sort();
            found
        };
        let uid = |n: u8| PodUid::parse(&format!("{UID}{n}")).unwrap();

        assert_eq!(live(&["kubepods"]), [uid(1), uid(2)]);
        assert_eq!(live(&["kubepods.slice", "absent"]), [uid(3), uid(4)]);
        assert_eq!(live(&["kubepods", "kubepods.slice"]), [uid(1), uid(2), uid(3), uid(4)]);

        // A pod that the kubelet has started again in the other tree.
        let again = format!("kubepods.slice/kubepods-pod{systemd}1.slice");
        fs::create_dir_all(root.path().join(&again)).unwrap();
        let trees = ["kubepods.slice", "kubepods"].map(|pods| root.path().join(pods));
        assert_eq!(pod_cgroups(root.path(), &trees).unwrap()[&uid(1)], root.path().join(again));
    }

    #[test]
    fn children_are_directories_and_a_cgroup_without_any_has_none() {
        let cgroup = tempfile::tempdir().unwrap();
        fs::write(cgroup.path().join("cgroup.procs"), "").unwrap();
        let children = || child_cgroups(cgroup.path()).collect::<Vec<_>>();
        assert!(children().is_empty());

        fs::create_dir(cgroup.path().join("container")).unwrap();

        assert_eq!(children(), [cgroup.path().join("container")]);
        assert_eq!(child_cgroups(&cgroup.path().join("gone")).count(), 0);
    }
}
