//! What a node has made on this machine, on disk before it exists, and how it is undone: by the node itself, by a signal, or by
//! the next run. Depends on cgroup removal, iproute2 and nftables. Called by `node`, the signal handler and `kube2ram-sandbox exec`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{cgroup, netns, pod};
use crate::{say, standin::hex_sha256};

/// The things that exist because of one node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// The node's name.
    pub name: String,
    /// Whose it is.
    pub pid: u32,
    /// The pods, by name.
    pub pods: BTreeMap<String, PodRecord>,
    pub(super) cgroup: PathBuf,
    pub(super) links: Vec<String>,
    pub(super) netns: Vec<String>,
}

/// How to get into a pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PodRecord {
    pub(super) cgroup: PathBuf,
    pub(super) containers: BTreeMap<String, PathBuf>,
    pub(super) netns: Option<String>,
}

impl PodRecord {
    /// A command that will run in a container (the first one when `None`).
    ///
    /// # Errors
    /// When the pod has no such container.
    pub fn command(&self, container: Option<&str>, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let found = match container {
            Some(name) => self.containers.get(name),
            None => self.containers.iter().find(|(name, _)| *name != pod::PAUSE).map(|(_, cgroup)| cgroup),
        };
        let cgroup = found.with_context(|| format!("no container {:?}", container.unwrap_or_default()))?;
        Ok(pod::join(cgroup, self.netns.as_deref(), program.as_ref()))
    }
}

impl Record {
    /// Where the records are.
    pub const ROOT: &str = "/run/kube2ram-sandbox";

    pub(super) fn new(name: &str, cgroup: PathBuf) -> Self {
        Self { name: name.to_owned(), pid: process::id(), cgroup, ..Self::default() }
    }

    /// The records of all nodes on this machine.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn load_all() -> Result<Vec<Self>> {
        let Ok(entries) = fs::read_dir(Self::ROOT) else { return Ok(Vec::new()) };
        let files = entries.filter_map(Result::ok).map(|entry| entry.path().join(FILE));
        files.filter(|file| file.exists()).map(|file| Self::load(&file)).collect()
    }

    fn load(file: &Path) -> Result<Self> {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", file.display()))
    }

    /// Removes a node of this process that cannot be dropped, because a signal ends the process.
    pub fn remove(name: &str) {
        if let Ok(record) = Self::load(&Path::new(Self::ROOT).join(name).join(FILE)) {
            record.undo();
        }
    }

    /// Undoes what crashed runs have left. The caller holds the lock, so every record is one of those.
    pub(super) fn undo_all() -> Result<()> {
        Self::load_all()?.iter().for_each(Self::undo);
        Ok(())
    }

    pub(super) fn save(&self) -> Result<()> {
        fs::create_dir_all(self.directory())?;
        // Renamed into place: a reader, or a crash, never sees half of it.
        let (file, new) = (self.directory().join(FILE), self.directory().join("state.new"));
        fs::write(&new, serde_json::to_vec(self)?)?;
        Ok(fs::rename(new, file)?)
    }

    pub(super) fn directory(&self) -> PathBuf {
        Path::new(Self::ROOT).join(&self.name)
    }

    pub(super) fn bpffs(&self) -> PathBuf {
        self.directory().join("bpf")
    }

    pub(super) fn agent_state(&self) -> PathBuf {
        self.directory().join("agent")
    }

    /// The name of a veth's end on the node: at most 15 characters, and unlike any other node's.
    pub(super) fn link(&self, index: u8) -> String {
        format!("k2r{}p{index}", &hex_sha256(self.name.as_bytes())[..6])
    }

    /// Removes everything, as far as the machine lets it; what could not be removed is said, and stays on record.
    pub(super) fn undo(&self) {
        let mut clean = true;
        let mut attempt = |outcome: Result<()>| {
            if let Err(error) = outcome {
                say(&format!("could not clean up: {error:#}"));
                clean = false;
            }
        };
        attempt(cgroup::remove(&self.cgroup));
        // The agent's netfilter table stays when the agent ends, and would hold for the next node's pods.
        let tables = netns::run(Command::new("nft").args(["list", "tables"]));
        if tables.is_ok_and(|tables| tables.lines().any(|table| table == GUARD)) {
            attempt(netns::run(Command::new("nft").arg(format!("delete {GUARD}"))).map(drop));
        }
        // What the agent pinned goes with the bpffs.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in [self.bpffs(), self.agent_state()] {
            if mounts.lines().any(|line| line.split(' ').nth(1).map(Path::new) == Some(&mount)) {
                attempt(netns::run(Command::new("umount").arg("-l").arg(&mount)).map(drop));
            }
        }
        for link in self.links.iter().filter(|link| Path::new("/sys/class/net").join(link).exists()) {
            attempt(netns::ip(&["link", "delete", link]));
        }
        for netns in self.netns.iter().filter(|netns| netns::path(netns).exists()) {
            attempt(netns::ip(&["netns", "delete", netns]));
        }
        // A record that is not fully undone is tried again by the next run.
        if clean && let Err(error) = fs::remove_dir_all(self.directory()) {
            say(&format!("could not remove {}: {error}", self.directory().display()));
        }
    }
}

const FILE: &str = "state.json";

/// The table of the agent's forward guard.
const GUARD: &str = "table ip kube2ram";
