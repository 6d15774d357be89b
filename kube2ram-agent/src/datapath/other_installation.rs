//! Finds programs of kube2ram on the pods' cgroup that no pin of this installation holds: those of another
//! installation, with another `--bpf-dir`. The two would redirect to each other's listeners. Called by
//! `preflight`.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use kube2ram_common::names::PREFIX;

use super::{
    DatapathError,
    attachment::HOOKS,
    io_error,
    pins::{check_bpffs, children, layouts},
    sys::{link_info, open_pinned, program_ids, program_name},
};

/// Programs on the pods' cgroup that belong to another installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherInstallation {
    /// The kernel's numbers of the programs.
    pub programs: BTreeSet<u32>,
    /// Where they are pinned, as far as that is on the same bpf file system.
    pub bpf_dirs: Vec<PathBuf>,
}

/// How deep below the mount point pins of another installation are searched for.
const MAX_DEPTH: usize = 4;

/// Looks for another installation.
///
/// # Errors
/// [`DatapathError::Io`] when the kernel refuses the query, or the pins cannot be read.
pub fn other_installation(
    bpf_dir: &Path,
    pods_cgroup: &Path,
) -> Result<Option<OtherInstallation>, DatapathError> {
    let before = named_programs(pods_cgroup)?;
    let own = pinned_programs(bpf_dir)?;
    // An agent may have swapped a program between the two calls: the previous program no longer exists.
    let after = if before.is_subset(&own) { BTreeSet::new() } else { named_programs(pods_cgroup)? };
    let programs: BTreeSet<u32> =
        before.intersection(&after).filter(|id| !own.contains(id)).copied().collect();
    if programs.is_empty() {
        return Ok(None);
    }
    let bpf_dirs = installations(bpf_dir, &programs);
    Ok(Some(OtherInstallation { programs, bpf_dirs }))
}

/// The programs on the cgroup whose names are kube2ram's.
fn named_programs(cgroup: &Path) -> Result<BTreeSet<u32>, DatapathError> {
    let failed = || io_error("ask for programs on", cgroup);
    let directory = File::open(cgroup).map_err(failed())?;
    let mut found = BTreeSet::new();
    for (hook, _) in HOOKS {
        for id in program_ids(&directory, hook).map_err(failed())? {
            match program_name(id) {
                Ok(name) if name.starts_with(PREFIX) => drop(found.insert(id)),
                Ok(_) => {}
                // It was detached meanwhile, or the agent runs with CAP_BPF alone, which cannot open a
                // program by its number.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {}
                Err(error) => return Err(failed()(error)),
            }
        }
    }
    Ok(found)
}

/// Programs under the links that are pinned in a directory.
fn pinned_programs(bpf_dir: &Path) -> Result<BTreeSet<u32>, DatapathError> {
    let mut found = BTreeSet::new();
    for layout in layouts(bpf_dir)? {
        for attachment_point in children(&layout.join("links"))? {
            for pin in children(&attachment_point)? {
                match open_pinned(&pin).and_then(link_info) {
                    Ok(info) => drop(found.insert(info.program_id)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(io_error("examine", &pin)(error)),
                }
            }
        }
    }
    Ok(found)
}

/// Directories of the same bpf file system that hold any of the programs.
fn installations(bpf_dir: &Path, programs: &BTreeSet<u32>) -> Vec<PathBuf> {
    let Some(mount) = bpf_dir.ancestors().filter(|path| path.exists() && check_bpffs(path).is_ok()).last()
    else {
        return Vec::new();
    };
    let (mut found, mut left) = (Vec::new(), vec![(mount.to_owned(), 0)]);
    while let Some((directory, depth)) = left.pop() {
        if pinned_programs(&directory).is_ok_and(|pinned| !pinned.is_disjoint(programs)) {
            found.push(directory);
        } else if depth < MAX_DEPTH {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            left.extend(directories.map(|entry| (entry.path(), depth + 1)));
        }
    }
    found.sort();
    found
}

impl fmt::Display for OtherInstallation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = self.programs.iter().map(u32::to_string).collect();
        write!(f, "another installation of kube2ram has programs there (ids {}", ids.join(", "))?;
        if self.bpf_dirs.is_empty() {
            return f.write_str(
                "), which are pinned nowhere on this bpf file system: end its agent, or remove its pins where they are mounted",
            );
        }
        let directories: Vec<_> = self.bpf_dirs.iter().map(|path| path.display().to_string()).collect();
        write!(
            f,
            "), pinned in {}: give the agent that --bpf-dir, or end the other agent and run kube2ram uninstall --bpf-dir={}",
            directories.join(" and "),
            directories[0]
        )
    }
}
