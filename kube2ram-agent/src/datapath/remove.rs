//! Takes the kernel half out of force, of every layout that ever was in the directory. Called by `uninstall`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use kube2ram_common::names::program;

use super::{
    DatapathError, io_error,
    pins::Lock,
    sys::{link_detach, open_pinned},
};

/// What was there and is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Programs in force.
    pub links: usize,
    /// Pinned maps.
    pub maps: usize,
}

/// Detaches all programs and removes all pins below `bpf_dir`; what is not there needs not be removed.
///
/// # Errors
/// [`DatapathError::Locked`] when an agent runs: nothing was removed. Others may leave a part, which still denies.
pub fn remove(bpf_dir: &Path) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    if !bpf_dir.exists() {
        return Ok(removed);
    }
    let _lock = Lock::of_existing(bpf_dir)?;
    let layouts = children(bpf_dir)?;
    let layouts: Vec<_> = layouts.into_iter().filter(|path| is_layout(path)).collect();
    let mut links = Vec::new();
    for place in layouts.iter().map(|layout| children(&layout.join("links"))) {
        for place in place? {
            links.extend(children(&place)?);
        }
    }
    links.sort_by_key(|link| stage(link));
    for link in links {
        // Unpinning alone lets the program run for a moment longer.
        let opened = open_pinned(&link).map_err(io_error("open", &link))?;
        link_detach(opened).map_err(io_error("detach", &link))?;
        fs::remove_file(&link).map_err(io_error("remove", &link))?;
        removed.links += 1;
    }
    for layout in &layouts {
        removed.maps += children(&layout.join("maps"))?.len();
        fs::remove_dir_all(layout).map_err(io_error("remove", layout))?;
    }
    match fs::remove_dir(bpf_dir) {
        // A mount point, or with something in it that is not ours.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty) => {}
        outcome => outcome.map_err(io_error("remove", bpf_dir))?,
    }
    Ok(removed)
}

/// Egress denies whatever the others no longer redirect, so it goes last; the hand-over is of use as long as somebody redirects.
fn stage(link: &Path) -> u8 {
    let is = |names: &[&str]| names.iter().any(|name| link.file_name() == Some(name.as_ref()));
    match () {
        () if is(&[program::PEER_NAME4, program::PEER_NAME6]) => 0,
        () if is(&[program::SOCK_OPS]) => 2,
        () if is(&[program::EGRESS]) => 3,
        () => 1,
    }
}

/// `v` and a number: the directory of one map layout.
fn is_layout(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('v'));
    name.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What a directory holds; nothing when there is none.
fn children(directory: &Path) -> Result<Vec<PathBuf>, DatapathError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("read", directory))?,
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(io_error("read", directory))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_denies_goes_last() {
        let mut links = program::ALL.map(|name| Path::new("/b/v1/links/pods").join(name));

        links.sort_by_key(|link| stage(link));

        let names: Vec<_> = links.iter().filter_map(|link| link.file_name()?.to_str()).collect();
        assert_eq!(names[..2], [program::PEER_NAME4, program::PEER_NAME6]);
        assert_eq!(names[names.len() - 2..], [program::SOCK_OPS, program::EGRESS]);
    }

    #[test]
    fn only_layouts_are_ours() {
        for (name, ours) in [("v1", true), ("v12", true), ("v", false), ("v1x", false), ("other", false)] {
            assert_eq!(is_layout(&Path::new("/b").join(name)), ours, "{name}");
        }
    }
}
