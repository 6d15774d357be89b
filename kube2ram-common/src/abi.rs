//! The structs in the maps, byte for byte. Depends on nothing; used by both halves.
//!
//! Any change of a layout, a map's type or its size is a change of [`ABI_VERSION`]: pins live in a directory of that name, so an agent never reads
//! another layout's maps.

use core::mem::{align_of, size_of};

/// The version of everything in this file; part of the pin path (`<bpf-dir>/v2`).
pub const ABI_VERSION: u32 = 2;

macro_rules! abi {
    ($(#[$doc:meta])* $name:ident : $size:literal { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
        // As documented, and equal to the sum of the fields: no padding, so every byte is initialised and may cross to the kernel.
        const _: () = assert!(size_of::<$name>() == $size && $size == 0 $(+ size_of::<$type>())*);
        const _: () = assert!(align_of::<$name>() <= 8);
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya reads and writes map values as bytes; the orphan rule puts the impl here")]
        // SAFETY: repr(C), integers only, no padding (asserted above): every bit pattern is a value.
        unsafe impl aya::Pod for $name {}
    };
}

abi!(
    /// What the kernel half must know of the node and the cloud: the only entry of the configuration map.
    Config: 64 {
        /// The cgroup that holds all pods.
        pods_cgroup: u64,
        /// The cookie of the agent's network namespace, which is the host's; 0 where nobody tells.
        agent_netns: u64,
        /// Its children that hold the pods of one quality of service, for there is none for Guaranteed pods; 0 where there are fewer.
        qos_cgroups: [u64; 2],
        /// IPv6 address of the metadata server, four words in network byte order; all zero when it has none.
        metadata_addr6_be: [u32; 4],
        /// IPv4 address of the metadata server, network byte order.
        metadata_addr_be: u32,
        /// IPv4 address of the agent's listener on the host, network byte order; 0 when there is none.
        agent_addr_be: u32,
        /// TCP port of the metadata server, network byte order.
        metadata_port_be: u16,
        /// TCP port of the agent's listener on the host, network byte order.
        agent_port_be: u16,
        /// [`CONFIG_KEEPS_OPEN`] or zero.
        flags: u32,
    }
);

abi!(
    /// What the boot guard must know of the cloud: the only entry of its configuration map.
    BootConfig: 20 {
        /// IPv6 address of the metadata server, four words in network byte order; all zero when it has none.
        metadata_addr6_be: [u32; 4],
        /// IPv4 address of the metadata server, network byte order.
        metadata_addr_be: u32,
    }
);

abi!(
    /// The agent's listener in the network namespace of one pod, on the loopback device, to which connections of the pod's cgroup are sent.
    Target: 16 {
        /// The cookie of that namespace (`SO_NETNS_COOKIE`), never reused. A socket of another namespace is not sent there.
        netns: u64,
        /// The TCP port at 127.0.0.1, network byte order.
        port_be: u16,
        /// [`TARGET_HAS_IPV6`] or zero.
        flags: u16,
        /// Zero.
        reserved: u32,
    }
);

abi!(
    /// The 4-tuple of a handshake in flight, as the accepting side sees it.
    ///
    /// Two words, because Linux 5.10 and 6.1 without `CAP_PERFMON` refuse to see a stack slot of 8 bytes written in parts
    /// (kernel fix "bpf: Fix narrow scalar spill onto 64-bit spilled scalar slots", 6.13, back-ported to 6.12).
    Handshake: 16 {
        /// Client address in the low half, agent address in the high half, both network byte order.
        addrs_be: u64,
        /// Client port in bits 0–15, agent port in bits 16–31, both network byte order; the rest is zero.
        ports_be: u64,
    }
);

abi!(
    /// What the connect hook recorded of a connect(2) that goes to the agent's listener on the host. It travels with the connection:
    /// client socket → handshake → accepted socket.
    ///
    /// Whole words only: see [`Handshake`].
    ConnectRecord: 64 {
        /// The cgroup of the task that called connect(2).
        cgroup: u64,
        /// Cookie of the client socket.
        cookie: u64,
        /// When connect(2) was called, CLOCK_MONOTONIC nanoseconds.
        connected_at_ns: u64,
        /// The key of what this connection takes of its pod's share: [`place_in`].
        place: u64,
        /// Until when it has that place, CLOCK_MONOTONIC nanoseconds; tells whose the place is.
        place_until_ns: u64,
        /// 1 when two client sockets claimed one 4-tuple at the same time (by a forged address, or on the loopback devices of two namespaces): neither is vouched for.
        ambiguous: u64,
        /// 1 when the client socket is in another network namespace than the agent.
        is_elsewhere: u64,
        /// 1 when the client's side of the handshake is complete.
        established: u64,
    }
);

/// The listener is at `::1` as well, at the same port.
pub const TARGET_HAS_IPV6: u16 = 1;

/// Where listeners in pods' network namespaces are, the first and the last port. The Internet Assigned Numbers Authority has reserved 225 to 241, and assigns them
/// to nobody (IANA's Service Name and Transport Protocol Port Number Registry). They are outside of the ports that the kernel chooses (`ip_local_port_range`) and that
/// `bindresvport(3)` does (512 to 1023), so that no application asks for one of them.
pub const LISTENER_PORTS: (u16, u16) = (225, 232);

/// Connections to the metadata server go on that were open before the programs were in force.
pub const CONFIG_KEEPS_OPEN: u32 = 1;

/// A record older than this is never handed over: longer than the longest handshake (`tcp_syn_retries` 6 gives up after 127 s), shorter than any
/// leftover of a time without programs could be.
pub const HANDSHAKE_MAX_AGE_NS: u64 = 150_000_000_000;

/// How many levels below the root are searched for a target; kubepods pods live at 2 to 6.
pub const MAX_CGROUP_LEVEL: i32 = 10;

/// How long after connect(2) the SYN may come: microseconds, but for `TCP_FASTOPEN_CONNECT`, with which it waits for the first byte. A record without one is of a connect(2)
/// that came to nothing.
pub const ANNOUNCE_WITHIN_NS: u64 = 5_000_000_000;

/// Whether something that began at `since_ns` is older than [`HANDSHAKE_MAX_AGE_NS`].
#[inline(always)]
#[must_use]
pub const fn is_past_max_age(now_ns: u64, since_ns: u64) -> bool {
    is_over(now_ns, since_ns.wrapping_add(HANDSHAKE_MAX_AGE_NS))
}

/// Whether a time is over.
///
/// The difference is signed: another processor may write `until_ns` after this one has read its clock, and a difference that wraps round would make the
/// youngest entry the oldest.
#[inline(always)]
#[must_use]
pub const fn is_over(now_ns: u64, until_ns: u64) -> bool {
    now_ns.wrapping_sub(until_ns).cast_signed() > 0
}

/// Cgroups that the boot guard takes for the host's own, at most.
pub const MAX_HOST_CGROUPS: usize = 64;

/// Pods on the node with a listener of their own, at most.
pub const MAX_TARGETS: usize = 4096;

/// Pods on the node that may have connections to the host's listener in flight at the same time. Most nodes have room for 110, the largest for some 700.
pub const MAX_PODS: usize = 1024;

/// Connections to the host's listener in flight, at most. Beyond it a connection is not vouched for, hence denied.
pub const MAX_HANDSHAKES: usize = MAX_PODS * MAX_HANDSHAKES_OF_POD;

/// Places that are taken of all shares, at most: more than [`MAX_HANDSHAKES`], so that it is the pod's own share that ends first.
pub const MAX_PLACES: usize = 2 * MAX_HANDSHAKES;

/// Connections to the host's listener that one pod may have in flight. An honest one is over within the connect(2), or as soon as the agent accepts; a pod that lets
/// them hang for the two minutes that TCP allows takes no more than this from the others.
pub const MAX_HANDSHAKES_OF_POD: usize = 32;

/// How many places of its share a connection tries. A pod that leaves every second place free is refused one connect in 256.
pub const SHARE_PROBES: u64 = 8;

/// The share of a pod's cgroup: the key of its place 0. Ids of cgroups are counted up from 1 since the boot, so that none is too long.
#[inline(always)]
#[must_use]
pub const fn share_of(cgroup: u64) -> u64 {
    cgroup << MAX_HANDSHAKES_OF_POD.trailing_zeros()
}

/// The key of a place in the share that any of its keys names; places are counted round.
#[inline(always)]
#[must_use]
pub const fn place_in(share: u64, place: u64) -> u64 {
    const PLACES: u64 = MAX_HANDSHAKES_OF_POD as u64 - 1;
    share & !PLACES | place & PLACES
}

/// Declares the counters once: enum, count and names.
macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// Index into the per-CPU counter map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter { $($(#[$doc])* $variant),* }

        impl Counter {
            /// All counters in the order of the map, with the value of their metrics label.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $name)),*];
        }
    };
}

counters! {
    /// A handshake's 4-tuple was claimed twice, or dialled by a socket that was not recorded while it was claimed.
    Ambiguous = "ambiguous",
    /// Dropped: a packet to the metadata server, whatever socket it came from.
    DeniedEgress = "denied_egress",
    /// Denied: somebody dialled a pod's listener himself, to which only the redirection leads.
    DeniedListener = "denied_listener",
    /// Denied: a datagram to the metadata server.
    DeniedMessage = "denied_message",
    /// Denied: the pod has no listener of its own, and the host has none.
    DeniedNoTarget = "denied_no_target",
    /// Denied: another port of the metadata address.
    DeniedPort = "denied_port",
    /// Denied: not TCP.
    DeniedProtocol = "denied_protocol",
    /// Denied: a socket option that leads a pod's packets past the wire guard.
    DeniedSocketOption = "denied_socket_option",
    /// Denied at the root: a pod's task with a socket that was made outside of the pods.
    DeniedTask = "denied_task",
    /// Dropped on a network device: a packet to the metadata server of a pod's packet socket, or of nobody's.
    DeniedWire = "denied_wire",
    /// A pod dialled the agent's listener on the host itself, and was recorded as if it had been redirected there.
    DialledAgent = "dialled_agent",
    /// Not vouched for: the map of connections in flight is full.
    HandshakesFull = "handshakes_full",
    /// A record was handed to an accepted socket.
    HandedOver = "handed_over",
    /// A packet of a connection to the metadata server from before the programs, which were told to keep those.
    KeptOpen = "kept_open",
    /// Not handed over: the record was contested, too old, or vanished during the hand-over, or the client's side was not complete.
    NotHandedOver = "not_handed_over",
    /// Redirected to the host's listener, because the socket is in another network namespace than its pod's listener.
    OtherNamespace = "other_namespace",
    /// One of the agent's own sockets passed.
    Passed = "passed",
    /// The agent asked whether the programs see a socket, and they do.
    Probed = "probed",
    /// Redirected to the agent.
    Redirected = "redirected",
    /// Not vouched for: the pod has its share of connections to the host's listener in flight.
    ShareFull = "share_full",
    /// Not vouched for: the shares of all pods together are full.
    SharesFull = "shares_full",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_different_shares_differ() {
        let places = MAX_HANDSHAKES_OF_POD as u64;
        let last = places - 1;
        let keys =
            [(1, 0), (1, last), (2, 0), (2, 1)].map(|(cgroup, place)| place_in(share_of(cgroup), place));

        for (position, key) in keys.iter().enumerate() {
            assert!(!keys[..position].contains(key), "{key}");
        }
        assert_eq!(place_in(keys[1], 0), keys[0], "any key of a share names it");
        assert_eq!(place_in(keys[0], places), keys[0], "counted round");
        assert!(MAX_HANDSHAKES_OF_POD.is_power_of_two());
    }

    #[test]
    fn only_what_is_older_than_the_maximum_is_past_it() {
        let now = 5_u64;
        for (since_ns, is_past) in [
            (now, false),
            (now + 1, false),
            (now.wrapping_sub(HANDSHAKE_MAX_AGE_NS), false),
            (now.wrapping_sub(HANDSHAKE_MAX_AGE_NS + 1), true),
        ] {
            assert_eq!(is_past_max_age(now, since_ns), is_past, "{since_ns}");
        }
    }

    #[test]
    fn counters_are_numbered_by_position() {
        for (position, (counter, _)) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, position);
        }
    }
}
