//! The first check of all, before the rest of the agent runs: it lets the boot guard's programs go. Called by
//! `app`.

use std::{io, path::Path, thread, time::Duration};

use prometheus_client::registry::Registry;

use super::WireGuard;
use crate::datapath::Wire;
use kube2ram_cloud::MetadataAddr;

/// A check is not complete if devices change meanwhile, as they do at boot.
const ATTEMPTS: usize = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Attaches the program to all devices, and returns whether all have it. Tries for some two seconds, in which
/// it blocks. A failure is logged. The guard that runs later adopts what was attached.
///
/// # Errors
/// When the node's network namespace cannot be opened.
pub fn cover_once(wire: Wire, metadata: MetadataAddr, pods_cgroup: &Path) -> io::Result<bool> {
    let mut guard = WireGuard::new(wire, metadata, pods_cgroup, None, &mut Registry::default())?;
    // Each node has a loopback device, so without a device none was listed.
    let mut is_covered = || guard.look() && !guard.node.links().is_empty();
    let mut attempts = 0..ATTEMPTS;
    Ok(is_covered()
        || attempts.any(|_| {
            thread::sleep(PAUSE);
            is_covered()
        }))
}
