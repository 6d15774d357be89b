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
    pub(super) credentials: Option<Credentials>,
    /// How long its signed call took, with all that was necessary for it.
    pub(super) millis: Option<u64>,
    pub(super) region: Option<String>,
    pub(super) version: String,
}

/// The running client.
#[derive(Debug)]
pub(super) struct Client {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// The role that it should get.
    role: String,
    /// What it and the other clients complain of.
    stderr: PathBuf,
}

/// With which of the SDK's own clients, in the one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum With {
    /// The one that was used the last time.
    Kept,
    /// As `Kept`, with its clock moved so far that it wants other credentials.
    Later,
    /// A new one, which holds nothing yet.
    New,
    /// None: it asks for the region.
    Region,
}

/// How long one answer may take, the start of a JVM on a busy machine included.
const DEADLINE: Duration = Duration::from_secs(60);

impl Client {
    /// Starts it with an empty home and no environment but PATH and the given one. `directory` goes away with
    /// the node.
    pub(super) fn start(
        mut command: Command,
        role: &str,
        environment: &[(&str, &str)],
        directory: PathBuf,
    ) -> Result<Self> {
        let (home, stderr) = (directory.join("home"), directory.join("client.log"));
        fs::create_dir_all(&home)?;
        // Other clients may still write to it.
        let log = File::options().create(true).append(true).open(&stderr)?;
        command.env_clear().env("HOME", home).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
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

        Ok(Self { child, input, lines, role: role.to_owned(), stderr })
    }

    /// The role that it should get.
    pub(super) fn role(&self) -> &str {
        &self.role
    }

    /// Asks for credentials, or for the region.
    pub(super) fn ask(&mut self, with: With) -> Result<Answer> {
        let sent = self.input.write_all(match with {
            With::Kept => "kept\n".as_bytes(),
            With::Later => b"later\n",
            With::New => b"new\n",
            With::Region => b"region\n",
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
