//! Trees of pods' cgroups besides the kubelet's current one. After a change of the kubelet's cgroup driver
//! the previous tree stays, with its pods until the kubelet ends them, and an agent may still run in it.
//! Called by `attach` and `repair`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::Ebpf;
use kube2ram_common::names::program;

use super::{
    DatapathError, Mode, Settings, io_error,
    links::Link,
    load,
    pins::{self, Pins, children},
};

/// The existing trees, with the programs of a pods' cgroup attached to each.
#[derive(Debug, Default)]
pub(super) struct OtherTrees(Vec<Tree>);

#[derive(Debug)]
struct Tree {
    cgroup: PathBuf,
    links: Vec<Link>,
}

/// Attachment points that belong to no other tree.
const ATTACHMENT_POINTS: [&str; 5] = ["agent", "pods", "root", program::WIRE, program::WIRE_IP];

impl OtherTrees {
    /// Its programs.
    pub(super) fn links(&self) -> impl Iterator<Item = &Link> {
        self.0.iter().flat_map(|tree| &tree.links)
    }

    /// The same, to be repaired.
    pub(super) fn links_mut(&mut self) -> impl Iterator<Item = &mut Link> {
        self.0.iter_mut().flat_map(|tree| &mut tree.links)
    }

    /// Attaches the programs to new trees, and forgets removed ones. Loads the programs only for a new tree.
    ///
    /// # Errors
    /// As [`super::Datapath::attach`]; to be tried again.
    pub(super) fn follow(
        &mut self,
        mode: Mode,
        pins: &Pins,
        settings: &Settings,
    ) -> Result<(), DatapathError> {
        let is_there = |cgroup: &PathBuf| cgroup.is_dir();
        let former = self.0.len();
        self.0.retain(|tree| is_there(&tree.cgroup));
        if self.0.len() < former {
            self.remove_stale(pins)?;
        }
        let mut there = settings.other_pods_cgroups.iter().filter(|cgroup| is_there(cgroup));
        if there.all(|cgroup| self.0.iter().any(|tree| tree.cgroup == *cgroup)) {
            return Ok(());
        }
        self.cover(&mut load::load(pins, settings.debug)?, mode, pins, settings)
    }

    /// Attaches the programs to each existing tree that has none yet.
    ///
    /// # Errors
    /// As [`Self::follow`]; the trees before are covered.
    pub(super) fn cover(
        &mut self,
        ebpf: &mut Ebpf,
        mode: Mode,
        pins: &Pins,
        settings: &Settings,
    ) -> Result<(), DatapathError> {
        for cgroup in &settings.other_pods_cgroups {
            if !cgroup.is_dir() || self.0.iter().any(|tree| tree.cgroup == *cgroup) {
                continue;
            }
            let attachment_point = attachment_point_of(cgroup, settings);
            let directory = pins.attachment_point(&attachment_point);
            fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
            let wanted = mode.wanted_on_pods(settings);
            let mut links = Vec::new();
            for name in &wanted {
                links.push(Link::ensure(ebpf, name, cgroup, pins.link(&attachment_point, name))?.0);
            }
            for pin in children(&directory)? {
                if !wanted.iter().any(|name| pin.ends_with(name)) {
                    pins::remove(&pin)?;
                }
            }
            tracing::info!(cgroup = %cgroup.display(), "programs attached to another tree of pods' cgroups");
            self.0.push(Tree { cgroup: cgroup.clone(), links });
        }
        Ok(())
    }

    /// Removes the pins of an earlier agent and of removed trees. Call it once the kubelet's own tree has the
    /// programs.
    ///
    /// # Errors
    /// When a pin cannot be removed.
    pub(super) fn remove_stale(&self, pins: &Pins) -> Result<(), DatapathError> {
        let attachment_points = pins.directory().join("links");
        let known: Vec<_> = self.0.iter().filter_map(|tree| tree.links.first()?.pin().parent()).collect();
        for attachment_point in children(&attachment_points)? {
            if ATTACHMENT_POINTS.iter().any(|name| attachment_point.ends_with(name))
                || known.contains(&&*attachment_point)
            {
                continue;
            }
            for pin in children(&attachment_point)? {
                pins::remove(&pin)?;
            }
            match fs::remove_dir(&attachment_point) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("remove", &attachment_point)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A directory's name for the links of a tree: its path, without the dots that a bpf file system takes for
/// its own.
fn attachment_point_of(cgroup: &Path, settings: &Settings) -> String {
    let below = cgroup.strip_prefix(&settings.cgroup_root).unwrap_or(cgroup);
    below.display().to_string().replace('/', "-").replace('.', "_")
}
