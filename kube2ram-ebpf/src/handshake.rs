//! `sock_ops`: carries the record of a connection to the host listener from the client socket, by the
//! handshake's 4-tuple, to the socket that the agent accepts.
//!
//! The record is consumed when it is handed over. Another socket of the same namespace could reuse a tuple
//! that stayed behind. Experiments spoofed that, TCP options and `sock_diag`.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use kube2ram_common::abi::{Config, ConnectRecord, Counter, Handshake, is_past_max_age};

use crate::{
    context::{SockOps, now_ns},
    maps::{ACCEPTED, CLIENTS, CONFIG, HANDSHAKES, count},
    record::{announced, forget},
    socket::Socket,
};

/// The return value of a socket operations program that changes nothing.
const CONTINUE: u32 = 1;

#[sock_ops]
pub(crate) fn k2r_sock_ops(context: SockOpsContext) -> u32 {
    let context = SockOps::new(context);
    let operation = context.operation();
    if operation != BPF_SOCK_OPS_TCP_CONNECT_CB
        && operation != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
        && operation != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
        && operation != BPF_SOCK_OPS_STATE_CB
    {
        return CONTINUE;
    }
    let Some(config) = CONFIG.get(0) else { return CONTINUE };
    let agent = (config.agent_addr_be, config.agent_port_be);
    if operation == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        if context.local() == agent
            && let Some(socket) = context.socket()
        {
            hand_over(context.handshake_of_accepted(), socket);
        }
        return CONTINUE;
    }
    if context.remote() != agent {
        return CONTINUE; // nearly every connection of the pods
    }
    if operation == BPF_SOCK_OPS_TCP_CONNECT_CB {
        announce(&context, config);
    } else if operation == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        confirm(&context);
    } else if context.new_state() == BPF_TCP_CLOSE {
        withdraw(&context);
    }
    CONTINUE
}

/// The kernel is about to build the client's SYN: no other socket can have seen the connection yet.
#[inline(always)]
fn announce(context: &SockOps, config: &Config) {
    let (key, cookie) = (context.handshake_of_client(), context.socket_cookie());
    let Some(record) = announced(cookie) else {
        // The connection has no record. It must not get the record that a dead socket left under its 4-tuple.
        contest(key);
        return;
    };
    // The socket has the host's address in another namespace. The owner of that namespace can complete a
    // handshake there, and on the host the address belongs to the host's own processes.
    if record.is_elsewhere == 1 && context.local().0 == config.agent_addr_be {
        forget(cookie);
        contest(key);
        return;
    }
    context.watch_state(BPF_SOCK_OPS_STATE_CB_FLAG.cast_signed());
    if HANDSHAKES.insert(key, record, u64::from(BPF_NOEXIST)).is_ok() {
        // A freed element is reused at once (Linux 6.1 and later): if this socket's record was removed during
        // the copy, a part of the copy may come from another record.
        if !is_copy_of(key, cookie) {
            contest(key);
        }
        return;
    }
    // The program may be attached at two levels of the cgroup tree: then the first run has already announced
    // it.
    if !is_of(key, cookie) && !contest(key) {
        count(Counter::HandshakesFull);
    }
}

/// Whether the handshake still equals the socket's record.
#[inline(always)]
fn is_copy_of(key: Handshake, cookie: u64) -> bool {
    // SAFETY: the element stays readable while the program runs (RCU).
    let Some(claim) = (unsafe { HANDSHAKES.get(key) }) else { return false };
    // SAFETY: as above.
    let Some(record) = (unsafe { CLIENTS.get(cookie) }) else { return false };
    claim.cookie == cookie && is_same(claim, record)
}

/// Whether the handshake belongs to this socket.
#[inline(always)]
fn is_of(key: Handshake, cookie: u64) -> bool {
    // SAFETY: the element stays readable while the program runs (RCU).
    match unsafe { HANDSHAKES.get(key) } {
        Some(claim) => claim.cookie == cookie,
        None => false,
    }
}

/// A second socket claims the 4-tuple: marks the first socket's claim, if there is one, so that neither
/// connection gets a record.
///
/// The claim is marked in place. Replacing or removing the element would free it while another CPU reads it
/// to hand it over, and would make room for a third claim.
#[inline(always)]
fn contest(key: Handshake) -> bool {
    let Some(claim) = HANDSHAKES.get_ptr_mut(key) else { return false };
    // SAFETY: the element stays writable while the program runs (RCU).
    unsafe { (*claim).ambiguous = 1 };
    count(Counter::Ambiguous);
    true
}

/// The client has received the answer to its SYN, so its address is not forged. On the same machine this
/// always happens before the agent's side is complete, because the client sends the last packet of the
/// handshake afterwards.
#[inline(always)]
fn confirm(context: &SockOps) {
    let (key, cookie) = (context.handshake_of_client(), context.socket_cookie());
    if let Some(claim) = HANDSHAKES.get_ptr_mut(key)
        // SAFETY: the element stays readable while the program runs (RCU).
        && unsafe { (*claim).cookie } == cookie
    {
        // SAFETY: the element stays writable while the program runs (RCU).
        unsafe { (*claim).established = 1 };
    }
}

/// The host listener completed a handshake; accept(2) returns the socket only after this.
#[inline(always)]
fn hand_over(key: Handshake, accepted: Socket) {
    let Some(claim) = HANDSHAKES.get_ptr_mut(key) else { return };
    let Some(record) = accepted.store_new(&ACCEPTED, claim) else {
        let _gone_already = HANDSHAKES.remove(key);
        count(Counter::NotHandedOver);
        return;
    };
    let is_old = is_past_max_age(now_ns(), record.connected_at_ns);
    let is_whole = record.ambiguous == 0 && record.established == 1;
    if confirm_and_consume(key, record) && !is_old && is_whole {
        forget(record.cookie);
        count(Counter::HandedOver);
    } else {
        record.ambiguous = 1;
        count(Counter::NotHandedOver);
    }
}

/// Removes the claim, and returns whether the record is a copy of it.
///
/// A freed element is reused at once (Linux 6.1 and later), not after a grace period: if the client closed
/// during the copy, the copy may be another pod's record, wholly or partly. So the copy counts only if it
/// equals the key's element after the copy, and this call removes that element.
#[inline(always)]
fn confirm_and_consume(key: Handshake, record: &ConnectRecord) -> bool {
    let Some(claim) = HANDSHAKES.get_ptr(key) else { return false };
    // SAFETY: the element stays readable while the program runs (RCU).
    let is_copy = is_same(record, unsafe { &*claim });
    HANDSHAKES.remove(key).is_ok() && is_copy
}

/// Compares the fields that the agent relies on. Two records never have the same cookie and time.
#[inline(always)]
const fn is_same(one: &ConnectRecord, other: &ConnectRecord) -> bool {
    one.cgroup == other.cgroup
        && one.cookie == other.cookie
        && one.connected_at_ns == other.connected_at_ns
        && one.ambiguous == other.ambiguous
}

/// The client socket closed. If its handshake was completed, its record is already removed.
#[inline(always)]
fn withdraw(context: &SockOps) {
    let (key, cookie) = (context.handshake_of_client(), context.socket_cookie());
    forget(cookie);
    if is_of(key, cookie) && HANDSHAKES.remove(key).is_err() {
        // Either the record was handed over first, and no entry is left. Or the kernel did not get the lock
        // of the hash bucket (-EBUSY from Linux 5.11 on, -EDEADLK or -ETIMEDOUT from 6.15 on), and the entry
        // outlives its socket: it must never be handed over.
        contest(key);
    }
}
