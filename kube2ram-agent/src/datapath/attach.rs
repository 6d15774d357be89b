//! Brings the kernel half in force, in the order that never leaves a pod half served. Called by `app`, once.

use std::path::PathBuf;

use aya::Ebpf;

use super::{
    AcceptedOrigins, AgentAddr, Counters, DatapathError, MetadataAddr, Mode, PassMark, Targets, boot, load,
    log, maps, pins::Pins, probe, watch,
};
use crate::telemetry::chain;

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
    settings: Settings,
    mode: Mode,
}

impl Datapath {
    /// Loads, configures and attaches. Blocks for some 30 ms.
    ///
    /// # Errors
    /// As named; whatever was in force before stays in force.
    pub fn attach(settings: &Settings) -> Result<Self, DatapathError> {
        check_kernel()?;
        let pins = Pins::open(&settings.bpf_dir)?;
        let mut ebpf = load::load(&pins, settings.debug)?;
        maps::configure(&pins, settings)?;
        let mode = Mode::known(&pins);
        mode.put_in_force(&mut ebpf, &pins, settings)?;
        let mut datapath = Self { pins, ebpf, settings: settings.clone(), mode };
        match probe::sees_pods(settings) {
            Ok(true) => {}
            Ok(false) if mode == Mode::Pods => datapath.fall_back()?,
            Ok(false) => return Err(DatapathError::Blind),
            Err(error) if watch::sockets_may_fall() => return Err(error),
            // Nothing is known that would make them blind there.
            Err(error) => tracing::debug!(error = chain(&error), "not probed"),
        }
        // Not before: from here on it would only be in the way, of the agent itself among others.
        if boot::retire(&settings.bpf_dir)? > 0 {
            tracing::info!("taken over from the boot guard");
        }
        Ok(datapath)
    }

    /// Redirects at the root from now on, as where the sockets of pods belong to it, and makes sure that they are seen there.
    ///
    /// # Errors
    /// [`DatapathError::Blind`] when they are not; others as [`Self::attach`]. What is in force stays.
    pub fn fall_back(&mut self) -> Result<(), DatapathError> {
        watch::fall_back(&mut self.ebpf, &self.pins, &self.settings)?;
        self.mode = Mode::Root;
        Ok(())
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

    /// Which cgroup the sockets of pods belong to on this node.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Looks after the kernel half and forwards its log, if it has one, until dropped; keeps the pin directory locked meanwhile.
    pub async fn run(self, debug: bool) {
        let Self { pins, ebpf, settings, mode } = self;
        let watching = watch::run(pins, settings, mode);
        if debug {
            tokio::join!(watching, log::forward(ebpf));
        } else {
            drop(ebpf); // the links hold the programs
            watching.await;
        }
    }
}

/// Cgroup links came with 5.7, `getpeername` hooks with 5.8; 5.10 is what is tested.
fn check_kernel() -> Result<(), DatapathError> {
    let release = || rustix::system::uname().release().to_string_lossy().into_owned();
    if load::kernel_version() < (5, 10) { Err(DatapathError::Kernel(release())) } else { Ok(()) }
}
