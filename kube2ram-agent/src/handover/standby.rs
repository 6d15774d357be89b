//! The running agent's side: knows the standby agents, and hands over when it is told to stop. Called by
//! `app`.

use std::{
    collections::VecDeque,
    fs::{self, Permissions},
    io,
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    net::UnixListener,
    time::{Instant, sleep},
};
use tracing::{debug, info, warn};

use super::{
    HandoverError, HandoverState, Hello, SOCKET,
    channel::{Channel, Message, PATIENCE},
};
use kube2ram_service::{state_dir::StateDir, telemetry::chain};

/// The listener at which standby agents report.
#[derive(Debug)]
pub struct StandbyListener {
    listener: UnixListener,
    hello: Hello,
    standbys: Standbys,
}

/// The standby agents, the latest last.
#[derive(Clone, Debug, Default)]
pub struct Standbys(Arc<Mutex<VecDeque<Channel>>>);

/// A rolling update has one.
const MAX_STANDBYS: usize = 4;
/// How long the outgoing agent waits until the standby agent is prepared. Pods are served meanwhile.
const PREPARATION: Duration = Duration::from_secs(10);
/// How long the incoming agent may take to load its programs (0.1 s), to open its in-pod listeners (about 1
/// ms each) and to serve. Pods are served meanwhile.
const TAKE_OVER: Duration = Duration::from_secs(10);
/// How long to wait when accept(2) fails, which is when descriptors or memory run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

impl StandbyListener {
    /// Listens in the state directory, and replaces an earlier agent's socket. The caller has the lock of the
    /// pins.
    ///
    /// # Errors
    /// [`HandoverError::Listen`].
    pub fn open(state: &StateDir, hello: Hello) -> Result<Self, HandoverError> {
        let path = state.socket(SOCKET);
        let listen = || {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener =
            listen().map_err(|source| HandoverError::Listen { path: state.path().join(SOCKET), source })?;
        Ok(Self { listener, hello, standbys: Standbys::default() })
    }

    /// The agents that report.
    pub fn standbys(&self) -> Standbys {
        self.standbys.clone()
    }

    /// Accepts reports of agents, for ever.
    ///
    /// # Cancel safety
    /// The connection of an agent that is reporting is closed; it reports to the next agent.
    pub async fn run(self) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match self.meet(Channel::new(stream)).await {
                    Ok(standby) => self.standbys.add(standby),
                    Err(error) => {
                        debug!(error = chain(&error), "refused an agent that cannot take over");
                    }
                },
                Err(error) => {
                    warn!(%error, "cannot accept a standby agent");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    async fn meet(&self, channel: Result<Channel, HandoverError>) -> Result<Channel, HandoverError> {
        let mut channel = channel?;
        let theirs = channel.receive_within(PATIENCE).await?;
        channel.send(&Message::Hello(self.hello.clone()), &[]).await?;
        match theirs {
            Message::Hello(theirs) if self.hello.fits(&theirs) => Ok(channel),
            Message::Hello(_) => Err(HandoverError::Different),
            _ => Err(HandoverError::Malformed),
        }
    }
}

impl Standbys {
    fn add(&self, standby: Channel) {
        info!("a standby agent is connected");
        let mut standbys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if standbys.len() == MAX_STANDBYS {
            standbys.pop_front();
        }
        standbys.push_back(standby);
    }

    fn latest(&self) -> Option<Channel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_back()
    }

    /// Hands everything over to a standby agent: waits until it is prepared, for a limited time, gets the
    /// descriptors from `release`, and waits until the other agent serves. Returns whether it serves. If not,
    /// no agent does, and the released descriptors are closed.
    ///
    /// # Errors
    /// Those of `release`: nothing was handed over then either.
    pub async fn hand_over<E>(
        &self,
        release: impl AsyncFnOnce() -> Result<HandoverState, E>,
    ) -> Result<bool, E> {
        let deadline = Instant::now() + PREPARATION;
        let mut standby = loop {
            let Some(mut standby) = self.latest() else { return Ok(false) };
            match standby.receive_within(deadline.saturating_duration_since(Instant::now())).await {
                Ok(Message::Prepared) => break standby,
                Err(HandoverError::Timeout) => {
                    warn!(
                        "standby agent is not prepared; handing over anyway because this agent was told to stop"
                    );
                    break standby;
                }
                Ok(_) => debug!("unexpected handover message from a standby agent"),
                Err(error) => debug!(error = chain(&error), "a standby agent has disconnected"),
            }
        };
        let handover_state = release().await?;
        let serving = async {
            pass_on(&mut standby, &handover_state).await?;
            drop(handover_state);
            loop {
                match standby.receive_within(TAKE_OVER).await? {
                    Message::Serving => return Ok::<_, HandoverError>(()),
                    Message::Prepared => {} // sent before it received the handover
                    _ => return Err(HandoverError::Malformed),
                }
            }
        };
        Ok(match serving.await {
            Ok(()) => true,
            Err(error) => {
                warn!(error = chain(&error), "the standby agent did not take over");
                false
            }
        })
    }
}

async fn pass_on(standby: &mut Channel, handover_state: &HandoverState) -> Result<(), HandoverError> {
    let HandoverState { lock, app, admin } = handover_state;
    standby.send(&Message::HandoverState, &[lock.as_fd(), app.as_fd(), admin.as_fd()]).await
}
