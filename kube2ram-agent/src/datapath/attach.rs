//! Attaches the eBPF programs, in an order that serves each pod completely or denies it. Called once by
//! `app`.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use aya::Ebpf;
use kube2ram_common::names::program;

use super::{
    AcceptedOrigins, AgentAddr, Counters, DatapathError, Layout, Mode, NetnsCookies, PassMark, Removed,
    Targets, boot,
    fill_levels::FillLevels,
    links::Link,
    load, log,
    maps::{Configuration, PinnedMap},
    pins::{Lock, Pins},
    probe,
    remove::remove_others,
    trees::OtherTrees,
    upkeep,
    wire::{Wire, WireHook, WirePrograms},
};
use kube2ram_cloud::MetadataAddr;
use kube2ram_service::telemetry::chain;

/// The settings of the eBPF programs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of the pins, on a bpf file system.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount: the root of all cgroups.
    pub cgroup_root: PathBuf,
    /// The cgroup that holds all pods.
    pub pods_cgroup: PathBuf,
    /// Where another cgroup driver of the kubelet's has pods, or may have later.
    pub other_pods_cgroups: Vec<PathBuf>,
    /// The agent's own cgroup, which owns its listener. It may lie below `pods_cgroup`.
    pub own_cgroup: PathBuf,
    /// What pods dial.
    pub metadata: MetadataAddr,
    /// What they get instead: the listener in the host's namespace, listening already.
    pub agent: AgentAddr,
    /// Let connections to the metadata server go on that are older than the programs.
    pub keeps_open: bool,
    /// Deny pods the socket options with which a packet skips the wire guard.
    pub guards_wire: bool,
    /// Log every verdict.
    pub debug: bool,
}

impl Settings {
    /// All cgroups that hold pods, the kubelet's first. Others need not exist.
    pub fn pods_cgroups(&self) -> Vec<PathBuf> {
        [&self.pods_cgroup].into_iter().chain(&self.other_pods_cgroups).cloned().collect()
    }
}

/// The attached eBPF programs. Dropping it detaches nothing: pods are then refused, which is the purpose of
/// the pins.
pub struct Datapath {
    pub(super) pins: Pins,
    pub(super) settings: Settings,
    pub(super) configuration: Configuration,
    pub(super) mode: Mode,
    pub(super) links: Vec<Link>,
    pub(super) others: OtherTrees,
    pub(super) maps: Vec<PinnedMap>,
    pub(super) targets: Targets,
    wire_programs: WirePrograms,
    /// Kept for its log.
    debug: Option<Ebpf>,
}

/// The state of the agent that wrote to the pins before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// It has ended, and its listeners are closed: pods must not be redirected to them.
    Ended,
    /// It serves until this agent does: pods are redirected to its listeners as before.
    HandsOver,
}

impl Datapath {
    /// Loads, configures and attaches, where no agent runs. Blocks for some 30 ms.
    ///
    /// # Errors
    /// As named; programs that were attached before stay attached. [`DatapathError::Locked`] when an agent
    /// runs.
    pub fn attach(settings: &Settings) -> Result<Self, DatapathError> {
        Self::take_over(settings, Lock::take(&settings.bpf_dir)?, Outgoing::Ended)
    }

    /// The same with a lock that is held already.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn take_over(settings: &Settings, lock: Lock, outgoing: Outgoing) -> Result<Self, DatapathError> {
        Self::activate(settings, lock, outgoing, Layout::OURS)
    }

    /// Attaches the programs with the maps and pins of one layout. Programs of other layouts are removed
    /// afterwards, so that there is no moment without programs.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_layout(settings: &Settings, layout: Layout) -> Result<Self, DatapathError> {
        Self::activate(settings, Lock::take(&settings.bpf_dir)?, Outgoing::Ended, layout)
    }

    fn activate(
        settings: &Settings,
        lock: Lock,
        outgoing: Outgoing,
        layout: Layout,
    ) -> Result<Self, DatapathError> {
        check_kernel()?;
        let pins = Pins::open(lock, layout)?;
        let mut ebpf = load::load(&pins, settings.debug)?;
        let maps = PinnedMap::open_all(&pins)?;
        let mut configuration = Configuration::open(&pins)?;
        // Before it is written: an update must not forget it for a moment.
        configuration.learn_agent_netns(&pins);
        configuration.ensure(settings)?;
        let targets = Targets::open(&pins, outgoing)?;
        let mode = Mode::known(&pins);
        // This comes first: if the kubelet uses another cgroup tree than at the last start, the previous tree
        // must keep its programs.
        let mut others = OtherTrees::default();
        if let Err(error) = others.cover(&mut ebpf, mode, &pins, settings) {
            tracing::warn!(
                error = chain(&error),
                "cannot attach the programs to another tree of pods' cgroups; the agent tries again"
            );
        }
        let links = mode.activate(&mut ebpf, &pins, settings)?;
        others.remove_stale(&pins)?;
        let wire_programs = WirePrograms::of(&ebpf, &pins)?;
        // The links hold the programs.
        let debug = settings.debug.then_some(ebpf);
        let settings = settings.clone();
        let mut datapath =
            Self { pins, settings, configuration, mode, links, others, maps, targets, wire_programs, debug };
        datapath.find_mode()?;
        datapath.configuration.learn_agent_netns(&datapath.pins);
        datapath.configuration.ensure(&datapath.settings)?;
        datapath.take_out_others()?;
        Ok(datapath)
    }

    /// Makes sure that the programs see the sockets of pods.
    fn find_mode(&mut self) -> Result<(), DatapathError> {
        match probe::sees_pods(&self.settings) {
            Ok(true) => Ok(()),
            Ok(false) if self.mode == Mode::Pods => self.fall_back(),
            Ok(false) => Err(DatapathError::Blind),
            Err(error) if upkeep::sockets_may_fall() => Err(error),
            // Nothing is known that would make them blind there.
            Err(error) => {
                tracing::debug!(error = chain(&error), "not probed");
                Ok(())
            }
        }
    }

    /// From here on the boot guard would only block legitimate connections, the agent's own among them. Its
    /// programs on network devices stay: the wire guard is not there yet.
    fn take_out_others(&self) -> Result<(), DatapathError> {
        let others = remove_others(&self.pins)?;
        if others != Removed::default() {
            tracing::info!(
                programs = others.links,
                maps = others.maps,
                "removed the programs of another map layout"
            );
        }
        if boot::retire(&self.settings.bpf_dir)? > 0 {
            tracing::info!("took over from the boot guard");
        }
        Ok(())
    }

    /// Redirects at the root from now on, as where the sockets of pods belong to it, and makes sure that they
    /// are seen there.
    ///
    /// # Errors
    /// [`DatapathError::Blind`] when they are not; others as [`Self::attach`]. Attached programs stay
    /// attached.
    pub fn fall_back(&mut self) -> Result<(), DatapathError> {
        tracing::warn!(
            "sockets of pods belong to the root cgroup (cgroup v1 net_cls or net_prio is in use on a kernel below 5.15): redirecting there; raw sockets of hostNetwork pods reach the metadata server until the node boots with cgroup_no_v1=net_cls,net_prio"
        );
        // The pinned maps are the same, so the records and targets stay valid.
        let mut ebpf = load::load(&self.pins, self.settings.debug)?;
        self.links = Mode::Root.activate(&mut ebpf, &self.pins, &self.settings)?;
        self.mode = Mode::Root;
        self.others = OtherTrees::default();
        self.others.cover(&mut ebpf, self.mode, &self.pins, &self.settings)?;
        if probe::sees_pods(&self.settings)? { Ok(()) } else { Err(DatapathError::Blind) }
    }

    /// Loads the programs on the maps of a running agent, and unloads them again: if the kernel refuses them,
    /// the running agent must not hand over. Also grants passes by that agent's map.
    ///
    /// # Errors
    /// As [`Self::attach`]; nothing was changed.
    pub fn rehearse(settings: &Settings) -> Result<PassMark, DatapathError> {
        check_kernel()?;
        let pins = Pins::of_running(&settings.bpf_dir);
        load::check_all_pinned(&pins)?; // or loading would make them
        load::load(&pins, settings.debug).map(drop)?;
        PassMark::open(&pins)
    }

    /// Whether a pass is granted by the map that the programs use. It is not if everything was removed and
    /// created again meanwhile.
    ///
    /// # Errors
    /// When the pinned map cannot be examined.
    pub fn honours(&self, pass: &PassMark) -> Result<bool, DatapathError> {
        pass.is_of(&self.pins)
    }

    /// Reads origins of connections that the host listener accepted.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn origins(&self) -> Result<AcceptedOrigins, DatapathError> {
        AcceptedOrigins::open(&self.pins)
    }

    /// The cookies of network namespaces.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn netns_cookies(&self) -> Result<NetnsCookies, DatapathError> {
        NetnsCookies::open(&self.pins)
    }

    /// Whether pods could ask the metadata server itself until this start.
    pub fn is_first(&self) -> bool {
        let is_new_egress = |link: &Link| link.name() == program::EGRESS && link.is_new();
        self.links.iter().chain(self.others.links()).any(is_new_egress)
    }

    /// Whether this start cut connections to the metadata server that pods had open before.
    pub fn has_cut_connections(&self) -> bool {
        !self.settings.keeps_open && self.is_first()
    }

    /// The address to which pods without an in-pod listener are redirected.
    pub fn agent(&self) -> AgentAddr {
        self.settings.agent
    }

    /// Sends them elsewhere, where the agent listens already.
    ///
    /// # Errors
    /// When the kernel refuses; to be tried again.
    pub fn move_agent(&mut self, to: AgentAddr) -> Result<(), DatapathError> {
        if self.settings.agent == to {
            return Ok(());
        }
        let settings = Settings { agent: to, ..self.settings.clone() };
        self.configuration.ensure(&settings)?;
        self.settings = settings;
        Ok(())
    }

    /// Redirects pods to their in-pod listeners.
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

    /// Reads the counters of the eBPF programs.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        Counters::open(&self.pins)
    }

    /// How full the maps of the host listener are.
    ///
    /// # Errors
    /// When a pinned map cannot be opened.
    pub fn fill_levels(&self) -> Result<FillLevels, DatapathError> {
        FillLevels::open(&self.pins)
    }

    /// The programs for network devices, with what an earlier agent has attached.
    ///
    /// # Errors
    /// When a pinned link cannot be examined, or its program cannot be swapped.
    pub fn wire(&self, hook: WireHook) -> Result<Wire, DatapathError> {
        Wire::adopt(&self.wire_programs, hook)
    }

    /// Whether the boot guard's programs are still on network devices, also if an agent was killed before it
    /// had detached them.
    ///
    /// # Errors
    /// When the pins cannot be read.
    pub fn has_boot_wires(&self) -> Result<bool, DatapathError> {
        boot::has_wires(&self.settings.bpf_dir)
    }

    /// Detaches the boot guard's programs from network devices, and returns the number of devices. Call it
    /// when the wire guard is on the devices. Until then, these programs also drop the agent's own packets to
    /// the metadata server.
    ///
    /// # Errors
    /// When a program cannot be detached; to be tried again.
    pub fn retire_boot_wires(&self) -> Result<usize, DatapathError> {
        boot::retire_wires(&self.settings.bpf_dir)
    }

    /// The attached programs, and the cgroup of each, in the order of their attachment.
    pub fn programs(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        self.links.iter().chain(self.others.links()).map(|link| (link.name(), link.cgroup()))
    }

    /// Which cgroup the sockets of pods belong to on this node.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Forwards the log of the eBPF programs until dropped, if they have one.
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

/// Cgroup links came with 5.7, `getpeername` hooks with 5.8; 5.10 is what is tested.
fn check_kernel() -> Result<(), DatapathError> {
    let release = || rustix::system::uname().release().to_string_lossy().into_owned();
    if load::kernel_version() < (5, 10) { Err(DatapathError::Kernel(release())) } else { Ok(()) }
}
