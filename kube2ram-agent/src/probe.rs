//! `kube2ram ready` and `live`: how the agent of this very container is. Two agents of a node share its ports, so that no probe over HTTP could tell
//! them apart, and others on the node could keep the kubelet from those ports. Depends on `admin` and `state_dir`; called by `app` and `main`.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixListener,
    time::{sleep, timeout},
};
use tracing::debug;

use crate::{
    admin::Readiness,
    identity::{CgroupId, MountError, cgroup_id, find_cgroup_root, own_cgroup},
    state_dir::{StateDir, StateDirError},
};

/// Answers with what the agent waits for.
#[derive(Debug)]
pub struct Probe(UnixListener);

/// The agent answers, whatever it waits for.
#[derive(Clone, Copy, Debug)]
pub struct Live;

/// The agent is ready.
#[derive(Clone, Copy, Debug)]
pub struct Ready;

/// Why nobody can tell, or the agent is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The container's cgroup, by which its agent is known.
    #[error("cannot tell this container's cgroup")]
    Cgroup(#[source] MountError),
    /// The same.
    #[error("cannot tell the id of {}", path.display())]
    CgroupId {
        /// The cgroup.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The agent waits for something.
    #[error("pending: {0}")]
    Pending(String),
    /// There is no agent in this container's cgroup, or it does not answer.
    #[error("no agent of this container answers")]
    Silent(#[source] io::Error),
    /// The socket could not be made.
    #[error("cannot make the socket {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state directory.
    #[error("cannot use the state directory")]
    StateDir(#[source] StateDirError),
}

/// What sockets' names begin with; the id of the agent's own cgroup follows. A container has one of its own, and `exec` joins it.
const PREFIX: &str = "ready-";
/// How long an answer may take, on either side. The manifest's probe allows 3 s.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an answer may take where silence ends the agent: a node that is short of processors is no reason. The manifest's probe allows 10 s.
const PATIENCE_FOR_LIFE: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: usize = 1024;
/// How long to wait when accept(2) fails.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

impl Probe {
    /// Listens for questions about the agent in this cgroup, and removes what agents that are gone left.
    ///
    /// # Errors
    /// [`ProbeError::Listen`].
    pub fn open(state: &StateDir, own: CgroupId) -> Result<Self, ProbeError> {
        let name = format!("{PREFIX}{own}");
        let listen = || {
            for other in sockets(state)? {
                if is_answered(state, &other) {
                    continue;
                }
                match fs::remove_file(state.socket(&other)) {
                    // Another agent that starts was faster.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            let path = state.socket(&name);
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            Ok(Self(listener))
        };
        listen().map_err(|source| ProbeError::Listen { path: state.path().join(&name), source })
    }

    /// Answers, for ever: one line of what is pending, empty when nothing is.
    pub async fn run(self, readiness: Readiness) {
        loop {
            match self.0.accept().await {
                Ok((mut stream, _)) => {
                    let answer = readiness.pending().join(", ") + "\n";
                    if !matches!(timeout(PATIENCE, stream.write_all(answer.as_bytes())).await, Ok(Ok(()))) {
                        debug!("whoever asked how the agent is did not wait for the answer");
                    }
                }
                Err(error) => {
                    debug!(%error, "cannot accept a question for how the agent is");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

/// Asks the agent of this container whether it is ready.
///
/// # Errors
/// [`ProbeError`], within a second: it is not ready, as far as anybody can tell.
pub fn ready(state_dir: &Path, cgroup_root: Option<&Path>) -> Result<Ready, ProbeError> {
    match ask(state_dir, cgroup_root, PATIENCE)? {
        pending if pending.is_empty() => Ok(Ready),
        pending => Err(ProbeError::Pending(pending)),
    }
}

/// Asks the agent of this container for any answer.
///
/// # Errors
/// [`ProbeError`], but for [`Pending`](ProbeError::Pending), within five seconds: there is none.
pub fn live(state_dir: &Path, cgroup_root: Option<&Path>) -> Result<Live, ProbeError> {
    ask(state_dir, cgroup_root, PATIENCE_FOR_LIFE).map(|_pending| Live)
}

/// What the agent of this container waits for.
fn ask(state_dir: &Path, cgroup_root: Option<&Path>, patience: Duration) -> Result<String, ProbeError> {
    let root = find_cgroup_root(cgroup_root).map_err(ProbeError::Cgroup)?;
    let path = own_cgroup(&root).map_err(ProbeError::Cgroup)?;
    let own = cgroup_id(&path).map_err(|source| ProbeError::CgroupId { path, source })?;
    match StateDir::existing(state_dir).map_err(ProbeError::StateDir)? {
        Some(state) => ask_agent(&state, own, patience),
        None => Err(ProbeError::Silent(io::ErrorKind::NotFound.into())),
    }
}

fn ask_agent(state: &StateDir, own: CgroupId, patience: Duration) -> Result<String, ProbeError> {
    let stream = dial(state, &format!("{PREFIX}{own}"));
    stream.and_then(|stream| hear(stream, patience)).map_err(ProbeError::Silent)
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

/// Whether any agent runs that shares the directory, serving or standing by.
///
/// # Errors
/// When the directory cannot be read.
pub fn any_agent(state: &StateDir) -> io::Result<bool> {
    Ok(sockets(state)?.iter().any(|name| is_answered(state, name)))
}

/// Names of the sockets that agents left or use.
///
/// # Errors
/// When the directory cannot be read.
pub fn sockets(state: &StateDir) -> io::Result<Vec<String>> {
    let names = fs::read_dir(state.path())?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(PREFIX)).collect())
}

/// A socket that nobody listens on any more refuses. One whose queue is full has somebody.
fn is_answered(state: &StateDir, name: &str) -> bool {
    let refused = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
    dial(state, name).map_or_else(|error| !refused.contains(&error.kind()), |_| true)
}

/// Never waits: an agent that hangs would let whoever dials it hang too, once the queue of its socket is full.
fn dial(state: &StateDir, name: &str) -> io::Result<StdUnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(state.socket(name))?)?;
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
