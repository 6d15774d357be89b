//! `connect4`, `connect6`: the verdict on a connect(2), and the record of who called, left in the client socket's storage.
//!
//! Twice: for the cgroup of the pods, and for the root where sockets fall to it (cgroup v1 `net_cls` or `net_prio` in use below Linux 5.15). There the
//! calling task tells whether it is a pod's; the host's processes go where they want.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use kube2ram_common::{
    abi::{Config, ConnectRecord, Counter, DEFAULT_TARGET, MAX_CGROUP_LEVEL, Target, share_of},
    connection::{AF_INET, AF_INET6, PROBE_ADDR, addr_be, is_metadata6, v4_mapped},
    verdict::{Attempt, Precheck, Verdict, dials_agent, precheck, verdict},
};

use crate::{
    context::{SockAddr, current_ancestor_cgroup, current_cgroup, current_tgid, now_ns},
    maps::{CLIENTS, CONFIG, PASS, TARGETS, count},
    pods::{accountable_cgroup, is_pods_task},
    socket::Socket,
};

/// The return values of a connect hook.
const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// Where a program is attached, and so which sockets it sees.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The pods' alone.
    Pods,
    /// Everybody's.
    Root,
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_connect4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, Asked { addr_be: context.addr_be(), is_native6: false }, AF_INET, Place::Pods)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_connect6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context), Place::Pods)
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn k2r_root_conn4(context: SockAddrContext) -> i32 {
    let context = SockAddr::new(context);
    judge(&context, Asked { addr_be: context.addr_be(), is_native6: false }, AF_INET, Place::Root)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn k2r_root_conn6(context: SockAddrContext) -> i32 {
    judge6(&SockAddr::new(context), Place::Root)
}

/// Where a connect(2) wants to go.
#[derive(Clone, Copy)]
struct Asked {
    /// IPv4 address, network byte order. The metadata server's when it is asked for by its IPv6 address.
    addr_be: u32,
    /// Asked for by the IPv6 address.
    is_native6: bool,
}

/// An IPv6 socket can be sent to the same listener as an IPv4 one, by its IPv4-mapped address: the kernel looks at the destination after this hook, and then
/// connects over IPv4. A socket that is IPv6-only (`IPV6_V6ONLY`), or bound to an IPv6 address, is refused by the kernel.
#[inline(always)]
fn judge6(context: &SockAddr, place: Place) -> i32 {
    let words = context.addr6_be();
    let asked = match v4_mapped(words) {
        Some(addr_be) => Asked { addr_be, is_native6: false },
        None => {
            let Some(config) = CONFIG.get(0) else { return unconfigured(place) };
            if !is_metadata6(&config.metadata_addr6_be, words) {
                forget(context);
                return ALLOW;
            }
            Asked { addr_be: config.metadata_addr_be, is_native6: true }
        }
    };
    judge(context, asked, AF_INET6, place)
}

/// The array's only element is always there; without it nothing is known, so nothing of a pod passes, and nobody can tell who is one.
#[inline(always)]
fn unconfigured(place: Place) -> i32 {
    if place == Place::Root { ALLOW } else { DENY }
}

/// The verdict, carried out and counted. (The destination is written where the target is known: carried beyond the branches, LLVM reads it from the
/// stack on every path, and 5.10 without CAP_PERFMON refuses to read what a path did not write.)
#[inline(always)]
fn judge(context: &SockAddr, asked: Asked, family: u16, place: Place) -> i32 {
    let Asked { addr_be, is_native6 } = asked;
    let Some(config) = CONFIG.get(0) else { return unconfigured(place) };
    if addr_be != config.metadata_addr_be {
        return elsewhere(context, config, addr_be, family, place); // nearly every connect: before any map is searched
    }
    if place == Place::Root && !is_pods_task(config) {
        return ALLOW;
    }
    let Some(socket) = context.socket() else { return DENY };
    let attempt = Attempt {
        addr_be,
        port_be: context.port_be(),
        protocol: context.protocol(),
        has_pass: socket.stored(&PASS).is_some_and(|pass| *pass != 0),
    };
    let prechecked = precheck(config, &attempt);
    let (target_cgroup, target) = match prechecked {
        Precheck::NeedTarget => find_target(),
        Precheck::Deny(_) | Precheck::Pass => (DEFAULT_TARGET, None),
    };
    let mut judged = verdict(prechecked, target);
    if let Verdict::Redirect(target) = judged {
        let asked_for = if is_native6 { 0 } else { addr_be };
        if !record(context, config, socket, (asked_for, attempt.port_be), family, target_cgroup, target) {
            judged = Verdict::Deny(Counter::DeniedNoMemory);
        } else if family == AF_INET6 {
            context.set_mapped_destination(target.addr_be, target.port_be);
        } else {
            context.set_destination(target.addr_be, target.port_be);
        }
    }
    #[cfg(feature = "debug-log")]
    log(context, &attempt, judged);
    let (answer, outcome) = match judged {
        Verdict::Deny(reason) => (DENY, reason),
        Verdict::Pass => (ALLOW, Counter::Passed),
        Verdict::Redirect(_) => (ALLOW, Counter::Redirected),
    };
    count(outcome);
    answer
}

/// A connect(2) to anybody else.
#[inline(always)]
fn elsewhere(context: &SockAddr, config: &Config, addr_be: u32, family: u16, place: Place) -> i32 {
    if (addr_be == PROBE_BE || addr_be == config.agent_addr_be)
        && (place == Place::Pods || is_pods_task(config))
    {
        if addr_be == PROBE_BE {
            count(Counter::Probed);
            return DENY;
        }
        if vouch(context, config, addr_be, family) {
            count(Counter::DialledAgent);
            return ALLOW;
        }
    }
    forget(context);
    ALLOW
}

const PROBE_BE: u32 = addr_be(PROBE_ADDR);

/// Records a pod that dials the agent's listener on the host itself, as an `http_proxy` does, as if it had been redirected there. Who is not recorded
/// is not vouched for.
#[inline(always)]
fn vouch(context: &SockAddr, config: &Config, addr_be: u32, family: u16) -> bool {
    let attempt =
        Attempt { addr_be, port_be: context.port_be(), protocol: context.protocol(), has_pass: false };
    if !dials_agent(config, &attempt) {
        return false;
    }
    // SAFETY: the agent replaces entries, never writes into one.
    let Some(target) = (unsafe { TARGETS.get(DEFAULT_TARGET) }) else { return false };
    let Some(socket) = context.socket() else { return false };
    #[cfg(feature = "debug-log")]
    aya_log_ebpf::debug!(
        context.inner(),
        "dial cgroup={} tgid={} port={}",
        current_cgroup(),
        current_tgid(),
        u16::from_be(attempt.port_be)
    );
    target.addr_be == addr_be
        && target.port_be == attempt.port_be
        && record(context, config, socket, (addr_be, attempt.port_be), family, DEFAULT_TARGET, *target)
}

/// A socket that now goes elsewhere, perhaps straight to the agent, and perhaps in other hands (a socket can be dissolved, passed on and connected again),
/// is not vouched for by what an earlier connect(2) recorded. No peer has the address 0. Costs a null check for a socket that was never redirected.
#[inline(always)]
fn forget(context: &SockAddr) {
    if let Some(socket) = context.socket()
        && let Some(record) = socket.stored(&CLIENTS)
    {
        record.target_addr_be = 0;
    }
}

/// The target of the outermost ancestor that has one, so that a nested cgroup cannot shadow its pod's; else the default.
#[inline(always)]
fn find_target() -> (u64, Option<Target>) {
    let mut level = 1;
    while level <= MAX_CGROUP_LEVEL {
        let cgroup = current_ancestor_cgroup(level);
        if cgroup == 0 {
            break;
        }
        // SAFETY: the agent replaces entries, never writes into one.
        if let Some(target) = unsafe { TARGETS.get(cgroup) } {
            return (cgroup, Some(*target));
        }
        level += 1;
    }
    // SAFETY: as above.
    (DEFAULT_TARGET, unsafe { TARGETS.get(DEFAULT_TARGET) }.copied())
}

/// Written in place: a struct built on the stack would be copied by a byte loop, and refused by 5.10 without CAP_PERFMON.
#[inline(always)]
fn record(
    context: &SockAddr,
    config: &Config,
    socket: Socket,
    (asked_addr_be, asked_port_be): (u32, u16),
    family: u16,
    target_cgroup: u64,
    target: Target,
) -> bool {
    let Some(record) = socket.stored_or_zero::<ConnectRecord>(&CLIENTS) else { return false };
    record.cgroup = current_cgroup();
    record.target_cgroup = target_cgroup;
    record.cookie = context.socket_cookie();
    record.connected_at_ns = now_ns();
    record.listener = target.listener;
    record.share = share_of(accountable_cgroup(config));
    record.metadata_addr_be = asked_addr_be;
    record.metadata_port_be = asked_port_be;
    record.family = family;
    record.target_addr_be = target.addr_be;
    record.target_port_be = target.port_be;
    record.flags = 0;
    record.tgid = current_tgid();
    record.reserved = 0;
    true
}

#[cfg(feature = "debug-log")]
#[inline(always)]
fn log(context: &SockAddr, attempt: &Attempt, judged: Verdict) {
    let (cgroup, tgid, port) = (current_cgroup(), current_tgid(), u16::from_be(attempt.port_be));
    match judged {
        Verdict::Deny(reason) => {
            aya_log_ebpf::debug!(
                context.inner(),
                "deny cgroup={} tgid={} port={} counter={}",
                cgroup,
                tgid,
                port,
                reason as u32
            );
        }
        Verdict::Pass => {
            aya_log_ebpf::debug!(context.inner(), "pass cgroup={} tgid={} port={}", cgroup, tgid, port)
        }
        Verdict::Redirect(_) => {
            aya_log_ebpf::debug!(context.inner(), "redirect cgroup={} tgid={} port={}", cgroup, tgid, port)
        }
    }
}
