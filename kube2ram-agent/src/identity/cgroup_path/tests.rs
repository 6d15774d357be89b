use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use proptest::prelude::*;

use super::*;

const UID: &str = "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a";
const UID_: &str = "0c5a1e7b_3f0d_4d0e_9a55_1f2e3d4c5b6a";
const OTHER: &str = "deadbeef-dead-4eef-8ead-deadbeefdead";
const OTHER_: &str = "deadbeef_dead_4eef_8ead_deadbeefdead";
const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015";
const CTR: &str = "4b1f0e6c1f8a2d7d3c5b6a798897a6b5c4d3e2f10123456789abcdef01234567";

/// Pods cgroup, path, expected pod; `{u}` is the UID, `{_}` the same for systemd, `{h}` a config hash, `{c}`
/// a container's id.
const REAL_PATHS: &[(&str, &str, &str)] = &[
    // kubelet with the cgroupfs driver
    ("kubepods", "kubepods/burstable/pod{u}/{c}", UID),
    ("kubepods", "kubepods/besteffort/pod{u}", UID),
    ("kubepods", "kubepods/pod{u}/{c}", UID),
    ("kubepods", "kubepods/pod{h}/{c}", HASH),
    ("kubepods", "kubepods/burstable/pod{u}/crio-{c}/container", UID),
    // kubelet with the systemd driver: containerd, CRI-O with runc and with crun, cri-dockerd
    (
        "kubepods.slice",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{_}.slice/cri-containerd-{c}.scope",
        UID,
    ),
    (
        "kubepods.slice",
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{_}.slice/crio-{c}.scope",
        UID,
    ),
    (
        "kubepods.slice",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{_}.slice/crio-{c}.scope/container",
        UID,
    ),
    ("kubepods.slice", "kubepods.slice/kubepods-pod{_}.slice/docker-{c}.scope", UID),
    (
        "kubepods.slice",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{h}.slice/cri-containerd-{c}.scope",
        HASH,
    ),
    // kind, and any kubelet with a --cgroup-root
    (
        "kubelet.slice/kubelet-kubepods.slice",
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{_}.slice/cri-containerd-{c}.scope",
        UID,
    ),
    (
        "kubelet.slice/kubelet-kubepods.slice",
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{_}.slice",
        UID,
    ),
    ("kubelet/kubepods", "kubelet/kubepods/besteffort/pod{u}/{c}", UID),
    // nodes that are containers themselves, seen from the machine
    ("docker/{c}/kubelet/kubepods", "docker/{c}/kubelet/kubepods/burstable/pod{u}/{c}", UID),
    (
        "system.slice/docker-{c}.scope/kubelet.slice/kubelet-kubepods.slice",
        "system.slice/docker-{c}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{_}.slice/cri-containerd-{c}.scope",
        UID,
    ),
    // an upper-case UID (file-based pods may bring their own) is the same pod
    ("kubepods", "kubepods/pod0C5A1E7B-3F0D-4D0E-9A55-1F2E3D4C5B6A/{c}", UID),
];

/// Pods cgroup, path: no pod.
const NOT_PODS: &[(&str, &str)] = &[
    ("kubepods", "kubepods"),
    ("kubepods", "kubepods/burstable"),
    ("kubepods", "system.slice/sshd.service"),
    ("kubepods", ""),
    // not directly below the chain
    ("kubepods", "kubepods/burstable/x/pod{u}"),
    ("kubepods", "kubepods/x/pod{u}"),
    ("kubepods", "kubepods/burstable/besteffort/pod{u}"),
    ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice/x/kubepods-burstable-pod{_}.slice"),
    // a chain that is not the kubelet's
    ("kubepods", "user.slice/kubepods/pod{u}"),
    ("kubepods.slice", "user.slice/kubepods.slice/kubepods-pod{_}.slice"),
    ("kubelet/kubepods", "kubepods/pod{u}"),
    ("kubepods", "kubepods2/pod{u}"),
    // one driver's names below the other's cgroup; a class that is not the parent's
    ("kubepods.slice", "kubepods.slice/pod{u}"),
    ("kubepods", "kubepods/kubepods-pod{_}.slice"),
    ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod{_}.slice"),
    ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice/kubepods-pod{_}.slice"),
    ("kubepods.slice", "kubepods.slice/kubepods-burstable.slice/kubepods--pod{_}.slice"),
    ("kubepods.slice", "kubepods.slice/kubepods-pod{_}"),
    // a UID that is none
    ("kubepods", "kubepods/pod"),
    ("kubepods", "kubepods/pod{u}x"),
    ("kubepods", "kubepods/pod{{u}}"),
    ("kubepods", "kubepods/pod0c5a1e7b"),
    ("kubepods", "kubepods/podgc5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a"),
    ("kubepods", "kubepods/pod-0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a"),
    ("kubepods", "kubepods/pod0c5a1e7b3f0d-4d0e-9a55-1f2e3d4c5b6a-"),
];

fn fill(template: &str) -> PathBuf {
    template.replace("{u}", UID).replace("{_}", UID_).replace("{h}", HASH).replace("{c}", CTR).into()
}

#[test]
fn reads_the_names_of_every_driver_and_runtime() {
    for (pods, path, expected) in REAL_PATHS {
        let pod = pod_of_path(&fill(path), &fill(pods));

        assert_eq!(pod.as_ref().map(PodUid::as_str), Some(*expected), "{path}");
    }
}

#[test]
fn takes_nothing_else_for_a_pod() {
    for (pods, path) in NOT_PODS {
        assert_eq!(pod_of_path(&fill(path), &fill(pods)), None, "{path}");
    }
}

#[test]
fn a_nested_cgroup_cannot_shadow_the_pod_it_lies_in() {
    for nested in [
        format!("pod{OTHER}"),
        format!("kubepods/burstable/pod{OTHER}"),
        format!("kubepods.slice/kubepods-pod{OTHER_}.slice"),
        format!("docker/x/kubelet/kubepods/pod{OTHER}"),
    ] {
        for (pods, path, expected) in REAL_PATHS {
            let path = fill(path).join(&nested);

            assert_eq!(
                pod_of_path(&path, &fill(pods)).as_ref().map(PodUid::as_str),
                Some(*expected),
                "{path:?}"
            );
        }
    }
}

#[test]
fn a_path_that_is_not_utf8_below_the_pod_is_still_the_pods() {
    let odd = PathBuf::from(OsString::from_vec(b"\xff\xfe".to_vec()));

    let pod = pod_of_path(&fill("kubepods/pod{u}").join(&odd), Path::new("kubepods"));

    assert_eq!(pod, PodUid::parse(UID));
    assert_eq!(pod_of_path(&Path::new("kubepods").join(odd), Path::new("kubepods")), None);
}

proptest! {
    #[test]
    fn never_panics(path in "\\PC{0,200}", pods in "\\PC{0,60}") {
        drop((pod_of_path(Path::new(&path), Path::new(&pods)), PodUid::parse(&path)));
    }

    #[test]
    fn a_hostile_suffix_never_changes_the_answer(row in 0..REAL_PATHS.len(), suffix in "[a-z0-9_./ -]{1,40}") {
        let (pods, path, expected) = REAL_PATHS[row];
        let path = PathBuf::from(format!("{}/{suffix}", fill(path).display()));

        let pod = pod_of_path(&path, &fill(pods));

        prop_assert_eq!(pod.as_ref().map(PodUid::as_str), Some(expected));
    }

    #[test]
    fn a_prefix_outside_of_the_pods_cgroup_gives_none(row in 0..REAL_PATHS.len(), prefix in "[a-z.-]{1,20}(/[a-z.-]{1,20}){0,3}") {
        let (pods, path, _) = REAL_PATHS[row];
        let path = Path::new(&prefix).join(fill(path));
        prop_assume!(!path.starts_with(fill(pods)));

        prop_assert_eq!(pod_of_path(&path, &fill(pods)), None);
    }

    #[test]
    fn a_uid_survives_both_drivers_spelling(bits in any::<u128>()) {
        let uid = PodUid::parse(&uuid::Uuid::from_u128(bits).to_string()).unwrap();
        let cgroupfs = format!("kubepods/pod{uid}");
        let systemd = format!("kubepods.slice/kubepods-pod{}.slice", uid.as_str().replace('-', "_"));

        prop_assert_eq!(pod_of_path(Path::new(&cgroupfs), Path::new("kubepods")), Some(uid.clone()));
        prop_assert_eq!(pod_of_path(Path::new(&systemd), Path::new("kubepods.slice")), Some(uid));
    }
}
