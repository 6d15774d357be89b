//! The pods' cgroups, as directories. Depends on `identity` for their names; called by `listeners`.

use std::{
    fs, io,
    os::unix::fs::DirEntryExt as _,
    path::{Path, PathBuf},
};

use crate::identity::{CgroupId, PodUid, pod_of_path};

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodCgroup {
    pub(super) id: CgroupId,
    pub(super) uid: PodUid,
    pub(super) path: PathBuf,
}

/// Where pods' cgroups are.
#[derive(Debug)]
pub(super) struct PodCgroups {
    root: PathBuf,
    /// The kubelet's tree, then those that another cgroup driver has or may have.
    trees: Vec<PathBuf>,
}

impl PodCgroups {
    pub(super) fn new(root: &Path, trees: Vec<PathBuf>) -> Self {
        Self { root: root.to_owned(), trees }
    }

    /// All existing pods: the children of each pods' cgroup, and those of its classes. Each of these
    /// directories is passed to `before` before it is read, so that a watch set there misses nothing. The
    /// directories above the pods' cgroup, which may be deleted and created again, are passed first.
    ///
    /// # Errors
    /// When one cannot be read; a removed one counts as empty.
    pub(super) fn list(&self, before: impl Fn(&Path)) -> io::Result<Vec<PodCgroup>> {
        let mut found = Vec::new();
        for (at, tree) in self.trees.iter().enumerate() {
            // That another driver's tree comes shows in the directory above, which is that of the kubelet's
            // tree as well.
            if at > 0 && !tree.is_dir() {
                continue;
            }
            tree.ancestors().take_while(|path| path.starts_with(&self.root)).for_each(&before);
            for (id, path) in children(tree)? {
                if let Some(uid) = self.pod(tree, &path) {
                    found.push(PodCgroup { id, uid, path });
                    continue;
                }
                before(&path);
                let pods = children(&path)?.into_iter();
                found.extend(
                    pods.filter_map(|(id, path)| Some(PodCgroup { id, uid: self.pod(tree, &path)?, path })),
                );
            }
        }
        Ok(found)
    }

    fn pod(&self, tree: &Path, path: &Path) -> Option<PodUid> {
        pod_of_path(path.strip_prefix(&self.root).ok()?, tree.strip_prefix(&self.root).ok()?)
    }
}

fn children(directory: &Path) -> io::Result<Vec<(CgroupId, PathBuf)>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push((CgroupId(entry.ino()), entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::identity::cgroup_id;

    #[test]
    fn lists_pods_of_every_class_and_nothing_below_them() {
        const UID: &str = "0b8c2a5e-1f6d-4f0e-9d1c-3a1d5f1f000";
        let root = tempfile::tempdir().unwrap();
        let pods = root.path().join("kubepods");
        let expected = [("", 1), ("burstable", 2), ("besteffort", 3)]
            .map(|(class, n)| (pods.join(class).join(format!("pod{UID}{n}")), format!("{UID}{n}")));
        for (path, _) in &expected {
            fs::create_dir_all(path.join(format!("pod{UID}4"))).unwrap();
        }
        fs::create_dir_all(pods.join(format!("burstable/other/pod{UID}5"))).unwrap();
        let seen = RefCell::new(Vec::new());

        let trees = vec![pods.clone(), root.path().join("absent")];
        let mut found =
            PodCgroups::new(root.path(), trees).list(|path| seen.borrow_mut().push(path.to_owned())).unwrap();

        let mut expected = expected
            .map(|(path, uid)| PodCgroup {
                id: cgroup_id(&path).unwrap(),
                uid: PodUid::parse(&uid).unwrap(),
                path,
            })
            .to_vec();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        seen.borrow_mut().sort();
        let watched = [root.path().to_owned(), pods.clone(), pods.join("besteffort"), pods.join("burstable")];
        assert_eq!(*seen.borrow(), watched);
    }

    #[test]
    fn a_pod_of_another_drivers_tree_is_listed_once_the_tree_is_there() {
        const UID: &str = "0b8c2a5e-1f6d-4f0e-9d1c-3a1d5f1f0001";
        let root = tempfile::tempdir().unwrap();
        let trees = ["kubepods", "kubepods.slice"].map(|tree| root.path().join(tree));
        let cgroups = PodCgroups::new(root.path(), trees.to_vec());
        fs::create_dir(&trees[0]).unwrap();
        assert_eq!(cgroups.list(|_| ()).unwrap(), []);

        fs::create_dir_all(trees[1].join(format!("kubepods-pod{}.slice", UID.replace('-', "_")))).unwrap();

        let found = cgroups.list(|_| ()).unwrap();
        assert_eq!(found.iter().map(|pod| pod.uid.as_str()).collect::<Vec<_>>(), [UID]);
    }

    #[test]
    fn without_the_pods_cgroup_there_are_no_pods() {
        let root = tempfile::tempdir().unwrap();

        assert_eq!(
            PodCgroups::new(root.path(), vec![root.path().join("kubepods")]).list(|_| ()).unwrap(),
            []
        );
    }
}
