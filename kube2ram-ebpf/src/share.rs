//! Each pod's share of the handshake map. A handshake takes a place when it is announced and gives it back with its entry. Called by `handshake`.
//!
//! Places, not a count: a count that one lost decrement leaves too high would refuse a pod for ever, while a place that nobody gave back is free again
//! when no handshake can be that old.

use aya_ebpf::bindings::BPF_NOEXIST;
use kube2ram_common::abi::{SHARE_PROBES, is_past_max_age, place_in};

use crate::{context::now_ns, maps::SHARES};

/// Takes a place of a share, beginning to look at `first`: its key, if one was free. (Not a loop: see `pods`.)
#[inline(always)]
pub(crate) fn take(share: u64, first: u64) -> Option<u64> {
    macro_rules! probe {
        ($($offset:literal)+) => {
            const _: () = assert!(SHARE_PROBES == [$($offset),+].len() as u64);
            $(
                let key = place_in(share, first + $offset);
                if is_taken_by_us(key) {
                    return Some(key);
                }
            )+
        };
    }
    probe!(0 1 2 3 4 5 6 7);
    None
}

#[inline(always)]
fn is_taken_by_us(key: u64) -> bool {
    let now = now_ns();
    if SHARES.insert(key, now, u64::from(BPF_NOEXIST)).is_ok() {
        return true;
    }
    // SAFETY: a value is replaced as a whole, never written in place.
    let is_forgotten = match unsafe { SHARES.get(key) } {
        Some(taken_at) => is_past_max_age(now, *taken_at),
        None => false,
    };
    if !is_forgotten {
        return false;
    }
    give_back(key);
    SHARES.insert(key, now, u64::from(BPF_NOEXIST)).is_ok()
}

/// Frees a place.
#[inline(always)]
pub(crate) fn give_back(key: u64) {
    let _gone_already = SHARES.remove(key);
}
