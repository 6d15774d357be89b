//! Records of connections to the host listener, from connect(2) on, and the lease that each takes of its
//! pod's share. Called by `connect` and `handshake`.

use kube2ram_common::abi::{
    ANNOUNCE_WITHIN_NS, Config, ConnectRecord, Counter, HANDSHAKE_MAX_AGE_NS, is_over, share_of,
};

use crate::{
    context::{SockAddr, current_cgroup, now_ns},
    maps::{CLIENTS, count},
    pods::accountable_cgroup,
    share,
};

/// Records the calling task for a client socket. A connection without a record is refused by the agent; the
/// reason is counted.
///
/// The connect hook runs under the socket's lock, so no other program writes under this cookie.
#[inline(always)]
pub(crate) fn record(config: &Config, context: &SockAddr) {
    let (cookie, now) = (context.socket_cookie(), now_ns());
    forget(cookie);
    let until = now + ANNOUNCE_WITHIN_NS;
    let lease = match share::take(share_of(accountable_cgroup(config)), cookie, until) {
        Ok(lease) => lease,
        Err(reason) => {
            count(reason);
            return;
        }
    };
    let is_elsewhere = config.agent_netns != 0 && config.agent_netns != context.netns();
    let record = ConnectRecord {
        cgroup: current_cgroup(),
        cookie,
        connected_at_ns: now,
        lease,
        lease_until_ns: until,
        // The field stands between two zeros: for adjacent zeros LLVM writes a byte loop, which Linux 5.10
        // refuses without CAP_PERFMON.
        ambiguous: 0,
        is_elsewhere: u64::from(is_elsewhere),
        established: 0,
    };
    if CLIENTS.insert(cookie, record, 0).is_err() {
        share::give_back(lease, until);
        count(Counter::HandshakesFull);
    }
}

/// The record of a socket whose SYN is about to be sent. Its lease is renewed for as long as a handshake may
/// take. `None` if there is no record, or it belongs to a connect(2) that failed.
#[inline(always)]
pub(crate) fn announced(cookie: u64) -> Option<&'static ConnectRecord> {
    let record = CLIENTS.get_ptr_mut(cookie)?;
    // SAFETY: the element stays readable and writable while the program runs (RCU).
    let record = unsafe { &mut *record };
    let (former, until) = (record.lease_until_ns, record.connected_at_ns + HANDSHAKE_MAX_AGE_NS);
    // The program may be attached at two levels of the cgroup tree: then the first run has already announced
    // it.
    if former != until {
        if is_over(now_ns(), former) || !share::keep(record.lease, former, until) {
            return None;
        }
        record.lease_until_ns = until;
    }
    Some(record)
}

/// Removes a socket's record, if it has one, and gives its lease back.
#[inline(always)]
pub(crate) fn forget(cookie: u64) {
    // SAFETY: the element stays readable while the program runs (RCU).
    let Some(record) = (unsafe { CLIENTS.get(cookie) }) else { return };
    let (lease, until) = (record.lease, record.lease_until_ns);
    if CLIENTS.remove(cookie).is_ok() {
        share::give_back(lease, until);
    }
}
