//! Each pod's share of the handshake map. A handshake takes a place when it is announced and gives it back with its entry. Called by `handshake`.
//!
//! Places, not a count: a count that one lost decrement leaves too high would refuse a pod for ever, while a place that nobody gave back is free again
//! when no handshake can be that old.

use aya_ebpf::bindings::BPF_NOEXIST;
use kube2ram_common::abi::{HANDSHAKE_MAX_AGE_NS, SHARE_PROBES, place_in};

use crate::{context::now_ns, maps::SHARES};

/// Takes a place of a share, beginning to look at `first`: its key, if one was free.
#[inline(always)]
pub(crate) fn take(share: u64, first: u64) -> Option<u64> {
    let now = now_ns();
    let mut probe = 0;
    while probe < SHARE_PROBES {
        let key = place_in(share, first + probe);
        if SHARES.insert(key, now, u64::from(BPF_NOEXIST)).is_ok() {
            return Some(key);
        }
        // SAFETY: a value is replaced as a whole, never written in place.
        if let Some(taken_at) = unsafe { SHARES.get(key) }
            && now.wrapping_sub(*taken_at) > HANDSHAKE_MAX_AGE_NS
        {
            give_back(key);
            if SHARES.insert(key, now, u64::from(BPF_NOEXIST)).is_ok() {
                return Some(key);
            }
        }
        probe += 1;
    }
    None
}

/// Frees a place.
#[inline(always)]
pub(crate) fn give_back(key: u64) {
    let _gone_already = SHARES.remove(key);
}
