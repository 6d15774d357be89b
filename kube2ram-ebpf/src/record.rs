//! Records of connections to the host's listener, from connect(2) on, and what each takes of its pod's share. Called by `connect` and `handshake`.

use kube2ram_common::abi::{
    ANNOUNCE_WITHIN_NS, Config, ConnectRecord, Counter, HANDSHAKE_MAX_AGE_NS, is_over, share_of,
};

use crate::{
    context::{SockAddr, current_cgroup, now_ns},
    maps::{CLIENTS, count},
    pods::accountable_cgroup,
    share,
};

/// Records the calling task as the one behind a client socket. Who is not recorded is not vouched for; why is counted.
///
/// The connect hook runs under the socket's lock, so that nobody else writes under this cookie.
#[inline(always)]
pub(crate) fn record(config: &Config, context: &SockAddr) {
    let (cookie, now) = (context.socket_cookie(), now_ns());
    forget(cookie);
    let until = now + ANNOUNCE_WITHIN_NS;
    let place = match share::take(share_of(accountable_cgroup(config)), cookie, until) {
        Ok(place) => place,
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
        place,
        place_until_ns: until,
        // Between two zeros: next to each other, LLVM writes them by a byte loop, which 5.10 without CAP_PERFMON refuses.
        ambiguous: 0,
        is_elsewhere: u64::from(is_elsewhere),
        established: 0,
    };
    if CLIENTS.insert(cookie, record, 0).is_err() {
        share::give_back(place, until);
        count(Counter::HandshakesFull);
    }
}

/// The record of a socket whose SYN is about to be sent: it keeps its place for as long as a handshake may take. `None` if there is none, or it is of a connect(2) that
/// came to nothing.
#[inline(always)]
pub(crate) fn announced(cookie: u64) -> Option<&'static ConnectRecord> {
    let record = CLIENTS.get_ptr_mut(cookie)?;
    // SAFETY: the element stays readable and writable while the program runs (RCU).
    let record = unsafe { &mut *record };
    let (former, until) = (record.place_until_ns, record.connected_at_ns + HANDSHAKE_MAX_AGE_NS);
    // Announced already, by this program at another level of the cgroup tree?
    if former != until {
        if is_over(now_ns(), former) || !share::keep(record.place, former, until) {
            return None;
        }
        record.place_until_ns = until;
    }
    Some(record)
}

/// Removes a socket's record, if it has one, and gives its place back.
#[inline(always)]
pub(crate) fn forget(cookie: u64) {
    // SAFETY: the element stays readable while the program runs (RCU).
    let Some(record) = (unsafe { CLIENTS.get(cookie) }) else { return };
    let (place, until) = (record.place, record.place_until_ns);
    if CLIENTS.remove(cookie).is_ok() {
        share::give_back(place, until);
    }
}
