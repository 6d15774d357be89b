//! Brings the kernel half in force, in the order that never leaves a pod half served. Called by `app`, once.

use std::path::{Path, PathBuf};

use aya::Ebpf;
use kube2ram_common::names::program;

use super::{
    AcceptedOrigins, AgentAddr, Counters, DatapathError, MetadataAddr, PassMark, Targets, links, load, log,
    maps,
    pins::{Lock, Pins},
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
#[derive(Debug)]
pub struct Datapath {
    pins: Pins,
    ebpf: Ebpf,
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

/// On the root: what sockets from elsewhere need. After the others, which rewrite what is legitimate.
const ON_ROOT: [&str; 3] = [program::TASK_CONNECT4, program::TASK_CONNECT6, program::TASK_SENDMSG4];

/// What became of the agent that wrote to the pins before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Former {
    /// It is gone, and its listeners with it: where it sent pods, nobody listens.
    Gone,
    /// It hands its listeners over: pods are sent there as before.
    HandsOver,
}

impl Datapath {
    /// Loads, configures and attaches, where no agent runs. Blocks for some 30 ms.
    ///
    /// # Errors
    /// As named; whatever was in force before stays in force. [`DatapathError::Locked`] when an agent runs.
    pub fn attach(settings: &Settings) -> Result<Self, DatapathError> {
        Self::succeed(settings, Lock::take(&settings.bpf_dir)?, Former::Gone)
    }

    /// The same with a lock that is held already.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn succeed(settings: &Settings, lock: Lock, former: Former) -> Result<Self, DatapathError> {
        check_kernel()?;
        let pins = Pins::open(lock)?;
        let mut ebpf = load::load(&pins, settings.debug)?;
        maps::configure(&pins, settings, former)?;
        let mut ensure = |place, program, cgroup: &Path| -> Result<(), DatapathError> {
            let outcome = links::ensure(&mut ebpf, program, cgroup, &pins.link(place, program))?;
            tracing::info!(program, cgroup = %cgroup.display(), ?outcome, "program in force");
            Ok(())
        };
        // An accepted socket belongs to the cgroup that made its listener: there the hand-over happens.
        if !settings.own_cgroup.starts_with(&settings.pods_cgroup) {
            ensure("agent", program::SOCK_OPS, &settings.own_cgroup)?;
        }
        for program in ON_PODS {
            ensure("pods", program, &settings.pods_cgroup)?;
        }
        for program in ON_ROOT {
            ensure("root", program, &settings.cgroup_root)?;
        }
        if settings.own_cgroup.starts_with(&settings.pods_cgroup) {
            // An agent that ran elsewhere would leave its program, never updated again, in force there.
            links::remove(&pins.link("agent", program::SOCK_OPS))?;
        }
        Ok(Self { pins, ebpf })
    }

    /// Loads the programs beside an agent that runs, on its maps, and lets them go again: where the kernel refuses them, that agent had better
    /// go on. Also grants passes by that agent's map.
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

    /// Whether a pass is granted by the map that is in force. It is not when everything was removed and made anew meanwhile.
    ///
    /// # Errors
    /// When the pinned map cannot be examined.
    pub fn honours(&self, pass: &PassMark) -> Result<bool, DatapathError> {
        pass.is_of(&self.pins)
    }

    /// Reads origins of connections that the host's listener accepted.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn origins(&self) -> Result<AcceptedOrigins, DatapathError> {
        AcceptedOrigins::open(&self.pins)
    }

    /// Sends pods to listeners of their own.
    ///
    /// # Errors
    /// When the pinned map cannot be opened.
    pub fn targets(&self) -> Result<Targets, DatapathError> {
        Targets::open(&self.pins)
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

    /// Forwards the kernel half's log, if it has one, until dropped; keeps the pin directory locked meanwhile.
    pub async fn run(self, debug: bool) {
        let Self { pins: _locked, ebpf } = self;
        if debug {
            log::forward(ebpf).await;
        } else {
            drop(ebpf); // the links hold the programs
        }
        std::future::pending().await
    }
}

/// Cgroup links came with 5.7, `getpeername` hooks with 5.8; 5.10 is what is tested.
fn check_kernel() -> Result<(), DatapathError> {
    let release = || rustix::system::uname().release().to_string_lossy().into_owned();
    if load::kernel_version() < (5, 10) { Err(DatapathError::Kernel(release())) } else { Ok(()) }
}
