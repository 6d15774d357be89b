//! The frontend: the eBPF programs and the listeners of the host, created or taken over from the outgoing
//! agent or from the boot guard. Called by `app`.

use std::{
    net::TcpListener as StdTcpListener,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::net::sockopt::socket_acceptconn;
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{mpsc, oneshot},
};
use tracing::{info, warn};

use super::{
    AppError,
    host_port::{HostPort, refuse},
    node::Node,
};
use crate::{
    datapath::{AgentAddr, Datapath, Lock, Outgoing, Settings, WireHook},
    handover::HandoverState,
    listeners::Release,
    wire_guard,
};
use kube2ram_service::listener::bound_buffers;

/// The attached programs, and the listeners.
pub(super) struct Frontend {
    pub(super) datapath: Datapath,
    pub(super) listeners: ListenerSet,
}

/// What an agent may hand over.
pub(super) struct ListenerSet {
    pub(super) app: Arc<HostPort>,
    pub(super) admin: Arc<HostPort>,
    /// The address to which pods were redirected while another process had the port of `app`. It is never
    /// closed, so that no process can listen there.
    pub(super) _refusing: Option<TcpSocket>,
    /// The last field, and so dropped last: the agent that gets the lock binds these addresses.
    pub(super) lock: Lock,
}

impl Frontend {
    /// Creates everything, if no agent runs. Listening comes before attaching: a pod is never redirected to a
    /// port without a listener, nor to another process's.
    pub(super) fn open(node: &Node, lock: Lock) -> Result<Self, AppError> {
        let app = HostPort::app(node.app)?;
        let admin = HostPort::admin(node.admin)?;
        let mut settings = node.settings.clone();
        let refusing = match app.listener() {
            Ok(_) => None,
            Err(_taken) => Some(send_nowhere(&mut settings, node)?),
        };
        let kept = lock.clone();
        let datapath = Datapath::take_over(&settings, lock, Outgoing::Ended).map_err(AppError::Datapath)?;
        relieve_boot_guard(&datapath, &settings)?;
        let listeners = ListenerSet { app, admin, _refusing: refusing, lock: kept };
        Ok(Self { datapath, listeners })
    }

    /// Takes over the descriptors of another agent, which continues to serve meanwhile.
    pub(super) fn take_over(node: &Node, handover_state: HandoverState) -> Result<Self, AppError> {
        let HandoverState { lock, app, admin } = handover_state;
        let app = HostPort::taken_over(node.app, "--app-port", listening(app)?);
        let admin = HostPort::taken_over(node.admin, "--metrics-port", listening(admin)?);
        let lock = Lock::adopt(&node.settings.bpf_dir, lock).map_err(AppError::Datapath)?;
        let kept = lock.clone();
        let datapath =
            Datapath::take_over(&node.settings, lock, Outgoing::HandsOver).map_err(AppError::Datapath)?;
        relieve_boot_guard(&datapath, &node.settings)?;
        Ok(Self { datapath, listeners: ListenerSet { app, admin, _refusing: None, lock: kept } })
    }
}

/// Detaches the boot guard's programs from network devices once the wire guard is there. Earlier, packet
/// sockets of pods would reach the metadata server in between. Later, the agent's own connections to it would
/// hang: this comes before the first of them.
fn relieve_boot_guard(datapath: &Datapath, settings: &Settings) -> Result<(), AppError> {
    if !datapath.has_boot_wires().map_err(AppError::Datapath)? {
        return Ok(());
    }
    if settings.guards_wire {
        let wire = datapath.wire(WireHook::of_kernel()).map_err(AppError::Datapath)?;
        let is_active = wire_guard::cover_once(wire, settings.metadata, &settings.pods_cgroup)
            .map_err(AppError::Namespace)?;
        // The wire guard has logged the reason, and tries again. Until it succeeds, the node is as without a
        // boot guard: an agent that cannot reach the metadata server would be worse.
        if !is_active {
            warn!("the wire guard is not on every network device; the boot guard leaves the devices anyway");
        }
    }
    let devices = datapath.retire_boot_wires().map_err(AppError::Datapath)?;
    info!(devices, "took over network devices from the boot guard");
    Ok(())
}

/// Redirects pods that the host listener would serve to an address at which connections are refused.
fn send_nowhere(settings: &mut Settings, node: &Node) -> Result<TcpSocket, AppError> {
    let ip = *node.agent.0.ip();
    let bind_error = |source| AppError::Bind { address: (ip, 0).into(), flag: "--host-ip", source };
    let (refusing, address) = refuse(ip).map_err(bind_error)?;
    settings.agent = AgentAddr(address);
    Ok(refusing)
}

impl ListenerSet {
    /// The descriptors for the next agent, once `pods` has stopped changing in-pod listeners.
    pub(super) async fn handover_state(
        &self,
        pods: &mpsc::Sender<Release>,
    ) -> Result<HandoverState, AppError> {
        let (release, released) = oneshot::channel();
        // Its other end is a background task, which may not end.
        let gone = AppError::Ended("listeners in pods");
        let is_released = pods.send(release).await.is_ok() && released.await.is_ok();
        if !is_released {
            return Err(gone);
        }
        Ok(HandoverState {
            lock: self.lock.copy().map_err(AppError::Datapath)?,
            app: copy(&**self.app.listener()?)?,
            admin: copy(&**self.admin.listener()?)?,
        })
    }
}

fn copy(descriptor: &impl AsFd) -> Result<OwnedFd, AppError> {
    descriptor.as_fd().try_clone_to_owned().map_err(AppError::PassListener)
}

/// A listener that another agent passed on.
fn listening(socket: OwnedFd) -> Result<TcpListener, AppError> {
    let checked = || {
        if !socket_acceptconn(&socket)? {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        // An agent of an older version may not have set the buffers.
        bound_buffers(&socket)?;
        let listener = StdTcpListener::from(socket);
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    checked().map_err(AppError::PassListener)
}
