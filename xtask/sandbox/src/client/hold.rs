//! A client that means harm: many connections that are never done, each replaced when the server cuts it off.
//! Depends on the standard library. Called inside pods by the binary's `client hold`.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// What to do.
#[derive(Clone, Debug)]
pub struct Hold {
    /// The server.
    pub addr: SocketAddr,
    /// How many connections.
    pub connections: usize,
    /// Sent once on each.
    pub first: Vec<u8>,
    /// Sent again and again on each.
    pub then: Vec<u8>,
}

/// A process that holds connections, as long as this is kept.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Starts one from a command that is this binary's `client`, and waits until it holds them.
    ///
    /// # Errors
    /// When it cannot be started, or ends before.
    pub fn start(
        mut client: Command,
        address: &str,
        connections: usize,
        first: &str,
        then: &str,
    ) -> Result<Self> {
        let (first, then, count) = (hex::encode(first), hex::encode(then), connections.to_string());
        client.args(["hold", "--connect", address, "--connections", &count, "--first", &first]);
        let mut child =
            client.args(["--then", &then]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let report = child.stdout.take().context("no standard output")?;
        let holder = Self(child);
        let mut line = String::new();
        BufReader::new(report).read_line(&mut line)?;
        ensure!(line == "holding\n", "the client holds nothing: {line:?}");
        Ok(holder)
    }
}

impl Drop for Holder {
    /// The end of its standard input ends it.
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}

/// How often each connection sends.
const PAUSE: Duration = Duration::from_millis(100);
/// How many are replaced each time: this is about connections that are held, not about a flood of new ones.
const REPLACED: usize = 10;
/// A server that does not read must not keep the other connections from sending.
const WRITE_TIMEOUT: Duration = Duration::from_millis(1);

impl Hold {
    /// Opens all connections, reports it, and keeps them busy until `until` ends.
    ///
    /// # Errors
    /// When nobody listens to the report.
    pub fn run(&self, mut until: impl Read + Send, mut report: impl Write) -> Result<()> {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                drop(until.read_to_end(&mut Vec::new()));
                ended.store(true, Ordering::Relaxed);
            });
            let mut held: Vec<_> = (0..self.connections).map(|_| self.open()).collect();
            writeln!(report, "holding")?;
            while !ended.load(Ordering::Relaxed) {
                let mut replaced = 0;
                for connection in &mut held {
                    let open = match connection.as_ref().map(|mut stream| stream.write_all(&self.then)) {
                        Some(Ok(())) => true,
                        // A socket that is full is still held.
                        Some(Err(error)) => error.kind() == ErrorKind::WouldBlock,
                        None => false,
                    };
                    if !open && replaced < REPLACED {
                        *connection = self.open();
                        replaced += 1;
                    }
                }
                thread::sleep(PAUSE);
            }
            Ok(())
        })
    }

    fn open(&self) -> Option<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&self.addr, Duration::from_secs(1)).ok()?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).ok()?;
        stream.write_all(&self.first).ok()?;
        Some(stream)
    }
}
