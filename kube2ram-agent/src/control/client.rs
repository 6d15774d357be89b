//! The side that asks: blocking, bounded. Called by `main`.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{net::sockopt::socket_peercred, process::geteuid};
use serde::de::DeserializeOwned;

use super::{MAX_ANSWER_BYTES, PATIENCE, Reply, Request, SOCKET};
use crate::status::SCHEMA;
use kube2ram_service::state_dir::{StateDir, StateDirError};

/// How long to wait before asking again.
const PAUSE: Duration = Duration::from_millis(50);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Its text cannot be parsed.
    #[error("cannot parse the agent's answer")]
    Answer(#[source] serde_json::Error),
    /// It has another schema than this binary shows; the JSON is available.
    #[error(
        "the agent answers in schema {0}, and this kube2ram reads schema {SCHEMA}: run the kube2ram of the agent's container, or print the raw answer with -o json"
    )]
    Foreign(u64),
    /// No agent listens.
    #[error("no agent runs on this node, or not with --state-dir={}", .0.display())]
    NoAgent(PathBuf),
    /// This process is not root's.
    #[error(
        "the agent answers only root: run this command as root, in the agent's container (kubectl exec) or on the node"
    )]
    NotRoot,
    /// The agent does not do it.
    #[error("{0}")]
    Refused(String),
    /// It does not answer in time, or hangs up.
    #[error("the agent does not answer")]
    Silent(#[source] io::Error),
    /// The state directory.
    #[error("cannot use the state directory")]
    StateDir(#[source] StateDirError),
}

impl ControlError {
    /// What the process exits with, after sysexits.h.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoAgent(_) => 69,                   // EX_UNAVAILABLE
            Self::Silent(_) => 75,                    // EX_TEMPFAIL
            Self::Answer(_) | Self::Foreign(_) => 76, // EX_PROTOCOL
            Self::NotRoot => 77,                      // EX_NOPERM
            Self::StateDir(_) => 78,                  // EX_CONFIG
            Self::Refused(_) => 64,                   // EX_USAGE
        }
    }
}

/// Asks the agent that serves this node, and gives its document as it is.
///
/// # Errors
/// [`ControlError`], within five seconds.
pub fn ask(state_dir: &Path, request: &Request) -> Result<serde_json::Value, ControlError> {
    if !geteuid().is_root() {
        return Err(ControlError::NotRoot);
    }
    ask_any(state_dir, request)
}

/// The same, whoever asks.
pub(super) fn ask_any(state_dir: &Path, request: &Request) -> Result<serde_json::Value, ControlError> {
    let state = match StateDir::existing(state_dir) {
        Ok(Some(state)) => state,
        Ok(None) => return Err(ControlError::NoAgent(state_dir.to_owned())),
        Err(error) => return Err(ControlError::StateDir(error)),
    };
    let (socket, end) = (state.socket(SOCKET), Instant::now() + PATIENCE);
    let reply = loop {
        match ask_once(&socket, request, end) {
            // An agent that ends closes its connections, also those that were opened a moment before: the
            // name then leads to the next agent.
            Err(error) if is_hang_up(&error) && Instant::now() + PAUSE < end => thread::sleep(PAUSE),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                return Err(ControlError::NoAgent(state_dir.to_owned()));
            }
            Err(error) => return Err(ControlError::Silent(error)),
            Ok(answer) => break serde_json::from_slice(&answer).map_err(ControlError::Answer)?,
        }
    };
    match reply {
        Reply::Document(document) => Ok(document),
        Reply::Refused(reason) => Err(ControlError::Refused(reason)),
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Reads a document, if it is of this binary's schema.
///
/// # Errors
/// [`ControlError::Foreign`] and [`ControlError::Answer`].
fn read<T: DeserializeOwned>(document: serde_json::Value) -> Result<T, ControlError> {
    match document["schema"].as_u64() {
        Some(schema) if schema != u64::from(SCHEMA) => Err(ControlError::Foreign(schema)),
        _ => serde_json::from_value(document).map_err(ControlError::Answer),
    }
}

/// What a command prints, and what its process exits with.
#[derive(Debug)]
pub struct Shown {
    /// For standard output.
    pub text: String,
    /// Why the document cannot be parsed; for standard error.
    pub error: Option<ControlError>,
    /// The exit status.
    pub code: u8,
}

/// Shows a document: as text, or, with `is_json`, unchanged. JSON is printed even if this binary cannot parse
/// it, because the reader may be able to. The exit status never means success then.
///
/// # Errors
/// [`ControlError::Foreign`] and [`ControlError::Answer`], if there is no JSON to print.
pub fn show<T: DeserializeOwned>(
    document: serde_json::Value,
    is_json: bool,
    to_text: impl FnOnce(&T) -> (String, u8),
) -> Result<Shown, ControlError> {
    let json = is_json.then(|| format!("{document:#}\n"));
    match (read(document), json) {
        (Ok(document), json) => {
            let (text, code) = to_text(&document);
            Ok(Shown { text: json.unwrap_or(text), error: None, code })
        }
        (Err(error), Some(text)) => Ok(Shown { text, code: error.exit_code(), error: Some(error) }),
        (Err(error), None) => Err(error),
    }
}

/// One question, and all of its answer.
fn ask_once(socket: &Path, request: &Request, end: Instant) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    // A process that can write to the directory could have put its own socket there.
    let peer = socket_peercred(&stream)?.uid;
    if peer != geteuid() && !peer.is_root() {
        return Err(io::Error::other("another user's process listens there"));
    }
    stream.set_write_timeout(Some(left_until(end)?))?;
    let mut question = serde_json::to_vec(request)?;
    question.push(b'\n');
    stream.write_all(&question)?;
    let (mut answer, mut chunk) = (Vec::new(), [0; 16 * 1024]);
    loop {
        stream.set_read_timeout(Some(left_until(end)?))?;
        match stream.read(&mut chunk)? {
            0 if answer.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => return Ok(answer),
            read if answer.len() + read > MAX_ANSWER_BYTES => {
                return Err(io::Error::other("the answer is too long"));
            }
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
}

/// Never zero, which would be no timeout.
fn left_until(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}
