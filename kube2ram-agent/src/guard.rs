//! The forward guard: a netfilter rule that drops what the node would forward to the metadata server. It closes what no hook of a cgroup
//! sees: packet sockets, TUN devices, a Service that points there, pods with a kernel of their own. Called by `app` and `uninstall`.

use std::{future::pending, io, path::Path, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use rustix::net::netlink;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{error, info, warn};

mod events;
mod ruleset;
mod state;

pub use self::state::{Standing, State};
use self::{events::Changes, ruleset::Target};
use crate::{
    datapath::MetadataAddr,
    netlink::{Message, Socket, uninterrupted},
    telemetry::chain,
};

/// Why the guard's table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// A request was refused.
    #[error(
        "cannot {0} the nf_tables table ip kube2ram: are nf_tables in the kernel and CAP_NET_ADMIN given?"
    )]
    Request(&'static str, #[source] io::Error),
    /// There is no netlink socket of netfilter.
    #[error("cannot speak with netfilter: is nfnetlink in the kernel?")]
    Socket(#[source] io::Error),
    /// Somebody else changes the table as fast as it is made.
    #[error("the nf_tables table ip kube2ram is not what was written: who else writes it?")]
    Unstable,
}

/// The guard of the network namespace that its first check runs in. Dropping it leaves the rule in force: nothing but [`remove`] takes it away.
#[derive(Debug)]
pub struct ForwardGuard {
    metadata: MetadataAddr,
    metrics: Metrics,
    socket: Option<Socket>,
    /// What the last check found; `None` before the first.
    in_force: Option<bool>,
    /// There where the namespace has IPVS.
    ipvs: &'static Path,
    /// What the last table was against.
    target: Option<Target>,
    /// What makes a table.
    install: fn(Target) -> Vec<Message>,
    /// When nf_tables is asked again for rules that ask connection tracking, which it could not make.
    tracking_again_at: Option<Instant>,
    state: State,
}

#[derive(Debug, Default)]
struct Metrics {
    in_force: Gauge,
    repairs: Counter,
}

/// The virtual servers of the calling thread's network namespace, which are there when ip_vs is loaded.
const IPVS: &str = "/proc/thread-self/net/ip_vs";
/// How long a rule that somebody removed may be missing, if the kernel does not tell.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Whoever changes the table all the time, changes it this often at most.
const PAUSE: Duration = Duration::from_millis(20);

impl ForwardGuard {
    /// Makes a guard that does nothing yet.
    pub fn new(metadata: MetadataAddr, registry: &mut Registry) -> Self {
        let metrics = Metrics::default();
        let help = "Whether the netfilter rule against forwarding to the metadata server is in force";
        registry.register("forward_guard_in_force", help, metrics.in_force.clone());
        let help = "How often the netfilter rule was found missing or changed, and made anew";
        registry.register("forward_guard_repairs", help, metrics.repairs.clone());
        Self::with(metadata, metrics)
    }

    fn with(metadata: MetadataAddr, metrics: Metrics) -> Self {
        let ipvs = Path::new(IPVS);
        Self {
            metadata,
            metrics,
            socket: None,
            in_force: None,
            ipvs,
            target: None,
            install: ruleset::install,
            tracking_again_at: None,
            state: State::default(),
        }
    }

    /// Where it tells how it stands.
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Makes the table unless it is there as it should be, reads it back, and tells whether it is in force. A failure is logged, not
    /// returned: the hooks in the cgroups hold without the guard, so that pods are better served by a loud agent than by none.
    ///
    /// Waits for other writers of nf_tables, which is usually no time.
    pub fn check(&mut self) -> bool {
        let before = self.in_force;
        let outcome = self.ensure();
        self.in_force = Some(outcome.is_ok());
        self.metrics.in_force.set(outcome.is_ok().into());
        self.state.write(&outcome, self.target, before);
        match outcome {
            Ok(Found::AsItShouldBe) => {}
            Ok(Found::MissingOrChanged) if before == Some(true) => {
                self.metrics.repairs.inc();
                warn!("the forward guard was removed or changed; it is in force again");
            }
            Ok(Found::MissingOrChanged | Found::OfAnotherTarget) => {
                let has_ipvs = self.target.is_some_and(|target| target.has_ipvs);
                info!(metadata = %self.metadata, has_ipvs, "forward guard in force");
            }
            Err(error) => {
                self.socket = None;
                if before != Some(false) {
                    error!(
                        error = chain(&error),
                        "no forward guard: packet sockets, TUN devices, Kata and gVisor pods, and Services that point at the metadata server get through"
                    );
                }
            }
        }
        self.in_force == Some(true)
    }

    /// Checks when somebody changes the table, and from time to time, for ever.
    ///
    /// # Cancel safety
    /// Safe: the table is changed between waits, in one transaction.
    pub async fn run(self) {
        let changes = Changes::of(ruleset::TABLE).inspect_err(|error| {
            warn!(%error, "cannot hear of changes of netfilter's tables; a repair takes up to 30 s");
        });
        self.run_with(changes.ok()).await;
    }

    async fn run_with(mut self, mut changes: Option<Changes>) {
        loop {
            // After the first time of listening too: what happened before is not told.
            self.check();
            sleep(PAUSE).await;
            let now = Instant::now();
            let again_at = self.tracking_again_at.filter(|at| *at > now).unwrap_or(now + CHECK_INTERVAL);
            tokio::select! {
                is_listening = changed(changes.as_mut()) => if !is_listening { changes = None },
                () = sleep_until(again_at) => {}
            }
        }
    }

    fn ensure(&mut self) -> Result<Found, GuardError> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => none.insert(open()?),
        };
        let has_ipvs = self.ipvs.exists();
        if !has_ipvs {
            self.tracking_again_at = None;
        }
        let mut target = Target {
            metadata: *self.metadata.v4.ip(),
            has_ipvs: has_ipvs && self.tracking_again_at.is_none(),
        };
        let before = self.target.replace(target);
        if is_installed(socket, target)? {
            return self.ask_for_tracking_again();
        }
        let mut written = socket.request(&(self.install)(target), |_, _| {});
        if target.has_ipvs
            && let Err(error) = &written
            && [Some(libc::ENOENT), Some(libc::EOPNOTSUPP)].contains(&error.raw_os_error())
        {
            let error = error.to_string();
            let without = Target { has_ipvs: false, ..target };
            written = socket.request(&(self.install)(without), |_, _| {});
            // Or it was something else that is not there.
            if written.is_ok() {
                warn!(
                    error,
                    "no rule against IPVS, is nft_ct in the kernel? A Service that points at the metadata server lets hostNetwork pods through"
                );
                self.tracking_again_at = Some(Instant::now() + CHECK_INTERVAL);
                self.target = Some(without);
                target = without;
            }
        }
        written.map_err(|error| GuardError::Request("write", error))?;
        match is_installed(socket, target)? {
            true if before.is_some_and(|before| before != target) => Ok(Found::OfAnotherTarget),
            true => Ok(Found::MissingOrChanged),
            false => Err(GuardError::Unstable),
        }
    }

    /// Where the rules against IPVS are missing: their module may have come since. If not, what is in force stays as it is.
    fn ask_for_tracking_again(&mut self) -> Result<Found, GuardError> {
        let (now, target) = (Instant::now(), Target { metadata: *self.metadata.v4.ip(), has_ipvs: true });
        let (Some(socket), Some(at)) = (&mut self.socket, &mut self.tracking_again_at) else {
            return Ok(Found::AsItShouldBe);
        };
        if now < *at {
            return Ok(Found::AsItShouldBe);
        }
        if socket.request(&(self.install)(target), |_, _| {}).is_err() {
            *at = now + CHECK_INTERVAL;
            return Ok(Found::AsItShouldBe);
        }
        (self.target, self.tracking_again_at) = (Some(target), None);
        if is_installed(socket, target)? { Ok(Found::OfAnotherTarget) } else { Err(GuardError::Unstable) }
    }
}

/// Makes the table once, unless it is there as it should be.
///
/// # Errors
/// [`GuardError`]: it may not be in force.
pub fn install(metadata: MetadataAddr) -> Result<(), GuardError> {
    ForwardGuard::with(metadata, Metrics::default()).ensure().map(drop)
}

/// Waits for a change; `false` when none will be told any more.
async fn changed(changes: Option<&mut Changes>) -> bool {
    match changes {
        Some(changes) => changes.next().await,
        None => pending().await,
    }
}

/// Removes the guard's table, and tells whether there was one.
///
/// # Errors
/// [`GuardError`]: it may still be there.
pub fn remove() -> Result<bool, GuardError> {
    match open()?.request(&ruleset::remove(), |_, _| {}) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(GuardError::Request("remove", error)),
    }
}

enum Found {
    AsItShouldBe,
    MissingOrChanged,
    /// As it was made, before IPVS came or went.
    OfAnotherTarget,
}

fn is_installed(socket: &mut Socket, target: Target) -> Result<bool, GuardError> {
    let mut replies = Vec::new();
    for query in ruleset::queries() {
        match ask(socket, &[query]) {
            Ok(messages) => replies.push(messages),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            Err(error) => return Err(GuardError::Request("read", error)),
        }
    }
    Ok(ruleset::is_installed(target, &replies))
}

/// The attributes of each message of the reply.
fn ask(socket: &mut Socket, query: &[Message]) -> io::Result<Vec<Vec<u8>>> {
    // Somebody else's change of any table interrupts a dump.
    uninterrupted(|| {
        let mut messages = Vec::new();
        socket.request(query, |_, payload| {
            messages.push(payload.get(ruleset::NFGENMSG..).unwrap_or_default().to_owned());
        })?;
        Ok(messages)
    })
}

fn open() -> Result<Socket, GuardError> {
    /// Far more than the table is.
    const MAX_DATAGRAMS: usize = 64;
    Socket::open(Some(netlink::NETFILTER), MAX_DATAGRAMS).map_err(GuardError::Socket)
}

#[cfg(test)]
mod tests;
