//! A cgroup's path, of which containers choose all but the beginning: the pod is the outermost one, and
//! nothing below changes it.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path};

use kube2ram_agent::identity::{PodUid, pod_of_path};

const ROOTS: [&str; 4] = ["/kubepods", "/kubepods.slice", "/kubelet/kubepods", "/kubelet-kubepods.slice"];
const OTHER: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

/// Checks one path: as it is, and below the kubelet's.
pub fn check(data: &[u8]) {
    for root in ROOTS {
        check_below(data, root);
        check_below(&[root.as_bytes(), b"/", data].concat(), root);
    }
}

fn check_below(path: &[u8], root: &str) {
    let path = Path::new(OsStr::from_bytes(path));
    let root = Path::new(root);
    let pod = pod_of_path(path, root);
    let Some(uid) = &pod else { return };

    let Ok(below) = path.strip_prefix(root) else {
        panic!("{} lies outside of {}", path.display(), root.display())
    };
    let named = below.components().take(2).any(|segment| {
        let name = segment.as_os_str().to_string_lossy().to_lowercase().replace('_', "-");
        name.trim_end_matches(".slice").ends_with(&format!("pod{uid}"))
    });
    assert!(named, "{uid} of {}", path.display());
    assert_eq!(PodUid::parse(uid.as_str()).as_ref(), Some(uid));
    for nested in [
        "x",
        &format!("pod{OTHER}"),
        &format!("kubepods-pod{}.slice", OTHER.replace('-', "_")),
        "burstable",
        "..",
    ] {
        let deeper = pod_of_path(&path.join(nested), root);
        // The kernel returns no path with dots; such a path belongs to no pod, or to the same pod.
        assert!(
            deeper == pod || deeper.is_none(),
            "{} is {deeper:?} and not {pod:?}",
            path.join(nested).display()
        );
    }
}
