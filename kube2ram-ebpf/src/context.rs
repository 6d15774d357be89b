//! Raw access to program contexts; the only module that reads or writes their fields. Called by the programs.
//!
//! Every access is volatile: LLVM otherwise merges two 32-bit loads into one of 64 bits, or narrows a load to
//! 16, and the verifier knows the fields only by their own width ("invalid bpf_context access", seen on 5.10,
//! 6.1 and 6.12).

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock_addr, bpf_sock_ops},
    cty::c_long,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_skb_ancestor_cgroup_id,
    },
    programs::{SkBuffContext, SockAddrContext, SockOpsContext, SockoptContext},
};
use kube2ram_common::{
    abi::Handshake,
    connection::{is_metadata6, sock_ops_local_port_be, sock_ops_remote_port_be, user_port_be},
};

use crate::socket::Socket;

macro_rules! read {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: the kernel passes a valid context, and the verifier checks the offset and the width.
        unsafe { ptr::read_volatile(&raw const (*$context).$($field)+) }
    };
}

macro_rules! write {
    ($context:expr, $($field:tt)+) => {
        // SAFETY: as above; the verifier knows which fields are writable.
        |value| unsafe { ptr::write_volatile(&raw mut (*$context).$($field)+, value) }
    };
}

/// The context of the connect and getpeername hooks.
pub(crate) struct SockAddr(SockAddrContext);

impl SockAddr {
    #[inline(always)]
    pub(crate) const fn new(context: SockAddrContext) -> Self {
        Self(context)
    }

    /// For aya-log.
    #[cfg(feature = "debug-log")]
    pub(crate) const fn inner(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    const fn raw(&self) -> *mut bpf_sock_addr {
        self.0.sock_addr
    }

    #[inline(always)]
    pub(crate) fn addr_be(&self) -> u32 {
        read!(self.raw(), user_ip4)
    }

    #[inline(always)]
    pub(crate) fn addr6_be(&self) -> [u32; 4] {
        let raw = self.raw();
        [read!(raw, user_ip6[0]), read!(raw, user_ip6[1]), read!(raw, user_ip6[2]), read!(raw, user_ip6[3])]
    }

    #[inline(always)]
    pub(crate) fn port_be(&self) -> u16 {
        user_port_be(read!(self.raw(), user_port))
    }

    #[inline(always)]
    pub(crate) fn protocol(&self) -> u32 {
        read!(self.raw(), protocol)
    }

    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        Socket::new(read!(self.raw(), __bindgen_anon_1.sk))
    }

    #[inline(always)]
    pub(crate) fn socket_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_socket_cookie(self.0.as_ptr()) }
    }

    /// The cookie of the socket's network namespace. Linux 5.7.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.0.as_ptr()) }
    }

    /// Whether the socket is in the network namespace that the kernel began with. Linux 5.7.
    #[inline(always)]
    pub(crate) fn is_in_first_network(&self) -> bool {
        // SAFETY: null stands for the first one.
        self.netns() == unsafe { bpf_get_netns_cookie(ptr::null_mut()) }
    }

    #[inline(always)]
    pub(crate) fn set_destination(&self, addr_be: u32, port_be: u16) {
        write!(self.raw(), user_ip4)(addr_be);
        write!(self.raw(), user_port)(u32::from(port_be));
    }

    #[inline(always)]
    pub(crate) fn set_mapped_destination(&self, addr_be: u32, port_be: u16) {
        self.set_destination6([0, 0, 0xffff_u32.to_be(), addr_be], port_be);
    }

    #[inline(always)]
    pub(crate) fn set_destination6(&self, words: [u32; 4], port_be: u16) {
        write!(self.raw(), user_ip6[0])(words[0]);
        write!(self.raw(), user_ip6[1])(words[1]);
        write!(self.raw(), user_ip6[2])(words[2]);
        write!(self.raw(), user_ip6[3])(words[3]);
        write!(self.raw(), user_port)(u32::from(port_be));
    }
}

/// The context of the socket operations hook.
pub(crate) struct SockOps(SockOpsContext);

impl SockOps {
    #[inline(always)]
    pub(crate) const fn new(context: SockOpsContext) -> Self {
        Self(context)
    }

    #[inline(always)]
    const fn raw(&self) -> *mut bpf_sock_ops {
        self.0.ops
    }

    #[inline(always)]
    pub(crate) fn operation(&self) -> u32 {
        read!(self.raw(), op)
    }

    /// The new state, in the state callback.
    #[inline(always)]
    pub(crate) fn new_state(&self) -> u32 {
        read!(self.raw(), __bindgen_anon_1.args[1])
    }

    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        Socket::new(read!(self.raw(), __bindgen_anon_2.sk))
    }

    #[inline(always)]
    pub(crate) fn socket_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_socket_cookie(self.0.as_ptr()) }
    }

    #[inline(always)]
    pub(crate) fn local(&self) -> (u32, u16) {
        (read!(self.raw(), local_ip4), sock_ops_local_port_be(read!(self.raw(), local_port)))
    }

    #[inline(always)]
    pub(crate) fn remote(&self) -> (u32, u16) {
        (read!(self.raw(), remote_ip4), sock_ops_remote_port_be(read!(self.raw(), remote_port)))
    }

    /// The handshake's key, seen from the client socket.
    #[inline(always)]
    pub(crate) fn handshake_of_client(&self) -> Handshake {
        Handshake::new(self.local(), self.remote())
    }

    /// The handshake's key, seen from the accepted socket.
    #[inline(always)]
    pub(crate) fn handshake_of_accepted(&self) -> Handshake {
        Handshake::new(self.remote(), self.local())
    }

    /// Requests the state callback in addition to the callbacks that other programs requested on this socket.
    #[inline(always)]
    pub(crate) fn watch_state(&self, flag: i32) {
        let flags = read!(self.raw(), bpf_sock_ops_cb_flags).cast_signed() | flag;
        // If the kernel refuses, a record stays behind and expires: HANDSHAKE_MAX_AGE_NS.
        let _refused = self.0.set_cb_flags(flags);
    }
}

/// The context of the setsockopt hook.
pub(crate) struct SocketOption(SockoptContext);

impl SocketOption {
    #[inline(always)]
    pub(crate) const fn new(context: SockoptContext) -> Self {
        Self(context)
    }

    #[inline(always)]
    fn level(&self) -> i32 {
        read!(self.0.sockopt, level)
    }

    #[inline(always)]
    fn name(&self) -> i32 {
        read!(self.0.sockopt, optname)
    }

    /// Whether the option makes packets skip tc: the kernel then transmits them by `__dev_direct_xmit`.
    #[inline(always)]
    pub(crate) fn skips_tc(&self) -> bool {
        /// include/linux/socket.h and include/uapi/linux/if_packet.h.
        const SOL_PACKET: i32 = 263;
        const PACKET_QDISC_BYPASS: i32 = 20;
        /// include/linux/socket.h and include/uapi/linux/if_xdp.h.
        const SOL_XDP: i32 = 283;
        const XDP_TX_RING: i32 = 3;
        match self.level() {
            SOL_PACKET => self.name() == PACKET_QDISC_BYPASS,
            SOL_XDP => self.name() == XDP_TX_RING,
            _ => false,
        }
    }

    /// Lets the kernel read the value from the caller's memory, where it is longer than what the hook copies.
    /// Without this the kernel refuses such a value (kernel commit d8fe449a9c51, Linux 5.8).
    #[inline(always)]
    pub(crate) fn leave_to_kernel(&self) {
        /// A page of the smallest size.
        const COPIED_MAX: i32 = 4096;
        if read!(self.0.sockopt, optlen) > COPIED_MAX {
            write!(self.0.sockopt, optlen)(0);
        }
    }
}

/// The kernel's context of the egress hook, as the object's type information (BTF) describes it: by name and
/// size only. Two of its members point to structures that the object does not contain, and LLVM 22 numbers
/// such forward declarations in the order of its own addresses, which differs in each run. With more than one
/// forward declaration, the same sources would give different objects. The contexts of the other hooks
/// already have one: `bpf_sock`.
#[repr(C)]
pub(crate) struct __sk_buff([u64; 24]);
const _: () = assert!(size_of::<__sk_buff>() == size_of::<aya_ebpf::bindings::__sk_buff>());

/// A packet's network protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    Ipv4,
    Ipv6,
    Other,
}

/// The context of the hooks that see packets, and where in it the IP header begins.
pub(crate) struct Packet {
    buffer: SkBuffContext,
    ip_at: usize,
}

impl Packet {
    /// A packet of the egress hook, which begins with the IP header.
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self::at(skb, 0)
    }

    /// A packet whose IP header begins at `ip_at`.
    #[inline(always)]
    pub(crate) const fn at(skb: *mut __sk_buff, ip_at: usize) -> Self {
        Self { buffer: SkBuffContext::new(skb.cast()), ip_at }
    }

    /// The packet in an Ethernet frame, by the frame's own bytes: the context's `protocol` is what the sender
    /// of a packet socket claims. `None` when there are more tags than this function reads. (A tag that the
    /// device will add is not part of the bytes.)
    #[inline(always)]
    pub(crate) fn in_frame(skb: *mut __sk_buff) -> Option<(Self, Network)> {
        /// The smallest type; smaller values are IEEE 802.3 lengths.
        const TYPES_FROM: u16 = 0x0600;
        const SNAP: [u8; 6] = [0xaa, 0xaa, 3, 0, 0, 0];
        let frame = Self::new(skb);
        let (mut kind, mut at) = (frame.type_at(12), 14);
        if is_tag(kind) {
            (kind, at) = (frame.type_at(16), 18);
            if is_tag(kind) {
                (kind, at) = (frame.type_at(20), 22);
                if is_tag(kind) {
                    return None;
                }
            }
        }
        // Linux does not receive IP in LLC/SNAP, but Open vSwitch does.
        if kind < TYPES_FROM && frame.load::<[u8; 6]>(at) == Ok(SNAP) {
            (kind, at) = (frame.type_at(at + 6), at + 8);
        }
        let network = match kind {
            ETH_P_IP => Network::Ipv4,
            ETH_P_IPV6 => Network::Ipv6,
            _ => Network::Other,
        };
        Some((Self::at(skb, at), network))
    }

    /// The type at an offset of a frame; 0 when it cannot be read.
    #[inline(always)]
    fn type_at(&self, offset: usize) -> u16 {
        match self.load::<u16>(offset) {
            Ok(kind) => u16::from_be(kind),
            Err(_) => 0,
        }
    }

    /// The protocol of a packet that begins with its IP header, by the header's version.
    #[inline(always)]
    pub(crate) fn network_by_version(&self) -> Network {
        let Ok(first) = self.load::<u8>(0) else { return Network::Other };
        match first >> 4 {
            4 => Network::Ipv4,
            6 => Network::Ipv6,
            _ => Network::Other,
        }
    }

    /// Reads at an offset from the IP header on.
    #[inline(always)]
    fn load<T>(&self, offset: usize) -> Result<T, c_long> {
        self.buffer.load(self.ip_at + offset)
    }

    #[inline(always)]
    const fn raw(&self) -> *mut aya_ebpf::bindings::__sk_buff {
        self.buffer.skb.skb
    }

    /// The packet's protocol. Packets of IPv4-mapped sockets are IPv4 packets.
    #[inline(always)]
    pub(crate) fn network(&self) -> Network {
        let protocol = read!(self.raw(), protocol);
        if protocol == u32::from(ETH_P_IP.to_be()) {
            Network::Ipv4
        } else if protocol == u32::from(ETH_P_IPV6.to_be()) {
            Network::Ipv6
        } else {
            Network::Other
        }
    }

    /// Whether an IPv6 packet is for `metadata`: by its destination, or by a routing header that names it.
    /// Also true if its headers cannot be read, or are longer than any legitimate packet needs.
    #[inline(always)]
    pub(crate) fn is_for6(&self, metadata: &[u32; 4]) -> bool {
        const DESTINATION: usize = 24;
        const NEXT_HEADER: usize = 6;
        let Ok(words) = self.load::<[u32; 4]>(DESTINATION) else { return true };
        if is_metadata6(metadata, words) {
            return true;
        }
        let Ok(next) = self.load::<u8>(NEXT_HEADER) else { return true };
        metadata[0] != 0 && is_extension(next) && self.is_routed_by6(next, metadata)
    }

    /// Reads the extension headers up to a routing header (RFC 8200 §4). Unrolled instead of a loop: see
    /// `pods`.
    #[inline(always)]
    fn is_routed_by6(&self, first: u8, metadata: &[u32; 4]) -> bool {
        const FIXED: usize = 40;
        let (header, at) = (first, FIXED);
        macro_rules! next {
            ($header:ident, $at:ident) => {{
                let Ok(next) = self.load::<u8>($at) else { return true };
                let Ok(length) = self.load::<u8>($at + 1) else { return true };
                if $header == ROUTING {
                    // A second one behind it would not be read.
                    return is_extension(next) || self.routing_names($at, length, metadata);
                }
                // Behind a fragment header only a part of the packet may be present. A router that
                // reassembles it sees the rest.
                if $header == FRAGMENT {
                    return is_extension(next);
                }
                if !is_extension(next) {
                    return false;
                }
                (next, $at + (length as usize + 1) * 8)
            }};
        }
        let (header, at) = next!(header, at);
        let (header, at) = next!(header, at);
        let _more = next!(header, at);
        true
    }

    /// Whether a routing header at `at` names `metadata` as a segment, has more segments than are read, or
    /// may omit parts of a segment. Types 0, 2 and 4 have whole segments at multiples of 16 bytes. Type 3
    /// (RFC 6554), which only routers of sensor networks use, compresses them.
    #[inline(always)]
    fn routing_names(&self, at: usize, length: u8, metadata: &[u32; 4]) -> bool {
        const TYPE: usize = 2;
        const COMPRESSED: u8 = 3;
        let Ok(kind) = self.load::<u8>(at + TYPE) else { return true };
        if kind == COMPRESSED {
            return true;
        }
        macro_rules! segments {
            ($($number:literal)+) => {
                const MOST: u8 = 8;
                const _: () = assert!([$($number),+].len() == MOST as usize);
                // In units of 8 bytes.
                if length > MOST * 2 {
                    return true;
                }
                $(
                    if length >= ($number + 1) * 2 {
                        let Ok(words) = self.load::<[u32; 4]>(at + 8 + $number * 16) else { return true };
                        if is_metadata6(metadata, words) {
                            return true;
                        }
                    }
                )+
            };
        }
        segments!(0 1 2 3 4 5 6 7);
        false
    }

    /// As [`Self::goes_on`], for an IPv6 packet: TCP directly behind the fixed header.
    #[inline(always)]
    pub(crate) fn goes_on6(&self, port_be: u16) -> bool {
        const NEXT_HEADER: usize = 6;
        const IPPROTO_TCP: u8 = 6;
        const TCP_PORT: usize = 42;
        const TCP_FLAGS: usize = 53;
        const SYN: u8 = 2;
        if self.load::<u8>(NEXT_HEADER) != Ok(IPPROTO_TCP) || self.load::<u16>(TCP_PORT) != Ok(port_be) {
            return false;
        }
        let Ok(flags) = self.load::<u8>(TCP_FLAGS) else { return false };
        flags & SYN == 0
    }

    /// The destination in the IPv4 header, network byte order.
    #[inline(always)]
    pub(crate) fn destination_be(&self) -> Option<u32> {
        const OFFSET: usize = 16;
        self.load(OFFSET).ok()
    }

    /// Whether `addr_be` occurs anywhere in the header's options: with source routing, the destination is
    /// only the next hop.
    #[inline(always)]
    pub(crate) fn options_name(&self, addr_be: u32) -> bool {
        const OPTIONS: usize = 20;
        // A packet whose first byte cannot be read has no destination.
        let Ok(first) = self.load::<u8>(0) else { return true };
        let end = usize::from(first & 0x0f) * 4;
        if end <= OPTIONS {
            return false; // nearly every packet
        }
        // Unrolled instead of a loop: see `pods`.
        macro_rules! at {
            ($($offset:literal)+) => {
                $(if $offset + 4 <= end && self.load::<u32>($offset) == Ok(addr_be) {
                    return true;
                })+
            };
        }
        at!(20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38);
        at!(39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56);
        false
    }

    /// Whether the packet belongs to a TCP connection to `port_be` and does not open it: the whole header in
    /// one fragment, no IP options, no SYN. A connect(2) of today is redirected before there is a packet, so
    /// such a connection is older than the programs.
    #[inline(always)]
    pub(crate) fn goes_on(&self, port_be: u16) -> bool {
        const VERSION_4_WITHOUT_OPTIONS: u8 = 0x45;
        const FRAGMENT: usize = 6;
        const FRAGMENT_OFFSET_OR_MORE: u16 = 0x3fff_u16.to_be();
        const PROTOCOL: usize = 9;
        const IPPROTO_TCP: u8 = 6;
        const TCP_PORT: usize = 22;
        const TCP_FLAGS: usize = 33;
        const SYN: u8 = 2;
        // One by one: a value that one branch did not set must not be used after the branches join.
        if self.load::<u8>(0) != Ok(VERSION_4_WITHOUT_OPTIONS) || self.load::<u8>(PROTOCOL) != Ok(IPPROTO_TCP)
        {
            return false;
        }
        let Ok(fragment) = self.load::<u16>(FRAGMENT) else { return false };
        if fragment & FRAGMENT_OFFSET_OR_MORE != 0 || self.load::<u16>(TCP_PORT) != Ok(port_be) {
            return false;
        }
        let Ok(flags) = self.load::<u8>(TCP_FLAGS) else { return false };
        flags & SYN == 0
    }

    /// Whether an IPv4 packet is for `metadata_be`: by its destination, or by an option. `None` when its
    /// header cannot be read.
    #[inline(always)]
    pub(crate) fn is_for(&self, metadata_be: u32) -> Option<bool> {
        const WORDS_WITHOUT_OPTIONS: u8 = 5;
        const DESTINATION: usize = 4;
        // One read for the whole header: each read calls a helper, and for nearly every packet of the node
        // this is the only one.
        let words = self.load::<[u32; 5]>(0).ok()?;
        let [first, ..] = words[0].to_ne_bytes();
        let has_options = first & 0x0f > WORDS_WITHOUT_OPTIONS;
        Some(words[DESTINATION] == metadata_be || has_options && self.options_name(metadata_be))
    }

    /// Whether an IPv6 packet is neighbour discovery (RFC 4861 §7.1): its hop limit is one that a forwarded
    /// packet cannot have.
    #[inline(always)]
    pub(crate) fn is_neighbour_discovery(&self) -> bool {
        const NEXT_HEADER: usize = 6;
        const IPPROTO_ICMPV6: u8 = 58;
        const MOST_HOPS: u8 = 255;
        const TYPE: usize = 40;
        const SOLICITATION: u8 = 135;
        const ADVERTISEMENT: u8 = 136;
        if self.load::<[u8; 2]>(NEXT_HEADER) != Ok([IPPROTO_ICMPV6, MOST_HOPS]) {
            return false;
        }
        let Ok(kind) = self.load::<u8>(TYPE) else { return false };
        kind == SOLICITATION || kind == ADVERTISEMENT
    }

    /// The sending socket, full or not; `None` when the packet was forwarded. Call it once: for a second call
    /// LLVM keeps the field's address, which the verifier refuses ("dereference of modified ctx ptr").
    #[inline(always)]
    pub(crate) fn sender(&self) -> Option<Socket> {
        Socket::new(read!(self.raw(), __bindgen_anon_2.sk))
    }

    /// The sending full socket; `None` when it is a request or TIME_WAIT socket.
    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        self.sender().and_then(Socket::full)
    }

    /// The ancestor of the sending socket's cgroup at `level` (the root is 0); 0 below the socket's own
    /// level.
    #[inline(always)]
    pub(crate) fn ancestor_cgroup(&self, level: i32) -> u64 {
        // SAFETY: the program's own context, and a plain value.
        unsafe { bpf_skb_ancestor_cgroup_id(self.raw(), level) }
    }
}

// include/uapi/linux/if_ether.h.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// IEEE 802.1Q, 802.1ad, and the type that was in use before 802.1ad.
#[inline(always)]
const fn is_tag(kind: u16) -> bool {
    kind == 0x8100 || kind == 0x88a8 || kind == 0x9100
}

/// Extension headers of IPv6 behind which others may be (RFC 8200 §4.1): hop-by-hop and destination options,
/// routing, fragment.
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;

#[inline(always)]
const fn is_extension(header: u8) -> bool {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION_OPTIONS: u8 = 60;
    header == HOP_BY_HOP || header == ROUTING || header == FRAGMENT || header == DESTINATION_OPTIONS
}

/// The cgroup of the calling task.
#[inline(always)]
pub(crate) fn current_cgroup() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The ancestor of the calling task's cgroup at `level` (the root is 0); 0 below the task's own level. Linux
/// 5.7 in these hooks.
#[inline(always)]
pub(crate) fn current_ancestor_cgroup(level: i32) -> u64 {
    // SAFETY: plain values only.
    unsafe { bpf_get_current_ancestor_cgroup_id(level) }
}

/// The process of the calling task, as the host numbers it.
#[inline(always)]
pub(crate) fn current_tgid() -> u32 {
    // SAFETY: no arguments.
    (unsafe { bpf_get_current_pid_tgid() } >> 32) as u32
}

/// CLOCK_MONOTONIC.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}
