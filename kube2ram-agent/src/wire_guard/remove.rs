//! Removes the wire guard's filters from all devices. Depends on `namespaces`, `datapath` and `devices`.
//! Called by `app` where the guard is off, and by `uninstall`.

use super::{WireGuardError, namespaces};
use crate::{
    datapath::{WireHook, uncover},
    devices::Links,
    listeners::NetnsId,
    netlink::uninterrupted,
};

/// Removes filters from the devices of this namespace and of all processes', and returns how many there were.
/// Links are pinned, and removed with the other pins.
///
/// # Errors
/// [`WireGuardError`]; some may be left.
pub fn remove_filters() -> Result<usize, WireGuardError> {
    if WireHook::of_kernel() == WireHook::Tcx {
        return Ok(0);
    }
    let mut removed = remove_filters_here("the node")?;
    let host = NetnsId::own().map_err(WireGuardError::Namespaces)?;
    for netns in namespaces::of_all(host).map_err(WireGuardError::Namespaces)?.into_values() {
        let mut outcome = Ok(0);
        let within = netns.within(|| {
            outcome = remove_filters_here("a pod");
            Ok(())
        });
        within.map_err(WireGuardError::Namespaces)?;
        removed += outcome?;
    }
    Ok(removed)
}

fn remove_filters_here(owner: &'static str) -> Result<usize, WireGuardError> {
    let links = uninterrupted(Links::of_this_thread);
    let links = links.map_err(|source| WireGuardError::List { owner, source })?;
    let mut removed = 0;
    for index in links.indices() {
        removed += usize::from(uncover(index).map_err(|source| WireGuardError::Uncover(index, source))?);
    }
    Ok(removed)
}
