//! The client as a process in a pod, asked line by line so that it lives through what happens to the agent.
//! Depends on the standard library. Called by `sdk`.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::client::Credentials;

/// What the client printed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Answer {
    /// Its identity, according to STS.
    pub(super) arn: Option<String>,
    #[serde(flatten)]
    pub(super) credentials: Credentials,
    pub(super) version: String,
}

impl Answer {
    /// Whose the credentials are: `STS.<role>.<unique>`.
    pub(super) fn role(&self) -> &str {
        self.credentials.access_key_id.split('.').nth(1).unwrap_or_default()
    }
}

/// The running client.
#[derive(Debug)]
pub(super) struct Client {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// What it complains of.
    stderr: PathBuf,
}

/// With which of the SDK's own clients, in the one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum With {
    /// The one that was used the last time.
    Kept,
    /// As `Kept`, with its process's clock an hour on.
    Later,
    /// A new one, which holds nothing yet.
    New,
}

/// How long one answer may take, the start of a JVM on a busy machine included.
const DEADLINE: Duration = Duration::from_secs(60);

impl Client {
    /// Starts it with an empty home and no environment but PATH. `directory` goes away with the node.
    pub(super) fn start(mut command: Command, directory: PathBuf) -> Result<Self> {
        let (home, stderr) = (directory.join("home"), directory.join("client.log"));
        fs::create_dir_all(&home)?;
        command.env_clear().env("HOME", home).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&stderr)?);
        let mut child = command.spawn().context("cannot start the client")?;
        let input = child.stdin.take().context("it has no input")?;
        let output = BufReader::new(child.stdout.take().context("it has no output")?);
        let (sender, lines) = channel();
        // It ends with the client's output, or with who reads its lines.
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });

        Ok(Self { child, input, lines, stderr })
    }

    /// Asks for credentials.
    pub(super) fn ask(&mut self, with: With) -> Result<Answer> {
        let sent = self.input.write_all(match with {
            With::Kept => "kept\n".as_bytes(),
            With::Later => b"later\n",
            With::New => b"new\n",
        });
        let line = sent.ok().and_then(|()| self.lines.recv_timeout(DEADLINE).ok()).with_context(|| {
            let complaint = fs::read_to_string(&self.stderr).unwrap_or_default();
            format!("no answer from the client:\n{complaint}")
        })?;
        serde_json::from_str(&line).with_context(|| format!("the client printed {line}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Its own child, so the id cannot have been reused.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
