//! Each pod's share of the connections to the host's listener that are in flight. A connection takes a place when it is recorded and gives it back with its record.
//! Called by `record`.
//!
//! Places, not a count: a count that one lost decrement leaves too high would refuse a pod for ever, while a place that nobody gave back is free again
//! when no handshake can be that old.

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use kube2ram_common::abi::{Counter, SHARE_PROBES, is_over, place_in};

use crate::{context::now_ns, maps::SHARES};

/// Takes a place of a share until a time, beginning to look at `first`: its key, or why there is none. (Not a loop: see `pods`.)
#[inline(always)]
pub(crate) fn take(share: u64, first: u64, until_ns: u64) -> Result<u64, Counter> {
    macro_rules! probe {
        ($($offset:literal)+) => {
            const _: () = assert!(SHARE_PROBES == [$($offset),+].len() as u64);
            $(
                let key = place_in(share, first + $offset);
                match take_place(key, until_ns) {
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

/// How it stands with a place.
enum Taken {
    ByOthers,
    ByUs,
    /// For no key at all.
    NoRoom,
}

#[inline(always)]
fn take_place(key: u64, until_ns: u64) -> Taken {
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

/// Keeps a place for longer, if it still is the one that was taken until `former_ns`.
#[inline(always)]
pub(crate) fn keep(key: u64, former_ns: u64, until_ns: u64) -> bool {
    is_taken_until(key, former_ns) && SHARES.insert(key, until_ns, u64::from(BPF_EXIST)).is_ok()
}

/// Frees a place, unless it is another's by now.
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
