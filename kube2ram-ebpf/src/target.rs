//! The in-pod listener of the calling pod. Called by `connect`, `peer_name` and `task`.

use kube2ram_common::{
    abi::{Counter, MAX_CGROUP_LEVEL, Target},
    verdict::{is_listener_port, is_tcp},
};

use crate::{
    context::{SockAddr, current_ancestor_cgroup},
    maps::{NAMESPACES, PASS, TARGETS, count},
};

/// The in-pod listener of the calling pod.
pub(crate) enum Found {
    /// It is in the socket's network namespace.
    Here(Target),
    /// It is in another network namespace.
    Elsewhere,
    /// The pod has no in-pod listener.
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

/// Whether the port of the context, on the loopback device, is the port of the calling pod's in-pod listener.
/// For nearly every port the answer needs no map look-up.
#[inline(always)]
pub(crate) fn is_own_listener(context: &SockAddr) -> bool {
    let port_be = context.port_be();
    is_listener_port(port_be)
        && match find(context) {
            Found::Here(target) => target.port_be == port_be,
            Found::Elsewhere | Found::None => false,
        }
}

/// Whether the socket is one of the agent's own with a pass.
#[inline(always)]
pub(crate) fn has_pass(context: &SockAddr) -> bool {
    context.socket().and_then(|socket| socket.stored(&PASS)).is_some_and(|pass| *pass != 0)
}

/// Whether a connect(2) to the loopback device dials an in-pod listener itself, and so is denied. Legitimate
/// clients are redirected and never dial it. Otherwise a process could act as the pod: through a proxy in the
/// pod that forwards connections from outside to the loopback device, through a program of the node that does
/// so (`kubectl port-forward`), with a socket that it was given, or in a namespace that it has entered. Only
/// the agent dials the listeners that it opens, to test them.
#[inline(always)]
pub(crate) fn is_denied_dial(context: &SockAddr) -> bool {
    if !is_listener(context) || has_pass(context) {
        return false;
    }
    count(Counter::DeniedListener);
    true
}

/// The same for the task gate, which runs after the pods' own programs: a pod that connects to its in-pod
/// listener was redirected there.
#[inline(always)]
pub(crate) fn is_denied_leftover(context: &SockAddr) -> bool {
    if !is_listener(context) || matches!(find(context), Found::Here(_)) || has_pass(context) {
        return false;
    }
    count(Counter::DeniedListener);
    true
}

/// Whether the socket's network namespace has an in-pod listener, and the port is one that a listener of this
/// agent or of an outgoing agent may have.
#[inline(always)]
fn is_listener(context: &SockAddr) -> bool {
    is_listener_port(context.port_be())
        && is_tcp(context.protocol())
        // SAFETY: only the existence of the entry is used.
        && unsafe { NAMESPACES.get(context.netns()) }.is_some()
}
