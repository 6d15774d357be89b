//! The commands `ready` and `live`: the state of the agent, or the authenticator, of this container. Two of
//! them share a node's ports during an upgrade, so a probe over HTTP could not distinguish them, and other
//! processes of the node could block those ports for the kubelet. Depends on `admin`; called by the programs'
//! `main`, and by what composes them.
//!
//! The agent answers on a socket in the pod's own directory, an `emptyDir`. A manifest from before that
//! directory has none: the socket is then in the state directory, which all agents of the node share, and is
//! named after the mount namespace, which the kubelet's exec shares with the agent.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixStream as StdUnixStream,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, open},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixListener,
    time::{sleep, timeout},
};
use tracing::debug;

use crate::admin::Readiness;

/// Answers with what the agent waits for.
#[derive(Debug)]
pub struct Probe(UnixListener);

/// The agent answers, whatever it waits for.
#[derive(Clone, Copy, Debug)]
pub struct Live;

/// The agent is ready.
#[derive(Clone, Copy, Debug)]
pub struct Ready;

/// Why the state is unknown, or the agent is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The agent waits for something.
    #[error("pending: {0}")]
    Pending(String),
    /// No agent runs in this container, or it does not answer.
    #[error("the agent of this container does not answer")]
    Silent(#[source] io::Error),
    /// The socket could not be created.
    #[error("cannot create the socket {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The possible paths of this container's socket: in the pod's own directory or, if that is missing, in the
/// shared one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPaths([SocketPath; 2]);

#[derive(Clone, Debug, PartialEq, Eq)]
struct SocketPath {
    directory: PathBuf,
    name: String,
}

/// The socket's name in the pod's own directory.
const NAME: &str = "probe";
/// What the names of sockets in the state directory begin with.
pub const SHARED_PREFIX: &str = "ready-";
/// How long an answer may take, on either side. The manifest's probe allows 3 s.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an answer may take for the liveness probe, whose failure restarts the agent: a busy node is no
/// reason. The manifest's probe allows 10 s.
const PATIENCE_FOR_LIFE: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: usize = 1024;
/// How long to wait when accept(2) fails.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

impl SocketPaths {
    /// In `pod_dir`, else in `state_dir`.
    pub fn new(pod_dir: &Path, state_dir: &Path) -> Self {
        // An error gives 0: the agent of this container then gets the same value.
        let namespace = fs::metadata("/proc/self/ns/mnt").map_or(0, |metadata| metadata.ino());
        let shared = format!("{SHARED_PREFIX}{namespace}");
        Self([
            SocketPath { directory: pod_dir.to_owned(), name: NAME.to_owned() },
            SocketPath { directory: state_dir.to_owned(), name: shared },
        ])
    }

    /// The first outcome of one that is there.
    fn first<T>(&self, act: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
        let [own, shared] = &self.0;
        match own.with_path(&act) {
            // A mount point that nothing is mounted on is a part of the read-only root.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem) =>
            {
                shared.with_path(&act)
            }
            outcome => outcome,
        }
    }
}

impl SocketPath {
    /// Calls with a path that is short enough for a socket's address, however deep the directory is.
    fn with_path<T>(&self, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory: OwnedFd = open(&self.directory, flags, Mode::empty())?;
        act(format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), self.name).as_ref())
    }
}

impl Probe {
    /// Listens for probes of this agent, and replaces the socket of an earlier agent of this container.
    ///
    /// # Errors
    /// [`ProbeError::Listen`].
    pub fn open(paths: &SocketPaths) -> Result<Self, ProbeError> {
        let listener = paths.first(|path| {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });
        let path = || paths.0[0].directory.join(NAME);
        listener.map(Self).map_err(|source| ProbeError::Listen { path: path(), source })
    }

    /// Answers, for ever: one line of what is pending, empty when nothing is.
    pub async fn run(self, readiness: Readiness) {
        loop {
            match self.0.accept().await {
                Ok((mut stream, _)) => {
                    let answer = readiness.pending().join(", ") + "\n";
                    if !matches!(timeout(PATIENCE, stream.write_all(answer.as_bytes())).await, Ok(Ok(()))) {
                        debug!("the probe's client did not wait for the answer");
                    }
                }
                Err(error) => {
                    debug!(%error, "cannot accept a probe");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

/// Asks the agent of this container whether it is ready.
///
/// # Errors
/// [`ProbeError`], within a second: it is not ready, or its state is unknown.
pub fn ready(paths: &SocketPaths) -> Result<Ready, ProbeError> {
    match ask(paths, PATIENCE)? {
        pending if pending.is_empty() => Ok(Ready),
        pending => Err(ProbeError::Pending(pending)),
    }
}

/// Asks the agent of this container for any answer.
///
/// # Errors
/// [`ProbeError`] except [`Pending`](ProbeError::Pending), within five seconds: it does not answer.
pub fn live(paths: &SocketPaths) -> Result<Live, ProbeError> {
    ask(paths, PATIENCE_FOR_LIFE).map(|_pending| Live)
}

/// What the agent of this container waits for.
fn ask(paths: &SocketPaths, patience: Duration) -> Result<String, ProbeError> {
    paths.first(dial).and_then(|stream| hear(stream, patience)).map_err(ProbeError::Silent)
}

/// A whole line: what ends before it does was no answer, but the agent's own end.
fn hear(mut stream: StdUnixStream, patience: Duration) -> io::Result<String> {
    let end = Instant::now() + patience;
    stream.set_nonblocking(false)?;
    let (mut answer, mut chunk) = (Vec::new(), [0; MAX_ANSWER_BYTES]);
    while answer.len() < MAX_ANSWER_BYTES {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => answer.extend_from_slice(&chunk[..read]),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => return Err(error),
        }
        if let Some(line) = answer.strip_suffix(b"\n") {
            return String::from_utf8(line.to_owned())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    Err(io::Error::other("the answer is too long"))
}

/// Never blocks: if an agent hangs and the backlog of its socket is full, a blocking connect would hang, too.
fn dial(path: &Path) -> io::Result<StdUnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

impl fmt::Display for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("live")
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ready")
    }
}

#[cfg(test)]
mod tests;
