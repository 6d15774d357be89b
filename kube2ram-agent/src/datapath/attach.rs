//! Brings the kernel half in force, in the order that never leaves a pod half served. Called by `app`, once.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use aya::Ebpf;
use kube2ram_common::names::program;

use super::{
    AcceptedOrigins, AgentAddr, Counters, DatapathError, Layout, MetadataAddr, PassMark, Removed, Targets,
    links::Link,
    load, log,
    maps::{Configuration, PinnedMap},
    pins::{self, Pins},
    remove::remove_others,
};

/// What the kernel half needs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of the pins, on a bpf file system.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount: the root of all cgroups.
    pub cgroup_root: PathBuf,
    /// The cgroup that holds all pods.
    pub pods_cgroup: PathBuf,
    /// The agent's own cgroup, which owns its listener. It may lie below `pods_cgroup`.
    pub own_cgroup: PathBuf,
    /// What pods dial.
    pub metadata: MetadataAddr,
    /// What they get instead: the listener in the host's namespace, listening already.
    pub agent: AgentAddr,
    /// Log every verdict.
    pub debug: bool,
}

/// The kernel half in force. Dropping it detaches nothing: pods are then refused, which is the point of the pins.
pub struct Datapath {
    pub(super) pins: Pins,
    pub(super) settings: Settings,
    pub(super) configuration: Configuration,
    pub(super) links: Vec<Link>,
    pub(super) maps: Vec<PinnedMap>,
    pub(super) targets: Targets,
    /// Kept for its log.
    debug: Option<Ebpf>,
}

/// On the pods' cgroup. Egress first: it cuts connections that are older than the rest. Then `sock_ops`: without it a redirected connection is not
/// vouched for. The peer names last: they are cosmetic.
const ON_PODS: [&str; 8] = [
    program::EGRESS,
    program::SOCK_OPS,
    program::CONNECT4,
    program::CONNECT6,
    program::SENDMSG4,
    program::SENDMSG6,
    program::PEER_NAME4,
    program::PEER_NAME6,
];

const ON_AGENT: &str = "agent";

/// On the root: what sockets from elsewhere need. After the others, which rewrite what is legitimate.
const ON_ROOT: [&str; 3] = [program::TASK_CONNECT4, program::TASK_CONNECT6, program::TASK_SENDMSG4];

impl Datapath {
    /// Loads, configures and attaches. Blocks for some 30 ms.
    ///
    /// # Errors
    /// As named; whatever was in force before stays in force.
    pub fn attach(settings: &Settings) -> Result<Self, DatapathError> {
        Self::attach_layout(settings, Layout::OURS)
    }

    /// The same with maps and pins of a layout's own. What agents of other layouts left in force is taken out after, so that there is no moment
    /// without programs.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_layout(settings: &Settings, layout: Layout) -> Result<Self, DatapathError> {
        check_kernel()?;
        let pins = Pins::open(&settings.bpf_dir, layout)?;
        let mut ebpf = load::load(&pins, settings.debug)?;
        let maps = PinnedMap::open_all(&pins)?;
        let mut configuration = Configuration::open(&pins)?;
        configuration.ensure(settings)?;
        let targets = Targets::open(&pins, settings.agent)?;
        let mut links = Vec::new();
        for (place, program, cgroup) in plan(settings) {
            let (link, outcome) = Link::ensure(&mut ebpf, program, cgroup, pins.link(place, program))?;
            tracing::info!(program, cgroup = %cgroup.display(), ?outcome, "program in force");
            links.push(link);
        }
        if is_below_pods(settings) {
            // An agent that ran elsewhere would leave its program, never updated again, in force there.
            pins::remove(&pins.link(ON_AGENT, program::SOCK_OPS))?;
        }
        let others = remove_others(&pins)?;
        if others != Removed::default() {
            tracing::info!(
                programs = others.links,
                maps = others.maps,
                "another layout's programs taken out"
            );
        }
        // The links hold the programs.
        let debug = settings.debug.then_some(ebpf);
        Ok(Self { pins, settings: settings.clone(), configuration, links, maps, targets, debug })
    }

    /// Reads origins of connections that the host's listener accepted.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn origins(&self) -> Result<AcceptedOrigins, DatapathError> {
        AcceptedOrigins::open(&self.pins)
    }

    /// Sends pods to listeners of their own.
    pub fn targets(&self) -> Targets {
        self.targets.clone()
    }

    /// Grants the agent's own sockets their pass.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn pass(&self) -> Result<PassMark, DatapathError> {
        PassMark::open(&self.pins)
    }

    /// Reads the kernel half's counters.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        Counters::open(&self.pins)
    }

    /// Forwards the kernel half's log until dropped, if it has one.
    pub fn log(&mut self) -> Option<impl Future<Output = ()> + Send + 'static> {
        self.debug.take().map(log::forward)
    }
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath")
            .field("pins", &self.pins)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

/// What goes where, in this order: place of the pin, program, cgroup.
fn plan(settings: &Settings) -> impl Iterator<Item = (&'static str, &'static str, &Path)> {
    // An accepted socket belongs to the cgroup that made its listener: there the hand-over happens.
    let agent = (!is_below_pods(settings)).then_some((ON_AGENT, program::SOCK_OPS, &*settings.own_cgroup));
    let pods = ON_PODS.map(|program| ("pods", program, &*settings.pods_cgroup));
    let root = ON_ROOT.map(|program| ("root", program, &*settings.cgroup_root));
    agent.into_iter().chain(pods).chain(root)
}

fn is_below_pods(settings: &Settings) -> bool {
    settings.own_cgroup.starts_with(&settings.pods_cgroup)
}

/// Cgroup links came with 5.7, `getpeername` hooks with 5.8; 5.10 is what is tested.
fn check_kernel() -> Result<(), DatapathError> {
    let release = || rustix::system::uname().release().to_string_lossy().into_owned();
    if load::kernel_version() < (5, 10) { Err(DatapathError::Kernel(release())) } else { Ok(()) }
}
