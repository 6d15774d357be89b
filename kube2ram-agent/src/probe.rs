//! `kube2ram ready`: whether the agent of this very container is ready. Two agents of a node share its ports, so that no probe over HTTP could tell them
//! apart, and one that mistook the old for the new would end the old too early. Depends on `admin` and `state_dir`; called by `app` and `main`.

use std::{
    fmt, fs,
    io::{self, Read as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    time::Duration,
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
const PATIENCE: Duration = Duration::from_secs(1);
const MAX_ANSWER_BYTES: u64 = 1024;
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

    /// Answers, for ever.
    pub async fn run(self, readiness: Readiness) {
        loop {
            match self.0.accept().await {
                Ok((mut stream, _)) => {
                    let answer = readiness.pending().join(", ");
                    if !matches!(timeout(PATIENCE, stream.write_all(answer.as_bytes())).await, Ok(Ok(()))) {
                        debug!("whoever asked for readiness did not wait for the answer");
                    }
                }
                Err(error) => {
                    debug!(%error, "cannot accept a question for readiness");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

/// Asks the agent of this container.
///
/// # Errors
/// [`ProbeError`]: it is not ready, as far as anybody can tell.
pub fn ask(state_dir: &Path, cgroup_root: Option<&Path>) -> Result<Ready, ProbeError> {
    let root = find_cgroup_root(cgroup_root).map_err(ProbeError::Cgroup)?;
    let path = own_cgroup(&root).map_err(ProbeError::Cgroup)?;
    let own = cgroup_id(&path).map_err(|source| ProbeError::CgroupId { path, source })?;
    ask_agent(&StateDir::open(state_dir).map_err(ProbeError::StateDir)?, own)
}

fn ask_agent(state: &StateDir, own: CgroupId) -> Result<Ready, ProbeError> {
    let asked = || {
        let stream = dial(state, &format!("{PREFIX}{own}"))?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
        Ok(answer)
    };
    match asked().map_err(ProbeError::Silent)? {
        pending if pending.is_empty() => Ok(Ready),
        pending => Err(ProbeError::Pending(pending)),
    }
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

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ready")
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::spawn_blocking;

    use super::*;

    const OWN: CgroupId = CgroupId(7);
    const OTHER: CgroupId = CgroupId(8);

    fn state(directory: &tempfile::TempDir) -> StateDir {
        StateDir::open(&directory.path().join("state")).unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn each_container_hears_of_its_own_agent() {
        let directory = tempfile::tempdir().unwrap();
        let (readiness, unready) = (Readiness::default(), Readiness::default());
        let (pods, _links) = (readiness.wait_for("pods"), unready.wait_for("links"));
        for (own, readiness) in [(OWN, &readiness), (OTHER, &unready)] {
            drop(tokio::spawn(Probe::open(&state(&directory), own).unwrap().run(readiness.clone())));
        }
        let state = state(&directory);
        let path = state.path().to_owned();
        let ask = |own| {
            let path = path.clone();
            spawn_blocking(move || ask_agent(&StateDir::open(&path).unwrap(), own))
        };

        assert_eq!(ask(OWN).await.unwrap().unwrap_err().to_string(), "pending: pods");
        pods.ready();
        assert!(ask(OWN).await.unwrap().is_ok());
        assert_eq!(ask(OTHER).await.unwrap().unwrap_err().to_string(), "pending: links");
        assert!(matches!(ask(CgroupId(9)).await.unwrap(), Err(ProbeError::Silent(_))));
    }

    #[tokio::test]
    async fn what_dead_agents_left_is_silent_and_goes_with_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let state = state(&directory);
        let dead = Probe::open(&state, OWN).unwrap();
        assert!(any_agent(&state).unwrap(), "the twin");

        drop(dead);

        assert!(!any_agent(&state).unwrap());
        assert!(matches!(ask_agent(&state, OWN), Err(ProbeError::Silent(_))));
        let _next = Probe::open(&state, OTHER).unwrap();
        assert_eq!(sockets(&state).unwrap(), ["ready-8"]);
        let _again = Probe::open(&state, OWN).unwrap();
    }
}
