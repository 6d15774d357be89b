//! What one call costs that is too short to be timed by itself: makes it as often as it is told to, and
//! returns the mean. One process, so that rounds of several can be interleaved. Depends on socket2. Called by
//! the binary's `client repeat`.

use std::{
    io::{BufRead, Write},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::time::{ClockId, clock_gettime};
use socket2::SockRef;

/// The call.
#[derive(Clone, Copy, Debug)]
pub enum Repeat {
    /// setsockopt(2) of a datagram socket.
    Option,
    /// sendto(2) of a small datagram to an address.
    Send(SocketAddr),
}

impl Repeat {
    /// Reads numbers, a line each; makes that many calls, and answers with the mean of the processor's time,
    /// in nanoseconds: what else the machine does is not in it.
    ///
    /// # Errors
    /// When a call fails, or nobody listens to the answer.
    pub fn run(&self, orders: impl BufRead, mut answers: impl Write) -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for order in orders.lines() {
            let count = order?.trim().parse::<u32>().context("a number of calls")?.max(1);
            let begin = processor_time()?;
            for _ in 0..count {
                match self {
                    Self::Option => SockRef::from(&socket).set_broadcast(true)?,
                    Self::Send(addr) => drop(socket.send_to(b"x", addr)?),
                }
            }
            let took = processor_time()?.saturating_sub(begin);
            writeln!(answers, "{}", took.as_nanos() / u128::from(count))?;
            answers.flush()?;
        }
        Ok(())
    }
}

/// What this thread has had of a processor.
fn processor_time() -> Result<Duration> {
    Ok(Duration::try_from(clock_gettime(ClockId::ThreadCPUTime))?)
}
