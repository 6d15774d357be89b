//! The maps. They are BTF maps, so that `bpftool map dump` shows fields by name. Socket storage also requires
//! BTF. The attribute's name is the kernel's; [`names`](kube2ram_common::names) repeats it for the agent, and
//! a kernel test compares the two.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, PerCpuArray, SkStorage},
    macros::btf_map,
};
use kube2ram_common::abi::{
    Config, ConnectRecord, Counter, Handshake, MAX_HANDSHAKES, MAX_LEASES, MAX_TARGETS, Target,
};

#[btf_map(name = "k2r_config")]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

#[btf_map(name = "k2r_targets")]
pub(crate) static TARGETS: HashMap<u64, Target, MAX_TARGETS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The pod of a network namespace.
#[btf_map(name = "k2r_namespaces")]
pub(crate) static NAMESPACES: HashMap<u64, u64, MAX_TARGETS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Keyed by the cookie of the client's socket, from connect(2) until the record is handed over. Socket
/// storage is not used, because the kernel counts it as the agent's memory, and a pod can have as much of it
/// as sockets.
#[btf_map(name = "k2r_clients")]
pub(crate) static CLIENTS: HashMap<u64, ConnectRecord, MAX_HANDSHAKES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// A plain hash: in an LRU one pod's handshakes could evict another pod's, and reuse their memory.
#[btf_map(name = "k2r_handshakes")]
pub(crate) static HANDSHAKES: HashMap<
    Handshake,
    ConnectRecord,
    MAX_HANDSHAKES,
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// Each connection with a record has an entry here.
#[btf_map(name = "k2r_shares")]
pub(crate) static SHARES: HashMap<u64, u64, MAX_LEASES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

#[btf_map(name = "k2r_accepted")]
pub(crate) static ACCEPTED: SkStorage<ConnectRecord> = SkStorage::new();

#[btf_map(name = "k2r_netns")]
pub(crate) static NETNS: SkStorage<u64> = SkStorage::new();

#[btf_map(name = "k2r_pass")]
pub(crate) static PASS: SkStorage<u32> = SkStorage::new();

#[btf_map(name = "k2r_counters")]
static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// Adds one.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: this CPU's own slot. A softirq that counts in between may cost one increment, never more.
        unsafe { *value += 1 }
    }
}
