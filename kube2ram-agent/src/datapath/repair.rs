//! Compares the eBPF programs with the expected state, and repairs them. Called by `reconcile`.

use std::path::{Path, PathBuf};

use super::{Datapath, DatapathError, Settings};
use kube2ram_service::telemetry::chain;

/// In which respect something was not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Drift {
    /// A cgroup was deleted and created again, and so had no program.
    Cgroup,
    /// The configuration in its map; also if the pods' cgroup, which it names, was created again.
    Config,
    /// A link was detached.
    Detached,
    /// A link's pin was missing, or another object's.
    LinkPin,
    /// A map's pin was missing, or another object's.
    MapPin,
    /// Another program ran under a link.
    Program,
    /// Entries of the target map were missing, altered, or foreign.
    Targets,
}

impl Drift {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Cgroup,
        Self::Config,
        Self::Detached,
        Self::LinkPin,
        Self::MapPin,
        Self::Program,
        Self::Targets,
    ];

    /// The metrics label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Config => "config",
            Self::Detached => "detached",
            Self::LinkPin => "link_pin",
            Self::MapPin => "map_pin",
            Self::Program => "program",
            Self::Targets => "targets",
        }
    }
}

/// What one comparison found.
#[derive(Debug, Default)]
pub struct Found {
    /// What was repaired.
    pub repaired: Vec<Drift>,
    /// The repaired object: program, map, or other, one for each of the above.
    pub of: Vec<&'static str>,
    /// What was not, the first thing first.
    pub failed: Vec<DatapathError>,
}

impl Datapath {
    /// The directories to watch for changes: those above the pods' cgroup, which may be deleted and created
    /// again, and those of the pins.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let Settings { cgroup_root, pods_cgroup, bpf_dir, .. } = &self.settings;
        let above = pods_cgroup.ancestors().skip(1).take_while(move |path| path.starts_with(cgroup_root));
        let pins = self.pins.directories();
        above.chain([&**bpf_dir]).map(Path::to_owned).chain(pins)
    }

    /// Compares everything with what it should be and repairs what it is not, in the order of a start: egress
    /// before what redirects. Blocks for some 100 system calls, and two more a pod if `with_targets`.
    ///
    /// The position of other programs in the same cgroup does not matter: whatever they rewrite, before or
    /// after ours, egress sees the address in the packet.
    pub fn repair(&mut self, with_targets: bool) -> Found {
        let mut found = Found::default();
        match self.pins.restore() {
            Ok(()) => {}
            // Nothing may be written without the lock.
            Err(error @ DatapathError::Locked(_)) => {
                found.failed.push(error);
                return found;
            }
            // Programs can be kept attached even if nothing can be pinned.
            Err(error) => found.failed.push(error),
        }
        for map in &self.maps {
            let outcome = map.repair(&self.pins).map(|done| done.then_some(Drift::MapPin));
            found.note(outcome, map.name());
        }
        let outcome = self.configuration.ensure(&self.settings);
        found.note(outcome.map(|done| done.then_some(Drift::Config)), "configuration");
        let outcome = self.others.follow(self.mode, &self.pins, &self.settings);
        found.note(outcome.map(|()| None), "another tree of pods' cgroups");
        for link in self.links.iter_mut().chain(self.others.links_mut()) {
            let mut drifts = Vec::new();
            let outcome = link.repair(|drift| drifts.push(drift));
            for drift in drifts {
                found.note(Ok(Some(drift)), link.name());
            }
            found.note(outcome.map(|()| None), link.name());
        }
        if with_targets {
            let outcome = self.targets.repair().map(|repaired| (repaired > 0).then_some(Drift::Targets));
            found.note(outcome, "targets");
        }
        found
    }
}

impl Found {
    fn note(&mut self, outcome: Result<Option<Drift>, DatapathError>, what: &'static str) {
        match outcome {
            Ok(None) => {}
            Ok(Some(drift)) => {
                tracing::warn!(kind = drift.label(), what, "the eBPF programs were changed; repairing them");
                self.repaired.push(drift);
                self.of.push(what);
            }
            Err(error) => {
                tracing::debug!(what, error = chain(&error), "cannot repair the eBPF programs");
                self.failed.push(error);
            }
        }
    }
}
