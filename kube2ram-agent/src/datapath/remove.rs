//! Detaches the eBPF programs: all of them, or those of other layouts once this layout's are attached. Called
//! by `uninstall` and `attach`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use kube2ram_common::names::program;

use super::{
    DatapathError, boot, io_error, pins,
    pins::{Lock, Pins, children, layouts},
    sys::{link_detach, open_pinned},
};

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Attached programs.
    pub links: usize,
    /// Pinned maps.
    pub maps: usize,
}

/// A handshake between pod and agent takes microseconds, a task that is not run in the middle of its
/// connect(2) some milliseconds.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(50);

/// Detaches all programs and removes all pins below `bpf_dir`; what is not there needs not be removed.
///
/// # Errors
/// [`DatapathError::Locked`] when an agent runs: nothing was removed. Others may leave a part, which still
/// denies.
pub fn remove(bpf_dir: &Path) -> Result<Removed, DatapathError> {
    let mut removed = Removed::default();
    let Some(_lock) = Lock::of_existing(bpf_dir)? else { return Ok(removed) };
    take_out(&layouts(bpf_dir)?, Duration::ZERO, &mut removed)?;
    removed.links += boot::forget(bpf_dir)?;
    match fs::remove_dir(bpf_dir) {
        // A mount point, or with something in it that is not ours.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty) => {}
        outcome => outcome.map_err(io_error("remove", bpf_dir))?,
    }
    Ok(removed)
}

/// Does the same for all layouts but this one, whose programs are attached already.
///
/// Until the other layout's connect hooks are removed, they run first, and ours see the rewritten address of
/// the other agent, which passes. From then on ours redirect. The connections that the others redirected last
/// have time to be handed over before their `sock_ops` is removed.
pub(super) fn remove_others(pins: &Pins) -> Result<Removed, DatapathError> {
    let mut others = layouts(pins.bpf_dir())?;
    others.retain(|layout| *layout != pins.directory());
    let mut removed = Removed::default();
    take_out(&others, HANDSHAKE_GRACE, &mut removed)?;
    Ok(removed)
}

fn take_out(layouts: &[PathBuf], grace: Duration, removed: &mut Removed) -> Result<(), DatapathError> {
    let mut links = Vec::new();
    for layout in layouts {
        for attachment_point in children(&layout.join("links"))? {
            links.extend(children(&attachment_point)?);
        }
    }
    links.sort_by_key(|link| stage(link));
    let mut reached = Stage::PeerName;
    for link in links {
        if reached < Stage::Handover && stage(&link) >= Stage::Handover {
            thread::sleep(grace);
        }
        reached = stage(&link);
        // Unpinning alone lets the program run for a moment longer.
        let opened = open_pinned(&link).map_err(io_error("open", &link))?;
        link_detach(opened).map_err(io_error("detach", &link))?;
        pins::remove(&link)?;
        removed.links += 1;
    }
    for layout in layouts {
        removed.maps += children(&layout.join("maps"))?.len();
        fs::remove_dir_all(layout).map_err(io_error("remove", layout))?;
    }
    Ok(())
}

/// The order in which programs are removed. Egress and the wire guard deny connections that are no longer
/// redirected, so they are removed last. `sock_ops` is needed as long as a program redirects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    PeerName,
    Verdict,
    Handover,
    Egress,
}

fn stage(link: &Path) -> Stage {
    let is = |names: &[&str]| names.iter().any(|name| link.file_name() == Some(name.as_ref()));
    match () {
        () if is(&[program::PEER_NAME4, program::PEER_NAME6]) => Stage::PeerName,
        () if is(&[program::SOCK_OPS]) => Stage::Handover,
        () if is(&[program::EGRESS]) || is_wire(link) => Stage::Egress,
        () => Stage::Verdict,
    }
}

/// Links to devices are pinned under their number, in a directory that is named after their program.
fn is_wire(link: &Path) -> bool {
    let attachment_point = link.parent().and_then(Path::file_name);
    program::WIRES.iter().any(|name| attachment_point == Some(name.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_denies_goes_last() {
        let wires = program::WIRES.map(|name| Path::new("/b/v1/links").join(name).join("7"));
        let others = program::ALL.map(|name| Path::new("/b/v1/links/pods").join(name));
        let mut links = [&wires[..], &others].concat();

        links.sort_by_key(|link| stage(link));

        let names: Vec<_> = links.iter().filter_map(|link| link.file_name()?.to_str()).collect();
        assert_eq!(names[..2], [program::PEER_NAME4, program::PEER_NAME6]);
        assert_eq!(names[names.len() - 4..], [program::SOCK_OPS, "7", "7", program::EGRESS]);
    }
}
