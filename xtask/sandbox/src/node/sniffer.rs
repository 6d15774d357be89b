//! Every IPv4 packet that arrives for the metadata address, seen by an AF_PACKET socket in the namespace that owns it: the proof
//! that does not depend on any server's word. Depends on socket2. Started by `node`, read by `show` and tests.

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns;
use crate::locked;

/// A packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it says it is from; port 0 when it has none.
    pub source: SocketAddrV4,
    /// The destination port; 0 when it has none.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// The TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
}

/// The packets so far.
#[derive(Debug)]
pub struct Sniffer {
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    address: Ipv4Addr,
    packets: Vec<Packet>,
    socket: Socket,
}

impl Sniffer {
    /// Every packet so far.
    pub fn packets(&self) -> Vec<Packet> {
        let mut seen = locked(&self.seen);
        seen.drain();
        seen.packets.clone()
    }

    /// Those that say they are from this address.
    pub fn packets_from(&self, source: Ipv4Addr) -> Vec<Packet> {
        let mut packets = self.packets();
        packets.retain(|packet| *packet.source.ip() == source);
        packets
    }
}

/// A running sniffer; stops when dropped.
#[derive(Debug)]
pub(super) struct Sniffed {
    sniffer: Arc<Sniffer>,
    stop: Arc<AtomicBool>,
}

/// More are counted for nothing: one is too many.
const PACKETS_MAX: usize = 1_000_000;
/// Short enough that the socket's buffer does not fill up between two reads.
const DRAIN_INTERVAL: Duration = Duration::from_millis(5);

impl Sniffed {
    pub(super) fn start(netns: &str, address: Ipv4Addr) -> Result<Self> {
        let socket = netns::within(netns, open).context("cannot open a packet socket")?;
        let sniffer = Arc::new(Sniffer { seen: Mutex::new(Seen { address, packets: Vec::new(), socket }) });
        let stop = Arc::new(AtomicBool::new(false));
        let (drained, stopped) = (Arc::clone(&sniffer), Arc::clone(&stop));
        thread::Builder::new().name("sniffer".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                locked(&drained.seen).drain();
                thread::sleep(DRAIN_INTERVAL);
            }
        })?;

        Ok(Self { sniffer, stop })
    }
}

impl std::ops::Deref for Sniffed {
    type Target = Sniffer;

    fn deref(&self) -> &Sniffer {
        &self.sniffer
    }
}

impl Drop for Sniffed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A packet socket for IPv4 without link headers. It is not shown what this namespace sends.
fn open() -> io::Result<Socket> {
    // packet(7): the protocol is in network byte order, and a socket made with one receives from every interface.
    let protocol = Protocol::from(i32::from(ETH_P_IP.to_be()));
    let socket = Socket::new(Domain::from(libc::AF_PACKET), Type::DGRAM, Some(protocol))?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(16 * 1024 * 1024)?;
    Ok(socket)
}

/// `ETH_P_IP` of linux/if_ether.h.
const ETH_P_IP: u16 = 0x0800;

impl Seen {
    fn drain(&mut self) {
        let mut buffer = [0; 128];
        while let Ok(length) = self.socket.read(&mut buffer) {
            let packet = parse(&buffer[..length], self.address);
            self.packets.extend(packet.filter(|_| self.packets.len() < PACKETS_MAX));
        }
    }
}

/// Reads an IPv4 packet for `address` (RFC 791, RFC 9293).
fn parse(bytes: &[u8], address: Ipv4Addr) -> Option<Packet> {
    let header = bytes.first_chunk::<20>()?;
    let ip = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    if ip(16) != address {
        return None;
    }
    let payload = bytes.get(usize::from(header[0] & 0x0f) * 4..).unwrap_or_default();
    let protocol = header[9];
    let has_ports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP].contains(&i32::from(protocol));
    let [source_port, port] = match payload.first_chunk::<4>() {
        Some([a, b, c, d]) if has_ports => [u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])],
        _ => [0, 0],
    };
    let is_tcp = i32::from(protocol) == libc::IPPROTO_TCP;
    let tcp_flags = payload.get(13).copied().filter(|_| is_tcp).unwrap_or_default();

    Some(Packet { source: SocketAddrV4::new(ip(12), source_port), port, protocol, tcp_flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_syn_and_ignores_other_destinations() {
        let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 213, 0, 2, 100, 100, 100, 200];
        bytes.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0]);

        let packet = parse(&bytes, Ipv4Addr::new(100, 100, 100, 200)).unwrap();

        assert_eq!(packet.source, SocketAddrV4::new(Ipv4Addr::new(10, 213, 0, 2), 40_000));
        assert_eq!((packet.port, packet.protocol, packet.tcp_flags), (80, 6, 0x02));
        assert_eq!(parse(&bytes, Ipv4Addr::LOCALHOST), None);
        assert_eq!(parse(&bytes[..10], Ipv4Addr::LOCALHOST), None);
    }
}
