//! What a node has made on this machine, on disk before it exists, and how it is undone: by the node itself,
//! by a signal, or by another process's node when this process has ended. Depends on cgroup removal and
//! iproute2. Called by `node`, the signal handler and `kube2ram-sandbox exec`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{cgroup, netns, pod};
use crate::say;

/// The things that exist because of one node.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// The name that the node was given, and its process's id.
    pub name: String,
    /// The pods, by name.
    pub pods: BTreeMap<String, PodRecord>,
    pub(super) cgroup: PathBuf,
    /// Network namespaces, the node's among them.
    pub(super) netns: Vec<String>,
    pub(super) node_netns: Option<String>,
    /// Held as long as somebody looks after the node: who gets it may undo what is on record.
    #[serde(skip)]
    lock: Option<File>,
}

/// How to get into a pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PodRecord {
    pub(super) cgroup: PathBuf,
    pub(super) containers: BTreeMap<String, PathBuf>,
    /// Its own, if it has one.
    pub(super) netns: Option<String>,
    pub(super) node_netns: Option<String>,
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
        Ok(self.join(cgroup, program.as_ref()))
    }

    /// A command that will run in a cgroup, and in the pod's network namespace or the node's.
    pub(super) fn join(&self, cgroup: &Path, program: &std::ffi::OsStr) -> Command {
        pod::join(cgroup, self.netns.as_deref().or(self.node_netns.as_deref()), program)
    }
}

impl Record {
    /// Where the records are.
    pub const ROOT: &str = "/run/kube2ram-sandbox";

    /// Of a node of this process that is about to be made.
    pub(super) fn create(name: &str, cgroup_root: &Path) -> Result<Self> {
        let name = of_this_process(name);
        let cgroup = cgroup_root.join(format!("kube2ram-{name}"));
        let mut record = Self { name, cgroup, ..Self::default() };
        fs::create_dir_all(record.directory())?;
        // Before the record exists: one without a lock is taken for abandoned.
        let lock = File::create(record.directory().join(LOCK))?;
        record.lock = Some(try_lock(lock)?.context("this process has a node of that name")?);
        record.save()?;
        Ok(record)
    }

    /// The records of all nodes on this machine.
    ///
    /// # Errors
    /// When a record cannot be read.
    pub fn load_all() -> Result<Vec<Self>> {
        let Ok(entries) = fs::read_dir(Self::ROOT) else { return Ok(Vec::new()) };
        let entries = entries.filter_map(Result::ok);
        let files = entries.map(|entry| entry.path().join(FILE)).filter(|file| file.is_file());
        // One that no longer exists was removed by its own process.
        files.map(|file| Self::load(&file)).filter(|record| !record.as_ref().is_err_and(is_gone)).collect()
    }

    fn load(file: &Path) -> Result<Self> {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", file.display()))
    }

    /// Removes a node of this process that cannot be dropped, because a signal ends the process.
    pub fn remove(name: &str) {
        if let Ok(record) = Self::load(&Path::new(Self::ROOT).join(of_this_process(name)).join(FILE)) {
            record.undo();
        }
    }

    /// Undoes what is of no process any more.
    pub(super) fn undo_abandoned() -> Result<()> {
        for record in Self::load_all()? {
            let Ok(lock) = File::open(record.directory().join(LOCK)) else { continue };
            let Some(_lock) = try_lock(lock)? else { continue };
            // Unless its own process, or another one that found it, was faster.
            if record.directory().join(FILE).exists() {
                record.undo();
            }
        }
        Ok(())
    }

    /// What a network namespace of the node's is called, among all of the machine.
    pub(super) fn netns_of(&self, what: &str) -> String {
        format!("kube2ram-{}-{what}", self.name)
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

    /// Removes everything, as far as the machine lets it; what could not be removed is said, and stays on
    /// record.
    pub(super) fn undo(&self) {
        let mut clean = true;
        let mut attempt = |outcome: Result<()>| {
            if let Err(error) = outcome {
                say(&format!("could not clean up: {error:#}"));
                clean = false;
            }
        };
        attempt(cgroup::remove(&self.cgroup));
        // What the agent pinned goes with the bpffs.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in [self.bpffs(), self.agent_state()] {
            if mounts.lines().any(|line| line.split(' ').nth(1).map(Path::new) == Some(&mount)) {
                attempt(netns::run(Command::new("umount").arg("-l").arg(&mount)).map(drop));
            }
        }
        // Devices, routes and netfilter tables go with them.
        for netns in self.netns.iter().filter(|netns| netns::path(netns).exists()) {
            attempt(netns::ip(&["netns", "delete", netns]));
        }
        // A record that is not fully undone is tried again by the next run.
        if clean && let Err(error) = self.remove_directory() {
            say(&format!("could not remove {}: {error}", self.directory().display()));
        }
    }
}

impl Record {
    /// The record last, and the lock after it: whoever is killed in between leaves something that the next
    /// node finds, or nothing but an unused lock.
    fn remove_directory(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(self.directory())? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else if entry.file_name() != FILE && entry.file_name() != LOCK {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_file(self.directory().join(FILE))?;
        fs::remove_dir_all(self.directory())
    }
}

const FILE: &str = "state.json";
const LOCK: &str = "lock";

/// The file with its lock, unless somebody has that.
fn try_lock(file: File) -> Result<Option<File>> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).context("cannot lock a record"),
    }
}

fn is_gone(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

fn of_this_process(name: &str) -> String {
    format!("{name}-{}", process::id())
}
