//! The node's own network devices. A node with many pods has as many ends of pairs, so they are listed again
//! only when they have changed. Called by `wire_guard`.

use std::{io, net::IpAddr, time::Duration};

use tokio::time::Instant;

use super::namespaces::DeviceChanges;
use crate::{
    devices::{Links, WayOut},
    netlink::{Route, uninterrupted},
};
use kube2ram_cloud::MetadataAddr;

/// The devices of the node at the last listing.
#[derive(Debug)]
pub(super) struct NodeDevices {
    /// Without it each refresh is a listing.
    changes: Option<DeviceChanges>,
    list_at: Instant,
    /// Where packets to the metadata server leave.
    routed: Vec<u32>,
    links: Vec<u32>,
    way: WayOut,
}

/// The kernel reports each change. This is for the case that it does not.
const LIST_AGAIN: Duration = Duration::from_secs(10);

impl NodeDevices {
    /// Those of a node that was never looked at.
    pub(super) fn new() -> Self {
        let (routed, links, way) = (Vec::new(), Vec::new(), WayOut::default());
        Self { changes: None, list_at: Instant::now(), routed, links, way }
    }

    /// Lists the devices of the calling thread's namespace if they, or the routes to the metadata server, may
    /// have changed. Returns whether there are others than before.
    ///
    /// # Errors
    /// Netlink's; interrupted when the devices change all the time. The next call lists them; until then the
    /// last list counts.
    pub(super) fn refresh(&mut self, metadata: MetadataAddr) -> io::Result<bool> {
        let now = Instant::now();
        let may_have_changed = match &self.changes {
            Some(changes) => changes.have_happened(),
            None => {
                // Before the listing: what changes from here on is reported.
                self.changes = DeviceChanges::of_this_thread().ok();
                true
            }
        };
        if may_have_changed {
            self.list_at = now;
        }
        let routed = routed_to(metadata)?;
        if routed == self.routed && now < self.list_at {
            return Ok(false);
        }
        self.list_at = now;
        let listed = uninterrupted(Links::of_this_thread)?;
        let links: Vec<u32> = listed.indices().collect();
        let are_others = links != self.links;
        (self.way, self.links, self.routed) = (listed.way_out_of_node(&routed), links, routed);
        self.list_at = now + LIST_AGAIN;
        Ok(are_others)
    }

    /// Those by which packets leave the node.
    pub(super) fn way_out(&self) -> &WayOut {
        &self.way
    }

    /// The index of each.
    pub(super) fn links(&self) -> &[u32] {
        &self.links
    }
}

/// The devices by which packets leave the node, listed now.
///
/// # Errors
/// Netlink's; interrupted when the devices change at this moment.
pub(super) fn way_out_of_node(metadata: MetadataAddr) -> io::Result<WayOut> {
    Ok(Links::of_this_thread()?.way_out_of_node(&routed_to(metadata)?))
}

fn routed_to(metadata: MetadataAddr) -> io::Result<Vec<u32>> {
    let addresses = [Some(IpAddr::V4(*metadata.v4.ip())), metadata.v6.map(IpAddr::V6)];
    let mut routed = Vec::new();
    for address in addresses.into_iter().flatten() {
        routed.extend(Route::towards(address)?.and_then(|route| route.device));
    }
    Ok(routed)
}
