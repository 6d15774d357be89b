//! The self-test of the interception: the agent connects to the metadata address as a pod does, without its
//! pass, and the connection must arrive at the agent. Attached programs alone are no proof: another program,
//! the host's firewall or a hanging listener may prevent it. Depends on `datapath` and `admin`; run by `app`;
//! `server` reports the arrivals.
//!
//! No other process can pass the test for the agent: the connection must come from the expected cgroup, by
//! the kernel's record, and from the expected port.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt as _;
use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::{
    net::TcpSocket,
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    datapath::{Origin, Settings, dial_as_pod},
    identity::CgroupId,
};
use kube2ram_service::{
    admin::{Pending, Readiness},
    telemetry::chain,
};

/// The time between two connections that arrive.
const EVERY: Duration = Duration::from_secs(10);
/// The time after a connection that did not arrive.
const AGAIN: Duration = Duration::from_millis(250);
/// How long one may take. It takes some 100 µs.
const PATIENCE: Duration = Duration::from_secs(1);
/// How many in a row must be lost until the agent is not ready: a single one may be lost on a busy node.
const LOST: u32 = 3;
/// How long an agent that took over waits before its first connection: the outgoing agent still accepts for a
/// moment from the backlog that both share.
const SHARED: Duration = Duration::from_secs(1);
/// The condition of readiness.
pub const CONDITION: &str = "an intercepted connection of the agent itself";

/// The agent's own connections to the metadata address.
#[derive(Debug)]
pub struct SelfTest {
    settings: Settings,
    /// The agent's cgroup, if it is below the pods'. Elsewhere a child dials, in a cgroup that is made for
    /// it.
    own: Option<CgroupId>,
    /// The cgroup whose connection is awaited; 0 means none.
    awaited_cgroup: AtomicU64,
    /// The port of the awaited connection; [`ANY_PORT`] if it is not known.
    awaited_port: AtomicU32,
    arrived: Notify,
    metrics: Family<[(&'static str, &'static str); 1], Counter>,
    last: Mutex<Last>,
}

/// No port's number.
const ANY_PORT: u32 = u32::MAX;

/// The last result.
#[derive(Clone, Debug, Default)]
pub struct Last {
    /// When one arrived.
    pub arrived_at: Option<Instant>,
    /// Why it did not, if three in a row did not.
    pub failure: Option<String>,
}

/// Why a connection did not arrive.
#[derive(Debug, thiserror::Error)]
enum SelfTestError {
    /// The address cannot be reached.
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    /// The child did not connect.
    #[error("cannot connect from a child process")]
    Child(#[source] crate::datapath::DatapathError),
    /// Another process answers there, or the kernel's record was lost.
    #[error("connected, but not to the agent, or without a record of the connect hook")]
    Elsewhere,
    /// The socket cannot be created.
    #[error("cannot create a socket")]
    Socket(#[source] std::io::Error),
    /// The child's thread.
    #[error("the attempt panicked")]
    Panicked(#[source] tokio::task::JoinError),
    /// Neither connected nor refused.
    #[error("no answer within {PATIENCE:?}")]
    Silence,
}

pub(crate) fn metrics(registry: &mut Registry) -> Family<[(&'static str, &'static str); 1], Counter> {
    let metrics = Family::default();
    let help = "Connections of the agent's self-test to the metadata address, by result (arrived, lost)";
    registry.register("interceptions", help, metrics.clone());
    for result in ["arrived", "lost"] {
        drop(metrics.get_or_create(&[("result", result)]));
    }
    metrics
}

impl SelfTest {
    /// Prepares. `own` is the agent's cgroup, if that lies below the pods'.
    pub fn new(settings: Settings, own: Option<CgroupId>, registry: &mut Registry) -> Arc<Self> {
        Arc::new(Self {
            settings,
            own,
            awaited_cgroup: AtomicU64::new(0),
            awaited_port: AtomicU32::new(0),
            arrived: Notify::new(),
            metrics: metrics(registry),
            last: Mutex::default(),
        })
    }

    /// Whether an accepted connection is the self-test's: then it is not served. Costs two loads for all
    /// other connections.
    pub fn takes(&self, peer: SocketAddr, origin: &Origin) -> bool {
        let Origin::Task(cgroup) = origin else { return false };
        if self.awaited_cgroup.load(Ordering::Acquire) != cgroup.0 {
            return false;
        }
        let port = self.awaited_port.load(Ordering::Acquire);
        let is_own = port == ANY_PORT || port == u32::from(peer.port());
        if is_own {
            self.arrived.notify_one();
        }
        is_own
    }

    /// The last result.
    pub fn last(&self) -> Last {
        self.last_mut().clone()
    }

    /// Dials from time to time, for ever. `pending` is met by the first that arrives; without one another
    /// agent served until now.
    ///
    /// # Cancel safety
    /// Dropping the future abandons a connection.
    pub async fn run(self: Arc<Self>, readiness: Readiness, mut pending: Option<Pending>) {
        if pending.is_none() {
            sleep(SHARED).await;
        }
        let mut lost = 0_u32;
        loop {
            let attempt = Arc::clone(&self).attempt().await;
            let Err(error) = attempt else {
                self.count("arrived");
                *self.last_mut() = Last { arrived_at: Some(Instant::now()), failure: None };
                if lost >= LOST {
                    info!("connections to the metadata address arrive again");
                }
                lost = 0;
                pending.take().into_iter().for_each(Pending::ready);
                sleep(EVERY).await;
                continue;
            };
            self.count("lost");
            lost = lost.saturating_add(1);
            let error = chain(&error);
            if lost < LOST {
                info!(error, "a connection to the metadata address did not arrive at the agent");
            } else {
                if lost == LOST {
                    warn!(error, "connections to the metadata address do not arrive at the agent");
                    pending.get_or_insert_with(|| readiness.wait_for(CONDITION));
                }
                self.last_mut().failure = Some(error);
            }
            sleep(AGAIN).await;
        }
    }

    async fn attempt(self: Arc<Self>) -> Result<(), SelfTestError> {
        let outcome = match self.own {
            Some(own) => self.dial(own).await,
            None => Arc::clone(&self).dial_by_child().await,
        };
        self.awaited_cgroup.store(0, Ordering::Release);
        outcome
    }

    async fn dial(&self, own: CgroupId) -> Result<(), SelfTestError> {
        let socket = TcpSocket::new_v4().map_err(SelfTestError::Socket)?;
        // Bound first, so that the port is known before the connection arrives. Zero linger leaves no
        // TIME_WAIT socket.
        socket.bind((Ipv4Addr::UNSPECIFIED, 0).into()).map_err(SelfTestError::Socket)?;
        let port = socket.local_addr().map_err(SelfTestError::Socket)?.port();
        socket.set_zero_linger().map_err(SelfTestError::Socket)?;
        self.expect(own, u32::from(port));
        let connected = timeout(PATIENCE, socket.connect(self.metadata().into())).await;
        let _stream =
            connected.map_err(|_elapsed| SelfTestError::Silence)?.map_err(SelfTestError::Connect)?;
        self.arrival().await
    }

    /// Used where the agent's own cgroup is not below the pods' cgroup.
    async fn dial_by_child(self: Arc<Self>) -> Result<(), SelfTestError> {
        let this = Arc::clone(&self);
        let dialled = spawn_blocking(move || {
            dial_as_pod(&this.settings, this.metadata(), PATIENCE, |cgroup| this.expect(cgroup, ANY_PORT))
        });
        dialled.await.map_err(SelfTestError::Panicked)?.map_err(SelfTestError::Child)?;
        self.arrival().await
    }

    fn expect(&self, cgroup: CgroupId, port: u32) {
        // One that came too late for the attempt before.
        let _late = self.arrived.notified().now_or_never();
        self.awaited_port.store(port, Ordering::Release);
        self.awaited_cgroup.store(cgroup.0, Ordering::Release);
    }

    async fn arrival(&self) -> Result<(), SelfTestError> {
        timeout(PATIENCE, self.arrived.notified()).await.map_err(|_elapsed| SelfTestError::Elsewhere)
    }

    fn metadata(&self) -> SocketAddrV4 {
        self.settings.metadata.v4
    }

    fn count(&self, result: &'static str) {
        self.metrics.get_or_create(&[("result", result)]).inc();
    }

    fn last_mut(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::AgentAddr;
    use kube2ram_cloud::MetadataAddr;

    fn self_test() -> Arc<SelfTest> {
        let nowhere = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        let settings = Settings {
            bpf_dir: "/".into(),
            cgroup_root: "/".into(),
            pods_cgroup: "/pods".into(),
            other_pods_cgroups: Vec::new(),
            own_cgroup: "/pods/own".into(),
            metadata: MetadataAddr::v4_only(nowhere),
            agent: AgentAddr(nowhere),
            keeps_open: false,
            guards_wire: true,
            debug: false,
        };
        SelfTest::new(settings, Some(CgroupId(7)), &mut Registry::default())
    }

    fn origin(cgroup: u64) -> Origin {
        Origin::Task(CgroupId(cgroup))
    }

    #[tokio::test(start_paused = true)]
    async fn takes_only_what_comes_from_its_cgroup_and_its_port_while_it_waits() {
        let self_test = self_test();
        let peer = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        assert!(!self_test.takes(peer(1000), &origin(7)), "nobody is awaited");

        self_test.expect(CgroupId(7), 1000);

        assert!(!self_test.takes(peer(1000), &origin(8)), "another cgroup");
        assert!(!self_test.takes(peer(1001), &origin(7)), "another port: a process beside the agent");
        assert!(self_test.arrival().await.is_err());
        assert!(self_test.takes(peer(1000), &origin(7)));
        assert!(self_test.arrival().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_comes_too_late_does_not_count_for_the_next() {
        let self_test = self_test();
        self_test.expect(CgroupId(7), ANY_PORT);
        assert!(self_test.takes(SocketAddr::from(([10, 0, 0, 1], 1)), &origin(7)));

        self_test.expect(CgroupId(7), ANY_PORT);

        assert!(self_test.arrival().await.is_err());
    }

    #[tokio::test]
    async fn an_agent_that_nobody_answers_is_not_ready_after_three_attempts_and_reports_why() {
        let (self_test, readiness) = (self_test(), Readiness::default());
        drop(tokio::spawn(Arc::clone(&self_test).run(readiness.clone(), None)));

        let unready = async {
            while readiness.pending().is_empty() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), unready).await.unwrap();

        assert_eq!(readiness.pending(), [CONDITION]);
        assert!(self_test.last().failure.is_some_and(|why| why.starts_with("cannot connect")));
    }
}
