//! Which program is attached to which cgroup, and the attachment of all of them. Called by `attach`.

use std::path::Path;

use aya::Ebpf;
use kube2ram_common::names::program;

use super::{
    DatapathError, Settings,
    links::Link,
    load::is_for_this_kernel,
    pins::{self, Pins},
};

/// Which cgroup the sockets of pods belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The pods' own, as it should be.
    Pods,
    /// The root, because a process has used cgroup v1 `net_cls` or `net_prio` on a kernel below 5.15 (kernel
    /// commit 8520e224f547). This lasts until the next boot.
    Root,
}

/// Each has a directory with the pins of its links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AttachmentPoint {
    /// The agent's own cgroup: an accepted socket belongs to the cgroup that created its listener, and
    /// `sock_ops` hands over the record there.
    Agent,
    Pods,
    Root,
}

impl AttachmentPoint {
    fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Pods => "pods",
            Self::Root => "root",
        }
    }

    fn cgroup(self, settings: &Settings) -> &Path {
        match self {
            Self::Agent => &settings.own_cgroup,
            Self::Pods => &settings.pods_cgroup,
            Self::Root => &settings.cgroup_root,
        }
    }
}

/// The order of attachment. Egress is first, unless open connections are kept: it cuts connections that are
/// older than the other programs. `sock_ops` comes next: without it a redirected connection has no record.
/// The peer names are cosmetic. The programs for sockets that were created outside of the pods come last,
/// after those that rewrite legitimate connections.
const PODS: [(AttachmentPoint, &str); 15] = [
    (AttachmentPoint::Agent, program::SOCK_OPS),
    (AttachmentPoint::Pods, program::EGRESS),
    (AttachmentPoint::Pods, program::SOCKET_OPTION),
    (AttachmentPoint::Pods, program::SOCK_OPS),
    (AttachmentPoint::Pods, program::CONNECT4),
    (AttachmentPoint::Pods, program::CONNECT6),
    (AttachmentPoint::Pods, program::SENDMSG4),
    (AttachmentPoint::Pods, program::SENDMSG6),
    (AttachmentPoint::Pods, program::PEER_NAME4),
    (AttachmentPoint::Pods, program::PEER_NAME6),
    (AttachmentPoint::Root, program::TASK_CONNECT4),
    (AttachmentPoint::Root, program::TASK_CONNECT6),
    (AttachmentPoint::Root, program::TASK_SENDMSG4),
    (AttachmentPoint::Root, program::TASK_SENDMSG6),
    (AttachmentPoint::Root, program::TASK_SOCKET_OPTION),
];

/// Programs that check the calling task also work at the root. Egress does not: a packet has no task. It
/// stays on the pods' cgroup, for sockets that are older.
const ROOT: [(AttachmentPoint, &str); 12] = [
    (AttachmentPoint::Pods, program::EGRESS),
    (AttachmentPoint::Pods, program::SOCKET_OPTION),
    (AttachmentPoint::Pods, program::SENDMSG4),
    (AttachmentPoint::Pods, program::SENDMSG6),
    (AttachmentPoint::Root, program::SOCK_OPS),
    (AttachmentPoint::Root, program::ROOT_CONNECT4),
    (AttachmentPoint::Root, program::ROOT_CONNECT6),
    (AttachmentPoint::Root, program::TASK_SENDMSG4),
    (AttachmentPoint::Root, program::TASK_SENDMSG6),
    (AttachmentPoint::Root, program::TASK_SOCKET_OPTION),
    (AttachmentPoint::Root, program::PEER_NAME4),
    (AttachmentPoint::Root, program::PEER_NAME6),
];

/// Those that are of use with the wire guard alone.
const OF_WIRE_GUARD: [&str; 2] = [program::SOCKET_OPTION, program::TASK_SOCKET_OPTION];

impl Mode {
    /// The one that an agent of this boot has found before.
    pub(super) fn known(pins: &Pins) -> Self {
        let is_root = pins.link(AttachmentPoint::Root.name(), program::ROOT_CONNECT4).exists();
        if is_root { Self::Root } else { Self::Pods }
    }

    /// In the order in which they become active. Where open connections are kept, egress is the last: it
    /// would drop the SYN of a connect(2) from just before what redirects, which would then wait for its
    /// timeout.
    fn programs(self, keeps_open: bool) -> Vec<(AttachmentPoint, &'static str)> {
        let programs: &[_] = match self {
            Self::Pods => &PODS,
            Self::Root => &ROOT,
        };
        let is_late = |(_, name): &(AttachmentPoint, &str)| keeps_open && *name == program::EGRESS;
        let (late, first): (Vec<_>, Vec<_>) = programs.iter().copied().partition(is_late);
        [first, late].concat()
    }

    /// The programs that these settings ask for.
    fn wanted(self, settings: &Settings) -> Vec<(AttachmentPoint, &'static str)> {
        // An agent that ran in another cgroup before would leave its program attached there, and it would
        // never be updated.
        let is_needed = |attachment_point| {
            attachment_point != AttachmentPoint::Agent
                || !settings.own_cgroup.starts_with(&settings.pods_cgroup)
        };
        let mut programs = self.programs(settings.keeps_open);
        let is_wanted = |program: &str| settings.guards_wire || !OF_WIRE_GUARD.contains(&program);
        programs.retain(|(attachment_point, program)| {
            is_needed(*attachment_point) && is_wanted(program) && is_for_this_kernel(program)
        });
        programs
    }

    /// Those of them that belong on a cgroup which holds pods.
    pub(super) fn wanted_on_pods(self, settings: &Settings) -> Vec<&'static str> {
        let on_pods = self
            .wanted(settings)
            .into_iter()
            .filter(|(attachment_point, _)| *attachment_point == AttachmentPoint::Pods);
        on_pods.map(|(_, program)| program).collect()
    }

    /// Attaches this mode's programs, then removes those that only the other mode has. In between a
    /// redirected connection has no record.
    pub(super) fn activate(
        self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        settings: &Settings,
    ) -> Result<Vec<Link>, DatapathError> {
        let programs = self.wanted(settings);
        let mut links = Vec::new();
        for &(attachment_point, program) in &programs {
            let cgroup = attachment_point.cgroup(settings);
            let (link, outcome) =
                Link::ensure(ebpf, program, cgroup, pins.link(attachment_point.name(), program))?;
            tracing::info!(program, cgroup = %cgroup.display(), ?outcome, "program active");
            links.push(link);
        }
        let others = PODS.iter().chain(&ROOT).filter(|other| !programs.contains(other));
        for (attachment_point, program) in others {
            pins::remove(&pins.link(attachment_point.name(), program))?;
        }
        Ok(links)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn egress_is_the_first_of_the_pods_programs_and_what_redirects_has_its_handover() {
        for mode in [Mode::Pods, Mode::Root] {
            let programs = mode.programs(false);
            let names: Vec<_> = programs.iter().map(|(_, name)| *name).collect();
            let at = |name| names.iter().rposition(|other| *other == name).unwrap();
            let connect4 = if mode == Mode::Pods { program::CONNECT4 } else { program::ROOT_CONNECT4 };

            assert!(
                programs
                    .iter()
                    .find(|(attachment_point, _)| *attachment_point == AttachmentPoint::Pods)
                    .unwrap()
                    .1
                    == program::EGRESS
            );
            assert!(at(program::SOCK_OPS) < at(connect4), "{mode:?}");
            assert!(at(connect4) < at(program::PEER_NAME4), "{mode:?}");

            let mut keeping = mode.programs(true);
            assert_eq!(keeping.pop(), Some((AttachmentPoint::Pods, program::EGRESS)), "{mode:?}");
            let others: Vec<_> = programs.iter().filter(|(_, name)| *name != program::EGRESS).collect();
            assert!(keeping.iter().eq(others), "{mode:?}");
        }
    }

    #[test]
    fn every_program_has_its_attachment_point() {
        for name in program::ALL {
            assert!(PODS.iter().chain(&ROOT).any(|(_, program)| *program == name), "{name}");
        }
    }
}
