//! Identity against the running kernel: real cgroups, opened by their ids.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "test support")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use kube2ram_agent::identity::{
    CgroupId, CgroupPods, CgroupTree, IdentityError, PodUid, cgroup_id, find_cgroup_root, find_pods_cgroup,
    own_cgroup,
};

const UID: &str = "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a";
const OTHER: &str = "deadbeef-dead-4eef-8ead-deadbeefdead";

/// A directory of cgroups of this test's own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(test: &str) -> Self {
        let root = find_cgroup_root(None).expect("a cgroup2 mount");
        let path = root.join(format!("kube2ram-test-{test}-{}", std::process::id()));
        fs::create_dir(&path).expect("may make a cgroup");
        Self(path)
    }

    fn make(&self, below: &str) -> PathBuf {
        let path = self.0.join(below);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn tree(&self) -> CgroupTree {
        let root = find_cgroup_root(None).unwrap();
        CgroupTree::open(&root, &[find_pods_cgroup(&root, Some(&self.make("kubepods"))).unwrap()]).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_tree(&self.0);
    }
}

/// `remove_dir_all` would try to unlink the kernel's files.
fn remove_tree(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let removed = fs::remove_dir(cgroup);
    assert!(removed.is_ok() || std::thread::panicking(), "{cgroup:?}: {removed:?}");
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().expect("own child");
        self.0.wait().expect("own child");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cgroup_id_leads_to_its_pod_even_from_a_nested_look_alike() {
    let scratch = Scratch::new("pod");
    let pod = scratch.make(&format!("kubepods/burstable/pod{UID}"));
    let container = scratch.make(&format!("kubepods/burstable/pod{UID}/ctr"));
    let fake = scratch.make(&format!("kubepods/burstable/pod{UID}/ctr/kubepods/pod{OTHER}"));
    let tree = scratch.tree();

    for cgroup in [pod, container, fake] {
        let found = tree.pod_of(cgroup_id(&cgroup).unwrap());

        assert_eq!(found.unwrap(), PodUid::parse(UID).unwrap(), "{cgroup:?}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cgroup_outside_of_every_pod_is_none() {
    let scratch = Scratch::new("outside");
    let tree = scratch.tree();

    for below in ["", "kubepods", "kubepods/burstable", &format!("system/pod{UID}")] {
        let found = tree.pod_of(cgroup_id(&scratch.make(below)).unwrap());

        assert!(matches!(found, Err(IdentityError::NoPod { .. })), "{below}: {found:?}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_removed_cgroup_is_not_found_and_its_id_does_not_come_back() {
    let scratch = Scratch::new("gone");
    let tree = scratch.tree();
    let pod = scratch.make(&format!("kubepods/pod{UID}"));
    let id = cgroup_id(&pod).unwrap();
    assert_eq!(tree.pod_of(id).unwrap().as_str(), UID);

    fs::remove_dir(&pod).unwrap();
    assert!(matches!(tree.pod_of(id), Err(IdentityError::Gone(gone)) if gone == id));

    fs::create_dir(&pod).unwrap();
    assert!(matches!(tree.pod_of(id), Err(IdentityError::Gone(_))));
    assert!(matches!(tree.pod_of(CgroupId(u64::MAX)), Err(IdentityError::Gone(_))));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_populated_pods_cgroup_wins_over_an_empty_leftover() {
    let scratch = Scratch::new("leftover");
    let (_empty, used) = (scratch.make("kubepods"), scratch.make("kubepods.slice"));
    let process = Process(Command::new("sleep").arg("60").spawn().unwrap());
    fs::write(used.join("cgroup.procs"), process.0.id().to_string()).unwrap();

    let found = find_pods_cgroup(&scratch.0, None);

    assert_eq!(found.unwrap(), used);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn own_cgroup_is_the_one_that_lists_this_process() {
    let root = find_cgroup_root(None).unwrap();

    let own = own_cgroup(&root).unwrap();

    let procs = fs::read_to_string(own.join("cgroup.procs")).unwrap();
    assert!(procs.lines().any(|pid| pid == std::process::id().to_string()));
}
