//! Each pod's share of the connections to the host listener that are in flight. A connection takes a lease
//! when it is recorded, and gives it back with its record. Called by `record`.
//!
//! A share consists of leases and not of a counter. If a decrement were lost, a counter would stay too high
//! and refuse the pod for ever. A lease that was not given back expires when no handshake can be that old.

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use kube2ram_common::abi::{Counter, SHARE_PROBES, is_over, lease_in};

use crate::{context::now_ns, maps::SHARES};

/// Takes a lease of a share until a time, and returns its key, or why there is none. The search begins at
/// `first`. It is unrolled instead of a loop: see `pods`.
#[inline(always)]
pub(crate) fn take(share: u64, first: u64, until_ns: u64) -> Result<u64, Counter> {
    macro_rules! probe {
        ($($offset:literal)+) => {
            const _: () = assert!(SHARE_PROBES == [$($offset),+].len() as u64);
            $(
                let key = lease_in(share, first + $offset);
                match take_lease(key, until_ns) {
                    Taken::ByUs => return Ok(key),
                    Taken::ByOthers => {}
                    Taken::NoRoom => return Err(Counter::SharesFull),
                }
            )+
        };
    }
    probe!(0 1 2 3 4 5 6 7);
    Err(Counter::ShareFull)
}

/// The result of trying to take a lease.
enum Taken {
    ByOthers,
    ByUs,
    /// The map has no room for any key.
    NoRoom,
}

#[inline(always)]
fn take_lease(key: u64, until_ns: u64) -> Taken {
    if SHARES.insert(key, until_ns, u64::from(BPF_NOEXIST)).is_ok() {
        return Taken::ByUs;
    }
    // SAFETY: a value is replaced as a whole, never written in place.
    let Some(others) = (unsafe { SHARES.get(key) }) else { return Taken::NoRoom };
    let others = *others;
    if !is_over(now_ns(), others) {
        return Taken::ByOthers;
    }
    give_back(key, others);
    if SHARES.insert(key, until_ns, u64::from(BPF_NOEXIST)).is_ok() { Taken::ByUs } else { Taken::ByOthers }
}

/// Extends a lease, if it is still the one that was taken until `former_ns`.
#[inline(always)]
pub(crate) fn keep(key: u64, former_ns: u64, until_ns: u64) -> bool {
    is_taken_until(key, former_ns) && SHARES.insert(key, until_ns, u64::from(BPF_EXIST)).is_ok()
}

/// Frees a lease, unless another connection has taken it meanwhile.
#[inline(always)]
pub(crate) fn give_back(key: u64, until_ns: u64) {
    if is_taken_until(key, until_ns) {
        let _gone_already = SHARES.remove(key);
    }
}

#[inline(always)]
fn is_taken_until(key: u64, until_ns: u64) -> bool {
    // SAFETY: a value is replaced as a whole, never written in place.
    unsafe { SHARES.get(key) }.is_some_and(|taken| *taken == until_ns)
}
