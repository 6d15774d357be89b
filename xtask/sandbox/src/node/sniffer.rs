//! Every packet that arrives for an address of the metadata server, seen by an AF_PACKET socket in the
//! namespace that owns them: the proof that does not depend on any server's word. Depends on socket2. Started
//! by `node`, read by `show` and tests.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
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
    /// Its source address; port 0 when it has none.
    pub source: SocketAddr,
    /// The destination port; 0 when it has none.
    pub port: u16,
    /// The IP protocol number, of IPv6 that of the header behind all extension headers.
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
    addresses: Vec<IpAddr>,
    packets: Vec<Packet>,
    twins: usize,
    socket: Socket,
}

impl Sniffer {
    /// Every packet so far.
    pub fn packets(&self) -> Vec<Packet> {
        let mut seen = locked(&self.seen);
        seen.drain();
        seen.packets.clone()
    }

    /// How many packets came for a neighbour of one of the addresses, which a way that is open leads to as
    /// well.
    pub fn twins(&self) -> usize {
        let mut seen = locked(&self.seen);
        seen.drain();
        seen.twins
    }

    /// Those with this source address.
    pub fn packets_from(&self, source: impl Into<IpAddr>) -> Vec<Packet> {
        let (source, mut packets) = (source.into(), self.packets());
        packets.retain(|packet| packet.source.ip() == source);
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
    pub(super) fn start(netns: &str, addresses: Vec<IpAddr>) -> Result<Self> {
        let socket = netns::within(netns, open).context("cannot open a packet socket")?;
        let sniffer =
            Arc::new(Sniffer { seen: Mutex::new(Seen { addresses, packets: Vec::new(), twins: 0, socket }) });
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

/// A packet socket for every protocol, without link headers.
fn open() -> io::Result<Socket> {
    // packet(7): the protocol is in network byte order, and a socket made with one receives from every
    // interface.
    let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket = Socket::new(Domain::from(libc::AF_PACKET), Type::DGRAM, Some(protocol))?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(16 * 1024 * 1024)?;
    Ok(socket)
}

/// `ETH_P_ALL` of linux/if_ether.h. Unlike one for a single protocol, such a socket is also shown what this
/// namespace sends, to others' addresses.
const ETH_P_ALL: u16 = 0x0003;

impl Seen {
    fn drain(&mut self) {
        let mut buffer = [0; 256];
        while let Ok(length) = self.socket.read(&mut buffer) {
            let neighbours: Vec<_> = self.addresses.iter().copied().map(neighbour).collect();
            self.twins += usize::from(parse(&buffer[..length], &neighbours).is_some());
            let packet = parse(&buffer[..length], &self.addresses);
            self.packets.extend(packet.filter(|_| self.packets.len() < PACKETS_MAX));
        }
    }
}

/// The address after this one.
fn neighbour(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() + 1).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() + 1).into(),
    }
}

/// What is behind more tags than the one that the kernel takes off, and behind LLC and SNAP. What begins with
/// a tag is told by its second half, a type, and by the priority 0 that the tests give it: an IP packet
/// begins with its version.
fn behind_headers(mut bytes: &[u8]) -> &[u8] {
    const SNAP: [u8; 6] = [0xaa, 0xaa, 3, 0, 0, 0];
    const TYPES: [[u8; 2]; 4] = [[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00], [0x88, 0xa8]];
    loop {
        let header = if bytes.starts_with(&SNAP) { SNAP.len() + 2 } else { 4 };
        let kind = bytes.get(header - 2..header).unwrap_or_default();
        let is_header = header > 4 || bytes.first().is_some_and(|first| first >> 4 == 0);
        match bytes.get(header..) {
            Some(rest) if is_header && TYPES.iter().any(|known| known == kind) => bytes = rest,
            _ => return bytes,
        }
    }
}

/// Reads a packet for one of `addresses` (RFC 791, RFC 8200, RFC 9293).
fn parse(bytes: &[u8], addresses: &[IpAddr]) -> Option<Packet> {
    let bytes = behind_headers(bytes);
    let (source, destination, protocol, payload) = match bytes.first()? >> 4 {
        4 => {
            let header = bytes.first_chunk::<20>()?;
            let ip = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let payload = bytes.get(usize::from(header[0] & 0x0f) * 4..).unwrap_or_default();
            (ip(12), ip(16), header[9], payload)
        }
        6 => {
            let header = bytes.first_chunk::<40>()?;
            let ip = |at: usize| Some(IpAddr::from(Ipv6Addr::from(*header[at..].first_chunk::<16>()?)));
            let (protocol, payload) = behind_extensions(header[6], &bytes[40..]);
            (ip(8)?, ip(24)?, protocol, payload)
        }
        _ => return None,
    };
    if !addresses.contains(&destination) {
        return None;
    }
    let has_ports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP].contains(&i32::from(protocol));
    let [source_port, port] = match payload.first_chunk::<4>() {
        Some([a, b, c, d]) if has_ports => [u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])],
        _ => [0, 0],
    };
    let is_tcp = i32::from(protocol) == libc::IPPROTO_TCP;
    let tcp_flags = payload.get(13).copied().filter(|_| is_tcp).unwrap_or_default();

    Some(Packet { source: SocketAddr::new(source, source_port), port, protocol, tcp_flags })
}

/// The first header that is no extension, with what follows; the payload of a later fragment, which has no
/// header, is taken for one.
fn behind_extensions(mut header: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    const FRAGMENT: i32 = libc::IPPROTO_FRAGMENT;
    const EXTENSIONS: [i32; 4] =
        [libc::IPPROTO_HOPOPTS, libc::IPPROTO_ROUTING, FRAGMENT, libc::IPPROTO_DSTOPTS];
    while EXTENSIONS.contains(&i32::from(header)) {
        let Some([next, words]) = rest.first_chunk::<2>().copied() else { break };
        let length = if i32::from(header) == FRAGMENT { 8 } else { (usize::from(words) + 1) * 8 };
        (header, rest) = (next, rest.get(length..).unwrap_or_default());
    }
    (header, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Node;

    const METADATA: [IpAddr; 2] = [IpAddr::V4(Node::METADATA_IP), IpAddr::V6(Node::METADATA_IP6)];
    const SYN: [u8; 20] = [0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0];

    #[test]
    fn reads_a_syn_and_ignores_other_destinations() {
        let mut bytes = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 213, 0, 2, 100, 100, 100, 200];
        bytes.extend(SYN);

        let packet = parse(&bytes, &METADATA).unwrap();

        assert_eq!(packet.source, "10.213.0.2:40000".parse().unwrap());
        assert_eq!((packet.port, packet.protocol, packet.tcp_flags), (80, 6, 0x02));
        assert_eq!(parse(&bytes, &METADATA[1..]), None);
        assert_eq!(parse(&bytes[..10], &METADATA), None);
    }

    #[test]
    fn reads_an_ipv6_syn_behind_extension_headers() {
        let source: Ipv6Addr = "fd00:213::2".parse().unwrap();
        for (first, extensions) in [(6, vec![]), (0, vec![44, 0, 1, 4, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 7])] {
            let mut bytes = vec![0x60, 0, 0, 0, 0, 36, first, 64];
            bytes.extend(source.octets());
            bytes.extend(Node::METADATA_IP6.octets());
            bytes.extend(extensions);
            bytes.extend(SYN);

            let packet = parse(&bytes, &METADATA).unwrap();

            assert_eq!(packet.source, (source, 40_000).into());
            assert_eq!((packet.port, packet.protocol, packet.tcp_flags), (80, 6, 0x02));
            assert_eq!(parse(&bytes, &METADATA[..1]), None);
            assert_eq!(parse(&bytes[..39], &METADATA), None);
        }
    }
}
