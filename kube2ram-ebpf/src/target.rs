//! The calling pod's own listener. Called by `connect`, `peer_name` and `task`.

use kube2ram_common::{
    abi::{Counter, MAX_CGROUP_LEVEL, Target},
    verdict::{is_listener_port, is_tcp},
};

use crate::{
    context::{SockAddr, current_ancestor_cgroup},
    maps::{NAMESPACES, PASS, TARGETS, count},
};

/// What is known of the calling pod's listener.
pub(crate) enum Found {
    /// It has one in the socket's network namespace.
    Here(Target),
    /// It has one in another network namespace.
    Elsewhere,
    /// It has none.
    None,
}

/// The target of the outermost ancestor that has one, so that a nested cgroup cannot shadow its pod's.
#[inline(always)]
pub(crate) fn find(context: &SockAddr) -> Found {
    let mut level = 1;
    while level <= MAX_CGROUP_LEVEL {
        let cgroup = current_ancestor_cgroup(level);
        if cgroup == 0 {
            break;
        }
        // SAFETY: the agent replaces entries, never writes into one.
        if let Some(target) = unsafe { TARGETS.get(cgroup) } {
            let target = *target;
            return if context.netns() == target.netns { Found::Here(target) } else { Found::Elsewhere };
        }
        level += 1;
    }
    Found::None
}

/// Whether the port of the context, at the loopback device, is that of the calling pod's own listener. For nearly every port, without a look at a map.
#[inline(always)]
pub(crate) fn is_own_listener(context: &SockAddr) -> bool {
    let port_be = context.port_be();
    is_listener_port(port_be)
        && match find(context) {
            Found::Here(target) => target.port_be == port_be,
            Found::Elsewhere | Found::None => false,
        }
}

/// Whether the socket is one of the agent's own that may go where it wants.
#[inline(always)]
pub(crate) fn has_pass(context: &SockAddr) -> bool {
    context.socket().and_then(|socket| socket.stored(&PASS)).is_some_and(|pass| *pass != 0)
}

/// Whether a connect(2) to the loopback device dials a pod's listener, and so is denied. No honest client does, not even the pod's own, which is redirected: nobody is to
/// be a pod because a proxy in it forwards what comes from outside to the loopback device, because a program of the node does (`kubectl port-forward`), by a socket that
/// it was given, or in a namespace that it has entered. The agent tries those that it opens.
#[inline(always)]
pub(crate) fn is_denied_dial(context: &SockAddr) -> bool {
    if !is_listener(context) || has_pass(context) {
        return false;
    }
    count(Counter::DeniedListener);
    true
}

/// The same, for whoever sees what the pods' own programs leave: a pod that is at its own listener was redirected there.
#[inline(always)]
pub(crate) fn is_denied_leftover(context: &SockAddr) -> bool {
    if !is_listener(context) || matches!(find(context), Found::Here(_)) || has_pass(context) {
        return false;
    }
    count(Counter::DeniedListener);
    true
}

/// Whether there is a listener of the agent in the socket's network namespace, and the port is one of those that it may have, or that of an agent that is about to end.
#[inline(always)]
fn is_listener(context: &SockAddr) -> bool {
    is_listener_port(context.port_be())
        && is_tcp(context.protocol())
        // SAFETY: only whether there is one counts.
        && unsafe { NAMESPACES.get(context.netns()) }.is_some()
}
