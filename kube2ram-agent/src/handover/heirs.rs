//! The side that runs: knows who stands by, and hands over when it is told to end. Called by `app`.

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
    Estate, HandoverError, Hello, SOCKET,
    channel::{Channel, Message, PATIENCE},
};
use kube2ram_service::{state_dir::StateDir, telemetry::chain};

/// Where agents that stand by report.
#[derive(Debug)]
pub struct Post {
    listener: UnixListener,
    hello: Hello,
    heirs: Heirs,
}

/// The agents that stand by, the latest last.
#[derive(Clone, Debug, Default)]
pub struct Heirs(Arc<Mutex<VecDeque<Channel>>>);

/// A rolling update has one.
const MAX_HEIRS: usize = 4;
/// How long an agent that was told to end waits for the other one to be prepared. Pods are served meanwhile.
const PREPARATION: Duration = Duration::from_secs(10);
/// How long the other one may take to load its programs (0.1 s), to open its listeners in pods (about 1 ms each) and to serve. Pods are served meanwhile.
const TAKE_OVER: Duration = Duration::from_secs(10);
/// How long to wait when accept(2) fails, which is when descriptors or memory run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

impl Post {
    /// Listens in the state directory, in place of a former agent. Whoever calls it has the lock of the pins.
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
        Ok(Self { listener, hello, heirs: Heirs::default() })
    }

    /// Those who report.
    pub fn heirs(&self) -> Heirs {
        self.heirs.clone()
    }

    /// Lets agents report, for ever.
    ///
    /// # Cancel safety
    /// Whoever is reporting is hung up on, and reports to the next agent.
    pub async fn run(self) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match self.meet(Channel::new(stream)).await {
                    Ok(heir) => self.heirs.add(heir),
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

impl Heirs {
    fn add(&self, heir: Channel) {
        info!("a standby agent is connected");
        let mut heirs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if heirs.len() == MAX_HEIRS {
            heirs.pop_front();
        }
        heirs.push_back(heir);
    }

    fn latest(&self) -> Option<Channel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_back()
    }

    /// Hands everything over to an agent that stands by: waits a while until it is prepared, lets go of what is to be handed over by `release`, and waits until
    /// the other one serves. Whether one does; if not, there is none, and what was let go of is nobody's.
    ///
    /// # Errors
    /// Those of `release`: nothing was handed over then either.
    pub async fn hand_over<E>(&self, release: impl AsyncFnOnce() -> Result<Estate, E>) -> Result<bool, E> {
        let deadline = Instant::now() + PREPARATION;
        let mut heir = loop {
            let Some(mut heir) = self.latest() else { return Ok(false) };
            match heir.receive_within(deadline.saturating_duration_since(Instant::now())).await {
                Ok(Message::Prepared) => break heir,
                Err(HandoverError::Timeout) => {
                    warn!(
                        "standby agent is not prepared; handing over anyway because this agent was told to stop"
                    );
                    break heir;
                }
                Ok(_) => debug!("unexpected handover message from a standby agent"),
                Err(error) => debug!(error = chain(&error), "a standby agent has disconnected"),
            }
        };
        let estate = release().await?;
        let serving = async {
            bequeath(&mut heir, &estate).await?;
            drop(estate);
            loop {
                match heir.receive_within(TAKE_OVER).await? {
                    Message::Serving => return Ok::<_, HandoverError>(()),
                    Message::Prepared => {} // said before it heard that it was its turn
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

async fn bequeath(heir: &mut Channel, estate: &Estate) -> Result<(), HandoverError> {
    let Estate { lock, app, admin } = estate;
    heir.send(&Message::Estate, &[lock.as_fd(), app.as_fd(), admin.as_fd()]).await
}
