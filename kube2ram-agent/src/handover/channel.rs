//! Messages with descriptors over a Unix socket. Called by both sides of `handover`.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::geteuid,
};
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, net::UnixStream, time::timeout};

use super::{HandoverError, Hello};

/// The messages, in this order; [`Self::Prepared`] may be missing.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// Either side, first of all.
    Hello(Hello),
    /// Standing by: could serve at once.
    Prepared,
    /// Running: lock, app and admin listener are attached.
    #[serde(rename = "Estate")] // as older agents call it on the wire
    HandoverState,
    /// Formerly standing by: serves.
    Serving,
}

/// A connection to another agent.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// Of the next message, as far as it has come. Kept here, so that receiving can be cancelled.
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

/// How long the other agent may take to answer, or to read, when it is idle.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Descriptors with one message.
const DESCRIPTORS: usize = 3;
/// Descriptors that came before the message they belong to did.
const MAX_EARLY_DESCRIPTORS: usize = DESCRIPTORS;
const MAX_MESSAGE_BYTES: usize = 4096;
const LENGTH_BYTES: usize = size_of::<u32>();

impl Channel {
    /// Dials the running agent.
    pub(super) async fn connect(path: &Path) -> Result<Self, HandoverError> {
        let dialled = timeout(PATIENCE, UnixStream::connect(path)).await;
        Self::new(dialled.map_err(|_elapsed| HandoverError::Timeout)?.map_err(HandoverError::Speak)?)
    }

    /// The directory already excludes other users; this check is for a directory whose mode was changed by
    /// mistake.
    pub(super) fn new(stream: UnixStream) -> Result<Self, HandoverError> {
        let peer = stream.peer_cred().map_err(HandoverError::Speak)?;
        if peer.uid() != geteuid().as_raw() {
            return Err(HandoverError::Stranger);
        }
        Ok(Self { stream, bytes: Vec::new(), descriptors: VecDeque::new() })
    }

    /// Sends a message within [`PATIENCE`].
    pub(super) async fn send(
        &mut self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), HandoverError> {
        let text = serde_json::to_vec(message).map_err(|error| HandoverError::Speak(error.into()))?;
        let length =
            u32::try_from(text.len()).map_err(|error| HandoverError::Speak(io::Error::other(error)))?;
        let bytes = [&length.to_le_bytes()[..], &text].concat();
        let mut sent = 0;
        let sending = async {
            while sent < bytes.len() {
                // With the first byte of the message, and never again.
                let attached = if sent == 0 { descriptors } else { &[] };
                sent += self
                    .stream
                    .async_io(Interest::WRITABLE, || send_some(&self.stream, &bytes[sent..], attached))
                    .await?;
            }
            Ok(())
        };
        match timeout(PATIENCE, sending).await {
            Ok(outcome) => outcome.map_err(HandoverError::Speak),
            Err(_) => Err(HandoverError::Timeout),
        }
    }

    /// Waits for the next message.
    ///
    /// # Cancel safety
    /// What has come is kept.
    pub(super) async fn receive(&mut self) -> Result<Message, HandoverError> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(message);
            }
            let Self { stream, bytes, descriptors } = self;
            let received =
                stream.async_io(Interest::READABLE, || receive_some(stream, bytes, descriptors)).await;
            match received {
                Ok(0) => return Err(HandoverError::HungUp),
                Ok(_) if descriptors.len() > MAX_EARLY_DESCRIPTORS => return Err(HandoverError::Malformed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(HandoverError::HungUp);
                }
                Err(error) => return Err(HandoverError::Speak(error)),
            }
        }
    }

    /// The same, but not for ever.
    pub(super) async fn receive_within(&mut self, patience: Duration) -> Result<Message, HandoverError> {
        match timeout(patience, self.receive()).await {
            Ok(received) => received,
            Err(_) => Err(HandoverError::Timeout),
        }
    }

    /// A descriptor that came with the last message.
    pub(super) fn descriptor(&mut self) -> Result<OwnedFd, HandoverError> {
        self.descriptors.pop_front().ok_or(HandoverError::Malformed)
    }

    fn take_message(&mut self) -> Result<Option<Message>, HandoverError> {
        let Some((length, rest)) = self.bytes.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_MESSAGE_BYTES {
            return Err(HandoverError::Malformed);
        }
        let Some(text) = rest.get(..length) else { return Ok(None) };
        let message = serde_json::from_slice(text).map_err(|error| {
            tracing::debug!(%error, "not a handover message of this version");
            HandoverError::Malformed
        })?;
        self.bytes.drain(..LENGTH_BYTES + length);
        Ok(Some(message))
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags)?)
}

fn receive_some(
    stream: &UnixStream,
    bytes: &mut Vec<u8>,
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut chunk = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut chunk)], &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("descriptors were lost: too many open files?"));
    }
    bytes.extend_from_slice(&chunk[..received.bytes]);
    Ok(received.bytes)
}
