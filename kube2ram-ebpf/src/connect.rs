//! `connect4`, `connect6`: decide on a connect(2), and rewrite its destination. Nearly all pods are
//! redirected to the in-pod listener in their network namespace. Only this hook leads there, so the listener
//! proves the identity, and nothing is recorded. Other pods are redirected to the host listener, and the
//! calling task is recorded.
//!
//! Each program exists twice: for the pods' cgroup, and for the root cgroup where sockets fall to it (cgroup
//! v1 `net_cls` or `net_prio` in use below Linux 5.15). At the root, the calling task decides whether the
//! connection is a pod's. The host's processes are not restricted.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{
    abi::{Config, Counter, TARGET_HAS_IPV6},
    connection::{
        AF_INET, AF_INET6, LOOPBACK_BE, LOOPBACK6_BE, PROBE_ADDR, addr_be, is_loopback, is_loopback6,
        is_metadata6, v4_mapped,
    },
    verdict::{Attempt, Verdict, dials_agent, verdict},
};

use crate::{
    context::SockAddr,
    maps::{CONFIG, NETNS, count},
    pods::is_pods_task,
    record::record,
    target::{self, Found, has_pass, is_denied_dial},
};

/// The return values of a connect hook.
const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// Where a program is attached, and so which sockets it sees.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AttachmentPoint {
    /// Only pods' sockets.
    Pods,
    /// All sockets of the node.
    Root,
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_connect4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, Asked { addr_be: context.addr_be(), is_native6: false }, AF_INET, AttachmentPoint::Pods)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_connect6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context), AttachmentPoint::Pods)
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_root_conn4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, Asked { addr_be: context.addr_be(), is_native6: false }, AF_INET, AttachmentPoint::Root)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_root_conn6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context), AttachmentPoint::Root)
}

/// Where a connect(2) wants to go.
#[derive(Clone, Copy)]
struct Asked {
    /// IPv4 address, network byte order. For the metadata server's IPv6 address, its IPv4 address.
    addr_be: u32,
    /// Whether the client asked for the IPv6 address.
    is_native6: bool,
}

#[inline(always)]
fn judge6(context: &SockAddr, attachment_point: AttachmentPoint) -> i32 {
    let words = context.addr6_be();
    let asked = match v4_mapped(words) {
        Some(addr_be) => Asked { addr_be, is_native6: false },
        None => {
            let Some(config) = CONFIG.get(0) else { return unconfigured(attachment_point) };
            if !is_metadata6(&config.metadata_addr6_be, words) {
                return if is_loopback6(words) && is_denied_dial(context) { DENY } else { ALLOW };
            }
            Asked { addr_be: config.metadata_addr_be, is_native6: true }
        }
    };
    judge(context, asked, AF_INET6, attachment_point)
}

/// The verdict without configuration; the array's only element always exists. On the pods' cgroup every
/// connection is denied. On the root cgroup it is allowed, because no task can be recognised as a pod's.
#[inline(always)]
fn unconfigured(attachment_point: AttachmentPoint) -> i32 {
    if attachment_point == AttachmentPoint::Root { ALLOW } else { DENY }
}

/// The verdict, carried out and counted.
#[inline(always)]
fn judge(context: &SockAddr, asked: Asked, family: u16, attachment_point: AttachmentPoint) -> i32 {
    let addr_be = asked.addr_be;
    let Some(config) = CONFIG.get(0) else { return unconfigured(attachment_point) };
    if addr_be != config.metadata_addr_be {
        return elsewhere(context, config, addr_be, attachment_point); // nearly every connect: before any map is searched
    }
    if attachment_point == AttachmentPoint::Root && !is_pods_task(config) {
        return ALLOW;
    }
    let attempt = Attempt {
        addr_be,
        port_be: context.port_be(),
        protocol: context.protocol(),
        has_pass: has_pass(context),
    };
    let (answer, outcome) = match verdict(config, &attempt) {
        Verdict::Deny(reason) => (DENY, reason),
        Verdict::Pass => (ALLOW, Counter::Passed),
        Verdict::Redirect => redirect(context, config, asked, family),
    };
    #[cfg(feature = "debug-log")]
    log(context, attempt.port_be, answer, outcome);
    count(outcome);
    answer
}

/// Redirects to the in-pod listener, if the socket is in the listener's network namespace; otherwise to the
/// host listener, which answers for the calling task.
#[inline(always)]
fn redirect(context: &SockAddr, config: &Config, asked: Asked, family: u16) -> (i32, Counter) {
    match target::find(context) {
        Found::Here(target) => {
            // A socket that asked for the IPv6 address, and may use no other family (`IPV6_V6ONLY`), gets an
            // IPv6 address if the listener has one.
            if family == AF_INET {
                context.set_destination(LOOPBACK_BE, target.port_be);
            } else if asked.is_native6 && target.flags & TARGET_HAS_IPV6 != 0 {
                context.set_destination6(LOOPBACK6_BE, target.port_be);
            } else {
                context.set_mapped_destination(LOOPBACK_BE, target.port_be);
            }
            return (ALLOW, Counter::Redirected);
        }
        Found::Elsewhere => count(Counter::OtherNamespace),
        Found::None => {}
    }
    if config.agent_addr_be == 0 {
        return (DENY, Counter::DeniedNoTarget);
    }
    record(config, context);
    // An IPv6 socket is redirected to the IPv4 listener by the IPv4-mapped address: the kernel reads the
    // destination after this hook, and then connects over IPv4. The kernel refuses this for a socket that is
    // IPv6-only or bound to an IPv6 address.
    if family == AF_INET6 {
        context.set_mapped_destination(config.agent_addr_be, config.agent_port_be);
    } else {
        context.set_destination(config.agent_addr_be, config.agent_port_be);
    }
    (ALLOW, Counter::Redirected)
}

/// A connect(2) to any other address.
#[inline(always)]
fn elsewhere(context: &SockAddr, config: &Config, addr_be: u32, attachment_point: AttachmentPoint) -> i32 {
    if is_loopback(addr_be) && is_denied_dial(context) {
        return DENY;
    }
    if (addr_be != PROBE_BE && addr_be != config.agent_addr_be)
        || (attachment_point == AttachmentPoint::Root && !is_pods_task(config))
    {
        return ALLOW;
    }
    if addr_be == PROBE_BE {
        // The agent dials the probe's address with its own socket, whose storage has room for the answer.
        if let Some(netns) = context.socket().and_then(|socket| socket.stored(&NETNS)) {
            *netns = context.netns();
        }
        count(Counter::Probed);
        return DENY;
    }
    vouch(context, config, addr_be);
    ALLOW
}

const PROBE_BE: u32 = addr_be(PROBE_ADDR);

/// Records a pod that dials the host listener itself, as an `http_proxy` does, as if it had been redirected
/// there.
#[inline(always)]
fn vouch(context: &SockAddr, config: &Config, addr_be: u32) {
    let attempt =
        Attempt { addr_be, port_be: context.port_be(), protocol: context.protocol(), has_pass: false };
    if dials_agent(config, &attempt) {
        record(config, context);
        count(Counter::DialledAgent);
    }
}

#[cfg(feature = "debug-log")]
#[inline(always)]
fn log(context: &SockAddr, port_be: u16, answer: i32, outcome: Counter) {
    use crate::context::{current_cgroup, current_tgid};
    let (cgroup, tgid, port) = (current_cgroup(), current_tgid(), u16::from_be(port_be));
    if answer == DENY {
        aya_log_ebpf::debug!(
            context.inner(),
            "deny cgroup={} tgid={} port={} counter={}",
            cgroup,
            tgid,
            port,
            outcome as u32
        );
    } else if matches!(outcome, Counter::Passed) {
        aya_log_ebpf::debug!(context.inner(), "pass cgroup={} tgid={} port={}", cgroup, tgid, port);
    } else {
        aya_log_ebpf::debug!(context.inner(), "redirect cgroup={} tgid={} port={}", cgroup, tgid, port);
    }
}
