//! `sock_ops`: carries the record from the client socket, through the handshake's 4-tuple, to the socket that the agent accepts.
//!
//! The record is consumed by the hand-over. A tuple that stayed behind could be taken over by another socket of the same namespace; that, TCP options
//! and `sock_diag` were all spoofed in experiments.

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use kube2ram_common::abi::{ConnectRecord, Counter, FLAG_AMBIGUOUS, HANDSHAKE_MAX_AGE_NS};

use crate::{
    context::{SockOps, now_ns},
    maps::{ACCEPTED, CLIENTS, HANDSHAKES, count},
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
    } else if let Some(record) = socket.stored(&CLIENTS) {
        if operation == BPF_SOCK_OPS_TCP_CONNECT_CB {
            announce(&context, record);
        } else if context.new_state() == BPF_TCP_CLOSE {
            withdraw(&context, record);
        }
    }
    CONTINUE
}

/// The client's SYN is about to be built: nobody can have seen the connection yet.
#[inline(always)]
fn announce(context: &SockOps, record: &ConnectRecord) {
    if context.remote() != (record.target_addr_be, record.target_port_be) {
        count(Counter::Superseded);
        return;
    }
    let key = context.handshake_of_client();
    if HANDSHAKES.insert(key, record, u64::from(BPF_NOEXIST)).is_err() {
        let Some(other) = HANDSHAKES.get_ptr_mut(key) else {
            count(Counter::HandshakesFull);
            return;
        };
        // SAFETY: the element stays valid while the program runs (RCU).
        let other = unsafe { &mut *other };
        if other.cookie != record.cookie {
            // In place: replacing the element would free it under a hand-over that is reading it.
            other.flags = FLAG_AMBIGUOUS;
            count(Counter::Ambiguous);
            return;
        }
        // The same socket, reconnected. Replacing an element cannot fail for want of room.
        let _replaced = HANDSHAKES.insert(key, record, u64::from(BPF_ANY));
    }
    context.watch_state(BPF_SOCK_OPS_STATE_CB_FLAG.cast_signed());
}

/// The agent's listener completed a handshake; accept(2) returns the socket only after this.
#[inline(always)]
fn hand_over(context: &SockOps, accepted: Socket) {
    let key = context.handshake_of_accepted();
    let Some(pending) = HANDSHAKES.get_ptr_mut(key) else { return };
    let Some(record) = accepted.store_new(&ACCEPTED, pending) else {
        count(Counter::NotHandedOver);
        return;
    };
    // Consumed before it is believed: an element that vanished meanwhile may have been recycled while it was copied.
    let consumed = HANDSHAKES.remove(key).is_ok();
    if !consumed || now_ns().wrapping_sub(record.connected_at_ns) > HANDSHAKE_MAX_AGE_NS {
        record.flags = FLAG_AMBIGUOUS;
        count(Counter::NotHandedOver);
        return;
    }
    count(Counter::HandedOver);
}

/// The client socket closed before its handshake was completed.
#[inline(always)]
fn withdraw(context: &SockOps, record: &ConnectRecord) {
    let key = context.handshake_of_client();
    // SAFETY: the element stays valid while the program runs (RCU).
    if let Some(pending) = unsafe { HANDSHAKES.get(key) }
        && pending.cookie == record.cookie
    {
        let _gone_already = HANDSHAKES.remove(key);
    }
}
