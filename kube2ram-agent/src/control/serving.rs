//! The side that answers. Called by `app`.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use rustix::{net::sockopt::set_socket_send_buffer_size, process::geteuid};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{DRAFT, MAX_CONNECTIONS, MAX_REQUEST_BYTES, PATIENCE, Reply, Request, SOCKET};
use kube2ram_service::{listener::BUFFER_BYTES, state_dir::StateDir};

/// The socket.
#[derive(Debug)]
pub struct Control(UnixListener);

/// How long to wait when accept(2) fails, which is when descriptors or memory run out.
const ACCEPT_BACKOFF: std::time::Duration = std::time::Duration::from_millis(50);

impl Control {
    /// Listens, and replaces an earlier agent's socket: from here on the name leads to this agent. The caller
    /// serves the node.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(state: &StateDir) -> io::Result<Self> {
        // Created under another name until only root can dial it, and so that there is no moment without a
        // socket.
        let draft = state.socket(DRAFT);
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&draft)?;
        fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
        fs::rename(&draft, state.socket(SOCKET))?;
        Ok(Self(listener))
    }

    /// Answers, for ever: `answer` returns a document, or why there is none.
    ///
    /// # Cancel safety
    /// Whoever asks then is hung up on.
    pub async fn run<F>(self, answer: impl Fn(Request) -> F)
    where
        F: Future<Output = Result<serde_json::Value, String>>,
    {
        let mut connections = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(()) = connections.next() => {}
                accepted = self.0.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => connections.push(serve(stream, &answer)),
                    Err(error) => {
                        warn!(%error, "cannot accept on the control socket");
                        sleep(ACCEPT_BACKOFF).await;
                    }
                },
            }
        }
    }
}

async fn serve<F>(stream: UnixStream, answer: &impl Fn(Request) -> F)
where
    F: Future<Output = Result<serde_json::Value, String>>,
{
    match timeout(PATIENCE, exchange(stream, answer)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "request on the control socket not answered"),
        Err(_) => debug!("request on the control socket timed out"),
    }
}

async fn exchange<F>(mut stream: UnixStream, answer: &impl Fn(Request) -> F) -> io::Result<()>
where
    F: Future<Output = Result<serde_json::Value, String>>,
{
    // The socket's mode already excludes other users; this check is for a mode that was changed by mistake.
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != geteuid().as_raw() {
        warn!(uid = peer, "connection to the control socket refused: the client is not root");
        return Ok(());
    }
    // Not inherited from the listener. What does not fit waits in the process.
    set_socket_send_buffer_size(&stream, BUFFER_BYTES)?;
    let mut line = Vec::new();
    let (reading, mut writing) = stream.split();
    let limit = u64::try_from(MAX_REQUEST_BYTES).unwrap_or(u64::MAX);
    BufReader::new(reading.take(limit)).read_until(b'\n', &mut line).await?;
    let reply = match serde_json::from_slice::<Request>(&line) {
        Ok(request) => answer(request).await.map_or_else(Reply::Refused, Reply::Document),
        Err(_) => Reply::Refused(
            "this agent does not know that question: ask with its own version of kube2ram".to_owned(),
        ),
    };
    writing.write_all(&serde_json::to_vec(&reply)?).await?;
    writing.shutdown().await
}
