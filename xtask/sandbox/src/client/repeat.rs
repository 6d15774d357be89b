//! What one call costs that is too short to be timed by itself: makes it as often as it is told to, and tells the mean. One process, so
//! that rounds of several can be interleaved. Depends on socket2. Called by the binary's `client repeat`.

use std::{
    io::{BufRead, Write},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Instant,
};

use anyhow::{Context as _, Result};
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
    /// Reads numbers, a line each; makes that many calls, and answers with the mean, in nanoseconds.
    ///
    /// # Errors
    /// When a call fails, or nobody listens to the answer.
    pub fn run(&self, orders: impl BufRead, mut answers: impl Write) -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        for order in orders.lines() {
            let count = order?.trim().parse::<u32>().context("a number of calls")?.max(1);
            let begin = Instant::now();
            for _ in 0..count {
                match self {
                    Self::Option => SockRef::from(&socket).set_broadcast(true)?,
                    Self::Send(addr) => drop(socket.send_to(b"x", addr)?),
                }
            }
            writeln!(answers, "{}", begin.elapsed().as_nanos() / u128::from(count))?;
            answers.flush()?;
        }
        Ok(())
    }
}
