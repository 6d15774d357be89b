//! Addresses, ports and byte order, and the key of a handshake. Pure; the only module that converts the
//! values of the eBPF programs.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::abi::Handshake;

/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;
/// `IPPROTO_TCP`.
pub const IPPROTO_TCP: u32 = 6;
/// `IPPROTO_MPTCP`: what the connect hook sees on the first subflow of an MPTCP socket.
pub const IPPROTO_MPTCP: u32 = 262;

/// The address at which the connect hook of the pods' sockets refuses every connect(2): with it the agent
/// tests whether the hook sees a socket. It is a loopback address without a listener, and the agent uses a
/// datagram socket, so that no packet is sent if the hook is missing.
pub const PROBE_ADDR: Ipv4Addr = Ipv4Addr::new(127, 63, 255, 255);

/// The address of in-pod listeners.
pub const LOOPBACK_BE: u32 = addr_be(Ipv4Addr::LOCALHOST);
/// The same in IPv6.
pub const LOOPBACK6_BE: [u32; 4] = addr6_be(Ipv6Addr::LOCALHOST);

/// Whether a destination is the loopback device's own address: 127.0.0.1, or 0.0.0.0, which connect(2) treats
/// as 127.0.0.1.
#[inline(always)]
#[must_use]
pub const fn is_loopback(addr_be: u32) -> bool {
    addr_be == 0 || addr_be == LOOPBACK_BE
}

/// The same in IPv6: `::1`, or `::`, which connect(2) treats as `::1`.
#[inline(always)]
#[must_use]
pub const fn is_loopback6(words: [u32; 4]) -> bool {
    words[0] == 0 && words[1] == 0 && words[2] == 0 && (words[3] == 0 || words[3] == LOOPBACK6_BE[3])
}

/// The IPv4 address as the eBPF programs compare it.
#[must_use]
pub const fn addr_be(addr: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(addr.octets())
}

/// The address as the eBPF programs compare it: word by word.
#[must_use]
pub const fn addr6_be(addr: Ipv6Addr) -> [u32; 4] {
    let octets = addr.octets();
    let mut words = [0; 4];
    let mut word = 0;
    while word < 4 {
        let at = word * 4;
        words[word] = u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
        word += 1;
    }
    words
}

/// The port as the eBPF programs compare it.
#[must_use]
pub const fn port_be(port: u16) -> u16 {
    port.to_be()
}

/// `bpf_sock_ops.local_port` (host byte order) as a network-order port.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits; the kernel widens it")]
pub const fn sock_ops_local_port_be(local_port: u32) -> u16 {
    (local_port as u16).to_be()
}

/// `bpf_sock_ops.remote_port` (network byte order, 32 bits wide) as a network-order port.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits; the kernel widens it")]
pub const fn sock_ops_remote_port_be(remote_port: u32) -> u16 {
    (u32::from_be(remote_port) as u16).to_be()
}

/// `bpf_sock_addr.user_port` (network byte order in the low half) as a network-order port.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits; the kernel widens it")]
pub const fn user_port_be(user_port: u32) -> u16 {
    user_port as u16
}

/// The IPv4 address in `::ffff:a.b.c.d`, given the four network-order words of an IPv6 address. Every JVM
/// dials this form.
#[inline(always)]
#[must_use]
pub const fn v4_mapped(words: [u32; 4]) -> Option<u32> {
    if words[0] == 0 && words[1] == 0 && words[2] == 0xffff_u32.to_be() { Some(words[3]) } else { None }
}

/// Whether an IPv6 address is the metadata server's, which is all zero when it has none. (Addresses that
/// begin with four zero bytes, such as `::1` and IPv4-mapped ones, cannot be the metadata server's.)
#[inline(always)]
#[must_use]
pub const fn is_metadata6(metadata: &[u32; 4], words: [u32; 4]) -> bool {
    words[0] != 0
        && words[0] == metadata[0]
        && words[1] == metadata[1]
        && words[2] == metadata[2]
        && words[3] == metadata[3]
}

impl Handshake {
    /// The key of the handshake between a client and a listener of the agent; all in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn new(client: (u32, u16), agent: (u32, u16)) -> Self {
        Self {
            addrs_be: client.0 as u64 | (agent.0 as u64) << 32,
            ports_be: client.1 as u64 | (agent.1 as u64) << 16,
        }
    }

    /// The client's port as a number.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
    pub const fn client_port(&self) -> u16 {
        u16::from_be(self.ports_be as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_ports_of_every_context_to_network_order() {
        let port = 18_181_u16;

        assert_eq!(sock_ops_local_port_be(u32::from(port)), port.to_be());
        assert_eq!(sock_ops_remote_port_be(u32::from(port).to_be()), port.to_be());
        assert_eq!(user_port_be(u32::from(port.to_be())), port.to_be());
    }

    #[test]
    fn recognises_only_mapped_addresses() {
        let addr = addr_be(Ipv4Addr::new(100, 100, 100, 200));
        let mapped = 0xffff_u32.to_be();

        assert_eq!(v4_mapped([0, 0, mapped, addr]), Some(addr));
        assert_eq!(v4_mapped([0, 0, 0, addr]), None);
        assert_eq!(v4_mapped([1, 0, mapped, addr]), None);
        assert_eq!(v4_mapped([0, 1, mapped, addr]), None);
    }

    #[test]
    fn recognises_the_metadata_servers_ipv6_address_alone() {
        let metadata = addr6_be("fd00:100::100:200".parse().unwrap());

        assert!(is_metadata6(&metadata, metadata));
        assert_eq!(metadata[0], u32::from_ne_bytes([0xfd, 0, 1, 0]));
        for word in 0..4 {
            let mut other = metadata;
            other[word] ^= 1;
            assert!(!is_metadata6(&metadata, other));
        }
        let none = [0; 4];
        assert!(!is_metadata6(&none, none), "`::` is nobody's when there is no address");
    }

    #[test]
    fn a_handshake_holds_the_clients_port() {
        assert_eq!(Handshake::new((1, port_be(40_001)), (2, port_be(80))).client_port(), 40_001);
    }

    #[test]
    fn handshakes_differ_when_any_part_differs() {
        let base = Handshake::new((1, 2), (3, 4));

        for other in
            [((9, 2), (3, 4)), ((1, 9), (3, 4)), ((1, 2), (9, 4)), ((1, 2), (3, 9)), ((3, 4), (1, 2))]
        {
            assert_ne!(base, Handshake::new(other.0, other.1));
        }
    }
}
