//! What one connect(2) costs: dials an address as often as it is told to, and returns the median. One
//! process, so that rounds of several can be interleaved. Depends on socket2. Called inside pods by the
//! binary's `client dial`.

use std::{
    io::{BufRead, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, SockAddr, Socket, Type};

/// What to dial, and how.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    /// Where to.
    pub addr: SocketAddr,
    /// A datagram socket's connect(2) sends nothing: what is left is the system call, and what hooks add to
    /// it.
    pub udp: bool,
}

impl Dial {
    /// Reads numbers, a line each; dials that often, and answers with the median, in nanoseconds.
    ///
    /// # Errors
    /// When a connect fails, or nobody listens to the answer.
    pub fn run(&self, orders: impl BufRead, mut answers: impl Write) -> Result<()> {
        for order in orders.lines() {
            let count = order?.trim().parse::<usize>().context("a number of connects")?;
            let mut took = Vec::with_capacity(count);
            for _ in 0..count.max(1) {
                took.push(self.once()?);
            }
            took.sort_unstable();
            writeln!(answers, "{}", took[took.len() / 2].as_nanos())?;
            answers.flush()?;
        }
        Ok(())
    }

    fn once(&self) -> Result<Duration> {
        let kind = if self.udp { Type::DGRAM } else { Type::STREAM };
        let socket = Socket::new(Domain::for_address(self.addr), kind, None)?;
        let addr = SockAddr::from(self.addr);
        let begin = Instant::now();
        socket.connect(&addr).with_context(|| format!("cannot connect to {}", self.addr))?;
        let took = begin.elapsed();
        if !self.udp {
            // A reset leaves no TIME_WAIT behind, of which there would soon be too many.
            socket.set_linger(Some(Duration::ZERO))?;
        }
        Ok(took)
    }
}
