//! Netfilter rules that drop packets which the node would forward to the metadata server, for IPv4 and IPv6.
//! They cover traffic that no cgroup hook sees: packet sockets, TUN devices, a Service that points at the
//! metadata server, pods with their own kernel. Called by `app` and `uninstall`.

use std::{future::pending, io, path::Path, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

mod events;
mod ruleset;
mod state;
mod tables;

pub use self::state::{Standing, State};
use self::{
    events::Changes,
    ruleset::{Family, Target},
    tables::Tables,
};
use crate::netlink::Message;
use kube2ram_cloud::MetadataAddr;
use kube2ram_service::telemetry::chain;

/// Why the guard's tables could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// A request was refused.
    #[error(
        "cannot {0} the nf_tables tables ip kube2ram and ip6 kube2ram: check that the kernel has nf_tables and the agent CAP_NET_ADMIN"
    )]
    Request(&'static str, #[source] io::Error),
    /// The netlink socket of netfilter cannot be opened.
    #[error("cannot open a netlink socket to netfilter: check that the kernel has nfnetlink")]
    Socket(#[source] io::Error),
    /// Another process changes the tables as fast as they are written.
    #[error(
        "the nf_tables table ip kube2ram or ip6 kube2ram differs from what was written: find the other process that writes it"
    )]
    Unstable,
}

/// The guard of the network namespace in which its first check runs. Dropping it leaves the rules active:
/// only [`remove`] deletes them.
#[derive(Debug)]
pub struct ForwardGuard {
    metadata: MetadataAddr,
    metrics: Metrics,
    tables: Option<Tables>,
    /// Whether the last check found or wrote `target`; `None` before the first.
    active: Option<bool>,
    /// There where the namespace has IPVS.
    ipvs: &'static Path,
    /// There where the kernel has IPv6.
    ipv6: &'static Path,
    /// What the last tables were against.
    target: Option<Target>,
    /// Makes the transaction that writes the tables.
    install: fn(Target, bool) -> Vec<Message>,
    /// Set while the kernel cannot make all of the rules.
    reduced: Option<Reduced>,
    state: State,
}

/// What the kernel made of a target that it could not make as a whole.
#[derive(Clone, Debug)]
struct Reduced {
    wanted: Target,
    target: Target,
    /// Why not all.
    error: String,
    /// When the kernel is asked again for the whole: a module may have been loaded.
    again_at: Instant,
}

#[derive(Debug, Default)]
struct Metrics {
    active: Gauge,
    repairs: Counter,
}

/// The virtual servers of the calling thread's network namespace, which are there when ip_vs is loaded.
const IPVS: &str = "/proc/thread-self/net/ip_vs";
/// The IPv6 addresses of the calling thread's network namespace. The file is missing if the kernel has no
/// IPv6, or `ipv6.disable=1`.
const IPV6: &str = "/proc/thread-self/net/if_inet6";
/// How long removed rules may be missing if the kernel sends no notification.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// A check takes milliseconds, but waits for other writers of nf_tables, such as kube-proxy.
const LATE: Duration = Duration::from_secs(5);
/// The shortest time between two repairs, if another process keeps changing the tables.
const PAUSE: Duration = Duration::from_millis(20);

impl ForwardGuard {
    /// Makes a guard that does nothing yet.
    pub fn new(metadata: MetadataAddr, registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        let help = "Whether the netfilter rules against forwarding to the metadata server are active for each of its addresses";
        registry.register("forward_guard_in_force", help, metrics.active.clone());
        let help = "How often the netfilter rules were found missing or changed, and were restored";
        registry.register("forward_guard_repairs", help, metrics.repairs.clone());
        Self::with(metadata, metrics)
    }

    fn with(metadata: MetadataAddr, metrics: Metrics) -> Self {
        Self {
            metadata,
            metrics,
            tables: None,
            active: None,
            ipvs: Path::new(IPVS),
            ipv6: Path::new(IPV6),
            target: None,
            install: ruleset::install,
            reduced: None,
            state: State::default(),
        }
    }

    /// The state that `app` reads.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Creates the tables unless they are as expected, reads them back, and returns whether the rules for
    /// each address are active. A failure is logged and not returned: the cgroup hooks protect without these
    /// rules, so an agent that reports the failure is better than none.
    ///
    /// Waits for other writers of nf_tables; usually there are none.
    pub fn check(&mut self) -> bool {
        let before = self.active;
        let outcome = self.ensure();
        self.active = Some(outcome.is_ok());
        let failure = outcome.as_ref().err().map(|error| chain(error)).or_else(|| self.lacks_ipv6());
        let (is_active, target) = (failure.is_none(), self.target);
        let is_repair = before == Some(true) && matches!(outcome, Ok(Found::MissingOrChanged));
        self.metrics.active.set(is_active.into());
        self.state.update(|standing| {
            standing.is_active = Some(is_active);
            standing.has_ipv6 = target.is_some_and(|target| target.v6.is_some());
            standing.has_ipvs = target.is_some_and(|target| target.has_ipvs);
            standing.failure = failure;
            standing.repairs += u64::from(is_repair);
        });
        match outcome {
            Ok(Found::AsItShouldBe) => {}
            Ok(Found::MissingOrChanged) if is_repair => {
                self.metrics.repairs.inc();
                warn!("the netfilter rules were removed or changed; restored them");
            }
            Ok(Found::MissingOrChanged | Found::OfAnotherTarget) => {
                let has_ipv6 = target.is_some_and(|target| target.v6.is_some());
                let has_ipvs = target.is_some_and(|target| target.has_ipvs);
                info!(metadata = %self.metadata, has_ipv6, has_ipvs, "netfilter rules active");
            }
            Err(error) => {
                self.tables = None;
                if before != Some(false) {
                    error!(
                        error = chain(&error),
                        "no netfilter rules: packet sockets, TUN devices, Kata and gVisor pods, and Services that point at the metadata server reach it"
                    );
                }
            }
        }
        is_active
    }

    /// Why there are no rules for the IPv6 address, where packets may be forwarded to one.
    fn lacks_ipv6(&self) -> Option<String> {
        let reduced = self.reduced.as_ref()?;
        let is_lacking = reduced.wanted.v6.is_some() && reduced.target.v6.is_none() && self.ipv6.exists();
        is_lacking.then(|| format!("no rules for IPv6 (those for IPv4 are active): {}", reduced.error))
    }

    /// Checks after each change of the tables, and periodically, until `stop`. Checks run on threads that may
    /// block.
    ///
    /// # Cancel safety
    /// None: a check that has begun continues. After `stop` this returns once nothing is written any longer.
    pub async fn run(self, stop: CancellationToken) {
        let changes = Changes::of(ruleset::TABLE).inspect_err(|error| {
            warn!(%error, "cannot watch the netfilter tables for changes; a repair takes up to 30 s");
        });
        self.run_with(changes.ok(), stop).await;
    }

    async fn run_with(mut self, mut changes: Option<Changes>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let (active, state) = (self.metrics.active.clone(), self.state.clone());
            // Also after the first start of listening: earlier changes are not notified.
            let checking = spawn_blocking(move || {
                self.check();
                self
            });
            // It panicked, which ends this part, or the runtime ends.
            let Some(checked) = in_time(checking, &active, &state).await else { return };
            self = checked;
            sleep(PAUSE).await;
            let now = Instant::now();
            let again_at = self.reduced.as_ref().map(|reduced| reduced.again_at);
            let again_at = again_at.filter(|at| *at > now).unwrap_or(now + CHECK_INTERVAL);
            tokio::select! {
                is_listening = changed(changes.as_mut()) => if !is_listening { changes = None },
                () = stop.cancelled() => {}
                () = sleep_until(again_at) => {}
            }
        }
    }

    fn ensure(&mut self) -> Result<Found, GuardError> {
        let has_ipvs = self.ipvs.exists();
        let wanted = Target { v4: *self.metadata.v4.ip(), v6: self.metadata.v6, has_ipvs };
        self.reduced.take_if(|reduced| reduced.wanted != wanted);
        let target = self.reduced.as_ref().map_or(wanted, |reduced| reduced.target);
        let before = self.target.replace(target);
        let tables = self.tables()?;
        // An agent that had an IPv6 address may have left a table; one that this kernel cannot make now is
        // kept.
        let is_stale = wanted.v6.is_none() && tables.exists(Family::Ipv6)?;
        if !is_stale && tables.are_installed(target)? {
            return self.ask_again(wanted);
        }
        let target = self.write(wanted, &target.and_less(), is_stale)?;
        if !self.tables()?.are_installed(target)? {
            return Err(GuardError::Unstable);
        }
        let is_other = before.is_some_and(|before| before != target);
        Ok(if is_other { Found::OfAnotherTarget } else { Found::MissingOrChanged })
    }

    fn tables(&mut self) -> Result<&mut Tables, GuardError> {
        Ok(match &mut self.tables {
            Some(tables) => tables,
            none => none.insert(Tables::open()?),
        })
    }

    /// Writes the first target that the kernel can make. Which errors a kernel gives for what it lacks
    /// differs by version, so any error counts.
    fn write(&mut self, wanted: Target, targets: &[Target], is_stale: bool) -> Result<Target, GuardError> {
        let mut refused = None;
        for target in targets {
            let messages = (self.install)(*target, is_stale);
            match self.tables()?.write(&messages) {
                Ok(()) => {
                    self.target = Some(*target);
                    if let Some(error) = refused {
                        self.reduce(wanted, *target, &error);
                    }
                    return Ok(*target);
                }
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(GuardError::Request("write", refused.unwrap_or_else(|| io::ErrorKind::NotFound.into())))
    }

    /// Remembers that the kernel could not make all that is wanted, and logs what is missing.
    fn reduce(&mut self, wanted: Target, target: Target, error: &io::Error) {
        let error = error.to_string();
        if wanted.v6 != target.v6 && !self.ipv6.exists() {
            info!(error, "no netfilter rules for IPv6; this kernel has no IPv6, so none are needed");
        } else if wanted.v6 != target.v6 {
            warn!(
                error,
                "no netfilter rules for the metadata server's IPv6 address: check that the kernel has nf_tables for IPv6 (CONFIG_NF_TABLES_IPV6). \
                 Packet sockets, TUN devices, Kata and gVisor pods, and Services reach it by IPv6; the rules for IPv4 are active"
            );
        }
        if wanted.has_ipvs != target.has_ipvs {
            warn!(
                error,
                "no rule against IPVS: check that the kernel has nft_ct. A Service that points at the metadata server lets hostNetwork pods through"
            );
        }
        self.reduced = Some(Reduced { wanted, target, error, again_at: Instant::now() + CHECK_INTERVAL });
    }

    /// If rules are missing because the kernel could not create them, their module may have been loaded
    /// since. If not, the active rules stay as they are.
    fn ask_again(&mut self, wanted: Target) -> Result<Found, GuardError> {
        let now = Instant::now();
        let Some(reduced) = self.reduced.as_mut().filter(|reduced| reduced.again_at <= now) else {
            return Ok(Found::AsItShouldBe);
        };
        reduced.again_at = now + CHECK_INTERVAL;
        let better = wanted.and_less().into_iter();
        let current = reduced.target;
        for target in better.take_while(|target| *target != current) {
            let messages = (self.install)(target, false);
            if self.tables()?.write(&messages).is_err() {
                continue;
            }
            self.target = Some(target);
            match &mut self.reduced {
                Some(reduced) if target != wanted => reduced.target = target,
                reduced => *reduced = None,
            }
            let is_installed = self.tables()?.are_installed(target)?;
            return if is_installed { Ok(Found::OfAnotherTarget) } else { Err(GuardError::Unstable) };
        }
        Ok(Found::AsItShouldBe)
    }
}

/// Makes the tables once, unless they are there as they should be. What the kernel cannot make besides the
/// rules for IPv4 is logged.
///
/// # Errors
/// [`GuardError`]: the rules may not be active.
pub fn install(metadata: MetadataAddr) -> Result<(), GuardError> {
    ForwardGuard::with(metadata, Metrics::default()).ensure().map(drop)
}

/// Waits for a check, and reports one that takes too long; `None` when it panicked.
async fn in_time<T>(mut checking: JoinHandle<T>, active: &Gauge, state: &State) -> Option<T> {
    if let Ok(checked) = timeout(LATE, &mut checking).await {
        return checked.ok();
    }
    let late = format!("netfilter has not answered for {} s", LATE.as_secs());
    error!(
        "{late}: find the process that keeps writing nf_tables; the agent waits, and repairs no rule until then"
    );
    active.set(0);
    state.update(|standing| {
        standing.is_active = Some(false);
        standing.failure = Some(late);
    });
    checking.await.ok()
}

/// Waits for a change; `false` when no more notifications will come.
async fn changed(changes: Option<&mut Changes>) -> bool {
    match changes {
        Some(changes) => changes.next().await,
        None => pending().await,
    }
}

/// Removes the guard's tables, and returns whether there was one.
///
/// # Errors
/// [`GuardError`]: they may still be there.
pub fn remove() -> Result<bool, GuardError> {
    let mut tables = Tables::open()?;
    // Both are removed, even if the first removal fails.
    let (ipv6, ipv4) = (tables.remove(Family::Ipv6), tables.remove(Family::Ipv4));
    Ok(ipv4? | ipv6?)
}

enum Found {
    AsItShouldBe,
    MissingOrChanged,
    /// As it was made, before the kernel could make more of it, or IPVS came or went.
    OfAnotherTarget,
}

#[cfg(test)]
mod tests;
