//! `sock_ops`: carries the record from the client socket, through the handshake's 4-tuple, to the socket that the agent accepts.
//!
//! The record is consumed by the hand-over. A tuple that stayed behind could be taken over by another socket of the same namespace; that, TCP options
//! and `sock_diag` were all spoofed in experiments.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use kube2ram_common::abi::{ConnectRecord, Counter, FLAG_AMBIGUOUS, Handshake, is_past_max_age};

use crate::{
    context::{SockOps, now_ns},
    maps::{ACCEPTED, CLIENTS, HANDSHAKES, count},
    share,
    socket::Socket,
};

/// What a socket operations program returns when it has nothing to say.
const CONTINUE: u32 = 1;

#[sock_ops]
pub(crate) fn k2r_sock_ops(context: SockOpsContext) -> u32 {
    let context = SockOps::new(context);
    let operation = context.operation();
    if operation != BPF_SOCK_OPS_TCP_CONNECT_CB
        && operation != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && operation != BPF_SOCK_OPS_STATE_CB
    {
        return CONTINUE;
    }
    let Some(socket) = context.socket() else { return CONTINUE };
    if operation == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        hand_over(&context, socket);
    } else if operation == BPF_SOCK_OPS_TCP_CONNECT_CB {
        announce(&context, socket);
    } else if context.new_state() == BPF_TCP_CLOSE
        && let Some(record) = socket.stored(&CLIENTS)
    {
        withdraw(&context, record);
    }
    CONTINUE
}

/// The client's SYN is about to be built: nobody can have seen the connection yet.
#[inline(always)]
fn announce(context: &SockOps, client: Socket) {
    let key = context.handshake_of_client();
    let Some(record) = client.stored(&CLIENTS) else {
        // Not redirected. If it dials the agent itself, it must not find what a dead socket left under its 4-tuple.
        contest(key);
        return;
    };
    if context.remote() != (record.target_addr_be, record.target_port_be) {
        count(Counter::Superseded);
        contest(key);
        return;
    }
    let Some(place) = share::take(record.share, u64::from(key.client_port())) else {
        if !is_announced(key, record) {
            count(Counter::ShareFull);
            contest(key);
        }
        return;
    };
    record.share = place;
    let announced: &ConnectRecord = record;
    if HANDSHAKES.insert(key, announced, u64::from(BPF_NOEXIST)).is_ok() {
        context.watch_state(BPF_SOCK_OPS_STATE_CB_FLAG.cast_signed());
        return;
    }
    share::give_back(place);
    if !is_announced(key, record) && !contest(key) {
        count(Counter::HandshakesFull);
    }
}

/// Announced a moment ago, by this program at another level of the cgroup tree?
#[inline(always)]
fn is_announced(key: Handshake, record: &ConnectRecord) -> bool {
    // SAFETY: the element stays readable while the program runs (RCU).
    match unsafe { HANDSHAKES.get(key) } {
        Some(other) => other.cookie == record.cookie && other.connected_at_ns == record.connected_at_ns,
        None => false,
    }
}

/// A second socket claims the 4-tuple: marks the first one's claim, if there is one, so that neither is vouched for.
///
/// In place: replacing or removing the element would free it under a hand-over that is reading it, and make room for a third claim.
#[inline(always)]
fn contest(key: Handshake) -> bool {
    let Some(claim) = HANDSHAKES.get_ptr_mut(key) else { return false };
    // SAFETY: the element stays writable while the program runs (RCU).
    unsafe { (*claim).flags = FLAG_AMBIGUOUS };
    count(Counter::Ambiguous);
    true
}

/// The agent's listener completed a handshake; accept(2) returns the socket only after this.
#[inline(always)]
fn hand_over(context: &SockOps, accepted: Socket) {
    let key = context.handshake_of_accepted();
    let Some(claim) = HANDSHAKES.get_ptr_mut(key) else { return };
    let Some(record) = accepted.store_new(&ACCEPTED, claim) else {
        // SAFETY: the element stays readable while the program runs (RCU).
        consume(key, unsafe { (*claim).share });
        count(Counter::NotHandedOver);
        return;
    };
    let is_old = is_past_max_age(now_ns(), record.connected_at_ns);
    if confirm_and_consume(key, record) && !is_old && record.flags == 0 {
        count(Counter::HandedOver);
    } else {
        record.flags = FLAG_AMBIGUOUS;
        count(Counter::NotHandedOver);
    }
}

/// Removes the claim, and tells whether the record is a copy of it.
///
/// A freed element is reused at once (Linux 6.1 and later), not after a grace period: if the client closed during the copy, another pod's record may have
/// been copied, wholly or partly. So the copy is believed only if it is what the key leads to afterwards too, and is removed now.
#[inline(always)]
fn confirm_and_consume(key: Handshake, record: &ConnectRecord) -> bool {
    let Some(claim) = HANDSHAKES.get_ptr(key) else { return false };
    // SAFETY: the element stays readable while the program runs (RCU).
    let claim = unsafe { &*claim };
    let is_copy = is_same(record, claim);
    consume(key, claim.share) && is_copy
}

/// Removes a claim and gives its place back; whether it still was there.
#[inline(always)]
fn consume(key: Handshake, place: u64) -> bool {
    let is_removed = HANDSHAKES.remove(key).is_ok();
    if is_removed {
        share::give_back(place);
    }
    is_removed
}

/// Compares what the agent relies on. Cookie and time together are never the same for two records.
#[inline(always)]
const fn is_same(one: &ConnectRecord, other: &ConnectRecord) -> bool {
    one.cgroup == other.cgroup
        && one.cookie == other.cookie
        && one.connected_at_ns == other.connected_at_ns
        && one.listener == other.listener
        && one.flags == other.flags
}

/// The client socket closed before its handshake was completed.
#[inline(always)]
fn withdraw(context: &SockOps, record: &ConnectRecord) {
    let key = context.handshake_of_client();
    // SAFETY: the element stays valid while the program runs (RCU).
    if let Some(pending) = unsafe { HANDSHAKES.get(key) }
        && pending.cookie == record.cookie
        && !consume(key, pending.share)
    {
        // Either the hand-over removed the entry first, and nothing is left to mark. Or the kernel did not get the lock of the hash bucket (-EBUSY
        // from Linux 5.11 on, -EDEADLK or -ETIMEDOUT from 6.15 on) and the entry outlives its socket: it must never be handed over.
        contest(key);
    }
}
