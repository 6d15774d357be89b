//! The names under which `bpftool` shows our programs and maps. The kernel keeps 15 characters.

/// The prefix of every program and map.
pub const PREFIX: &str = "k2r_";

/// Maps, as pinned in `<bpf-dir>/v<ABI>/maps`.
pub mod map {
    /// Array of one [`Config`](crate::abi::Config).
    pub const CONFIG: &str = "k2r_config";
    /// Hash: cgroup id → [`Target`](crate::abi::Target).
    pub const TARGETS: &str = "k2r_targets";
    /// Hash: cookie of a network namespace with an in-pod listener → the cgroup id of the listener's pod.
    pub const NAMESPACES: &str = "k2r_namespaces";
    /// Hash: [`Handshake`](crate::abi::Handshake) → [`ConnectRecord`](crate::abi::ConnectRecord).
    pub const HANDSHAKES: &str = "k2r_handshakes";
    /// Hash: [lease](crate::abi::lease_in) of a share → when it ends, CLOCK_MONOTONIC nanoseconds.
    pub const SHARES: &str = "k2r_shares";
    /// Hash: cookie of a client socket → [`ConnectRecord`](crate::abi::ConnectRecord), until its handshake is
    /// over.
    pub const CLIENTS: &str = "k2r_clients";
    /// Socket storage of the agent's accepted sockets: [`ConnectRecord`](crate::abi::ConnectRecord).
    pub const ACCEPTED: &str = "k2r_accepted";
    /// Socket storage of a socket of the agent: a `u64` for the cookie of the socket's network namespace,
    /// which the connect hook writes.
    pub const NETNS: &str = "k2r_netns";
    /// Socket storage of the agent's own outgoing sockets: a non-zero `u32` lets them pass.
    pub const PASS: &str = "k2r_pass";
    /// Per-CPU array of `u64`, indexed by [`Counter`](crate::abi::Counter).
    pub const COUNTERS: &str = "k2r_counters";

    /// All of them.
    pub const ALL: [&str; 10] =
        [CONFIG, TARGETS, NAMESPACES, HANDSHAKES, SHARES, CLIENTS, ACCEPTED, NETNS, PASS, COUNTERS];
}

/// Programs.
pub mod program {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "k2r_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "k2r_connect6";
    /// `cgroup/getpeername4`.
    pub const PEER_NAME4: &str = "k2r_peer_name4";
    /// `cgroup/getpeername6`.
    pub const PEER_NAME6: &str = "k2r_peer_name6";
    /// `cgroup_skb/egress`.
    pub const EGRESS: &str = "k2r_egress";
    /// `cgroup/sendmsg4`.
    pub const SENDMSG4: &str = "k2r_sendmsg4";
    /// `cgroup/sendmsg6`.
    pub const SENDMSG6: &str = "k2r_sendmsg6";
    /// `cgroup/connect4`, at the root, where sockets fall to it.
    pub const ROOT_CONNECT4: &str = "k2r_root_conn4";
    /// `cgroup/connect6`, at the root, where sockets fall to it.
    pub const ROOT_CONNECT6: &str = "k2r_root_conn6";
    /// `cgroup/setsockopt`.
    pub const SOCKET_OPTION: &str = "k2r_option";
    /// `sockops`.
    pub const SOCK_OPS: &str = "k2r_sock_ops";
    /// `cgroup/connect4`, at the root.
    pub const TASK_CONNECT4: &str = "k2r_task_conn4";
    /// `cgroup/connect6`, at the root.
    pub const TASK_CONNECT6: &str = "k2r_task_conn6";
    /// `cgroup/setsockopt`, at the root.
    pub const TASK_SOCKET_OPTION: &str = "k2r_task_option";
    /// `cgroup/sendmsg4`, at the root.
    pub const TASK_SENDMSG4: &str = "k2r_task_send4";
    /// `cgroup/sendmsg6`, at the root.
    pub const TASK_SENDMSG6: &str = "k2r_task_send6";
    /// tc, on egress of devices with an Ethernet header.
    pub const WIRE: &str = "k2r_wire";
    /// tc, on egress of devices without a link header.
    pub const WIRE_IP: &str = "k2r_wire_ip";

    /// All of them that belong on cgroups.
    pub const ALL: [&str; 16] = [
        CONNECT4,
        CONNECT6,
        EGRESS,
        PEER_NAME4,
        PEER_NAME6,
        ROOT_CONNECT4,
        ROOT_CONNECT6,
        SENDMSG4,
        SENDMSG6,
        SOCKET_OPTION,
        SOCK_OPS,
        TASK_CONNECT4,
        TASK_CONNECT6,
        TASK_SENDMSG4,
        TASK_SENDMSG6,
        TASK_SOCKET_OPTION,
    ];
    /// Those that belong on network devices.
    pub const WIRES: [&str; 2] = [WIRE, WIRE_IP];
}

/// The boot guard's maps and programs; it is a separate object.
pub mod boot {
    /// Array of one [`BootConfig`](crate::abi::BootConfig).
    pub const CONFIG: &str = "k2r_boot_config";
    /// Per-CPU array of one `u64`: the number of denied attempts.
    pub const DENIED: &str = "k2r_boot_denied";
    /// Hash: the ids of the host's own cgroups → 1.
    pub const HOSTS: &str = "k2r_boot_hosts";

    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "k2r_boot_conn4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "k2r_boot_conn6";
    /// `cgroup_skb/egress`.
    pub const EGRESS: &str = "k2r_boot_egress";
    /// `cgroup/setsockopt`.
    pub const SOCKET_OPTION: &str = "k2r_boot_option";
    /// `cgroup/sendmsg4`.
    pub const SENDMSG4: &str = "k2r_boot_send4";
    /// `cgroup/sendmsg6`.
    pub const SENDMSG6: &str = "k2r_boot_send6";

    /// The maps.
    pub const MAPS: [&str; 3] = [CONFIG, DENIED, HOSTS];
    /// tc, on egress of the node's cards.
    pub const WIRE: &str = "k2r_boot_wire";
    /// The programs at the cgroup root.
    pub const PROGRAMS: [&str; 6] = [EGRESS, SOCKET_OPTION, CONNECT4, CONNECT6, SENDMSG4, SENDMSG6];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel() {
        for name in map::ALL
            .iter()
            .chain(&program::ALL)
            .chain(&program::WIRES)
            .chain(&boot::MAPS)
            .chain(&boot::PROGRAMS)
            .chain([&boot::WIRE])
        {
            assert!(name.len() <= 15 && name.starts_with(PREFIX), "{name}");
        }
    }
}
