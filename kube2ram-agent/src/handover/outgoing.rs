//! The standby agent's side: finds out whether an agent runs, and takes over its descriptors. Called by
//! `app`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tokio::time::sleep;
use tracing::{info, warn};

use super::{
    HandoverError, HandoverState, Hello, SOCKET,
    channel::{Channel, Message, PATIENCE},
};
use crate::datapath::{DatapathError, Lock};
use kube2ram_service::{state_dir::StateDir, telemetry::chain};

/// The state that a starting agent finds.
#[derive(Debug)]
pub enum LockOutcome {
    /// No agent runs: the lock is ours.
    Free(Lock),
    /// One runs, and will hand over.
    Taken(OutgoingAgent),
}

/// The running agent.
#[derive(Debug)]
pub struct OutgoingAgent(Channel);

/// How often the lock is tried while the running agent does not answer.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// An agent that has just started has the lock a little earlier than it answers. Each attempt may take
/// [`PATIENCE`] more.
const SILENCE: Duration = Duration::from_secs(2);
/// How often an agent that did not answer is asked again: it may have been stopped for a while.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Takes the lock, or finds the agent that has it. If that agent does not hand over, waits until it ends.
/// `on_wait` is called once then: only the running agent keeps this one from serving.
///
/// # Errors
/// When the lock cannot be tried.
///
/// # Cancel safety
/// Nothing is lost.
pub async fn claim(
    bpf_dir: &Path,
    state: &StateDir,
    hello: &Hello,
    on_wait: impl FnOnce(),
) -> Result<LockOutcome, HandoverError> {
    let (started, mut on_wait) = (Instant::now(), Some(on_wait));
    let mut ask_at = started;
    loop {
        match Lock::take(bpf_dir) {
            Ok(lock) => return Ok(LockOutcome::Free(lock)),
            Err(DatapathError::Locked(_)) => {}
            Err(error) => return Err(HandoverError::Lock(error)),
        }
        if ask_at <= Instant::now() {
            match OutgoingAgent::find(state, hello).await {
                Ok(outgoing) => return Ok(LockOutcome::Taken(outgoing)),
                Err(HandoverError::Speak(_) | HandoverError::HungUp) if started.elapsed() < SILENCE => {}
                Err(error) => {
                    if let Some(on_wait) = on_wait.take() {
                        warn!(
                            error = chain(&error),
                            "no handover from the running agent: this agent serves when the running agent has ended"
                        );
                        on_wait();
                    }
                    ask_at = Instant::now() + ASK_AGAIN;
                }
            }
        }
        sleep(LOCK_POLL).await;
    }
}

impl OutgoingAgent {
    pub(super) async fn find(state: &StateDir, hello: &Hello) -> Result<Self, HandoverError> {
        let mut channel = Channel::connect(&state.socket(SOCKET)).await?;
        channel.send(&Message::Hello(hello.clone()), &[]).await?;
        match channel.receive_within(PATIENCE).await? {
            Message::Hello(theirs) if hello.fits(&theirs) => {}
            Message::Hello(_) => return Err(HandoverError::Different),
            _ => return Err(HandoverError::Malformed),
        }
        info!("another agent serves this node; standing by until it ends");
        Ok(Self(channel))
    }

    /// Reports that this agent could serve.
    ///
    /// # Errors
    /// When the other agent does not receive it.
    pub async fn prepared(&mut self) -> Result<(), HandoverError> {
        self.0.send(&Message::Prepared, &[]).await
    }

    /// Waits, without a limit, until the other agent hands over, and takes its descriptors. The other agent
    /// serves until [`Self::serving`].
    ///
    /// # Errors
    /// [`HandoverError::HungUp`] when it ended without a handover; others when it breaks the protocol.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub async fn handover_state(&mut self) -> Result<HandoverState, HandoverError> {
        match self.0.receive().await? {
            Message::HandoverState => {
                let (lock, app, admin) = (self.0.descriptor()?, self.0.descriptor()?, self.0.descriptor()?);
                Ok(HandoverState { lock, app, admin })
            }
            _ => Err(HandoverError::Malformed),
        }
    }

    /// Reports that this agent serves. From here on the other agent accepts no connections.
    ///
    /// # Errors
    /// When the other agent has ended meanwhile, which has the same effect.
    pub async fn serving(mut self) -> Result<(), HandoverError> {
        self.0.send(&Message::Serving, &[]).await
    }
}
