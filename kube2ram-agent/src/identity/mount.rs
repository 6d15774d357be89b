//! Finds, by looking: the cgroup2 mount, the kubelet's pods cgroup in it, and the agent's own cgroup.
//! Depends on nothing of ours; called by `app` and preflight at start.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process,
};

/// Why a part of the cgroup tree was not found.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Nothing in the mount table is cgroup2.
    #[error(
        "no cgroup2 file system is mounted: mount the host's (cgroup v2 is required) or set --cgroup-root"
    )]
    NoCgroup2,
    /// No pods cgroup exists where kubelets make it.
    #[error(
        "no pods cgroup below {root}, looked for {}: in a container, mount the host's at /sys/fs/cgroup; are pods in cgroup v2? else set \
         --pods-cgroup",
        POD_CGROUPS.join(", ")
    )]
    NoPods {
        /// The cgroup2 mount.
        root: PathBuf,
    },
    /// The directory is not on a cgroup2 file system.
    #[error("{path} is not on a cgroup2 file system: correct --cgroup-root")]
    NotCgroup2 {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is not below the cgroup2 mount.
    #[error("{path} is not below the cgroup2 mount {root}: correct --pods-cgroup")]
    Outside {
        /// The directory.
        path: PathBuf,
        /// The cgroup2 mount.
        root: PathBuf,
    },
    /// No cgroup below the mount has the agent in it: the mount is not the host's.
    #[error("the agent's own cgroup is not below {root}: mount the host's cgroup2 and set --cgroup-root")]
    OwnNotFound {
        /// The cgroup2 mount.
        root: PathBuf,
    },
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Read {
        /// What could not be read.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// The root of the cgroup2 tree: the configured directory, or the mount of systemd (unified, then hybrid), or
/// any other mount.
///
/// # Errors
/// [`MountError::NotCgroup2`] when the configured directory is something else, [`MountError::NoCgroup2`] when
/// there is no mount, [`MountError::Read`].
pub fn find_cgroup_root(configured: Option<&Path>) -> Result<PathBuf, MountError> {
    if let Some(path) = configured {
        // `/proc/self/fd` shows no links, so neither may the prefix that is stripped from it.
        let path = fs::canonicalize(path).map_err(read_error(path))?;
        return if is_cgroup2(&path)? { Ok(path) } else { Err(MountError::NotCgroup2 { path }) };
    }
    let mountinfo = Path::new("/proc/self/mountinfo");
    let mut mounts = cgroup2_mounts(&fs::read(mountinfo).map_err(read_error(mountinfo))?);
    mounts.sort_by_key(|mount| {
        PREFERRED_ROOTS.iter().position(|root| Path::new(root) == mount).unwrap_or(usize::MAX)
    });
    for mount in mounts {
        // A later mount may cover this one.
        if is_cgroup2(&mount)? {
            return Ok(mount);
        }
    }
    Err(MountError::NoCgroup2)
}

/// The cgroup in which the kubelet keeps all pods, as an absolute path below `root`. `configured` may be
/// absolute or relative to `root`.
///
/// A change of the kubelet's cgroup driver leaves the other driver's tree behind, empty or with pods that
/// were started before. Of several trees, the kubelet's is the one that contains this process, because the
/// kubelet started this agent's pod; otherwise it is the first one with a process. [`other_pods_cgroups`]
/// returns the others.
///
/// # Errors
/// [`MountError::NoPods`], [`MountError::Outside`], [`MountError::Read`].
pub fn find_pods_cgroup(root: &Path, configured: Option<&Path>) -> Result<PathBuf, MountError> {
    if let Some(path) = configured {
        let path = root.join(path);
        let path = fs::canonicalize(&path).map_err(read_error(&path))?;
        let below = path.starts_with(root) && path != root;
        return if below { Ok(path) } else { Err(MountError::Outside { path, root: root.into() }) };
    }
    let existing: Vec<_> = candidates(root).filter(|path| path.is_dir()).collect();
    if let [only] = existing.as_slice() {
        return Ok(only.clone());
    }
    let own = own_cgroup(root).ok();
    let holds_own = |path: &&PathBuf| own.as_ref().is_some_and(|own| own.starts_with(path));
    let chosen = existing.iter().find(holds_own);
    let chosen = chosen.or_else(|| existing.iter().find(|path| is_populated(path))).or(existing.first());
    chosen.cloned().ok_or_else(|| MountError::NoPods { root: root.into() })
}

/// The trees in which another cgroup driver of the kubelet keeps pods, or may do so later. None if the
/// operator has configured the pods' cgroup.
pub fn other_pods_cgroups(root: &Path, pods: &Path, configured: Option<&Path>) -> Vec<PathBuf> {
    if configured.is_some() {
        return Vec::new();
    }
    candidates(root).filter(|path| path != pods).collect()
}

fn candidates(root: &Path) -> impl Iterator<Item = PathBuf> {
    POD_CGROUPS.into_iter().map(|name| root.join(name))
}

/// The agent's own cgroup, as an absolute path below `root`.
///
/// # Errors
/// [`MountError::OwnNotFound`] when no cgroup below `root` has this process, [`MountError::Read`].
pub fn own_cgroup(root: &Path) -> Result<PathBuf, MountError> {
    let file = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(file).map_err(read_error(file))?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/")).map(|below| root.join(below));
    // In its own cgroup namespace (the runtimes' default) a process sees a path relative to that namespace,
    // not to the host's mount. It reads process ids of its own pid namespace, with 0 for all other processes,
    // so the walk cannot confuse processes.
    match own {
        Some(own) if has_this_process(&own) => Ok(own),
        _ => find_own(root).ok_or_else(|| MountError::OwnNotFound { root: root.into() }),
    }
}

const PREFERRED_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// systemd driver, cgroupfs driver, then both below kind's `--cgroup-root=/kubelet`.
const POD_CGROUPS: [&str; 4] =
    ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// `CGROUP2_SUPER_MAGIC`, include/uapi/linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let path = path.to_path_buf();
    |source| MountError::Read { path, source }
}

fn is_cgroup2(path: &Path) -> Result<bool, MountError> {
    let statfs = rustix::fs::statfs(path).map_err(|source| read_error(path)(source.into()))?;
    Ok(u64::try_from(statfs.f_type).is_ok_and(|magic| magic == CGROUP2_MAGIC))
}

/// The mount points of type cgroup2 in the text of a mountinfo file (proc_pid_mountinfo(5)).
fn cgroup2_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let of_line = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let mount_point = fields.nth(4)?;
        // Optional fields end with a lone dash; the type follows.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        (kind == b"cgroup2").then(|| PathBuf::from(OsString::from_vec(unescape(mount_point))))
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(of_line).collect()
}

/// Undoes the octal escapes (`\040` for a space) of mountinfo's paths.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [byte, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        out.push(octal.unwrap_or(*byte));
        rest = if octal.is_some() { &rest[4..] } else { tail };
    }
    out
}

/// Returns whether there is a process in the cgroup or below.
pub fn is_populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

fn has_this_process(cgroup: &Path) -> bool {
    let own = process::id().to_string();
    fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|procs| procs.lines().any(|pid| pid == own))
}

/// Walks the tree once, at start; cgroups that go away meanwhile are passed over.
fn find_own(root: &Path) -> Option<PathBuf> {
    let mut left = vec![root.to_path_buf()];
    while let Some(cgroup) = left.pop() {
        if has_this_process(&cgroup) {
            return Some(cgroup);
        }
        let entries = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        left.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cgroup2_mount_points_out_of_mountinfo() {
        let mountinfo = b"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:10 master:2 - cgroup2 cgroup2 rw\n\
            50 31 0:38 /../.. /host\\040root/cgroup\\134 ro - cgroup2 cgroup rw\n\
            garbage\n";

        let mounts = cgroup2_mounts(mountinfo);

        assert_eq!(mounts, [Path::new("/sys/fs/cgroup/unified"), Path::new("/host root/cgroup\\")]);
    }

    #[test]
    fn a_configured_root_that_is_not_cgroup2_is_refused() {
        let dir = tempfile::tempdir().unwrap();

        assert!(matches!(find_cgroup_root(Some(dir.path())), Err(MountError::NotCgroup2 { .. })));
    }

    #[test]
    fn finds_the_one_pods_cgroup_that_exists() {
        for name in POD_CGROUPS {
            let root = tempfile::tempdir().unwrap();
            assert!(matches!(find_pods_cgroup(root.path(), None), Err(MountError::NoPods { .. })));
            fs::create_dir_all(root.path().join(name)).unwrap();

            assert_eq!(find_pods_cgroup(root.path(), None).unwrap(), root.path().join(name));
        }
    }

    #[test]
    fn of_several_pods_cgroups_takes_a_populated_one_and_names_the_others() {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("kubepods"), root.path().join("kubepods.slice"));
        for cgroup in [&old, &new] {
            fs::create_dir(cgroup).unwrap();
            fs::write(cgroup.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        }
        let find = || find_pods_cgroup(root.path(), None).unwrap();
        assert_eq!(find(), new, "any");

        fs::write(old.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert_eq!(find(), old);
        let others = other_pods_cgroups(root.path(), &old, None);
        assert!(others.contains(&new) && others.len() == POD_CGROUPS.len() - 1, "{others:?}");
        assert!(other_pods_cgroups(root.path(), &old, Some(&old)).is_empty());

        fs::write(new.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        assert_eq!(find(), new, "either will do: both are covered");
    }

    #[test]
    fn a_configured_pods_cgroup_must_lie_below_the_root() {
        let root = tempfile::tempdir().unwrap();
        let pods = root.path().join("my.slice/my-kubepods.slice");
        fs::create_dir_all(&pods).unwrap();

        let relative = find_pods_cgroup(root.path(), Some(Path::new("my.slice/my-kubepods.slice")));
        let absolute = find_pods_cgroup(root.path(), Some(&pods));

        assert_eq!(relative.unwrap(), pods);
        assert_eq!(absolute.unwrap(), pods);
        for outside in ["/proc", "..", "."] {
            let refused = find_pods_cgroup(root.path(), Some(Path::new(outside)));
            assert!(matches!(refused, Err(MountError::Outside { .. })), "{outside}");
        }
    }
}
