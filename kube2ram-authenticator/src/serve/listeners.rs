//! The server's sockets, and when they listen. During an upgrade the former server and the next one run on
//! the node at once. Both bind the webhook's port (`SO_REUSEPORT`); the next one listens on it when it can
//! answer, and then the former one is ended. The admin port is one server's at a time. It is bound the same
//! way, so that the kernel distinguishes the former server, which is of the same user, from another program.
//! Called by the parent.
//!
//! Only processes of the same user can share a port so, and the API server believes only one that has a
//! certificate of the CA.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use kube2ram_service::listener;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tracing::info;

use super::ServeError;

/// The sockets.
#[derive(Debug)]
pub struct Listeners {
    webhook: TcpSocket,
    /// Whether no other server listened on the webhook's port.
    is_alone: bool,
    /// `None` while another server has the port.
    admin: Option<Arc<TcpListener>>,
    admin_address: SocketAddr,
}

/// The port of the webhook, before the server listens on it.
pub(super) struct Webhook {
    socket: TcpSocket,
    is_alone: bool,
}

/// The port of liveness, readiness and metrics.
pub(super) struct AdminPort {
    listening: Option<Arc<TcpListener>>,
    address: SocketAddr,
}

impl Listeners {
    /// Takes the ports. `webhook` is where the API server calls, over TLS; `admin` is where liveness,
    /// readiness and metrics are, without.
    ///
    /// # Errors
    /// [`ServeError::Bind`]: something that is no server of this user has one of the ports.
    pub async fn bind(webhook: SocketAddr, admin: SocketAddr) -> Result<Self, ServeError> {
        let failed = |address| move |source| ServeError::Bind { address, source };
        let is_alone = is_free(webhook).is_ok();
        let webhook = shared(webhook).map_err(failed(webhook))?;
        let listening = match alone(admin) {
            Ok(listening) => Some(listening),
            // Without the former server's user and SO_REUSEPORT this fails.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && !is_alone => {
                shared(admin).map(|_closed| None).map_err(failed(admin))?
            }
            Err(error) => return Err(failed(admin)(error)),
        };
        let bound = listening.as_ref().map(|listening| listening.local_addr()).transpose();
        let admin_address = bound.map_err(failed(admin))?.unwrap_or(admin);
        Ok(Self { webhook, is_alone, admin: listening, admin_address })
    }

    /// Where the webhook and the admin listener are, also when any free port was asked for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.webhook.local_addr()?, self.admin_address))
    }

    pub(super) fn split(self) -> (Webhook, AdminPort) {
        let webhook = Webhook { socket: self.webhook, is_alone: self.is_alone };
        (webhook, AdminPort { listening: self.admin, address: self.admin_address })
    }
}

impl Webhook {
    /// Listens at once if no other server does, else when `can_answer`: a connection of the API server goes
    /// to any of the servers that listen.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn listen(self, can_answer: impl Fn() -> bool) -> io::Result<Arc<TcpListener>> {
        let address = self.socket.local_addr()?;
        if !self.is_alone {
            info!(%address, "another server has the port: listening when this one can answer");
            while !can_answer() && is_answered(address).await {
                sleep(LOOK_AGAIN).await;
            }
        }
        Ok(Arc::new(self.socket.listen(listener::MAX_BACKLOG)?))
    }
}

impl AdminPort {
    /// The listener, as soon as the port is free.
    ///
    /// # Errors
    /// The kernel's, except that the port is in use.
    pub(super) async fn listen(self) -> io::Result<Arc<TcpListener>> {
        if let Some(listening) = self.listening {
            return Ok(listening);
        }
        loop {
            match alone(self.address) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => sleep(LOOK_AGAIN).await,
                outcome => return outcome,
            }
        }
    }
}

/// Whether anybody accepts connections there. The former server may have ended before its time.
async fn is_answered(address: SocketAddr) -> bool {
    matches!(timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// Fails if anybody listens there, a server of this user as well. Nothing listens for it, not even for a
/// moment: a connection of that moment would be reset.
fn is_free(address: SocketAddr) -> io::Result<()> {
    let socket = of_family(address)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)
}

/// Listens on a port that no other server listens on now, and that the next one may bind.
fn alone(address: SocketAddr) -> io::Result<Arc<TcpListener>> {
    is_free(address)?;
    Ok(Arc::new(shared(address)?.listen(listener::MAX_BACKLOG)?))
}

/// A socket on a port that other servers of this user may have, too. It does not listen yet, so the kernel
/// gives it no connections.
fn shared(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = of_family(address)?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    listener::bound_buffers(&socket)?;
    socket.bind(address)?;
    Ok(socket)
}

fn of_family(address: SocketAddr) -> io::Result<TcpSocket> {
    if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

/// How often a server looks whether it may listen.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;

    const ANY: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));

    async fn listening(listeners: Listeners) -> (Arc<TcpListener>, Arc<TcpListener>) {
        let (webhook, admin) = listeners.split();
        (webhook.listen(|| true).await.unwrap(), admin.listen().await.unwrap())
    }

    #[tokio::test]
    async fn the_next_server_listens_when_it_can_answer_and_the_former_one_still_does() {
        let former = Listeners::bind(ANY, ANY).await.unwrap();
        let (webhook, admin) = former.addresses().unwrap();
        let former = listening(former).await;
        let next = Listeners::bind(webhook, admin).await.unwrap();
        assert_eq!(next.addresses().unwrap(), (webhook, admin));
        let (next_webhook, next_admin) = next.split();
        let can_answer = Arc::new(AtomicBool::new(false));
        let waiting = tokio::spawn({
            let can_answer = Arc::clone(&can_answer);
            next_webhook.listen(move || can_answer.load(Ordering::SeqCst))
        });
        let admin_waits = tokio::spawn(next_admin.listen());
        sleep(3 * LOOK_AGAIN).await;
        assert!(!waiting.is_finished() && !admin_waits.is_finished());

        can_answer.store(true, Ordering::SeqCst);
        let next = waiting.await.unwrap().unwrap();

        assert_eq!(next.local_addr().unwrap(), webhook);
        assert!(!admin_waits.is_finished(), "the former server still has it");
        drop(former);
        assert_eq!(admin_waits.await.unwrap().unwrap().local_addr().unwrap(), admin);
        let (connected, accepted) = tokio::join!(TcpStream::connect(webhook), next.accept());
        assert!(connected.is_ok() && accepted.is_ok());
    }

    #[tokio::test]
    async fn the_next_server_listens_at_once_when_the_former_one_ends_before_its_time() {
        let former = Listeners::bind(ANY, ANY).await.unwrap();
        let (webhook, admin) = former.addresses().unwrap();
        let former = listening(former).await;
        let (next, _admin) = Listeners::bind(webhook, admin).await.unwrap().split();
        let waiting = tokio::spawn(next.listen(|| false));

        drop(former);

        assert_eq!(waiting.await.unwrap().unwrap().local_addr().unwrap(), webhook);
    }

    #[tokio::test]
    async fn a_port_of_another_program_is_an_error() {
        let other = TcpListener::bind(ANY).await.unwrap();
        let taken = other.local_addr().unwrap();

        for (webhook, admin) in [(taken, ANY), (ANY, taken)] {
            let Err(ServeError::Bind { address, .. }) = Listeners::bind(webhook, admin).await else {
                panic!("it was bound")
            };
            assert_eq!(address, taken);
        }
        assert!(Listeners::bind(ANY, ANY).await.is_ok(), "the allowed twin");
        // Nor is the other program taken for the former server during an upgrade.
        let former = Listeners::bind(ANY, ANY).await.unwrap();
        let (webhook, admin) = former.addresses().unwrap();
        let _former = listening(former).await;
        let Err(ServeError::Bind { address, .. }) = Listeners::bind(webhook, taken).await else {
            panic!("it was bound")
        };
        assert_eq!(address, taken);
        assert!(Listeners::bind(webhook, admin).await.is_ok(), "the allowed twin");
    }
}
