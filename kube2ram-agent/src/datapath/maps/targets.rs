//! Which pods have an in-pod listener, in the maps of targets and of their network namespaces. `listeners`
//! writes the entries, `repair` compares the maps with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Pod,
    maps::{HashMap, MapData, MapError},
};
use kube2ram_common::{
    abi::{TARGET_HAS_IPV6, Target},
    connection::port_be,
    names::map,
};

use super::open;
use crate::{
    datapath::{DatapathError, Outgoing, pins::Pins},
    identity::CgroupId,
};

/// The agent's listener in a pod's network namespace, at 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodTarget {
    /// The cookie of the namespace.
    pub netns: u64,
    /// The TCP port.
    pub port: u16,
    /// Whether it is at `::1` as well.
    pub has_ipv6: bool,
}

/// Pods with an in-pod listener, by the pod's cgroup. Remembers what it wrote, so that it can be written
/// again.
#[derive(Clone, Debug)]
pub struct Targets(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    map: HashMap<MapData, u64, Target>,
    /// Follows from it: which pod's a namespace is.
    namespaces: HashMap<MapData, u64, u64>,
    /// As many as the map has room for.
    wanted: BTreeMap<u64, Target>,
    /// The entries that a previous agent wrote.
    adopted: BTreeSet<u64>,
}

impl Targets {
    /// Opens the map. If the previous agent has ended, its listeners are closed, and all pods are redirected
    /// to the host listener.
    pub(in crate::datapath) fn open(pins: &Pins, outgoing: Outgoing) -> Result<Self, DatapathError> {
        let (map, namespaces) = (open(pins, map::TARGETS)?, open(pins, map::NAMESPACES)?);
        let mut written = Written { map, namespaces, wanted: BTreeMap::new(), adopted: BTreeSet::new() };
        if outgoing == Outgoing::HandsOver {
            written.adopt()?;
        }
        written.repair()?;
        Ok(Self(Arc::new(Mutex::new(written))))
    }

    /// Redirects a pod's connections to its in-pod listener, which must be listening.
    ///
    /// # Errors
    /// When the map is full, or the kernel refuses; what held for the pod before still does.
    pub fn insert(&self, pod: CgroupId, target: PodTarget) -> Result<(), DatapathError> {
        self.written().set(pod.0, target.into())
    }

    /// Redirects a pod's connections to the host listener again. Call it before the in-pod listener is
    /// closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, pod: CgroupId) -> Result<(), DatapathError> {
        self.written().remove(pod.0)
    }

    /// Redirects pods to the host listener if their target is still the outgoing agent's in-pod listener:
    /// those listeners are about to be closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget_adopted(&self) -> Result<(), DatapathError> {
        let mut written = self.written();
        let adopted = std::mem::take(&mut written.adopted);
        adopted.into_iter().try_for_each(|pod| written.remove(pod))
    }

    /// The target of a pod's in-pod listener, if it has one.
    pub fn of_pod(&self, pod: CgroupId) -> Option<PodTarget> {
        self.written().wanted.get(&pod.0).copied().map(PodTarget::from)
    }

    /// Compares the map with what was written, repairs it, and returns how many entries were missing, altered
    /// or foreign.
    pub(in crate::datapath) fn repair(&self) -> Result<usize, DatapathError> {
        self.written().repair()
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<PodTarget> for Target {
    fn from(target: PodTarget) -> Self {
        let flags = if target.has_ipv6 { TARGET_HAS_IPV6 } else { 0 };
        Self { netns: target.netns, port_be: port_be(target.port), flags, reserved: 0 }
    }
}

impl From<Target> for PodTarget {
    fn from(target: Target) -> Self {
        let has_ipv6 = target.flags & TARGET_HAS_IPV6 != 0;
        Self { netns: target.netns, port: u16::from_be(target.port_be), has_ipv6 }
    }
}

impl Written {
    /// Takes what another agent wrote for its own.
    fn adopt(&mut self) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Map { what: "read", name: map::TARGETS, source };
        self.wanted = self.map.iter().collect::<Result<_, _>>().map_err(failed)?;
        self.adopted = self.wanted.keys().copied().collect();
        Ok(())
    }

    fn set(&mut self, cgroup: u64, target: Target) -> Result<(), DatapathError> {
        // No other process may dial the listener before the pod is redirected to it.
        self.namespaces.insert(target.netns, cgroup, 0).map_err(failed("write", map::NAMESPACES))?;
        self.map.insert(cgroup, target, 0).map_err(failed("write", map::TARGETS))?;
        self.adopted.remove(&cgroup);
        let former = self.wanted.insert(cgroup, target);
        match former.filter(|former| former.netns != target.netns) {
            Some(former) => remove(&mut self.namespaces, former.netns, map::NAMESPACES),
            None => Ok(()),
        }
    }

    fn remove(&mut self, cgroup: u64) -> Result<(), DatapathError> {
        remove(&mut self.map, cgroup, map::TARGETS)?;
        match self.wanted.remove(&cgroup) {
            Some(former) => remove(&mut self.namespaces, former.netns, map::NAMESPACES),
            None => Ok(()),
        }
    }

    fn repair(&mut self) -> Result<usize, DatapathError> {
        let namespaces = self.wanted.iter().map(|(cgroup, target)| (target.netns, *cgroup)).collect();
        Ok(repair(&mut self.namespaces, &namespaces, map::NAMESPACES)?
            + repair(&mut self.map, &self.wanted, map::TARGETS)?)
    }
}

fn failed(what: &'static str, name: &'static str) -> impl Fn(MapError) -> DatapathError {
    move |source| DatapathError::Map { what, name, source }
}

fn remove<V: Pod>(
    map: &mut HashMap<MapData, u64, V>,
    key: u64,
    name: &'static str,
) -> Result<(), DatapathError> {
    match map.remove(&key) {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("remove from", name)),
    }
}

/// Repairs a map, and returns how many entries differed.
fn repair<V: Pod + PartialEq>(
    map: &mut HashMap<MapData, u64, V>,
    wanted: &BTreeMap<u64, V>,
    name: &'static str,
) -> Result<usize, DatapathError> {
    let found = map.keys().collect::<Result<BTreeSet<_>, _>>().map_err(failed("read", name))?;
    let mut repaired = 0;
    // These come first, because they take the room of missing entries.
    for key in found.iter().filter(|key| !wanted.contains_key(key)) {
        remove(map, *key, name)?;
        repaired += 1;
    }
    for (key, value) in wanted {
        if found.contains(key) && map.get(key, 0).map_err(failed("read", name))? == *value {
            continue;
        }
        map.insert(key, value, 0).map_err(failed("write", name))?;
        repaired += 1;
    }
    Ok(repaired)
}
