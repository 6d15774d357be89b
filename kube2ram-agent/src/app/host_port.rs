//! A TCP port of the node that the agent listens on. If another process has the port, the agent reports which
//! one, and retries; the eBPF programs are attached meanwhile. Called by `app`.

mod holder;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::net::sockopt::set_ipv6_v6only;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::SetOnce,
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tracing::{error, info};

use self::holder::Holder;
use super::AppError;
use crate::{identity::PodUid, status::TakenPort};
use kube2ram_service::{
    admin::Readiness,
    listener::{MAX_BACKLOG, bound_buffers},
    telemetry::chain,
};

/// A port and the listener on it, once there is one.
#[derive(Debug)]
pub(super) struct HostPort {
    address: SocketAddr,
    flag: &'static str,
    /// The condition of readiness.
    condition: &'static str,
    listener: SetOnce<Arc<TcpListener>>,
    /// The process that has the port; `None` once the agent has it.
    holder: Mutex<Option<Holder>>,
}

/// How often a port that is taken is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How often the process that has the port is searched for, which reads the descriptors of all processes, and
/// logged.
const REPORT_EVERY: Duration = Duration::from_mins(1);

impl HostPort {
    /// The port of `--app-port`.
    ///
    /// # Errors
    /// [`AppError::Bind`] for any reason but that the port is taken.
    pub(super) fn app(address: SocketAddr) -> Result<Arc<Self>, AppError> {
        Self::open(address, "--app-port", "the port of --app-port")
    }

    /// The port of `--metrics-port`.
    ///
    /// # Errors
    /// As [`Self::app`].
    pub(super) fn admin(address: SocketAddr) -> Result<Arc<Self>, AppError> {
        Self::open(address, "--metrics-port", "the port of --metrics-port")
    }

    fn open(address: SocketAddr, flag: &'static str, condition: &'static str) -> Result<Arc<Self>, AppError> {
        let (listener, holder) = match listen(address) {
            Ok(listener) => (SetOnce::new_with(Some(Arc::new(listener))), None),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                (SetOnce::new(), Some(Holder::default()))
            }
            Err(source) => return Err(AppError::Bind { address, flag, source }),
        };
        Ok(Arc::new(Self { address, flag, condition, listener, holder: Mutex::new(holder) }))
    }

    /// A listener that another agent handed over.
    pub(super) fn taken_over(address: SocketAddr, flag: &'static str, listener: TcpListener) -> Arc<Self> {
        let listener = SetOnce::new_with(Some(Arc::new(listener)));
        Arc::new(Self { address, flag, condition: flag, listener, holder: Mutex::default() })
    }

    /// The listener.
    ///
    /// # Errors
    /// [`AppError::PortTaken`] while another process has the port.
    pub(super) fn listener(&self) -> Result<&Arc<TcpListener>, AppError> {
        self.listener.get().ok_or(AppError::PortTaken(self.flag))
    }

    /// Waits for [`Self::claim`] to succeed.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub(super) async fn is_open(&self) {
        self.listener.wait().await;
    }

    /// The process that has the port instead of the agent. `pod_name` looks up the namespace and name of a
    /// pod.
    pub(super) fn taken(&self, pod_name: impl Fn(&PodUid) -> Option<String>) -> Option<TakenPort> {
        let holder = self.holder().as_ref()?.describe(pod_name);
        Some(TakenPort { flag: self.flag.to_owned(), address: self.address.to_string(), holder })
    }

    /// Binds the port as soon as no other process has it; until then the agent is not ready.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the agent unready.
    pub(super) async fn claim(
        &self,
        readiness: &Readiness,
        pod_name: impl Fn(&PodUid) -> Option<String>,
    ) -> &Arc<TcpListener> {
        if let Some(listener) = self.listener.get() {
            return listener;
        }
        let pending = readiness.wait_for(self.condition);
        let mut report_at = Instant::now();
        let listener = loop {
            let failure = match listen(self.address) {
                Ok(listener) => break listener,
                Err(error) => error,
            };
            if report_at <= Instant::now() {
                report_at = Instant::now() + REPORT_EVERY;
                self.report(&failure, &pod_name).await;
            }
            sleep(RETRY_EVERY).await;
        };
        info!(address = %self.address, flag = self.flag, "the port is free again, and the agent listens on it");
        *self.holder() = None;
        // Only this task sets it.
        drop(self.listener.set(Arc::new(listener)));
        pending.ready();
        self.listener.wait().await
    }

    async fn report(&self, failure: &io::Error, pod_name: impl Fn(&PodUid) -> Option<String>) {
        let address = self.address;
        let found = spawn_blocking(move || Holder::find(address)).await.unwrap_or_default();
        error!(
            %address,
            flag = self.flag,
            holder = found.describe(pod_name),
            pid = found.pid(),
            error = chain(failure),
            "another process has the agent's port: stop it, or give the agent another port; pods that need this port are refused meanwhile, and the agent tries again every second"
        );
        *self.holder() = Some(found);
    }

    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address of the node at which every connection is refused, for as long as this is held: bound, so that
/// no other process can listen there, and not listening.
pub(super) fn refuse(ip: std::net::Ipv4Addr) -> io::Result<(TcpSocket, std::net::SocketAddrV4)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((ip, 0).into())?;
    match socket.local_addr()? {
        SocketAddr::V4(address) => Ok((socket, address)),
        SocketAddr::V6(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// At the unspecified IPv6 address, at all of both families.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        set_ipv6_v6only(&socket, false)?;
        socket
    };
    socket.set_reuseaddr(true)?;
    bound_buffers(&socket)?;
    socket.bind(address)?;
    socket.listen(MAX_BACKLOG)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener as StdTcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_port_that_is_taken_is_reported_and_claimed_once_it_is_free() {
        let other = StdTcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = other.local_addr().unwrap();
        let (port, readiness) = (HostPort::app(address).unwrap(), Readiness::default());
        assert!(matches!(port.listener(), Err(AppError::PortTaken("--app-port"))));
        let claiming = tokio::spawn({
            let (port, readiness) = (Arc::clone(&port), readiness.clone());
            async move { port.claim(&readiness, |_| None).await.local_addr().unwrap() }
        });
        let own = format!("pid {}", std::process::id());
        while !port.taken(|_| None).unwrap().holder.contains(&own) {
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(readiness.pending(), ["the port of --app-port"]);
        assert_eq!(port.taken(|_| None).unwrap().address, address.to_string());

        drop(other);

        assert_eq!(claiming.await.unwrap(), address);
        assert!(readiness.pending().is_empty() && port.taken(|_| None).is_none());
        assert!(port.listener().is_ok());
    }

    #[tokio::test]
    async fn both_families_reach_the_unspecified_ipv6_address() {
        let port = HostPort::admin((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        let number = port.listener().unwrap().local_addr().unwrap().port();

        for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, number)), (Ipv6Addr::LOCALHOST, number).into()]
        {
            assert!(TcpStream::connect(address).is_ok(), "{address}");
        }
        let taken = listen((Ipv4Addr::UNSPECIFIED, number).into()).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse, "the IPv4 port is its own");
    }

    #[tokio::test]
    async fn any_other_reason_ends_the_start() {
        let nobodys = "192.0.2.1:80".parse().unwrap();

        assert!(matches!(HostPort::admin(nobodys), Err(AppError::Bind { flag: "--metrics-port", .. })));
    }

    #[tokio::test]
    async fn a_refusing_address_is_refused_and_cannot_be_taken() {
        let (held, address) = refuse(Ipv4Addr::LOCALHOST).unwrap();

        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(listen(address.into()).unwrap_err().kind(), io::ErrorKind::AddrInUse);

        drop(held);
        assert!(listen(address.into()).is_ok(), "the twin");
    }
}
