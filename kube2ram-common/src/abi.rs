//! The structs in the maps, byte for byte. Depends on nothing; used by the eBPF programs and by the agent.
//!
//! Any change of a layout, a map's type or its size is a change of [`ABI_VERSION`]: pins live in a directory
//! of that name, so an agent never reads another layout's maps.

use core::mem::{align_of, size_of};

/// The version of everything in this file; part of the pin path (`<bpf-dir>/v2`).
pub const ABI_VERSION: u32 = 2;

macro_rules! abi {
    ($(#[$doc:meta])* $name:ident : $size:literal { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }
        // As documented, and equal to the sum of the fields: no padding, so every byte is initialised and may
        // cross to the kernel.
        const _: () = assert!(size_of::<$name>() == $size && $size == 0 $(+ size_of::<$type>())*);
        const _: () = assert!(align_of::<$name>() <= 8);
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "aya reads and writes map values as bytes; the orphan rule puts the impl here")]
        // SAFETY: repr(C), integers only, no padding (asserted above): every bit pattern is a value.
        unsafe impl aya::Pod for $name {}
    };
}

abi!(
    /// What the eBPF programs need to know of the node and the cloud: the only entry of the configuration
    /// map.
    ///
    /// The agent changes it in place while the programs run, so a program may see one field from before a
    /// change and the next one from after it. No verdict depends on two fields of one change. A new address
    /// with the former port of the host listener is a connection that is refused. With one of two new QoS
    /// cgroups, a connect(2) counts in the share of a container instead of its pod's. The metadata server's
    /// addresses, the IPv6 one of four words, change only with the flags of the agent: until the change is
    /// complete, the new address is not covered, as before it.
    Config: 64 {
        /// The cgroup that holds all pods.
        pods_cgroup: u64,
        /// The cookie of the agent's network namespace, which is the host's; 0 where the kernel does not
        /// provide it.
        agent_netns: u64,
        /// Its children for the qualities of service Burstable and BestEffort (Guaranteed has none); 0 where
        /// one is missing.
        qos_cgroups: [u64; 2],
        /// IPv6 address of the metadata server, four words in network byte order; all zero when it has none.
        metadata_addr6_be: [u32; 4],
        /// IPv4 address of the metadata server, network byte order.
        metadata_addr_be: u32,
        /// IPv4 address of the host listener, network byte order; 0 when there is none.
        agent_addr_be: u32,
        /// TCP port of the metadata server, network byte order.
        metadata_port_be: u16,
        /// TCP port of the host listener, network byte order.
        agent_port_be: u16,
        /// [`CONFIG_KEEPS_OPEN`] or zero.
        flags: u32,
    }
);

abi!(
    /// What the boot guard needs to know of the cloud: the only entry of its configuration map.
    BootConfig: 20 {
        /// IPv6 address of the metadata server, four words in network byte order; all zero when it has none.
        metadata_addr6_be: [u32; 4],
        /// IPv4 address of the metadata server, network byte order.
        metadata_addr_be: u32,
    }
);

abi!(
    /// The in-pod listener of one pod, on the loopback device of its network namespace, to which connections
    /// of the pod's cgroup are redirected.
    Target: 16 {
        /// The cookie of that namespace (`SO_NETNS_COOKIE`), never reused. A socket of another namespace is
        /// not redirected there.
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
    /// Two words, because Linux 5.10 and 6.1 without `CAP_PERFMON` refuse to see a stack slot of 8 bytes
    /// written in parts (kernel fix "bpf: Fix narrow scalar spill onto 64-bit spilled scalar slots", 6.13,
    /// back-ported to 6.12).
    Handshake: 16 {
        /// Client address in the low half, agent address in the high half, both network byte order.
        addrs_be: u64,
        /// Client port in bits 0–15, agent port in bits 16–31, both network byte order; the rest is zero.
        ports_be: u64,
    }
);

abi!(
    /// The connect hook's record of a connect(2) that is redirected to the host listener. It follows the
    /// connection: client socket → handshake → accepted socket.
    ///
    /// Whole words only: see [`Handshake`].
    ConnectRecord: 64 {
        /// The cgroup of the task that called connect(2).
        cgroup: u64,
        /// Cookie of the client socket.
        cookie: u64,
        /// When connect(2) was called, CLOCK_MONOTONIC nanoseconds.
        connected_at_ns: u64,
        /// The key of this connection's lease of its pod's share: [`lease_in`].
        lease: u64,
        /// When the lease ends, CLOCK_MONOTONIC nanoseconds; identifies the connection that holds it.
        lease_until_ns: u64,
        /// 1 when two client sockets claimed one 4-tuple at the same time (with a forged address, or on the
        /// loopback devices of two namespaces): both are refused.
        ambiguous: u64,
        /// 1 when the client socket is in another network namespace than the agent.
        is_elsewhere: u64,
        /// 1 when the client's side of the handshake is complete.
        established: u64,
    }
);

/// The listener also listens on `::1`, on the same port.
pub const TARGET_HAS_IPV6: u16 = 1;

/// The first and the last port of in-pod listeners. The Internet Assigned Numbers Authority has reserved 225
/// to 241 and does not assign them (IANA's Service Name and Transport Protocol Port Number Registry). The
/// kernel (`ip_local_port_range`) and `bindresvport(3)` (512 to 1023) choose other ports, so no application
/// uses one of them.
pub const LISTENER_PORTS: (u16, u16) = (225, 232);

/// Connections to the metadata server that were opened before the programs were attached stay open.
pub const CONFIG_KEEPS_OPEN: u32 = 1;

/// A record older than this is never handed over. It is longer than the longest handshake (`tcp_syn_retries`
/// 6 gives up after 127 s), and shorter than the age of any record from a time without programs.
pub const HANDSHAKE_MAX_AGE_NS: u64 = 150_000_000_000;

/// How many levels below the root are searched for a target; kubepods pods live at 2 to 6.
pub const MAX_CGROUP_LEVEL: i32 = 10;

/// How long after connect(2) the SYN may be sent: microseconds, except with `TCP_FASTOPEN_CONNECT`, where the
/// SYN waits for the first byte. A record without a SYN belongs to a connect(2) that failed.
pub const ANNOUNCE_WITHIN_NS: u64 = 5_000_000_000;

/// Whether something that began at `since_ns` is older than [`HANDSHAKE_MAX_AGE_NS`].
#[inline(always)]
#[must_use]
pub const fn is_past_max_age(now_ns: u64, since_ns: u64) -> bool {
    is_over(now_ns, since_ns.wrapping_add(HANDSHAKE_MAX_AGE_NS))
}

/// Whether a time is over.
///
/// The difference is signed: another processor may write `until_ns` after this one has read its clock, and an
/// unsigned difference would wrap and make the youngest entry the oldest.
#[inline(always)]
#[must_use]
pub const fn is_over(now_ns: u64, until_ns: u64) -> bool {
    now_ns.wrapping_sub(until_ns).cast_signed() > 0
}

/// The largest number of cgroups that the boot guard treats as the host's own.
pub const MAX_HOST_CGROUPS: usize = 64;

/// The largest number of in-pod listeners on the node.
pub const MAX_TARGETS: usize = 4096;

/// Number of pods on the node that may have connections to the host listener in flight at the same time. Most
/// nodes have room for 110 pods, the largest for about 700.
pub const MAX_PODS: usize = 1024;

/// The largest number of connections to the host listener in flight. Further connections are not recorded,
/// and so denied.
pub const MAX_HANDSHAKES: usize = MAX_PODS * MAX_HANDSHAKES_OF_POD;

/// The largest number of leases of all shares: more than [`MAX_HANDSHAKES`], so that a pod's own share is
/// used up first.
pub const MAX_LEASES: usize = 2 * MAX_HANDSHAKES;

/// Number of connections to the host listener that one pod may have in flight. A normal one ends within the
/// connect(2), or as soon as the agent accepts. A pod that leaves handshakes open for the two minutes that
/// TCP allows takes no more than this from the others.
pub const MAX_HANDSHAKES_OF_POD: usize = 32;

/// How many leases of its share a connection tries. A pod that holds every second lease is refused one
/// connect in 256.
pub const SHARE_PROBES: u64 = 8;

/// The share of a pod's cgroup: the key of its lease 0. Ids of cgroups are counted from 1 since boot, so none
/// is too large.
#[inline(always)]
#[must_use]
pub const fn share_of(cgroup: u64) -> u64 {
    cgroup << MAX_HANDSHAKES_OF_POD.trailing_zeros()
}

/// The key of a lease in the share that any of its keys names; numbers wrap round.
#[inline(always)]
#[must_use]
pub const fn lease_in(share: u64, lease: u64) -> u64 {
    const LEASES: u64 = MAX_HANDSHAKES_OF_POD as u64 - 1;
    share & !LEASES | lease & LEASES
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
    /// A handshake's 4-tuple was claimed twice, or a socket without a record dialled it while it was claimed.
    Ambiguous = "ambiguous",
    /// Dropped: a packet of a pod's socket to the metadata server.
    DeniedEgress = "denied_egress",
    /// Denied: a process dialled an in-pod listener itself; only the redirection may lead there.
    DeniedListener = "denied_listener",
    /// Denied: a datagram to the metadata server.
    DeniedMessage = "denied_message",
    /// Denied: there is neither an in-pod listener nor a host listener.
    DeniedNoTarget = "denied_no_target",
    /// Denied: another port of the metadata address.
    DeniedPort = "denied_port",
    /// Denied: not TCP.
    DeniedProtocol = "denied_protocol",
    /// Denied: a socket option with which a pod's packets bypass the wire guard.
    DeniedSocketOption = "denied_socket_option",
    /// Denied at the root: a pod's task with a socket that was created outside of the pods.
    DeniedTask = "denied_task",
    /// Dropped on a network device: a packet to the metadata server from a pod's packet socket, or without a
    /// socket.
    DeniedWire = "denied_wire",
    /// A pod dialled the host listener itself, and was recorded as if it had been redirected there.
    DialledAgent = "dialled_agent",
    /// Not recorded: the map of connections in flight is full.
    HandshakesFull = "handshakes_full",
    /// A record was handed to an accepted socket.
    HandedOver = "handed_over",
    /// A packet of a connection to the metadata server that is older than the programs, with
    /// `--open-connections=keep`.
    KeptOpen = "kept_open",
    /// Not handed over: the record was contested, too old, or removed during the copy, or the client's side
    /// was not complete.
    NotHandedOver = "not_handed_over",
    /// Redirected to the host listener, because the socket is in another network namespace than the in-pod
    /// listener of its pod.
    OtherNamespace = "other_namespace",
    /// One of the agent's own sockets passed.
    Passed = "passed",
    /// The agent tested whether the programs see a socket, and they do.
    Probed = "probed",
    /// Redirected to the agent.
    Redirected = "redirected",
    /// Not recorded: the pod has its share of connections to the host listener in flight.
    ShareFull = "share_full",
    /// Not recorded: the shares of all pods together are full.
    SharesFull = "shares_full",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_of_different_shares_differ() {
        let leases = MAX_HANDSHAKES_OF_POD as u64;
        let last = leases - 1;
        let keys =
            [(1, 0), (1, last), (2, 0), (2, 1)].map(|(cgroup, lease)| lease_in(share_of(cgroup), lease));

        for (position, key) in keys.iter().enumerate() {
            assert!(!keys[..position].contains(key), "{key}");
        }
        assert_eq!(lease_in(keys[1], 0), keys[0], "any key of a share names it");
        assert_eq!(lease_in(keys[0], leases), keys[0], "counted round");
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
