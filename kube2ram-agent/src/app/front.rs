//! What faces the pods: the kernel half and the listeners that it sends them to, made anew or taken over. Called by `app`.

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

use super::{
    AppError,
    host_port::{HostPort, refuse},
    node::Node,
};
use crate::{
    datapath::{AgentAddr, Datapath, Former, Lock, Settings},
    handover::Estate,
    listeners::Release,
};
use kube2ram_service::listener::bound_buffers;

/// The kernel half in force, and who listens.
pub(super) struct Front {
    pub(super) datapath: Datapath,
    pub(super) listeners: Listeners,
}

/// What an agent may hand over.
pub(super) struct Listeners {
    pub(super) app: Arc<HostPort>,
    pub(super) admin: Arc<HostPort>,
    /// Where pods were sent while another process had the port of `app`. Held for good: nobody may ever listen
    /// there.
    pub(super) _refusing: Option<TcpSocket>,
    /// Last, and so dropped last: whoever gets it listens there.
    pub(super) lock: Lock,
}

impl Front {
    /// Makes everything anew, where no agent runs. Listening comes before attaching: a pod is never sent to a port
    /// on which nobody listens, nor to one on which another process does.
    pub(super) fn open(node: &Node, lock: Lock) -> Result<Self, AppError> {
        let app = HostPort::app(node.app)?;
        let admin = HostPort::admin(node.admin)?;
        let mut settings = node.settings.clone();
        let refusing = match app.listener() {
            Ok(_) => None,
            Err(_taken) => Some(send_nowhere(&mut settings, node)?),
        };
        let kept = lock.clone();
        let datapath = Datapath::succeed(&settings, lock, Former::Gone).map_err(AppError::Datapath)?;
        let listeners = Listeners { app, admin, _refusing: refusing, lock: kept };
        Ok(Self { datapath, listeners })
    }

    /// Takes over what another agent has and goes on serving with meanwhile.
    pub(super) fn inherit(node: &Node, estate: Estate) -> Result<Self, AppError> {
        let Estate { lock, app, admin } = estate;
        let app = HostPort::inherited(node.app, "--app-port", listening(app)?);
        let admin = HostPort::inherited(node.admin, "--metrics-port", listening(admin)?);
        let lock = Lock::adopt(&node.settings.bpf_dir, lock).map_err(AppError::Datapath)?;
        let kept = lock.clone();
        let datapath =
            Datapath::succeed(&node.settings, lock, Former::HandsOver).map_err(AppError::Datapath)?;
        Ok(Self { datapath, listeners: Listeners { app, admin, _refusing: None, lock: kept } })
    }
}

/// Has pods that the host's listener would serve refused.
fn send_nowhere(settings: &mut Settings, node: &Node) -> Result<TcpSocket, AppError> {
    let ip = *node.agent.0.ip();
    let bind_error = |source| AppError::Bind { address: (ip, 0).into(), flag: "--host-ip", source };
    let (refusing, address) = refuse(ip).map_err(bind_error)?;
    settings.agent = AgentAddr(address);
    Ok(refusing)
}

impl Listeners {
    /// Everything that the next agent needs, once `pods` changes nothing more in pods.
    pub(super) async fn estate(&self, pods: &mpsc::Sender<Release>) -> Result<Estate, AppError> {
        let (release, released) = oneshot::channel();
        // Its other end is a part, which may not end.
        let gone = AppError::Ended("listeners in pods");
        let is_released = pods.send(release).await.is_ok() && released.await.is_ok();
        if !is_released {
            return Err(gone);
        }
        Ok(Estate {
            lock: self.lock.copy().map_err(AppError::Datapath)?,
            app: copy(&**self.app.listener()?)?,
            admin: copy(&**self.admin.listener()?)?,
        })
    }
}

fn copy(descriptor: &impl AsFd) -> Result<OwnedFd, AppError> {
    descriptor.as_fd().try_clone_to_owned().map_err(AppError::HandOver)
}

/// A listener that was passed on.
fn listening(socket: OwnedFd) -> Result<TcpListener, AppError> {
    let checked = || {
        if !socket_acceptconn(&socket)? {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        // An agent of an older version may not have done it.
        bound_buffers(&socket)?;
        let listener = StdTcpListener::from(socket);
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    checked().map_err(AppError::HandOver)
}
