use std::{
    fs::{create_dir_all, read, read_link, read_to_string},
    os::unix::fs::symlink,
};

use super::{binary::tests::elf, *};

const WANTS: &str = "etc/systemd/system/multi-user.target.wants/kube2ram-boot-guard.service";
const REQUIRES: &str = "etc/systemd/system/kubelet.service.requires/kube2ram-boot-guard.service";

fn installation(host_root: &Path) -> Installation {
    let guard = Guard {
        bpf_dir: "/sys/fs/bpf/kube2ram".into(),
        cgroup_root: None,
        forward_guard: true,
        host_cgroups: vec!["system.slice".into()],
        metadata: MetadataAddr {
            v4: "100.100.100.200:80".parse().unwrap(),
            v6: Some("fd00:100::100:200".parse().unwrap()),
        },
    };
    Installation { guard, host_root: host_root.to_owned(), report_to: None, required_by_kubelet: false }
}

/// A host with systemd, whose /lib is a link, as on most hosts.
fn host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    create_dir_all(host.path().join("usr/lib/systemd/system")).unwrap();
    create_dir_all(host.path().join("etc/systemd/system/multi-user.target.wants")).unwrap();
    symlink("/usr/lib", host.path().join("lib")).unwrap();
    host
}

/// Every file below, without directories.
fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn installs_an_enabled_unit_and_removes_all_of_it() {
    let host = host();
    let before = files(host.path());
    let binary = elf(&[1]);

    let installed = install_binary(&binary, &installation(host.path())).unwrap();

    assert_eq!(installed, Installed::Done { changed: true });
    let path = |below: &str| host.path().join(below);
    assert_eq!(read(path("opt/kube2ram/bin/kube2ram")).unwrap(), binary);
    let unit = read_to_string(path("etc/systemd/system/kube2ram-boot-guard.service")).unwrap();
    assert!(unit.contains("ExecStart=/opt/kube2ram/bin/kube2ram boot-guard apply"), "{unit}");
    assert_eq!(read_link(path(WANTS)).unwrap(), Path::new("../kube2ram-boot-guard.service"));
    assert_eq!(read_to_string(path(WANTS)).unwrap(), unit, "the link leads to the unit");
    let again = install_binary(&binary, &installation(host.path())).unwrap();
    assert_eq!(again, Installed::Done { changed: false }, "a second time");

    assert_eq!(remove(host.path()).unwrap().files, 3);
    assert_eq!(remove(host.path()).unwrap().files, 0);
    assert_eq!(files(host.path()), before);
    assert!(!path("opt/kube2ram").exists());
}

#[test]
fn the_kubelet_needs_it_only_as_long_as_that_is_asked_for() {
    let host = host();
    let mut installation = installation(host.path());
    installation.required_by_kubelet = true;

    install_binary(&elf(&[1]), &installation).unwrap();
    assert_eq!(read_link(host.path().join(REQUIRES)).unwrap(), Path::new("../kube2ram-boot-guard.service"));

    installation.required_by_kubelet = false;
    install_binary(&elf(&[1]), &installation).unwrap();
    assert!(!host.path().join(REQUIRES).exists() && host.path().join(WANTS).exists());
}

#[test]
fn changes_nothing_where_the_unit_could_not_run() {
    let bare = tempfile::tempdir().unwrap();
    let host = host();
    let before = files(host.path());

    let no_systemd = install_binary(&elf(&[1]), &installation(bare.path())).unwrap_err();
    let dynamic = install(&installation(host.path())).unwrap_err();

    assert!(matches!(no_systemd, BootGuardError::NoSystemd(_)), "{no_systemd}");
    assert!(matches!(dynamic, BootGuardError::Dynamic), "{dynamic}");
    assert!(files(bare.path()).is_empty());
    assert_eq!(files(host.path()), before);
}

#[test]
fn a_failure_is_left_to_the_agent_where_it_must_not_end_the_pods_start() {
    let (bare, host, pod) = (tempfile::tempdir().unwrap(), host(), tempfile::tempdir().unwrap());
    let reported = |host_root: &Path| {
        let mut installation = installation(host_root);
        installation.report_to = Some(pod.path().to_owned());
        install(&installation).unwrap().to_string()
    };
    assert_eq!(installation_failure(pod.path()), None, "none was tried");

    // A test's binary is dynamic.
    let said = reported(host.path());
    assert!(said.starts_with("the boot guard could not be installed: this binary is not static"), "{said}");
    assert!(installation_failure(pod.path()).unwrap().contains("not static"));

    let done = report(install_binary(&elf(&[1]), &installation(host.path())), pod.path());
    assert_eq!(done, Installed::Done { changed: true });
    assert_eq!(installation_failure(pod.path()), None, "the twin");

    report(install_binary(&elf(&[1]), &installation(bare.path())), pod.path());
    assert!(installation_failure(pod.path()).unwrap().contains("has no systemd"));
    let nowhere = pod.path().join("nowhere");
    let said = report(install_binary(&elf(&[1]), &installation(bare.path())), &nowhere).to_string();
    assert!(said.contains("has no systemd") && said.contains("cannot report it to the agent"), "{said}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_read_only_host_is_a_failure_that_names_the_file() {
    let host = host();
    let path = host.path().to_str().unwrap();
    let run = |program: &str, args: &[&str]| {
        assert!(
            std::process::Command::new(program).args(args).status().unwrap().success(),
            "{program} {args:?}"
        );
    };
    run("mount", &["--bind", path, path]);
    run("mount", &["-o", "remount,bind,ro", path]);

    let failure = install_binary(&elf(&[1]), &installation(host.path()));

    run("umount", &[path]);
    let failure = chain(&failure.unwrap_err());
    assert!(failure.contains("cannot create opt") && failure.contains("Read-only file system"), "{failure}");
}
